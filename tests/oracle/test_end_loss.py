"""Gradients of the answers' cross-entropy at every linear's output, against autograd's.

Environment: as test_parity.py.
"""

import subprocess

import pytest
import torch
from random_qwen2_vl import make
from safetensors.torch import load_file
from test_parity import PROGRAM, picture
from transformers import Qwen2VLForConditionalGeneration

# Largest difference over largest value: f32 sums in another order, there and back.
TOLERANCE = 1e-3

PROJECTIONS = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
               "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]


def autograd(folder, ours):
    """The loss and the gradients of transformers, on our ids and places."""
    model = Qwen2VLForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager").eval()
    outputs = {}
    for index, layer in enumerate(model.model.language_model.layers):
        for name in PROJECTIONS:
            def keep(_module, _inputs, output, key=f"gradients.{index}.{name}"):
                output.retain_grad()
                outputs[key] = output
            layer.get_submodule(name).register_forward_hook(keep)
    ids = ours["input_ids"][None]
    inputs = dict(input_ids=ids, attention_mask=torch.ones_like(ids))
    if "pixel_values" in ours:
        inputs |= dict(pixel_values=ours["pixel_values"], image_grid_thw=ours["image_grid_thw"],
                       mm_token_type_ids=(ids == model.config.image_token_id).long())
    logits = model(**inputs).logits[0]
    places = ours["answer_places"]
    loss = torch.nn.functional.cross_entropy(logits[places], ids[0, places + 1], reduction="sum")
    loss.backward()
    return loss.item(), {key: output.grad[0] for key, output in outputs.items()}


@pytest.mark.parametrize("sizes", [[], [(97, 211)]], ids=["text", "image"])
@pytest.mark.parametrize("shape", ["tied", "untied"])
def test_gradients(tmp_path, shape, sizes):
    folder = make(tmp_path / "model", shape)
    output, flags = tmp_path / "trace.safetensors", []
    for i, size in enumerate(sizes):
        picture(*size, seed=i).save(tmp_path / f"{i}.png")
        flags += ["--image", tmp_path / f"{i}.png"]
    subprocess.run([PROGRAM, "trace", folder, *flags, "--prompt", "How many red shapes are there?",
                    "--answer", "There are three of them.", "--output", output], check=True)
    ours = load_file(output)
    loss, theirs = autograd(folder, ours)
    assert len(ours["answer_places"]) > 3
    assert abs(ours["loss"].item() - loss) <= TOLERANCE * loss
    found = {key for key in ours if key.startswith("gradients.")}
    assert found == set(theirs)
    for key, gradient in theirs.items():
        difference = ((ours[key] - gradient).abs().max() / gradient.abs().max()).item()
        assert difference <= TOLERANCE, f"{key}: {difference:.2e}"
