"""Writes a random-weight Qwen2-VL checkpoint in bf16 with the widths of a real one and few layers.

Usage: make_model.py OUT [--size small|2B|7B|32B|72B] [--layers 2] [--seed 0] [--hollow]

With --hollow the weights are zeros that take no place on disk: enough for `vlmq quantize --dry-run`.

Weights are normal with standard deviation 0.02 and norms are 1, so activations stay near 1. The tower
is small, since none of the tools quantizes it; tokenizer, template and processor are the testbed's.
"""

import argparse
import json
import math
import os
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

TESTBED = Path(__file__).resolve().parents[2] / "testbed/model"
# hidden, intermediate, heads, key-value heads of Qwen2-VL 2B, 7B and 72B and of Qwen2.5-VL 32B
SIZES = {"small": (512, 2048, 4, 2), "2B": (1536, 8960, 12, 2), "7B": (3584, 18944, 28, 4),
         "32B": (5120, 27648, 40, 8), "72B": (8192, 29568, 64, 8)}
HEAD_DIM = 128
DEPTH, EMBED = 2, 128


def layer_shapes(i, size):
    """Shapes of a decoder layer's tensors, by their names on the hub."""
    hidden, intermediate, heads, kv_heads = SIZES[size]
    layer = f"model.layers.{i}"
    out = {f"{layer}.{norm}.weight": (hidden,)
           for norm in ["input_layernorm", "post_attention_layernorm"]}
    for name, rows in [("q", heads), ("k", kv_heads), ("v", kv_heads)]:
        out[f"{layer}.self_attn.{name}_proj.weight"] = (rows * HEAD_DIM, hidden)
        out[f"{layer}.self_attn.{name}_proj.bias"] = (rows * HEAD_DIM,)
    out[f"{layer}.self_attn.o_proj.weight"] = (hidden, heads * HEAD_DIM)
    out[f"{layer}.mlp.gate_proj.weight"] = (intermediate, hidden)
    out[f"{layer}.mlp.up_proj.weight"] = (intermediate, hidden)
    out[f"{layer}.mlp.down_proj.weight"] = (hidden, intermediate)
    return out


def other_shapes(size, vocab, patch):
    """Shapes of everything but the decoder's layers."""
    hidden = SIZES[size][0]
    out = {"model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,)}

    def linear(name, rows, columns):
        out[f"{name}.weight"], out[f"{name}.bias"] = (rows, columns), (rows,)

    out["visual.patch_embed.proj.weight"] = (EMBED, 3, 2, patch, patch)
    for i in range(DEPTH):
        block = f"visual.blocks.{i}"
        for norm in ["norm1", "norm2"]:
            out[f"{block}.{norm}.weight"] = out[f"{block}.{norm}.bias"] = (EMBED,)
        linear(f"{block}.attn.qkv", 3 * EMBED, EMBED)
        linear(f"{block}.attn.proj", EMBED, EMBED)
        linear(f"{block}.mlp.fc1", 4 * EMBED, EMBED)
        linear(f"{block}.mlp.fc2", EMBED, 4 * EMBED)
    out["visual.merger.ln_q.weight"] = out["visual.merger.ln_q.bias"] = (EMBED,)
    linear("visual.merger.mlp.0", 4 * EMBED, 4 * EMBED)
    linear("visual.merger.mlp.2", hidden, 4 * EMBED)
    return out


def write_hollow(path, shapes):
    """A safetensors file of bf16 zeros, all of them a hole."""
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * math.prod(shape)
        header[name] = dict(dtype="BF16", shape=shape, data_offsets=[start, end])
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(path, 8 + len(text) + end)


def tensor(name, shape, generator):
    if "norm" in name or "ln_q" in name:
        return torch.full(shape, float(name.endswith("weight")))
    return torch.randn(shape, generator=generator) * 0.02


def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("out", type=Path)
    p.add_argument("--size", choices=SIZES, default="2B")
    p.add_argument("--layers", type=int, default=2)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--hollow", action="store_true")
    p.add_argument("--tokenizer", type=Path, default=TESTBED)
    args = p.parse_args()
    config = json.loads((args.tokenizer / "config.json").read_text())
    hidden, intermediate, heads, kv_heads = SIZES[args.size]
    config |= dict(
        hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=args.layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, rope_theta=1e6,
        rope_scaling=dict(type="mrope", mrope_section=[16, 24, 24]))
    config["vision_config"] |= dict(depth=DEPTH, embed_dim=EMBED, num_heads=4, mlp_ratio=4,
                                    hidden_size=hidden)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for name in ["tokenizer.json", "tokenizer_config.json", "chat_template.json",
                 "preprocessor_config.json", "generation_config.json"]:
        shutil.copy(args.tokenizer / name, args.out / name)
    g = torch.Generator().manual_seed(args.seed)
    # A shard for each layer, so that no more than one is in memory.
    parts = [other_shapes(args.size, config["vocab_size"], config["vision_config"]["patch_size"])]
    parts += [layer_shapes(i, args.size) for i in range(args.layers)]
    weight_map, n_weights = {}, 0
    for i, part in enumerate(parts):
        name = f"model-{i + 1:05}-of-{len(parts):05}.safetensors"
        if args.hollow:
            write_hollow(args.out / name, part)
        else:
            tensors = {n: tensor(n, s, g).bfloat16() for n, s in part.items()}
            save_file(tensors, args.out / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, name)
        n_weights += sum(math.prod(s) for s in part.values())
    index = dict(metadata=dict(total_size=2 * n_weights), weight_map=weight_map)
    (args.out / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    print(f"{args.out}: {n_weights / 1e6:.0f} million weights")


if __name__ == "__main__":
    main()
