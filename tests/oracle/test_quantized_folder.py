"""A folder that `vlmq quantize` wrote loads in transformers, with an image in the input, and gives
the logits of vlmq's own forward.

Environment: VLMQ_BIN, the vlmq program (default: target/release/vlmq); VLMQ_MODEL, the model folder
(default: testbed/model); VLMQ_CALIBRATION (default: testbed/calibration). The folder is loaded in
float32, so the weights of both sides are the same numbers: codes times stored scales.
"""

import json

import pytest
import torch
from folders import CALIBRATION, MODEL, image, inputs_for, relative, tensors_of, trace, vlmq  # noqa: F401
from packing_fix import packed_zero_points_on_meta  # noqa: F401
from transformers import AutoModelForImageTextToText

# Largest difference over largest value. Both sides compute in f32 with sums in another order.
LOGITS_TOLERANCE = 1e-3
FEATURES_TOLERANCE = 1e-4

SCHEMES = [
    pytest.param((4, 64, "--symmetric"), id="int4-sym-g64"),
    pytest.param((4, 64, "--asymmetric"), id="int4-asym-g64"),
    pytest.param((3, 64, "--asymmetric"), id="int3-asym-g64"),
    pytest.param((3, -1, "--symmetric"), id="int3-sym-channel"),
    pytest.param((2, 64, "--asymmetric"), id="int2-asym-g64"),
    pytest.param((2, 64, "--symmetric"), id="int2-sym-g64"),
    # A mean, for which modules have 2, 3 and 4 bits.
    pytest.param((2.5, 64, "--symmetric"), id="mean2.5-sym-g64"),
    pytest.param((2.5, 64, "--asymmetric"), id="mean2.5-asym-g64"),
]


def module_names(folder, suffix):
    return {name.removesuffix(suffix) for name in tensors_of(folder) if name.endswith(suffix)}


@pytest.fixture(scope="module", params=SCHEMES)
def quantized(request, tmp_path_factory):
    bits, group_size, symmetry = request.param
    output = tmp_path_factory.mktemp("quantized") / "model"
    vlmq(
        *("quantize", MODEL, "--calibration", CALIBRATION, "--output", output),
        *("--method", "vlmq", "--samples", 8),
        *("--bits", bits, f"--group-size={group_size}", symmetry),
    )
    return output


@pytest.fixture(scope="module")
def loaded(quantized):
    model, report = AutoModelForImageTextToText.from_pretrained(
        quantized, dtype=torch.float32, output_loading_info=True
    )
    assert not report["missing_keys"], report["missing_keys"]
    assert not report["unexpected_keys"], report["unexpected_keys"]
    return model.eval()


def test_logits_agree_with_an_image_in_the_input(quantized, loaded, image, tmp_path):
    own = trace(quantized, image, tmp_path)
    inputs = inputs_for(quantized, image)
    ids = inputs["input_ids"]
    assert own["input_ids"].flatten().tolist() == ids.flatten().tolist()
    pixels = inputs["pixel_values"]
    assert torch.equal(own["pixel_values"].reshape(pixels.shape).float(), pixels)
    with torch.no_grad():
        logits = loaded(**inputs).logits[0]
    assert int((ids == loaded.config.image_token_id).sum()) > 0
    found = own["logits"].float().reshape(-1, logits.shape[-1])
    # A trace may hold the logits of the last positions only.
    assert relative(found, logits[-found.shape[0] :]) < LOGITS_TOLERANCE


def test_vision_features_agree(quantized, loaded, image, tmp_path):
    found = trace(quantized, image, tmp_path)["image_features"].float()
    inputs = inputs_for(quantized, image)
    with torch.no_grad():
        features = loaded.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"])
    features = getattr(features, "pooler_output", features)
    features = torch.cat(list(features)) if isinstance(features, (list, tuple)) else features
    found = found.reshape(features.shape)
    assert relative(found, features) < FEATURES_TOLERANCE


def test_only_the_language_model_is_quantized(quantized, loaded):
    packed = module_names(quantized, ".weight_packed")
    assert packed
    assert not [name for name in packed if "visual" in name or "lm_head" in name]
    schemes = {
        name.replace("model.language_model.", "model.")
        for name, module in loaded.named_modules()
        if getattr(module, "quantization_scheme", None) is not None
    }
    assert schemes == packed


def test_each_module_has_the_bits_of_the_report(quantized, loaded):
    report = json.loads((quantized / "vlmq_report.json").read_text())
    expected = {module["name"]: module["scheme"]["bits"] for module in report["modules"]}
    found = {
        name.replace("model.language_model.", "model."): module.quantization_scheme.weights.num_bits
        for name, module in loaded.named_modules()
        if getattr(module, "quantization_scheme", None) is not None
    }
    assert found == expected
    if "allocation" in report:
        assert len(set(found.values())) > 1


def test_everything_else_is_the_source(quantized):
    written = json.loads((quantized / "config.json").read_text())
    written.pop("quantization_config")
    assert written == json.loads((MODEL / "config.json").read_text())
    weights = ("config.json", "model.safetensors.index.json")
    for path in MODEL.iterdir():
        is_side_file = path.is_file() and path.suffix != ".safetensors"
        if is_side_file and path.name not in weights:
            assert (quantized / path.name).read_bytes() == path.read_bytes(), path.name
