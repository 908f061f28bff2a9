"""`vlmq quantize --method awq` against AWQ written from its description: the losses of all scales,
the scales chosen, what is folded where, and the weights that are written.

Environment: VLMQ_BIN, the vlmq program (default: target/release/vlmq).
"""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from awq import (
    DOWN, GROUPS, K, O, Q, UP, V, layers, load, read_samples, rounded, write_samples)
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from random_qwen2_vl import make
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = os.environ.get("VLMQ_BIN", str(ROOT / "target/release/vlmq"))
BITS, GROUP = 3, 32

# f32 sums in another order, on losses that are small differences of large outputs.
LOSS_TOLERANCE = 1e-3

# A group cut off at both ends has a zero point in the middle between two codes, which goes either
# way by the last bit of its limit. Few groups are such, and they lose and win by it alike.
OTHER_CODES = 0.05
OTHER_ERROR = 0.03


@pytest.fixture(scope="module", params=["tied", "ungrouped"])
def case(request, tmp_path_factory):
    """The folder, what vlmq wrote and told, and the layers as transformers has them."""
    home = tmp_path_factory.mktemp("awq")
    folder = make(home / "model", request.param, seed=5)
    data = write_samples(home / "data")
    output = home / "out"
    run = subprocess.run(
        [PROGRAM, "quantize", folder, "--calibration", data, "--output", output, "--json",
         "--method", "awq", "--bits", str(BITS), "--group-size", str(GROUP), "--samples", "3"],
        check=True, capture_output=True, text=True, timeout=1800)
    report = json.loads(run.stdout)["report"]
    processor, model = load(folder)
    with torch.no_grad():
        found, n_tokens = layers(model, read_samples(data, processor), BITS, GROUP)
    assert n_tokens == sum(report["calibration"]["n_tokens"].values())
    return request.param, report, found, load_file(output / "model.safetensors")


def scale_reports(report, layer_idx):
    found = [s for s in report["scales"] if s["layer_idx"] == layer_idx]
    return {s["modules"][0]: s for s in found}


def test_losses_and_chosen_ratios_agree(case):
    shape, report, found, _ = case
    for layer_idx, layer in enumerate(found):
        reports = scale_reports(report, layer_idx)
        assert set(reports) == {g[0] for g in GROUPS} - ({O} if shape == "tied" else set())
        for names in GROUPS:
            if names[0] not in reports:
                continue
            ours = reports[names[0]]
            with torch.no_grad():
                theirs = layer.losses(names)
            for a, b in zip(ours["losses"], theirs, strict=True):
                assert abs(a - b) < LOSS_TOLERANCE * b, (layer_idx, names)
            best = min(theirs)
            assert theirs[round(20 * ours["ratio"])] < best * (1 + LOSS_TOLERANCE)


def norm(name):
    return "input_layernorm" if name == Q else "post_attention_layernorm"


def dequantized(tensors, module, rows, cols):
    def unpacked(suffix, shape, dim):
        packed = tensors[f"{module}.{suffix}"]
        return unpack_from_int32(packed, BITS, torch.Size(shape), packed_dim=dim).float()
    codes = unpacked("weight_packed", (rows, cols), 1)
    zeros = unpacked("weight_zero_point", (rows, cols // GROUP), 0)
    scales = tensors[f"{module}.weight_scale"].float()
    wide = [t.repeat_interleave(GROUP, 1) for t in (zeros, scales)]
    return (codes - wide[0]) * wide[1]


def test_folder_holds_the_scaled_and_limited_weights(case):
    _, report, found, tensors = case
    changed = {c["name"] for c in report["changed"]}
    for layer_idx, layer in enumerate(found):
        prefix = next(n for n in tensors if f"layers.{layer_idx}.input_layernorm" in n)
        prefix = prefix.removesuffix("input_layernorm.weight")
        reports = scale_reports(report, layer_idx)
        scales = {}
        for names in GROUPS:
            ratio = reports[names[0]]["ratio"] if names[0] in reports else 0
            for name in names:
                scales[name] = layer.scales(names[0], ratio)
        for name in (Q, "mlp.gate_proj"):
            stored = tensors[f"{prefix}{norm(name)}.weight"]
            expected = layer.layer.get_submodule(norm(name)).weight / scales[name]
            torch.testing.assert_close(stored, expected.detach(), rtol=1e-5, atol=0)
            was_scaled = reports[name]["ratio"] > 0
            assert (f"{prefix}{norm(name)}.weight" in changed) == was_scaled
        unscaled = torch.ones(layer.weight(V).shape[0])
        rows = {V: scales[O] if O in reports else unscaled, UP: scales[DOWN]}
        bias = layer.layer.get_submodule(V).bias / rows[V]
        torch.testing.assert_close(tensors[f"{prefix}{V}.bias"], bias.detach(), rtol=1e-5, atol=0)
        for name in scales:
            weight = layer.weight(name).detach() * scales[name]
            weight = weight / rows[name][:, None] if name in rows else weight
            limited = weight
            if name not in (Q, K):
                limited = layer.limited(weight, torch.cat(layer.inputs[name]) / scales[name])
            expected = rounded(limited, BITS, GROUP)
            ours = dequantized(tensors, prefix + name, *weight.shape)
            differ = (ours - expected).abs() > 1e-4 * expected.abs().max()
            assert differ.float().mean() < OTHER_CODES, (layer_idx, name)
            inputs = torch.cat(layer.inputs[name]) / scales[name]
            error = [(inputs @ (w - weight).T).square().mean() for w in (ours, expected)]
            assert abs(error[0] / error[1] - 1) < OTHER_ERROR, (layer_idx, name)
