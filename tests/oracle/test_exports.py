"""Folders in every format, read by other people's code: GPTQModel's own linear, transformers (with
optimum and GPTQModel, for GPTQ and AWQ), MLX and mlx-vlm. An image is in the input wherever a whole
model runs.

Environment: as `folders.py` says.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

# Its pool asks for more workers than a small machine has cores, and then fails.
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")

import mlx.core as mx
import numpy as np
import pytest
import torch
from folders import CALIBRATION, MODEL, image, inputs_for, relative, tensors_of, trace, vlmq  # noqa: F401
from gptqmodel.nn_modules.qlinear.torch import TorchLinear
from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm
from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module
from transformers import AutoModelForImageTextToText

SCHEMES = [(bits, group, kind) for bits in (2, 3, 4, 8)
           for group, kind in ((64, "symmetric"), (64, "asymmetric"), (-1, "symmetric"))]
WHOLE = [(4, 64, "symmetric"), (3, 64, "asymmetric"), (2, 64, "symmetric"), (2.5, 64, "asymmetric")]

# GPTQModel and MLX multiply in float16 and bfloat16 where they dequantize: half a unit of 11 and 8
# bits of mantissa for the product, and for MLX the same for the bias and the sum.
F16_ROUNDING, BF16_ROUNDING = 2.0**-11, 2.0**-8
LOGITS_TOLERANCE = 1e-3
# In float16 and bfloat16 throughout, as readers of such folders run them.
F16_LOGITS_TOLERANCE = 5e-3
BF16_LOGITS_TOLERANCE = 0.1


def name_of(scheme):
    bits, group, kind = scheme
    return f"{bits}-{group}-{kind}"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("exports")


def quantized(home, scheme):
    """The bundled model rounded to a grid, in vlmq's usual format."""
    bits, group, kind = scheme
    output = home / f"ct-{name_of(scheme)}"
    method = "rtn" if bits != 2.5 else "gptq"
    if not output.exists():
        vlmq("quantize", MODEL, "--output", output, "--method", method, "--bits", bits,
             "--calibration", CALIBRATION, "--samples", 8, f"--group-size={group}", f"--{kind}")
    return output


def exported(home, scheme, form):
    output = home / f"{form}-{name_of(scheme)}"
    if not output.exists():
        vlmq("export", quantized(home, scheme), "--format", form, "--output", output)
        vlmq("verify", output, "--against", MODEL)
    return output


def numbers(home, scheme):
    """What the codes stand for, in float32, by module."""
    tensors = tensors_of(exported(home, scheme, "f32"))
    packed = tensors_of(quantized(home, scheme))
    modules = [n.removesuffix(".weight_packed") for n in packed if n.endswith(".weight_packed")]
    assert modules
    return {module: tensors[f"{module}.weight"] for module in modules}


def torch_linear(tensors, module, scheme, is_v1):
    bits, group, kind = scheme
    cols, rows = len(tensors[f"{module}.g_idx"]), tensors[f"{module}.scales"].shape[1]
    linear = TorchLinear(bits=bits, group_size=group, sym=kind == "symmetric", desc_act=False,
                         in_features=cols, out_features=rows, bias=False, pack_dtype=torch.int32)
    for part in ("qweight", "qzeros", "scales", "g_idx"):
        found = tensors[f"{module}.{part}"]
        assert getattr(linear, part).shape == found.shape and getattr(linear, part).dtype == found.dtype
        getattr(linear, part).data.copy_(found)
    if is_v1:
        convert_gptq_v1_to_v2_format_module(linear, bits, torch.int32)
    linear.post_init()
    return linear


@pytest.mark.parametrize("scheme", SCHEMES, ids=name_of)
def test_gptqmodel_decodes_our_words(home, scheme):
    tensors = tensors_of(exported(home, scheme, "gptq"))
    for module, expected in numbers(home, scheme).items():
        linear = torch_linear(tensors, module, scheme, scheme[2] == "symmetric")
        found = linear.dequantize_weight().T.float()
        assert ((found - expected).abs() <= F16_ROUNDING * expected.abs()).all(), module


@pytest.mark.parametrize("scheme", [s for s in SCHEMES if s[0] == 4], ids=name_of)
def test_gptqmodel_decodes_our_awq_words(home, scheme):
    """In float32, so that nothing is rounded: equal."""
    tensors = tensors_of(exported(home, scheme, "awq"))
    for module, expected in numbers(home, scheme).items():
        parts = [tensors[f"{module}.{part}"] for part in ("qweight", "qzeros", "scales")]
        cols = len(parts[0])
        group = cols if scheme[1] == -1 else scheme[1]
        found = dequantize_gemm(*parts[:2], parts[2].float(), 4, group)
        assert torch.equal(found.T, expected), module


# Groups that MLX knows, and 8 bits, whose zero points its biases do not tell apart.
BY_MLX = [s for s in SCHEMES if s[1] != -1 and s[0] < 8]
BY_MLX += [(bits, group, "symmetric") for bits in (4, 8) for group in (32, 128)] + [(8, 64, "symmetric")]


@pytest.mark.parametrize("scheme", BY_MLX, ids=name_of)
def test_mlx_decodes_our_words(home, scheme):
    bits, group, _ = scheme
    folder = exported(home, scheme, "mlx")
    tensors = mx.load(str(folder / "model.safetensors"))
    for module, expected in numbers(home, scheme).items():
        parts = [tensors[f"{module}.{part}"] for part in ("weight", "scales", "biases")]
        wide = [parts[0], parts[1].astype(mx.float32), parts[2].astype(mx.float32)]
        found = np.array(mx.dequantize(*wide, group_size=group, bits=bits))
        expected = expected.numpy()
        # Only the bias is rounded here; it is at most 2^bits scales.
        bias = np.repeat(np.abs(np.array(wide[2])), group, axis=1)
        assert (np.abs(found - expected) <= 1.01 * BF16_ROUNDING * bias + 1e-7).all(), module


def loaded_logits(folder, image, dtype):
    model, report = AutoModelForImageTextToText.from_pretrained(
        folder, dtype=dtype, device_map="cpu", output_loading_info=True)
    assert not report["missing_keys"], report["missing_keys"]
    assert not report["unexpected_keys"], report["unexpected_keys"]
    inputs = inputs_for(folder, image)
    assert int((inputs["input_ids"] == model.config.image_token_id).sum()) > 0
    with torch.no_grad():
        return model, model.eval()(**inputs).logits[0].float()


def own_logits(folder, image, tmp_path, n):
    logits = trace(folder, image, tmp_path)["logits"].float()
    return logits.reshape(-1, logits.shape[-1])[-n:]


def quantized_kinds(model):
    """Classes of the decoder's linears, and of all others."""
    decoder, others = set(), set()
    for name, module in model.named_modules():
        kind = type(module).__name__
        if "Linear" in kind:
            (decoder if ".layers." in name and "vis" not in name else others).add(kind)
    return decoder, others


@pytest.mark.parametrize("scheme", WHOLE[:3], ids=name_of)
def test_transformers_runs_gptq(home, scheme, image, tmp_path):
    folder = exported(home, scheme, "gptq")
    model, logits = loaded_logits(folder, image, torch.float32)
    decoder, others = quantized_kinds(model)
    assert others == {"Linear"} and "Linear" not in decoder
    found = own_logits(folder, image, tmp_path, len(logits))
    assert relative(found, logits[-len(found):]) < LOGITS_TOLERANCE


@pytest.mark.parametrize("scheme", [(4, 64, "asymmetric"), (4, 64, "symmetric")], ids=name_of)
def test_transformers_runs_awq(home, scheme, image, tmp_path):
    folder = exported(home, scheme, "awq")
    model, logits = loaded_logits(folder, image, torch.float16)
    decoder, others = quantized_kinds(model)
    assert others == {"Linear"} and "Linear" not in decoder
    found = own_logits(folder, image, tmp_path, len(logits))
    difference = relative(found, logits[-len(found):])
    print(f"awq {name_of(scheme)}: logits {difference:.1e} apart")
    assert difference < F16_LOGITS_TOLERANCE


@pytest.mark.parametrize("pattern", [r"layers\.1\.", r"layers\.2\.mlp\.up_proj"])
def test_transformers_does_not_run_gptq_of_some_layers_only(home, pattern, image, tmp_path):
    """optimum puts codes into every layer alike; the card says so."""
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(f"[[rule]]\npattern = '{pattern}'\nskip = true\n")
    source, folder = tmp_path / "ct", tmp_path / "gptq"
    vlmq("quantize", MODEL, "--output", source, "--method", "rtn", "--bits", 4, "--group-size", 64,
         "--symmetric", "--recipe", recipe)
    told = vlmq("export", source, "--format", "gptq", "--output", folder)
    assert "note: transformers does not load it" in told
    assert "transformers: no, optimum puts codes into every layer" in (folder / "README.md").read_text()
    _, report = AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.float32, device_map="cpu", output_loading_info=True)
    # It asks for codes where there are none, and goes on with whatever is in memory.
    missing = [name for name in report["missing_keys"] if name.endswith(".qweight")]
    assert missing and all(re.search(pattern, name) for name in missing), report["missing_keys"]
    # What the card offers instead.
    _, logits = loaded_logits(source, image, torch.float32)
    found = own_logits(source, image, tmp_path, len(logits))
    assert relative(found, logits[-len(found):]) < LOGITS_TOLERANCE


# Decoders with another name in memory than in the file, and one whose layers optimum has to be told.
@pytest.mark.parametrize("family,variant", [("qwen2_5_vl", "tied"), ("llava", "clip"), ("idefics3", "tied")])
def test_transformers_runs_gptq_of_families(family, variant, tmp_path):
    from families import make
    make(tmp_path / "model", family, variant)
    vlmq("quantize", tmp_path / "model", "--output", tmp_path / "gptq", "--method", "rtn", "--bits", 4,
         "--group-size", 32, "--symmetric", "--format", "gptq")
    vlmq("verify", tmp_path / "gptq", "--against", tmp_path / "model")
    vlmq("export", tmp_path / "gptq", "--format", "f32", "--output", tmp_path / "f32")
    ids = torch.arange(5, 45)[None]
    logits = []
    for folder in (tmp_path / "gptq", tmp_path / "f32"):
        model, report = AutoModelForImageTextToText.from_pretrained(
            folder, dtype=torch.float32, device_map="cpu", output_loading_info=True)
        assert not report["missing_keys"] and not report["unexpected_keys"], report
        decoder, _ = quantized_kinds(model)
        with torch.no_grad():
            logits.append(model.eval()(input_ids=ids).logits[0].float())
        assert ("Linear" not in decoder) == (folder.name == "gptq"), decoder
    difference = relative(*logits)
    print(f"{family}: logits {difference:.1e} apart")
    assert difference < LOGITS_TOLERANCE


@pytest.mark.parametrize("form", ["bf16", "f32"])
def test_transformers_runs_plain_numbers(home, form, image, tmp_path):
    folder = exported(home, WHOLE[1], form)
    _, logits = loaded_logits(folder, image, torch.float32)
    found = own_logits(folder, image, tmp_path, len(logits))
    assert relative(found, logits[-len(found):]) < LOGITS_TOLERANCE


@pytest.mark.parametrize("scheme", WHOLE, ids=name_of)
def test_mlx_vlm_runs_a_folder(home, scheme, image, tmp_path):
    folder = exported(home, scheme, "mlx")
    inputs = inputs_for(folder, image)
    names = ("input_ids", "pixel_values", "image_grid_thw")
    np.savez(tmp_path / "inputs.npz", **{name: inputs[name].numpy() for name in names})
    script = Path(__file__).with_name("mlx_logits.py")
    command = [sys.executable, script, folder, tmp_path / "inputs.npz", tmp_path / "logits.npz"]
    subprocess.run(list(map(str, command)), check=True, timeout=600)
    answer = np.load(tmp_path / "logits.npz")
    assert int(answer["n_quantized"]) == len(numbers(home, scheme))
    logits = torch.tensor(answer["logits"])
    found = own_logits(folder, image, tmp_path, len(logits))
    assert relative(found, logits[-len(found):]) < BF16_LOGITS_TOLERANCE


def test_codes_come_back_from_every_format(home):
    """compressed-tensors to GPTQ, AWQ and MLX, and from there to compressed-tensors: same codes."""
    scheme = (4, 64, "asymmetric")
    first = tensors_of(quantized(home, scheme))
    for form in ("gptq", "awq", "mlx"):
        back = home / f"back-from-{form}"
        vlmq("export", exported(home, scheme, form), "--format", "compressed-tensors",
             "--output", back)
        again = tensors_of(back)
        assert set(again) == set(first)
        for name, tensor in first.items():
            same = torch.equal(again[name].float(), tensor.float())
            assert same and (again[name].dtype == tensor.dtype or name.endswith("scale")), name
