"""Random-weight folders of every family: the exact layout of the real ones, a thousand times smaller.

Each family says what is its own: configurations in a few variants, which between them exercise every
branch of tower and decoder, and the parts of its processor. Tokenizers are the small one of
testdata/processor with the family's special tokens added.
"""

import json
from pathlib import Path

import torch
import transformers as hf
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

ROOT = Path(__file__).resolve().parents[2]
TOKENIZER = ROOT / "testdata/processor/model"
CHATML = json.loads((TOKENIZER / "tokenizer_config.json").read_text())["chat_template"]


def tokenizer(*special):
    """The small tokenizer with more special tokens, by their texts."""
    found = hf.AutoTokenizer.from_pretrained(TOKENIZER)
    known = found.get_vocab()
    found.add_tokens([hf.AddedToken(t, special=True, normalized=False) for t in special if t not in known],
                     special_tokens=True)
    return found


def text(hidden, heads, kv, inter, layers, **more):
    """The keys that every language model's configuration has."""
    return dict(hidden_size=hidden, num_attention_heads=heads, num_key_value_heads=kv,
                intermediate_size=inter, num_hidden_layers=layers, rms_norm_eps=1e-6,
                bos_token_id=None, pad_token_id=None, **more)


class Qwen25VL:
    """Windows of 2 × 2 tokens over grids that they do not divide, and one layer of whole frames."""

    model_type = "qwen2_5_vl"
    variants = ["tied", "untied"]

    @staticmethod
    def config(variant, ids, vocab):
        tied = variant == "tied"
        hidden = 64 if tied else 96
        heads, kv, section = (4, 2, [2, 3, 3]) if tied else (6, 1, [2, 2, 4])
        return hf.Qwen2_5_VLConfig(
            text_config=text(hidden, heads, kv, 96, 3, vocab_size=vocab, tie_word_embeddings=tied,
                             rope_parameters=dict(rope_type="default", rope_theta=1e4,
                                                  mrope_section=section)),
            vision_config=dict(depth=3, hidden_size=48, num_heads=3, intermediate_size=80,
                               out_hidden_size=hidden, window_size=56 if tied else 84,
                               fullatt_block_indexes=[1] if tied else [0, 2]),
            image_token_id=ids["<|image_pad|>"], video_token_id=ids["<|video_pad|>"],
            vision_start_token_id=ids["<|vision_start|>"], vision_end_token_id=ids["<|vision_end|>"],
            tie_word_embeddings=tied)

    model = hf.Qwen2_5_VLForConditionalGeneration

    @staticmethod
    def processor(variant):
        images = Qwen2VLImageProcessorPil(min_pixels=56 * 56, max_pixels=28 * 28 * 64, patch_size=14)
        return hf.Qwen2_5_VLProcessor(images, tokenizer(), hf.Qwen2VLVideoProcessor(),
                                      chat_template=CHATML)


class Qwen3VL:
    """Interleaved axes, DeepStack after two layers, learned positions resampled to odd grids."""

    model_type = "qwen3_vl"
    variants = ["tied", "untied"]

    @staticmethod
    def config(variant, ids, vocab):
        tied = variant == "tied"
        hidden = 64 if tied else 96
        heads, kv, dim, section = (4, 2, 32, [6, 5, 5]) if tied else (3, 1, 16, [4, 2, 2])
        return hf.Qwen3VLConfig(
            text_config=text(hidden, heads, kv, 96, 3, vocab_size=vocab, tie_word_embeddings=tied,
                             head_dim=dim, attention_bias=not tied,
                             rope_parameters=dict(rope_type="default", rope_theta=1e4,
                                                  mrope_section=section, mrope_interleaved=True)),
            vision_config=dict(depth=3, hidden_size=48, num_heads=3, intermediate_size=80, patch_size=16,
                               out_hidden_size=hidden, num_position_embeddings=36 if tied else 49,
                               deepstack_visual_indexes=[0, 2] if tied else [1]),
            image_token_id=ids["<|image_pad|>"], video_token_id=ids["<|video_pad|>"],
            vision_start_token_id=ids["<|vision_start|>"], vision_end_token_id=ids["<|vision_end|>"],
            tie_word_embeddings=tied)

    model = hf.Qwen3VLForConditionalGeneration

    @staticmethod
    def processor(variant):
        images = Qwen2VLImageProcessorPil(
            size=dict(shortest_edge=64 * 64, longest_edge=32 * 32 * 64), patch_size=16,
            image_mean=[0.5] * 3, image_std=[0.5] * 3)
        return hf.Qwen3VLProcessor(images, tokenizer(), hf.Qwen3VLVideoProcessor(), chat_template=CHATML)


FAMILIES = {family.model_type: family for family in [Qwen25VL, Qwen3VL]}


def make(folder, family, variant, seed=0, dtype=torch.float32):
    """Writes a model folder with its processor; returns the processor, whose image side is Pillow's."""
    family = FAMILIES[family]
    processor = family.processor(variant)
    ids = processor.tokenizer.get_vocab()
    vocab = (1 + max(ids.values()) + 63) // 64 * 64
    config = family.config(variant, ids, vocab)
    torch.manual_seed(seed)
    model = family.model(config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            # Norms and biases away from their trivial values, weights large enough to matter.
            if p.ndim <= 1:
                p.add_(torch.randn_like(p) * 0.3)
            else:
                p.copy_(torch.randn_like(p) * (0.8 / p.shape[-1] ** 0.5 if p.ndim == 2 else 0.05))
    model.generation_config.eos_token_id = ids["<|im_end|>"]
    model.to(dtype).save_pretrained(folder)
    processor.save_pretrained(folder)
    return processor
