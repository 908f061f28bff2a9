"""`vlmq rotate`: every family's rotated folder gives the source's logits, in transformers and in vlmq,
or is refused by name.

Environment: VLMQ_BIN, the vlmq program (default: target/release/vlmq).
"""

import json
import subprocess

import pytest
import torch
from families import FAMILIES, make
from safetensors.torch import load_file
from test_families import PROGRAM, PROMPT, inputs_of, saved_pictures, vlmq
from test_parity import relative
from transformers import AutoModelForImageTextToText

# Largest difference over largest value: the f32 of both forwards, through all layers.
TOLERANCE = 1e-4

# Norms after attention and MLP; a tower whose outputs are divided before they are put in.
REFUSED = {"gemma3", "paligemma", "qwen3_vl_moe"}
VARIANTS = [(family, variant) for family, f in FAMILIES.items() for variant in f.variants]


def logits_of(folder, processor, paths):
    model = AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        return model(**inputs_of(processor, paths, PROMPT)).logits[0]


def assert_same_logits(tmp_path, processor, source, changed, tolerance):
    """Of both folders in vlmq, and in transformers where that reads their files."""
    paths = saved_pictures(tmp_path, [(168, 97)])
    traces = []
    for folder in (source, changed):
        output = tmp_path / f"{folder.name}.safetensors"
        vlmq("trace", folder, "--image", paths[0], "--prompt", PROMPT, "--output", output)
        traces.append(load_file(output)["logits"])
    assert relative(traces[1], traces[0]) < tolerance
    # Files of other names than transformers' own are held against our own forward alone.
    try:
        expected = logits_of(source, processor, paths)
    except (ValueError, OSError, KeyError):
        return
    assert relative(logits_of(changed, processor, paths), expected) < tolerance


@pytest.mark.parametrize("kind", ["hadamard", "random"])
@pytest.mark.parametrize("family, variant", VARIANTS)
def test_logits_stay_what_they_were(tmp_path, family, variant, kind):
    folder, rotated = tmp_path / "model", tmp_path / "rotated"
    processor = make(folder, family, variant)
    arguments = ["rotate", folder, "--output", rotated, "--kind", kind, "--float32", "--json"]
    if family in REFUSED:
        run = subprocess.run([PROGRAM, *map(str, arguments)], capture_output=True, text=True)
        assert run.returncode == 2 and "rotation of" in run.stderr
        assert not rotated.exists()
        return
    assert json.loads(vlmq(*arguments))["n_changed"] > 10
    assert_same_logits(tmp_path, processor, folder, rotated, TOLERANCE)
