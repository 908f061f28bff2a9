"""Writes a random-weight Qwen3-VL-MoE checkpoint in bf16 with the widths of the 30B-A3B and few layers.

Usage: make_mixture.py OUT [--layers 2] [--seed 0]; with the environment of tests/oracle.

Hidden 2048, 32 heads on 4 key-value heads of 128, 128 experts of width 768 of which a token goes through
8. The tower is small, and tokenizer and processor are those of the tests.
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests/oracle"))
from families import FAMILIES, make  # noqa: E402


def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("out", type=Path)
    p.add_argument("--layers", type=int, default=2)
    p.add_argument("--seed", type=int, default=0)
    args = p.parse_args()
    family = FAMILIES["qwen3_vl_moe"]
    small = family.config

    def config(variant, ids, vocab):
        found = small(variant, ids, vocab)
        text = found.text_config
        text.hidden_size = found.vision_config.out_hidden_size = 2048
        text.num_attention_heads, text.num_key_value_heads, text.head_dim = 32, 4, 128
        text.num_experts = text.num_local_experts = 128
        text.num_experts_per_tok, text.moe_intermediate_size = 8, 768
        text.num_hidden_layers = args.layers
        text.rope_parameters["mrope_section"] = [24, 20, 20]
        return found

    family.config = staticmethod(config)
    torch.set_default_dtype(torch.bfloat16)
    make(args.out, "qwen3_vl_moe", "all", args.seed, torch.bfloat16)


if __name__ == "__main__":
    main()
