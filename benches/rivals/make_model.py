"""Writes a random-weight Qwen2-VL checkpoint in bf16 with the widths of the real 2B and few layers.

Usage: make_model.py OUT [--layers 2] [--seed 0] [--tokenizer testbed/model]

Weights are normal with standard deviation 0.02 and norms are 1, so activations stay near 1. The tower
is small, since none of the tools quantizes it; tokenizer, template and processor are the testbed's.
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

TESTBED = Path(__file__).resolve().parents[2] / "testbed/model"
HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, HEAD_DIM = 1536, 8960, 12, 2, 128
DEPTH, EMBED = 2, 128


def shapes(layers, vocab, patch):
    """Every tensor's shape, by its name on the hub."""
    out = {"model.embed_tokens.weight": (vocab, HIDDEN), "model.norm.weight": (HIDDEN,)}
    for i in range(layers):
        layer = f"model.layers.{i}"
        for norm in ["input_layernorm", "post_attention_layernorm"]:
            out[f"{layer}.{norm}.weight"] = (HIDDEN,)
        for name, rows in [("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)]:
            out[f"{layer}.self_attn.{name}_proj.weight"] = (rows * HEAD_DIM, HIDDEN)
            out[f"{layer}.self_attn.{name}_proj.bias"] = (rows * HEAD_DIM,)
        out[f"{layer}.self_attn.o_proj.weight"] = (HIDDEN, HEADS * HEAD_DIM)
        out[f"{layer}.mlp.gate_proj.weight"] = (INTERMEDIATE, HIDDEN)
        out[f"{layer}.mlp.up_proj.weight"] = (INTERMEDIATE, HIDDEN)
        out[f"{layer}.mlp.down_proj.weight"] = (HIDDEN, INTERMEDIATE)

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
    linear("visual.merger.mlp.2", HIDDEN, 4 * EMBED)
    return out


def tensor(name, shape, generator):
    if "norm" in name or "ln_q" in name:
        return torch.full(shape, float(name.endswith("weight")))
    return torch.randn(shape, generator=generator) * 0.02


def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("out", type=Path)
    p.add_argument("--layers", type=int, default=2)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--tokenizer", type=Path, default=TESTBED)
    args = p.parse_args()
    config = json.loads((args.tokenizer / "config.json").read_text())
    config |= dict(
        hidden_size=HIDDEN, intermediate_size=INTERMEDIATE, num_hidden_layers=args.layers,
        num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, rope_theta=1e6,
        rope_scaling=dict(type="mrope", mrope_section=[16, 24, 24]))
    config["vision_config"] |= dict(depth=DEPTH, embed_dim=EMBED, num_heads=4, mlp_ratio=4,
                                    hidden_size=HIDDEN)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for name in ["tokenizer.json", "tokenizer_config.json", "chat_template.json",
                 "preprocessor_config.json", "generation_config.json"]:
        shutil.copy(args.tokenizer / name, args.out / name)
    g = torch.Generator().manual_seed(args.seed)
    all_shapes = shapes(args.layers, config["vocab_size"], config["vision_config"]["patch_size"])
    tensors = {n: tensor(n, s, g).bfloat16() for n, s in all_shapes.items()}
    save_file(tensors, args.out / "model.safetensors", metadata={"format": "pt"})
    print(f"{args.out}: {sum(t.numel() for t in tensors.values()) / 1e6:.0f} million weights")


if __name__ == "__main__":
    main()
