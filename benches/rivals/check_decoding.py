"""Holds layer_loss.py's decoding against the library that wrote or loads a folder, bit for bit.

Usage, in the environment of that library: check_decoding.py QUANTIZED...
GPTQ folders need GPTQModel, pack-quantized ones compressed-tensors.
"""

import json
import os
import sys
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")

import torch
from safetensors.torch import load_file

from layer_loss import decode_folder
from samples import module_of


def by_gptqmodel(folder):
    from gptqmodel import BACKEND, GPTQModel

    # In f16, the type of the stored scales: any other would round them first.
    model = GPTQModel.load(str(folder), device="cpu", backend=BACKEND.GPTQ_TORCH,
                           dtype=torch.float16).model
    return {module_of(n): m.dequantize_weight().T for n, m in model.named_modules()
            if hasattr(m, "dequantize_weight")}


def by_compressed_tensors(folder, config):
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationConfig

    scheme = QuantizationConfig.model_validate(config).config_groups["group_0"]
    tensors = load_file(folder / "model.safetensors")
    out = {}
    for owner in [n.removesuffix(".weight_packed") for n in tensors if n.endswith(".weight_packed")]:
        state = {n.removeprefix(owner + "."): t for n, t in tensors.items()
                 if n.startswith(owner + ".weight")}
        out[module_of(owner)] = PackedQuantizationCompressor.decompress(state, scheme)["weight"]
    return out


def main():
    wrong = 0
    for folder in map(Path, sys.argv[1:]):
        config = json.loads((folder / "config.json").read_text())["quantization_config"]
        if config["quant_method"] == "gptq":
            theirs = by_gptqmodel(folder)
        else:
            theirs = by_compressed_tensors(folder, config)
        ours = decode_folder(folder)
        # Theirs are products in 16 bits; ours are exact, so they are rounded once before comparing.
        unequal = [m for m in theirs if not torch.equal(ours[m].to(theirs[m].dtype), theirs[m])]
        if unequal or not theirs or set(ours) != set(theirs):
            wrong += 1
            print(f"{folder}: DIFFERENT, {len(unequal)} of {len(theirs)} modules, {len(ours)} here")
        else:
            print(f"{folder}: {len(ours)} modules equal, {theirs[next(iter(theirs))].dtype}")
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
