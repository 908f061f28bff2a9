"""Mixtures of experts: what is peculiar to them when they are quantized."""

import json

import pytest
import torch
from families import FAMILIES, make
from mixtures import load_merged
from safetensors.torch import load_file
from test_families import PROMPT, QUANTIZED_TOLERANCE, ROOT, inputs_of, saved_pictures, vlmq
from test_parity import relative


def quantize(folder, output, *more, method="gptq"):
    vlmq("quantize", folder, "--calibration", ROOT / "testbed/calibration", "--output", output,
         "--method", method, "--samples", 1, "--bits", 4, "--group-size", 32, "--symmetric", *more)
    tensors = {k: v for path in output.glob("*.safetensors") for k, v in load_file(path).items()}
    return tensors, json.loads((output / "vlmq_report.json").read_text())


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """64 experts of which each token goes to one, so that a sample leaves some out."""
    folder = tmp_path_factory.mktemp("many") / "model"
    family = FAMILIES["qwen3_vl_moe"]
    config = family.config

    def with_many(variant, ids, vocab):
        found = config(variant, ids, vocab)
        found.text_config.num_experts = found.text_config.num_local_experts = 64
        found.text_config.num_experts_per_tok = 1
        return found

    family.config = staticmethod(with_many)
    try:
        processor = make(folder, "qwen3_vl_moe", "all")
    finally:
        family.config = staticmethod(config)
    return folder, processor


def test_experts_without_tokens_are_rounded_and_told(many, tmp_path):
    folder, _ = many
    solved, report = quantize(folder, tmp_path / "gptq")
    rounded, _ = quantize(folder, tmp_path / "rtn", method="rtn")
    unreached = {d["module"] for d in report["deviations"] if d["kind"] == "unreached"}
    experts = {m["name"] for m in report["modules"] if ".experts." in m["name"]}
    assert len(experts) == 3 * 64 * 3 and unreached and unreached < experts
    for module in experts:
        same = torch.equal(solved[f"{module}.weight_packed"], rounded[f"{module}.weight_packed"])
        assert same == (module in unreached), module
    losses = {m["name"]: m["loss"] for m in report["modules"]}
    assert all((losses[m] is None) == (m in unreached) for m in experts)


def quantize_but(pattern, folder, tmp_path):
    """Quantizes what does not match, and takes a picture through it: the folder, its tensors, the trace."""
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(f"[[rule]]\npattern = '{pattern}'\nskip = true\n")
    output, trace = tmp_path / "out", tmp_path / "trace.safetensors"
    tensors, _ = quantize(folder, output, "--recipe", recipe)
    paths = saved_pictures(tmp_path, [(90, 60)])
    vlmq("trace", output, "--image", paths[0], "--prompt", PROMPT, "--output", trace)
    return output, tensors, paths, load_file(trace)


def test_experts_left_as_they_are_keep_their_values(many, tmp_path):
    """A layer of which only some experts are quantized is taken apart; the others' values stay."""
    folder, _ = many
    _, tensors, _, _ = quantize_but(".*layers.1.mlp.experts.*down_proj", folder, tmp_path)
    source = load_file(folder / "model.safetensors")
    prefix = "model.language_model.layers.1.mlp.experts"
    down = torch.stack([tensors[f"{prefix}.{e}.down_proj.weight"] for e in range(64)])
    assert torch.equal(down, source[f"{prefix}.down_proj"])
    assert f"{prefix}.0.gate_proj.weight_packed" in tensors


def test_attention_alone_leaves_the_experts_fused(many, tmp_path):
    folder, processor = many
    output, tensors, paths, ours = quantize_but(".*mlp.*", folder, tmp_path)
    source = load_file(folder / "model.safetensors")
    fused = [name for name in source if "experts" in name]
    assert fused and all(torch.equal(tensors[name], source[name]) for name in fused)
    model, report = load_merged(output)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    with torch.no_grad():
        logits = model.eval()(**inputs_of(processor, paths, PROMPT)).logits[0]
    assert relative(ours["logits"], logits) <= QUANTIZED_TOLERANCE
