"""Writes the testbed's folders from a trained model: model/, calibration/ and eval/.

Usage: export.py WORK [--out testbed]
"""

import argparse
import io
import json
import random
import shutil
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file, save_file
from data import TASKS, scenes

# Of each task; calibration pictures come after those of training, in a seed of their own.
N_CALIBRATION, N_QUESTIONS, CALIBRATION_SEED = 140, 600, 77
TOKENIZER_FILES = ["tokenizer.json", "tokenizer_config.json", "chat_template.json",
                   "preprocessor_config.json"]


def hub_name(name):
    """The tensor's name in checkpoints on the hub, which transformers still reads."""
    return name.replace("model.language_model.", "model.").replace("model.visual.", "visual.")


def export_model(work, out):
    out.mkdir(parents=True, exist_ok=True)
    tensors = load_file(work / "trained/model.safetensors")
    tensors = {hub_name(k): v.bfloat16().contiguous() for k, v in tensors.items()
               if k != "lm_head.weight"}
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    trained = json.loads((work / "trained/config.json").read_text())
    text, vision = trained["text_config"], trained["vision_config"]
    rope = text["rope_parameters"]
    keep = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
            "num_attention_heads", "num_key_value_heads", "max_position_embeddings",
            "rms_norm_eps", "bos_token_id", "eos_token_id"]
    config = dict(
        architectures=["Qwen2VLForConditionalGeneration"], model_type="qwen2_vl",
        torch_dtype="bfloat16", hidden_act="silu", tie_word_embeddings=True,
        use_sliding_window=False, rope_theta=rope["rope_theta"],
        rope_scaling=dict(type="mrope", mrope_section=rope["mrope_section"]),
        **{k: text[k] for k in keep},
        **{k: trained[k] for k in ["image_token_id", "video_token_id", "vision_start_token_id",
                                   "vision_end_token_id"]},
        vision_config={k: vision[k] for k in [
            "depth", "embed_dim", "hidden_size", "num_heads", "mlp_ratio", "patch_size",
            "spatial_merge_size", "temporal_patch_size", "in_channels", "hidden_act"]})
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (out / "generation_config.json").write_text(json.dumps(dict(
        bos_token_id=text["bos_token_id"], eos_token_id=[text["eos_token_id"]],
        do_sample=False), indent=2) + "\n")
    for name in TOKENIZER_FILES:
        shutil.copy(work / "model" / name, out / name)


def png(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def export_calibration(out):
    out.mkdir(parents=True, exist_ok=True)
    r = random.Random(CALIBRATION_SEED)
    lines = []
    with zipfile.ZipFile(out / "images.zip", "w", zipfile.ZIP_STORED) as archive:
        for task in TASKS:
            for i, scene in enumerate(scenes(task, N_CALIBRATION, CALIBRATION_SEED, held=False)):
                name = f"{task}/{i:04}.png"
                info = zipfile.ZipInfo(name, (2026, 1, 1, 0, 0, 0))
                archive.writestr(info, png(scene.image))
                _, question, answer = r.choice([q for q in scene.questions if q[0] != "list"])
                lines.append(dict(id=f"{task}-{i:04}", image=name, conversations=[
                    {"from": "human", "value": f"<image>\n{question}"},
                    {"from": "gpt", "value": answer}]))
    r.shuffle(lines)
    (out / "samples.jsonl").write_text("".join(json.dumps(l) + "\n" for l in lines))


def export_eval(out):
    out.mkdir(parents=True, exist_ok=True)
    for task in TASKS:
        r = random.Random(f"eval {task}")
        rows = dict(id=[], image=[], question=[], answer=[], category=[])
        for i, scene in enumerate(scenes(task, 150, 0, held=True)):
            single = [q for q in scene.questions if q[0] != "list"]
            image = dict(bytes=png(scene.image), path=f"{i:04}.png")
            for category, question, answer in r.sample(single, min(5, len(single))):
                if len(rows["id"]) < N_QUESTIONS:
                    rows["id"].append(f"{task}-{len(rows['id']):04}")
                    rows["image"].append(image)
                    rows["question"].append(question)
                    rows["answer"].append(answer)
                    rows["category"].append(category)
        table = pa.table(rows, schema=pa.schema([
            ("id", pa.string()), ("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
            ("question", pa.string()), ("answer", pa.string()), ("category", pa.string())]))
        pq.write_table(table, out / f"{task}.parquet", compression="zstd", compression_level=19)


def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("work", type=Path)
    p.add_argument("--out", type=Path, default=Path(__file__).parent)
    p.add_argument("--only", choices=["model", "calibration", "eval"])
    args = p.parse_args()
    if args.only in (None, "model"):
        export_model(args.work, args.out / "model")
    if args.only in (None, "calibration"):
        export_calibration(args.out / "calibration")
    if args.only in (None, "eval"):
        export_eval(args.out / "eval")


if __name__ == "__main__":
    main()
