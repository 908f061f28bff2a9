"""Writes testdata/checkpoint/golden: float tensors saved by safetensors, and weights packed by
compressed-tensors itself with the values that it decodes them to.

Run: python tests/oracle/make_checkpoint_golden.py testdata/checkpoint/golden
"""

import json
import sys
from pathlib import Path

import compressed_tensors
import safetensors
import torch
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from safetensors.torch import save_file

# More than 8 rows: compressed-tensors 0.20 cannot unpack 4-bit zero points of one word a column.
ROWS, COLS, GROUP = 13, 48, 16


def packed_module(bits, group_size, symmetric, generator):
    """The state of one module as compressed-tensors would save it, and its dequantized weight."""
    n_groups = COLS // group_size if group_size else 1
    half = 1 << (bits - 1)
    codes = torch.randint(-half, half, (ROWS, COLS), generator=generator).to(torch.int8)
    scale = torch.rand(ROWS, n_groups, generator=generator) * 0.1 + 0.01
    state = {
        "weight_packed": pack_to_int32(codes, bits),
        "weight_scale": scale,
        "weight_shape": torch.tensor([ROWS, COLS]),
    }
    if not symmetric:
        zero = torch.randint(-half, half, (ROWS, n_groups), generator=generator).to(torch.int8)
        state["weight_zero_point"] = pack_to_int32(zero, bits, packed_dim=0)
    args = QuantizationArgs(
        num_bits=bits,
        symmetric=symmetric,
        strategy="group" if group_size else "channel",
        group_size=group_size,
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    weight = PackedQuantizationCompressor.decompress(state, scheme)["weight"]
    return state, weight, args


def main(output):
    generator = torch.Generator().manual_seed(0)
    tensors, groups = {}, {}
    for name, dtype in [
        ("bf16", torch.bfloat16),
        ("f16", torch.float16),
        ("f32", torch.float32),
        ("f64", torch.float64),
    ]:
        plain = torch.randn(3, 5, generator=generator, dtype=torch.float64).to(dtype)
        tensors[f"plain.{name}"] = plain
        tensors[f"plain.{name}.as_f32"] = plain.float()
    for bits in (2, 3, 4, 8):
        for group_size in (None, GROUP):
            for symmetric in (True, False):
                kind = f"{'group' if group_size else 'channel'}_{'sym' if symmetric else 'asym'}"
                module = f"packed.int{bits}_{kind}"
                state, weight, args = packed_module(bits, group_size, symmetric, generator)
                tensors |= {f"{module}.{key}": value for key, value in state.items()}
                tensors[f"{module}.dequantized"] = weight
                groups[module] = {
                    "targets": [f"re:.*{module}$"],
                    "weights": json.loads(args.model_dump_json()),
                }
    output.mkdir(parents=True, exist_ok=True)
    made_with = {m.__name__: m.__version__ for m in (torch, safetensors, compressed_tensors)}
    config = {
        "made_with": made_with,
        "made_by": "tests/oracle/make_checkpoint_golden.py",
        "quantization_config": {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "config_groups": groups,
            "ignore": [],
        },
    }
    (output / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    tensors = {name: tensor.clone().contiguous() for name, tensor in tensors.items()}
    save_file(tensors, output / "model.safetensors", metadata={"format": "pt"})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
