"""What the tests of written folders share: the program, an image, a processor, and a distance."""

import os
import subprocess
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = os.environ.get("VLMQ_BIN", str(ROOT / "target/release/vlmq"))
MODEL = Path(os.environ.get("VLMQ_MODEL", ROOT / "testbed/model"))
CALIBRATION = Path(os.environ.get("VLMQ_CALIBRATION", ROOT / "testbed/calibration"))
PROMPT = "What is in the image?"


def vlmq(*arguments, exit_code=0):
    """Runs the program and returns what it says."""
    command = [PROGRAM, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800)
    assert done.returncode == exit_code, done.stderr
    return done.stdout


def relative(found, expected):
    """Largest difference over largest value; NaN is never small."""
    difference = (found - expected).abs().max() / expected.abs().max()
    return float(difference.nan_to_num(float("inf")))


def tensors_of(folder):
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    """A colour gradient with a dark rectangle: sides that need resizing, and no symmetry."""
    width, height = 173, 130
    picture = Image.new("RGB", (width, height))
    for y in range(height):
        for x in range(width):
            is_dark = 40 < x < 90 and 30 < y < 70
            picture.putpixel((x, y), (10, 20, 30) if is_dark else (x, 255 - y, (x + 2 * y) % 256))
    path = tmp_path_factory.mktemp("image") / "image.png"
    picture.save(path)
    return path


def inputs_for(folder, image, prompt=PROMPT):
    processor = AutoProcessor.from_pretrained(folder)
    # The torchvision variant, which AutoProcessor prefers, resamples otherwise than Pillow.
    processor.image_processor = Qwen2VLImageProcessorPil.from_pretrained(folder)
    content = [{"type": "image"}, {"type": "text", "text": prompt}]
    messages = [{"role": "user", "content": content}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    picture = Image.open(image).convert("RGB")
    return processor(text=[text], images=[picture], return_tensors="pt")


def trace(folder, image, tmp_path):
    """What vlmq itself computes of a folder, for the image and the prompt."""
    path = tmp_path / f"trace-{Path(folder).name}.safetensors"
    if not path.exists():
        vlmq("trace", folder, "--image", image, "--prompt", PROMPT, "--output", path)
    return load_file(path)
