"""Folders that other tools made: vlmq reads them as their makers' readers do.

GPTQModel quantizes the bundled model here, in each of its orders of columns, and by AWQ. llm-compressor needs
other versions of torch and transformers: its folder, of a small random model, is made by
`llm_compressor_golden.py` and kept in testdata/others.
"""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from folders import CALIBRATION, MODEL, ROOT, image, inputs_for, relative, trace, vlmq  # noqa: F401
from packing_fix import packed_zero_points_on_meta  # noqa: F401
from random_qwen2_vl import make
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

RIVALS = ROOT / "benches/rivals"
sys.path.append(str(RIVALS))
from samples import write_folder  # noqa: E402

GOLDEN = ROOT / "testdata/others/llm-compressor"
LOGITS_TOLERANCE = 1e-3
# AWQ's reader has its weights in float16, and its products.
F16_LOGITS_TOLERANCE = 5e-3
CASES = [
    pytest.param((4, "none", False), id="4-as-they-are"),
    pytest.param((3, "static", True), id="3-static-groups-asymmetric"),
    pytest.param((2, "group-aware", False), id="2-group-aware"),
    pytest.param((4, "scattered", False), id="4-scattered-groups"),
]


def run_gptqmodel(home, *flags):
    write_folder(CALIBRATION, home / "samples", 0, 4)
    command = [sys.executable, RIVALS / "gptqmodel_run.py", MODEL, "--samples", home / "samples",
               "--out", home / "out", "--group", 64, *flags]
    environment = os.environ | dict(GPTQMODEL_CPU_WORKERS="2", HF_HUB_OFFLINE="1")
    done = subprocess.run(list(map(str, command)), env=environment, timeout=1200, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return home / "out"


@pytest.fixture(scope="module", params=CASES)
def of_gptqmodel(request, tmp_path_factory):
    bits, order, is_asymmetric = request.param
    flags = ["--bits", bits, "--order", order] + ["--asymmetric"] * is_asymmetric
    return run_gptqmodel(tmp_path_factory.mktemp("gptqmodel"), *flags), order


def logits_of(folder, inputs, dtype=torch.float32):
    model, report = AutoModelForImageTextToText.from_pretrained(
        folder, dtype=dtype, device_map="cpu", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    with torch.no_grad():
        return model.eval()(**inputs).logits[0].float()


def own(folder, image, tmp_path):
    logits = trace(folder, image, tmp_path)["logits"].float()
    return logits.reshape(-1, logits.shape[-1])


def check_use(folder, image, tmp_path):
    """Nothing is found wrong with an untouched folder, and the model's programs run on it."""
    vlmq("verify", folder)
    # Its tensors have the names of memory, and its files other names: its configuration is no other.
    problems = json.loads(vlmq("verify", folder, "--against", MODEL, "--json", exit_code=1))["verification"]
    assert not [p for p in problems["problems"] if p.startswith("config.json: ")], problems["problems"]
    answer = json.loads(vlmq("generate", folder, "--image", image, "--prompt", "what is this?",
                             "--max-new-tokens", 4, "--json"))
    assert 1 <= len(answer["output_ids"]) <= 4
    vlmq("eval", folder, "--task", ROOT / "testbed/eval/counting.parquet", "--limit", 3, "--output",
         tmp_path / "eval")
    assert len(json.loads((tmp_path / "eval/predictions.json").read_text())["counting"]) == 3


def test_a_folder_of_gptqmodel(of_gptqmodel, image, tmp_path):
    folder, order = of_gptqmodel
    check_use(folder, image, tmp_path)
    said = json.loads(vlmq("inspect", folder, "--json"))
    assert said["n_quantized_modules"] == said["n_modules"]
    expected = logits_of(folder, inputs_for(MODEL, image))
    found = own(folder, image, tmp_path)
    assert relative(found, expected[-len(found):]) < LOGITS_TOLERANCE
    output = tmp_path / "ct"
    refused = order == "scattered"
    vlmq("export", folder, "--format", "compressed-tensors", "--output", output,
         exit_code=2 if refused else 0)
    assert output.exists() != refused
    if not refused:
        again = logits_of(output, inputs_for(MODEL, image))
        assert relative(again, expected) < LOGITS_TOLERANCE


def test_an_awq_folder_of_gptqmodel(image, tmp_path):
    folder = run_gptqmodel(tmp_path, "--method", "awq", "--bits", 4, "--asymmetric")
    check_use(folder, image, tmp_path)
    said = json.loads(vlmq("inspect", folder, "--json"))
    assert said["n_quantized_modules"] == said["n_modules"]
    found = own(folder, image, tmp_path)
    vlmq("export", folder, "--format", "compressed-tensors", "--output", tmp_path / "ct")
    again = own(tmp_path / "ct", image, tmp_path)
    assert torch.equal(again, found)
    # Its configuration says nothing of what has no codes, which transformers needs, as a pattern from the start.
    path = folder / "config.json"
    config = json.loads(path.read_text())
    assert "modules_to_not_convert" not in config["quantization_config"]
    config["quantization_config"]["modules_to_not_convert"] = [".*visual"]
    path.write_text(json.dumps(config))
    expected = logits_of(folder, inputs_for(MODEL, image), torch.float16)
    difference = relative(found, expected[-len(found):])
    print(f"AWQ of GPTQModel: logits {difference:.1e} apart")
    assert difference < F16_LOGITS_TOLERANCE


def test_a_folder_of_llm_compressor(image, tmp_path):
    folder = make(tmp_path / "model", "tied", dtype=torch.bfloat16)
    packed = load_file(GOLDEN / "packed.safetensors")
    modules = {name.rsplit(".", 1)[0] for name in packed}
    weights = {f"{module}.weight" for module in modules}
    plain = load_file(folder / "model.safetensors")
    assert weights and weights <= set(plain)
    plain = {name: tensor for name, tensor in plain.items() if name not in weights}
    save_file(plain | packed, folder / "model.safetensors", metadata=dict(format="pt"))
    shutil.copy(GOLDEN / "config.json", folder / "config.json")
    said = json.loads(vlmq("verify", folder, "--json"))["verification"]
    assert said["format"] == "compressed-tensors" and said["n_quantized"] == len(modules)
    assert not said["problems"]
    expected = logits_of(folder, inputs_for(folder, image))
    found = own(folder, image, tmp_path)
    assert relative(found, expected[-len(found):]) < LOGITS_TOLERANCE
    answer = json.loads(vlmq("generate", folder, "--image", image, "--prompt", "what is this?",
                             "--max-new-tokens", 4, "--json"))
    assert 1 <= len(answer["output_ids"]) <= 4
    # Its two formats of bits are more than transformers can take as GPTQ.
    vlmq("export", folder, "--format", "f32", "--output", tmp_path / "f32")
    again = logits_of(tmp_path / "f32", inputs_for(folder, image))
    assert relative(again, expected) < LOGITS_TOLERANCE
