"""Random-weight Qwen2-VL folders: the exact layout of the real ones, a thousand times smaller."""

import json
import shutil
from pathlib import Path

import torch
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

ROOT = Path(__file__).resolve().parents[2]
TOKENIZER = ROOT / "testdata/processor/model"
TOKENIZER_FILES = ["tokenizer.json", "tokenizer_config.json", "generation_config.json"]

# Head sizes as in the 2B and 7B models' ratios: grouped queries, three unequal rotary sections.
SHAPES = {
    "tied": dict(hidden_size=64, heads=4, kv=2, inter=96, layers=3, section=[2, 3, 3], tie=True),
    "ungrouped": dict(hidden_size=64, heads=4, kv=4, inter=96, layers=2, section=[2, 3, 3],
                      tie=True),
    "untied": dict(hidden_size=96, heads=6, kv=1, inter=128, layers=2, section=[2, 2, 4], tie=False),
}


def make(folder, shape, seed=0, dtype=torch.float32, max_shard_size="50GB", pixels=None):
    """Writes a model folder and returns it. `pixels` is the processor's (min, max)."""
    s = SHAPES[shape]
    ids = {t["content"]: t["id"] for t in
           json.loads((TOKENIZER / "tokenizer.json").read_text())["added_tokens"]}
    vocab = 1 + max(ids.values())
    config = Qwen2VLConfig(
        text_config=dict(
            vocab_size=(vocab + 63) // 64 * 64, hidden_size=s["hidden_size"],
            intermediate_size=s["inter"], num_hidden_layers=s["layers"],
            num_attention_heads=s["heads"], num_key_value_heads=s["kv"], rms_norm_eps=1e-6,
            rope_parameters=dict(rope_type="default", rope_theta=1e4, mrope_section=s["section"]),
            bos_token_id=None, eos_token_id=ids["<|im_end|>"], tie_word_embeddings=s["tie"]),
        vision_config=dict(depth=2, embed_dim=48, num_heads=3, mlp_ratio=3,
                           hidden_size=s["hidden_size"]),
        image_token_id=ids["<|image_pad|>"], video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"], vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=s["tie"])
    torch.manual_seed(seed)
    model = Qwen2VLForConditionalGeneration(config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            # Norms and biases away from their trivial values, weights large enough to matter.
            if p.ndim == 1:
                p.add_(torch.randn_like(p) * 0.3)
            else:
                p.copy_(torch.randn_like(p) * (0.8 / p.shape[-1] ** 0.5 if "patch" not in name else 0.05))
    model.to(dtype).save_pretrained(folder, max_shard_size=max_shard_size)
    for name in TOKENIZER_FILES:
        shutil.copy(TOKENIZER / name, folder / name)
    template = json.loads((TOKENIZER / "tokenizer_config.json").read_text())["chat_template"]
    (folder / "chat_template.jinja").write_text(template)
    processor = json.loads((TOKENIZER / "preprocessor_config.json").read_text())
    low, high = pixels or (56 * 56, 28 * 28 * 64)
    processor |= dict(min_pixels=low, max_pixels=high,
                      size=dict(shortest_edge=low, longest_edge=high))
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder
