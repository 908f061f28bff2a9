"""Quantizes a Qwen2-VL folder with llm-compressor's GPTQModifier on CPU and prints one JSON line.

Usage: llmcompressor_run.py MODEL --samples FOLDER --out OUT --bits 4 --group 128

FOLDER: samples.jsonl in LLaVA form with its images, all of which are used. Columns go by falling
diagonal of the Hessian with groups fixed beforehand, damping is 1 %: vlmq's settings. The modules of
one decoder layer are all solved on inputs from before any of them changed; the tool has no other way.
"""

import argparse
import json
import os
import time
from pathlib import Path

START = time.time()
THREADS = os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["HF_HUB_OFFLINE"] = "1"

import llmcompressor
import torch
import transformers
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from loguru import logger
from torch.utils.data import DataLoader

from samples import conversations, inputs_of, peak_bytes, processor_of


def losses(lines):
    """What the tool says of each module: half the summed squared error of the solver."""
    out, names = [], None
    for line in lines:
        if line.startswith("Quantizing "):
            names = line[line.index("[") + 1:line.rindex("]")].replace("'", "")
        elif line.startswith("error "):
            out.append(dict(module=names, loss=line.removeprefix("error ")))
    return out


def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("model", type=Path)
    p.add_argument("--samples", type=Path, required=True)
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--bits", type=int, default=4)
    p.add_argument("--group", type=int, default=128)
    p.add_argument("--asymmetric", action="store_true")
    p.add_argument("--order", choices=["static", "none"], default="static")
    args = p.parse_args()
    torch.set_num_threads(int(THREADS))
    imported, import_peak = time.time(), peak_bytes()["peak_bytes"]
    model = transformers.Qwen2VLForConditionalGeneration.from_pretrained(args.model, dtype="auto")
    processor = processor_of(args.model)
    inputs = [inputs_of(processor, chat) for chat in conversations(args.samples)]
    scheme = dict(targets=["Linear"], weights=dict(
        num_bits=args.bits, type="int", symmetric=not args.asymmetric, strategy="group",
        group_size=args.group))
    order = {"actorder": None if args.order == "none" else "static"}
    recipe = GPTQModifier(config_groups=dict(group_0=scheme), dampening_frac=0.01, **order,
                          ignore=["re:.*lm_head", "re:.*visual.*"])
    # Losses exist as log lines only, each after the line that names its module.
    lines = []
    logger.add(lambda line: lines.append(line.record["message"]), level=0)
    loaded = time.time()
    oneshot(model=model, processor=processor, dataset=DataLoader(inputs, batch_size=None),
            recipe=recipe, num_calibration_samples=len(inputs), shuffle_calibration_samples=False,
            pipeline="sequential", sequential_targets=["Qwen2VLDecoderLayer"])
    quantized = time.time()
    model.save_pretrained(args.out, save_compressed=True)
    processor.save_pretrained(args.out)
    done = time.time()
    print(json.dumps(dict(
        tool="llm-compressor",
        versions=dict(llmcompressor=llmcompressor.__version__, torch=torch.__version__,
                      transformers=transformers.__version__),
        model=str(args.model), samples=len(inputs),
        tokens=sum(i["input_ids"].numel() for i in inputs), images=True,
        bits=args.bits, group=args.group, symmetric=not args.asymmetric, order=args.order,
        seconds=quantized - loaded, save_seconds=done - quantized,
        load_seconds=loaded - imported, import_seconds=imported - START,
        total_seconds=done - START, **peak_bytes(),
        import_peak_bytes=import_peak,
        reported_loss=losses(lines),
        # Modules that were rounded to nearest since their Hessian could not be inverted.
        fallback=[line for line in lines if "inversion failed" in line], output=str(args.out))), flush=True)


if __name__ == "__main__":
    main()
