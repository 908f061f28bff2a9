"""What the scripts of this folder share: samples, the processor, and one line of results."""

import json
import zipfile
from pathlib import Path

PLACE = "<image>\n"
ROLES = {"human": "user", "gpt": "assistant"}


def write_folder(source, out, start, n):
    """Samples start to start + n of a folder with samples.jsonl and images.zip, as a folder of files."""
    write_lines(source, out, range(start, start + n))


def write_lines(source, out, places):
    """Those lines of the same, counted from zero, in the order of `places`."""
    every = (source / "samples.jsonl").read_text().splitlines()
    if max(places) >= len(every):
        raise SystemExit(f"{source}: fewer than {max(places) + 1} samples")
    lines = [every[i] for i in places]
    out.mkdir(parents=True)
    (out / "samples.jsonl").write_text("".join(line + "\n" for line in lines))
    with zipfile.ZipFile(source / "images.zip") as archive:
        for line in lines:
            archive.extract(json.loads(line)["image"], out)


def conversations(folder):
    """Each sample of such a folder as a chat whose image part is a path."""
    out = []
    for line in (folder / "samples.jsonl").read_text().splitlines():
        row = json.loads(line)
        image = {"type": "image", "image": str(folder.resolve() / row["image"])}
        chat = []
        for turn in row["conversations"]:
            text = turn["value"]
            has_image = text.startswith(PLACE)
            parts = [image] * has_image + [{"type": "text", "text": text[len(PLACE) * has_image:]}]
            chat.append({"role": ROLES[turn["from"]], "content": parts})
        out.append(chat)
    return out


def processor_of(model):
    """The model's processor with the image processor that resamples as Pillow does, as vlmq does.

    For other families than Qwen2-VL its own: good for images that need no resampling."""
    from transformers import AutoProcessor
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    processor = AutoProcessor.from_pretrained(model)
    if "qwen2_vl" in json.loads((Path(model) / "config.json").read_text())["model_type"]:
        processor.image_processor = Qwen2VLImageProcessorPil.from_pretrained(model)
    return processor


def inputs_of(processor, chat):
    """Model inputs of one chat, question and answer, with its image."""
    from PIL import Image

    text = processor.apply_chat_template(chat, add_generation_prompt=False)
    paths = [part["image"] for turn in chat for part in turn["content"] if part["type"] == "image"]
    images = [Image.open(path).convert("RGB") for path in paths]
    return processor(text=[text], images=images, return_tensors="pt")


def peak_bytes():
    """Peak resident memory of this process and of its largest finished child (Linux counts in KiB)."""
    import resource

    return {name: resource.getrusage(who).ru_maxrss * 1024 for name, who in
            [("peak_bytes", resource.RUSAGE_SELF), ("peak_bytes_children", resource.RUSAGE_CHILDREN)]}


def module_of(name):
    """`model.layers.I.PART.PROJ` from any spelling of a decoder module, or None for other modules."""
    at = name.find("layers.")
    return "model." + name[at:] if at >= 0 and "vis" not in name[:at] else None
