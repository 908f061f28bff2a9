"""A neutral judge: how far the outputs of each quantized decoder module are from the original's.

Usage: layer_loss.py MODEL QUANTIZED... --samples FOLDER [--modules]

The original model runs in f32 on samples that no tool has seen. For every decoder linear with weight
W, inputs X and quantized weight Q, the loss is ||(W-Q)X||^2 / ||WX||^2. Q is decoded here from the
files: GPTQ (versions 1 and 2) and compressed-tensors' pack-quantized. One JSON line per folder.
"""

import argparse
import json
from pathlib import Path

import torch
from safetensors import safe_open

from samples import conversations, inputs_of, module_of, processor_of

MASK = 0xFFFFFFFF


def unpack(words, bits, n):
    """Codes of `bits` bits, n to a row, from rows of 32-bit words: one stream of bits, lowest first."""
    words = words.to(torch.int64) & MASK
    words = torch.nn.functional.pad(words, (0, 1))
    at = torch.arange(n) * bits
    word, shift = at // 32, at % 32
    pair = words[:, word] >> shift | words[:, word + 1] << (32 - shift)
    return pair & (1 << bits) - 1


def decode_gptq(t, bits, version):
    """Words run down the inputs in qweight and along the outputs in qzeros."""
    columns, groups, rows = t["g_idx"].numel(), *t["scales"].shape
    codes = unpack(t["qweight"].T, bits, columns)
    zeros = t["qzeros"].to(torch.int64)
    if version == 1 and bits != 3:
        # Stored one too low, by a subtraction of whole words that borrows across codes.
        zeros = zeros + sum(1 << i for i in range(0, 32, bits))
    zeros = unpack(zeros, bits, rows)
    if version == 1 and bits == 3:
        zeros = (zeros + 1) & 7
    group = t["g_idx"].long()
    return (codes - zeros.T[:, group]).float() * t["scales"].float().T[:, group]


def decode_compressed(t, bits):
    """Codes are signed and stored with 2^(bits-1) added; zero points are packed down the rows."""
    half = 1 << bits - 1
    rows, columns = t["weight_shape"].tolist()
    scale = t["weight_scale"].float()
    codes = unpack(t["weight_packed"], bits, columns) - half
    group = torch.arange(columns) // (columns // scale.shape[1])
    if "weight_g_idx" in t:
        group = t["weight_g_idx"].long()
    if "weight_zero_point" in t:
        zeros = unpack(t["weight_zero_point"].T, bits, rows).T - half
        codes = codes - zeros[:, group]
    return codes.float() * scale[:, group]


def decode_folder(folder):
    """The decoded weight of every quantized decoder module, by its name on the hub."""
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    parts = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as f:
            for name in f.keys():
                owner, _, part = name.rpartition(".")
                if module_of(owner) and owner.endswith("_proj"):
                    parts.setdefault(module_of(owner), {})[part] = f.get_tensor(name)
    if config["quant_method"] == "gptq":
        version = {"gptq": 1, "gptq_v2": 2}[config.get("checkpoint_format", config.get("format", "gptq"))]
        return {m: decode_gptq(t, config["bits"], version) for m, t in parts.items() if "qweight" in t}
    if config["quant_method"] != "compressed-tensors" or config["format"] != "pack-quantized":
        raise SystemExit(f"{folder}: neither GPTQ nor pack-quantized")
    bits = {g["weights"]["num_bits"] for g in config["config_groups"].values()}
    if len(bits) > 1:
        raise SystemExit(f"{folder}: modules of different widths")
    bits = bits.pop()
    return {m: decode_compressed(t, bits) for m, t in parts.items() if "weight_packed" in t}


@torch.no_grad()
def judge(model, inputs, quantized):
    """Relative loss by module."""
    linears = {module_of(n): m for n, m in model.named_modules()
               if isinstance(m, torch.nn.Linear) and module_of(n)}
    if set(linears) != set(quantized):
        raise SystemExit(f"not quantized, or unknown: {sorted(set(linears) ^ set(quantized))}")
    difference = {n: m.weight - quantized[n] for n, m in linears.items()}
    sums = {n: [0.0, 0.0] for n in linears}

    def hook(name):
        def add(module, args, _):
            x = args[0].reshape(-1, args[0].shape[-1])
            for i, w in enumerate([difference[name], module.weight]):
                sums[name][i] += (x @ w.T).double().square().sum().item()
        return add

    hooks = [m.register_forward_hook(hook(n)) for n, m in linears.items()]
    for one in inputs:
        model(**one)
    for h in hooks:
        h.remove()
    return {n: error / reference for n, (error, reference) in sums.items()}


def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("model", type=Path)
    p.add_argument("quantized", type=Path, nargs="+")
    p.add_argument("--samples", type=Path, required=True)
    p.add_argument("--modules", action="store_true", help="print every module's loss too")
    args = p.parse_args()
    from transformers import Qwen2VLForConditionalGeneration

    model = Qwen2VLForConditionalGeneration.from_pretrained(args.model, dtype=torch.float32).eval()
    processor = processor_of(args.model)
    inputs = [inputs_of(processor, chat) for chat in conversations(args.samples)]
    for folder in args.quantized:
        losses = judge(model, inputs, decode_folder(folder))
        worst = max(losses, key=losses.get)
        line = dict(folder=str(folder), samples=len(inputs), modules=len(losses),
                    mean=sum(losses.values()) / len(losses), worst=worst, worst_loss=losses[worst])
        print(json.dumps(line | (dict(losses=losses) if args.modules else {})), flush=True)


if __name__ == "__main__":
    main()
