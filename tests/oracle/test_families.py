"""Every family against transformers on random weights: pixels, token ids, positions, features,
logits, greedy answers, and folders quantized at 4, 3 and 2 bits.

Environment: VLMQ_BIN, the vlmq program (default: target/release/vlmq).
"""

import json
import os
import subprocess
from pathlib import Path

import mixtures
import pytest
import torch
from families import FAMILIES, make
from packing_fix import packed_zero_points_on_meta  # noqa: F401
from PIL import Image
from safetensors.torch import load_file
from test_parity import IMAGES, picture, relative
from transformers import AutoModelForImageTextToText, PaliGemmaProcessor

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = os.environ.get("VLMQ_BIN", str(ROOT / "target/release/vlmq"))
PROMPT = "How many red shapes are there?"

# Largest difference over largest value: f32 sums in another order, through all layers.
TOLERANCE = 1e-4
# The same through weights of few bits, as for the bundled model.
QUANTIZED_TOLERANCE = 1e-3

CASES = [(family, variant) for family, f in FAMILIES.items() for variant in f.variants]


def vlmq(*arguments):
    done = subprocess.run([PROGRAM, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    home = tmp_path_factory.mktemp("families")
    found = {}
    for family, variant in CASES:
        folder = home / f"{family}-{variant}"
        found[family, variant] = folder, make(folder, family, variant)
    return found


def question(processor, paths, prompt):
    """The inputs of a family without a template, whose processor takes no text without an image."""
    if paths:
        inputs = processor(text=["<image>" * len(paths) + prompt], images=[[Image.open(path) for path in paths]],
                           return_tensors="pt")
        del inputs["labels"]
        return inputs
    return processor.tokenizer(processor.tokenizer.bos_token + prompt + "\n", add_special_tokens=False,
                               return_token_type_ids=True, return_tensors="pt")


def inputs_of(processor, paths, prompt):
    if isinstance(processor, PaliGemmaProcessor):
        return question(processor, paths, prompt)
    content = [{"type": "image"} for _ in paths] + [{"type": "text", "text": prompt}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    bos = processor.tokenizer.bos_token
    images = [[Image.open(path) for path in paths]] if paths else None
    return processor(text=[text], images=images, return_tensors="pt",
                     add_special_tokens=not (bos and text.startswith(bos)))


def patches_of(pixels, patch):
    """Tiles `[.., 3, H, W]` as rows of patches, channel, row, column, without what no patch fills; rows of
    patches stay."""
    if pixels.ndim == 2:
        return pixels
    pixels = pixels.reshape(-1, *pixels.shape[-3:])
    # Tiles that only fill up a batch are zero, and are not made here.
    pixels = pixels[pixels.flatten(1).any(1)]
    n, c, h, w = pixels.shape
    pixels = pixels[:, :, :h // patch * patch, :w // patch * patch]
    cut = pixels.reshape(n, c, h // patch, patch, w // patch, patch).permute(0, 2, 4, 1, 3, 5)
    return cut.reshape(n * (h // patch) * (w // patch), -1)


def pixels_of(family, inputs, patch):
    """The patches of all images. Where images come in any size, smaller ones are filled up to a batch, and
    what fills them up is not made here."""
    pixels = inputs["pixel_values"]
    if not getattr(FAMILIES[family], "any_size", False):
        return patches_of(pixels, patch)
    images = zip(pixels, inputs["image_sizes"].tolist())
    return torch.cat([patches_of(image[None, :, :height, :width], patch) for image, (height, width) in images])


def feature_inputs(model, inputs):
    """What get_image_features of this model takes, of what the processor gave."""
    import inspect
    taken = inspect.signature(inspect.unwrap(model.model.get_image_features)).parameters
    return {k: v for k, v in inputs.items() if k in taken and k != "input_ids"}


def features_of(model, inputs):
    with torch.no_grad():
        found = model.model.get_image_features(**feature_inputs(model, inputs), return_dict=True)
    joined = lambda rows: torch.cat(list(rows)) if isinstance(rows, (list, tuple)) else rows
    rows = joined(found.pooler_output)
    deepstack = [joined(level) for level in getattr(found, "deepstack_features", None) or []]
    return rows.reshape(-1, rows.shape[-1]), deepstack


def positions_of(model, inputs):
    """Positions on three axes; families without a rule of their own count."""
    ids = inputs["input_ids"]
    if not hasattr(model.model, "get_rope_index"):
        first = int(model.config.model_type == "paligemma")
        return torch.arange(first, first + ids.shape[1]).expand(3, -1)
    grids = inputs.get("image_grid_thw")
    positions, _ = model.model.get_rope_index(ids, inputs.get("mm_token_type_ids"), image_grid_thw=grids)
    return positions[:, 0]


def saved_pictures(tmp_path, sizes):
    paths = []
    for i, size in enumerate(sizes):
        paths.append(tmp_path / f"{i}.png")
        picture(*size, seed=i).save(paths[-1])
    return paths


@pytest.mark.parametrize("images", IMAGES)
@pytest.mark.parametrize("family, variant", CASES)
def test_forward(folders, tmp_path, family, variant, images):
    folder, processor = folders[family, variant]
    paths = saved_pictures(tmp_path, IMAGES[images])
    flags = [part for path in paths for part in ("--image", path)]
    output = tmp_path / "trace.safetensors"
    vlmq("trace", folder, *flags, "--prompt", PROMPT, "--output", output)
    ours = load_file(output)
    model = AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager").eval()
    inputs = inputs_of(processor, paths, PROMPT)
    assert ours["input_ids"].tolist() == inputs["input_ids"][0].tolist()
    assert torch.equal(ours["position_ids"], positions_of(model, inputs))
    if paths:
        side = int((ours["pixel_values"].shape[1] // 3) ** 0.5)
        expected = pixels_of(family, inputs, side)
        assert torch.equal(ours["pixel_values"], expected)
        rows, deepstack = features_of(model, inputs)
        assert relative(ours["image_features"], rows) <= TOLERANCE
        for i, level in enumerate(deepstack):
            assert relative(ours[f"deepstack_features.{i}"], level) <= TOLERANCE
    with torch.no_grad():
        logits = model(**inputs).logits[0]
        answer = model.generate(**inputs, do_sample=False, max_new_tokens=12)
    assert ours["logits"].shape == logits.shape
    assert relative(ours["logits"], logits) <= TOLERANCE
    said = vlmq("generate", folder, *flags, "--prompt", PROMPT, "--max-new-tokens", 12, "--json")
    ids, found = json.loads(said)["output_ids"], answer[0, inputs["input_ids"].shape[1]:].tolist()
    assert ids == found[:len(ids)]
    assert len(ids) == 12 or found[len(ids)] == model.generation_config.eos_token_id


def loaded(folder, family, bits):
    if family == "qwen3_vl_moe":
        return mixtures.load_merged(folder) if bits == 4 else mixtures.load_unpacked(folder)
    return AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, attn_implementation="eager")


@pytest.mark.parametrize("bits", [4, 3, 2])
@pytest.mark.parametrize("family, variant", CASES)
def test_quantized_folder(folders, tmp_path, family, variant, bits):
    folder, processor = folders[family, variant]
    paths = saved_pictures(tmp_path, IMAGES["odd"])
    output, trace = tmp_path / "out", tmp_path / "trace.safetensors"
    vlmq("quantize", folder, "--calibration", ROOT / "testbed/calibration", "--output", output,
         "--method", "vlmq-v2", "--samples", 4, "--bits", bits, "--group-size", 32,
         "--symmetric" if bits == 4 else "--asymmetric", "--set", "importance_loss=layer")
    vlmq("trace", output, "--image", paths[0], "--prompt", PROMPT, "--output", trace)
    ours = load_file(trace)
    model, report = loaded(output, family, bits)
    assert not report["missing_keys"], report["missing_keys"]
    assert not report["unexpected_keys"], report["unexpected_keys"]
    with torch.no_grad():
        logits = model.eval()(**inputs_of(processor, paths, PROMPT)).logits[0]
    assert relative(ours["logits"], logits) <= QUANTIZED_TOLERANCE
    whole = json.loads(vlmq("inspect", folder, "--json"))["modules"]
    packed = {name.removesuffix(".weight_packed") for path in output.glob("*.safetensors")
              for name in load_file(path) if name.endswith(".weight_packed")}
    assert packed == {module["name"] for module in whole}
