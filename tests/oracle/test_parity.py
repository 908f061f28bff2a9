"""Our forward against transformers': pixels, token ids, positions, features, logits, answers.

Environment: VLMQ_BIN, the vlmq program (default: target/release/vlmq); VLMQ_MODEL, a trained model
(default: testbed/model).
"""

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from random_qwen2_vl import make
from safetensors.torch import load_file
from transformers import AutoProcessor, Qwen2VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = os.environ.get("VLMQ_BIN", str(ROOT / "target/release/vlmq"))
TRAINED = Path(os.environ.get("VLMQ_MODEL", ROOT / "testbed/model"))

# Largest difference over largest value: f32 sums in another order, through all layers.
TOLERANCE = 1e-4

IMAGES = {
    "text-only": [],
    "square": [(168, 168)],
    "odd": [(97, 211)],
    "two": [(64, 200), (150, 90)],
}


def picture(width, height, seed):
    """Smooth colours with hard edges, so that resampling has something to get wrong."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    channels = [127 + 120 * np.sin(x / (5 + 3 * c) + y / (9 - c) + seed) for c in range(3)]
    pixels = np.stack(channels, -1).astype(np.uint8)
    for _ in range(5):
        left, top = rng.integers(0, max(width - 9, 1)), rng.integers(0, max(height - 9, 1))
        pixels[top:top + 12, left:left + 20] = rng.integers(0, 256, 3)
    return Image.fromarray(pixels)


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    home = tmp_path_factory.mktemp("models")
    found = {
        "tied": make(home / "tied", "tied"),
        "untied": make(home / "untied", "untied", max_shard_size="200KB"),
        "bf16": make(home / "bf16", "tied", seed=1, dtype=torch.bfloat16),
    }
    if (TRAINED / "config.json").exists():
        found["trained"] = TRAINED
    return found


def reference(folder, paths, prompt):
    """Everything transformers computes for one prompt, in float32."""
    processor = AutoProcessor.from_pretrained(folder)
    processor.image_processor = Qwen2VLImageProcessorPil.from_pretrained(folder)
    model = Qwen2VLForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager").eval()
    content = [{"type": "image"} for _ in paths] + [{"type": "text", "text": prompt}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True)
    images = [Image.open(path) for path in paths] or None
    inputs = processor(text=[text], images=images, return_tensors="pt")
    out = {"input_ids": inputs["input_ids"][0]}
    with torch.no_grad():
        out["logits"] = model(**inputs).logits[0]
        positions, _ = model.model.get_rope_index(
            inputs["input_ids"], inputs.get("mm_token_type_ids"),
            image_grid_thw=inputs.get("image_grid_thw"))
        out["position_ids"] = positions[:, 0]
        if images:
            out["pixel_values"] = inputs["pixel_values"]
            out["image_grid_thw"] = inputs["image_grid_thw"]
            tower = model.model.visual(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"])
            out["image_features"] = tower.pooler_output
        answer = model.generate(**inputs, do_sample=False, max_new_tokens=12)
        out["answer"] = answer[0, inputs["input_ids"].shape[1]:]
    return out


def relative(ours, theirs):
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


@pytest.mark.parametrize("images", IMAGES)
@pytest.mark.parametrize("name", ["tied", "untied", "bf16", "trained"])
def test_forward(folders, tmp_path, name, images):
    if name not in folders:
        pytest.skip("no trained model")
    folder, prompt = folders[name], "How many red shapes are there?"
    paths, flags = [], []
    for i, size in enumerate(IMAGES[images]):
        paths.append(tmp_path / f"{i}.png")
        picture(*size, seed=i).save(paths[-1])
        flags += ["--image", paths[-1]]
    output = tmp_path / "trace.safetensors"
    subprocess.run([PROGRAM, "trace", folder, *flags, "--prompt", prompt, "--output", output],
                   check=True)
    ours, theirs = load_file(output), reference(folder, paths, prompt)
    exact = ["input_ids", "position_ids"] + (["pixel_values", "image_grid_thw"] if paths else [])
    for key in exact:
        assert ours[key].shape == theirs[key].shape, key
        assert torch.equal(ours[key], theirs[key]), key
    close = ["logits"] + (["image_features"] if paths else [])
    for key in close:
        assert ours[key].shape == theirs[key].shape, key
        difference = relative(ours[key], theirs[key])
        print(f"{name} {images} {key}: {difference:.2e}")
        assert difference <= TOLERANCE, key

    answer = subprocess.run(
        [PROGRAM, "generate", folder, *flags, "--prompt", prompt, "--max-new-tokens", "12", "--json"],
        check=True, capture_output=True, text=True)
    ids = json.loads(answer.stdout)["output_ids"]
    found = theirs["answer"].tolist()
    assert ids == found[:len(ids)]
    assert len(ids) == 12 or found[len(ids)] in load_eos(folder)


def load_eos(folder):
    value = json.loads((folder / "generation_config.json").read_text()).get("eos_token_id")
    return value if isinstance(value, list) else [value]
