"""compressed-tensors itself decodes the folder that vlmq's exporter wrote, bit for bit.

Run: VLMQ_ORACLE_OUT=DIR cargo test --lib every_scheme, then VLMQ_ORACLE_OUT=DIR pytest this file.
Without the variable the test runs cargo itself. Needs torch and compressed-tensors >= 0.18.
"""

import json
import os
import re
import subprocess
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from compressed_tensors.quantization import QuantizationConfig
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]
MODULES = [f"model.layers.{i}.mlp.up_proj" for i in range(24)]


@pytest.fixture(scope="session")
def written(tmp_path_factory):
    given = os.environ.get("VLMQ_ORACLE_OUT")
    output = Path(given) if given else tmp_path_factory.mktemp("oracle")
    if not (output / "folder").exists():
        command = ["cargo", "test", "--lib", "every_scheme_is_read_back_bit_for_bit"]
        environment = os.environ | {"VLMQ_ORACLE_OUT": str(output)}
        subprocess.run(command, cwd=ROOT, env=environment, check=True)
    config = json.loads((output / "folder" / "config.json").read_text())["quantization_config"]
    return {
        "config": QuantizationConfig.model_validate(config),
        "tensors": load_file(output / "folder" / "model.safetensors"),
        "expected": load_file(output / "model.safetensors"),
    }


def scheme_of(config, module):
    """The module's scheme by the library's order of precedence: pattern first, then class."""
    schemes = list(config.config_groups.values())
    named = [s for s in schemes for t in s.targets if re.match(t.removeprefix("re:"), module)]
    return (named or [s for s in schemes if s.targets == ["Linear"]])[0]


def state_of(tensors, module):
    prefix = module + "."
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


@pytest.mark.parametrize("module", MODULES)
def test_the_library_decodes_our_weights(written, module):
    scheme = scheme_of(written["config"], module)
    state = state_of(written["tensors"], module)
    names = set(PackedQuantizationCompressor.compression_param_names(scheme))
    assert set(state) == names
    weight = PackedQuantizationCompressor.decompress(state, scheme)["weight"]
    assert torch.equal(weight, written["expected"][module])


@pytest.mark.parametrize("module", MODULES)
def test_the_library_packs_the_same_words(written, module):
    bits = scheme_of(written["config"], module).weights.num_bits
    state = state_of(written["tensors"], module)
    shape = torch.Size(state["weight_shape"].tolist())
    codes = unpack_from_int32(state["weight_packed"], bits, shape)
    assert torch.equal(pack_to_int32(codes, bits), state["weight_packed"])
    if "weight_zero_point" in state:
        shape = torch.Size((shape[0], state["weight_scale"].shape[1]))
        zero = unpack_from_int32(state["weight_zero_point"], bits, shape, packed_dim=0)
        assert torch.equal(pack_to_int32(zero, bits, packed_dim=0), state["weight_zero_point"])


def test_every_scheme_is_there(written):
    kinds = set()
    for module in MODULES:
        weights = scheme_of(written["config"], module).weights
        kinds.add((weights.num_bits, weights.group_size, weights.symmetric))
    sizes = (None, 8, 16)
    assert kinds == {(b, g, s) for b in (2, 3, 4, 8) for g in sizes for s in (True, False)}
