"""Writes testdata/importance: a decoder layer of transformers, its two streams, and the gradients
that automatic differentiation gives for the outputs of its linears.

Run: python tests/oracle/importance_golden.py
"""

from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLTextConfig
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLDecoderLayer, Qwen2VLRotaryEmbedding

OUT = Path(__file__).resolve().parents[2] / "testdata/importance"
HIDDEN, HEADS, KV, INTER, SECTION = 48, 6, 2, 40, [1, 1, 2]
LINEARS = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
           "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]


def positions():
    """Three text tokens, an image of 2 x 3 merged patches, four text tokens."""
    text = [[i] * 3 for i in range(3)]
    image = [[3, 3 + row, 3 + col] for row in range(2) for col in range(3)]
    after = [[6 + i] * 3 for i in range(4)]
    return torch.tensor(text + image + after).T


def main():
    torch.manual_seed(7)
    torch.set_default_dtype(torch.float64)
    config = Qwen2VLTextConfig(
        hidden_size=HIDDEN, num_attention_heads=HEADS, num_key_value_heads=KV,
        intermediate_size=INTER, num_hidden_layers=1, vocab_size=8, rms_norm_eps=1e-6,
        rope_parameters=dict(rope_type="default", rope_theta=100.0, mrope_section=SECTION),
        bos_token_id=None, eos_token_id=None)
    config._attn_implementation = "eager"
    layer = Qwen2VLDecoderLayer(config, 0)
    for p in layer.parameters():
        p.data = torch.randn_like(p) * (p.shape[-1] ** -0.5 if p.ndim == 2 else 0.3) + (p.ndim == 1)
    layer.float().double()  # the weights are stored in f32; the gradients belong to those
    ids = positions()
    n = ids.shape[1]
    full = torch.randn(n, HIDDEN).float().double()
    quantized = (full + 0.1 * torch.randn(n, HIDDEN)).float().double()
    rotary = Qwen2VLRotaryEmbedding(config)(full[None], ids[:, None])
    mask = torch.full((1, 1, n, n), float("-inf")).triu(1)

    outputs = {}
    for name in LINEARS:
        def keep(_, __, out, name=name):
            if out.requires_grad:
                out.retain_grad()
                outputs[name] = out
        layer.get_submodule(name).register_forward_hook(keep)

    def after_attention(x):
        normed = layer.input_layernorm(x[None])
        return x + layer.self_attn(normed, attention_mask=mask, position_embeddings=rotary)[0][0]

    def whole(x):
        out = layer(x[None], attention_mask=mask, position_embeddings=rotary)
        return (out[0] if isinstance(out, tuple) else out).reshape(n, HIDDEN)

    tensors = {f"layer.{k}": v for k, v in layer.state_dict().items()}
    tensors |= {"full": full, "quantized": quantized}
    for name, run, linears in [("attention", after_attention, LINEARS[:4]), ("layer", whole, LINEARS)]:
        with torch.no_grad():
            target = run(full)
        loss = (run(quantized) - target).square().sum()
        loss.backward()
        tensors |= {f"{name}.{linear}": outputs[linear].grad[0] for linear in linears}
        tensors[f"{name}.loss"] = loss.detach()[None]
    OUT.mkdir(parents=True, exist_ok=True)
    tensors = {k: v.float().contiguous() for k, v in tensors.items()}
    tensors["position_ids"] = ids.int().contiguous()
    save_file(tensors, OUT / "layer.safetensors",
              metadata={"torch": torch.__version__, "transformers": transformers.__version__,
                        "script": "tests/oracle/importance_golden.py"})


if __name__ == "__main__":
    main()
