"""Random-weight folders of every family: the exact layout of the real ones, a thousand times smaller.

Each family says what is its own: configurations in a few variants, which between them exercise every
branch of tower and decoder, and the parts of its processor. Tokenizers are the small one of
testdata/processor with the family's special tokens added.
"""

import json
from pathlib import Path

import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from tokenizers.processors import TemplateProcessing
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
    LlavaOnevisionImageProcessorPil)
from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.smolvlm import processing_smolvlm
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

ROOT = Path(__file__).resolve().parents[2]
TOKENIZER = ROOT / "testdata/processor/model"
CHATML = json.loads((TOKENIZER / "tokenizer_config.json").read_text())["chat_template"]


def tokenizer(*special, **named):
    """The small tokenizer with more special tokens, by their texts, and names for some."""
    found = hf.AutoTokenizer.from_pretrained(TOKENIZER, **named)
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
        heads, kv, dim, section = (4, 2, 32, [6, 5, 5]) if tied else (4, 1, 16, [4, 2, 2])
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


class Qwen3VLMoe(Qwen3VL):
    """Mixtures in all layers, and in each second one beside MLPs for all tokens."""

    model_type = "qwen3_vl_moe"
    variants = ["all", "some"]
    model = hf.Qwen3VLMoeForConditionalGeneration

    @staticmethod
    def config(variant, ids, vocab):
        every = variant == "all"
        hidden, chosen = (64, 2) if every else (96, 3)
        experts = dict(num_experts=4, moe_intermediate_size=64) if every else \
            dict(num_experts=7, moe_intermediate_size=32, decoder_sparse_step=2, mlp_only_layers=[3])
        return hf.Qwen3VLMoeConfig(
            text_config=text(hidden, 4, 2, 96, 3 if every else 4, vocab_size=vocab, head_dim=32,
                             tie_word_embeddings=every, num_experts_per_tok=chosen, **experts,
                             rope_parameters=dict(rope_type="default", rope_theta=1e4,
                                                  mrope_section=[6, 5, 5], mrope_interleaved=True)),
            vision_config=dict(depth=3, hidden_size=48, num_heads=3, intermediate_size=80, patch_size=16,
                               out_hidden_size=hidden, num_position_embeddings=36,
                               deepstack_visual_indexes=[0, 2]),
            image_token_id=ids["<|image_pad|>"], video_token_id=ids["<|video_pad|>"],
            vision_start_token_id=ids["<|vision_start|>"], vision_end_token_id=ids["<|vision_end|>"],
            tie_word_embeddings=every)


SPECIAL = ["<image>", "<video>"]
# The templates of the hub write an image as this one token, which the processor multiplies.
SIMPLE = ("{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['content'] is string %}{{ m['content'] }}"
          "{% else %}{% for c in m['content'] %}{% if c['type'] == 'image' %}<image>\n"
          "{% elif 'text' in c %}{{ c['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


def tower(kind, side, patch=14, **more):
    """A small vision transformer's configuration."""
    return dict(model_type=kind, hidden_size=48, num_attention_heads=3, num_hidden_layers=3,
                image_size=side, patch_size=patch, **more)


class Llava:
    """One view; CLIP's last layer but one, SigLIP's last, DINOv2 with positions resampled."""

    model_type = "llava"
    variants = ["clip", "siglip", "dinov2"]
    model = hf.LlavaForConditionalGeneration

    @staticmethod
    def config(variant, ids, vocab):
        more = dict(
            clip=dict(vision_config=tower("clip_vision_model", 56, intermediate_size=80),
                      text_config=text(64, 4, 2, 96, 2, vocab_size=vocab, model_type="llama",
                                       rope_parameters=dict(rope_type="llama3", rope_theta=1e4, factor=4.0,
                                                            low_freq_factor=1.0, high_freq_factor=4.0,
                                                            original_max_position_embeddings=64)),
                      vision_feature_layer=-2, vision_feature_select_strategy="default"),
            siglip=dict(vision_config=tower("siglip_vision_model", 56, intermediate_size=80,
                                            vision_use_head=False),
                        text_config=text(96, 6, 1, 128, 2, vocab_size=vocab, model_type="qwen2"),
                        vision_feature_layer=-1, vision_feature_select_strategy="full",
                        multimodal_projector_bias=False),
            dinov2=dict(vision_config=tower("dinov2", 70, mlp_ratio=2),
                        text_config=text(64, 4, 4, 96, 2, vocab_size=vocab, model_type="mistral",
                                         head_dim=32, sliding_window=None),
                        vision_feature_layer=2, vision_feature_select_strategy="full"),
        )[variant.removesuffix("-biased")]
        if variant.endswith("-biased"):
            more["multimodal_projector_bias"] = True
        return hf.LlavaConfig(image_token_index=ids["<image>"], **more)

    @staticmethod
    def processor(variant):
        images = dict(
            clip=lambda: CLIPImageProcessorPil(size=dict(shortest_edge=56),
                                               crop_size=dict(height=56, width=56)),
            siglip=lambda: CLIPImageProcessorPil(size=dict(height=56, width=56), do_center_crop=False,
                                                 image_mean=[0.5] * 3, image_std=[0.5] * 3),
            dinov2=lambda: CLIPImageProcessorPil(size=dict(shortest_edge=64),
                                                 crop_size=dict(height=56, width=56)),
        )[variant.removesuffix("-biased")]()
        return hf.LlavaProcessor(
            images, tokenizer(*SPECIAL), patch_size=14, chat_template=SIMPLE,
            vision_feature_select_strategy="default" if variant == "clip" else "full",
            num_additional_image_tokens=0 if variant.startswith("siglip") else 1)


class LlavaNext:
    """Tiles with margins on either axis, and a token at the end of each row."""

    model_type = "llava_next"
    variants = ["clip", "wide"]
    model = hf.LlavaNextForConditionalGeneration
    pinpoints = dict(clip=[[56, 112], [112, 56], [112, 112], [168, 56]], wide=[[42, 84], [84, 84], [126, 42]])

    @classmethod
    def config(cls, variant, ids, vocab):
        side = 56 if variant == "clip" else 42
        return hf.LlavaNextConfig(
            vision_config=tower("clip_vision_model", side, intermediate_size=80),
            text_config=text(64, 4, 2, 96, 2, vocab_size=vocab, model_type="mistral", sliding_window=None),
            image_token_index=ids["<image>"], image_grid_pinpoints=cls.pinpoints[variant])

    @classmethod
    def processor(cls, variant):
        side = 56 if variant == "clip" else 42
        images = LlavaNextImageProcessorPil(size=dict(shortest_edge=side),
                                            crop_size=dict(height=side, width=side),
                                            image_grid_pinpoints=cls.pinpoints[variant])
        return hf.LlavaNextProcessor(images, tokenizer(*SPECIAL), patch_size=14, chat_template=SIMPLE,
                                     vision_feature_select_strategy="default",
                                     num_additional_image_tokens=1)


class LlavaOnevision:
    """Tiles whose features are shrunk beyond a limit; several images give one view each."""

    model_type = "llava_onevision"
    variants = ["max_9", "max_2"]
    model = hf.LlavaOnevisionForConditionalGeneration
    pinpoints = [[56 * a, 56 * b] for a in range(1, 4) for b in range(1, 4)]

    @classmethod
    def config(cls, variant, ids, vocab):
        tied = variant == "max_2"
        return hf.LlavaOnevisionConfig(
            vision_config=tower("siglip_vision_model", 56, intermediate_size=80, vision_use_head=False),
            text_config=text(64, 4, 2, 96, 2, vocab_size=vocab, model_type="qwen2",
                             tie_word_embeddings=tied),
            tie_word_embeddings=tied, image_token_index=ids["<image>"], video_token_index=ids["<video>"],
            image_grid_pinpoints=cls.pinpoints, vision_aspect_ratio=f"anyres_{variant}")

    @classmethod
    def processor(cls, variant):
        images = LlavaOnevisionImageProcessorPil(size=dict(height=56, width=56),
                                                 image_grid_pinpoints=cls.pinpoints)
        return hf.LlavaOnevisionProcessor(
            images, tokenizer(*SPECIAL), hf.LlavaOnevisionVideoProcessor(), num_image_tokens=16,
            vision_feature_select_strategy="full", vision_aspect_ratio=f"anyres_{variant}",
            chat_template=SIMPLE)


# A template in the manner of SmolVLM's: roles with a capital, a space before a text, no system message.
SMOLVLM_TEMPLATE = (
    "<|im_start|>{% for m in messages %}{{ m['role'] | capitalize }}:"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}<image>{% else %} {{ c['text'] }}{% endif %}"
    "{% endfor %}<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}")

# Only the words for numbers of video frames need the package; images do without it.
processing_smolvlm.num2words = processing_smolvlm.num2words or str


def idefics3_config(kind, variant, ids, vocab, image):
    """Configuration of Idefics3 or SmolVLM for images of this kind."""
    tied = variant == "tied"
    hidden, heads, kv = (64, 4, 2) if tied else (96, 6, 1)
    return kind(
        text_config=text(hidden, heads, kv, 96, 3, vocab_size=vocab, model_type="llama",
                         rope_parameters=dict(rope_type="default", rope_theta=1e4)),
        vision_config=dict(hidden_size=48, intermediate_size=80, num_hidden_layers=3,
                           num_attention_heads=3, patch_size=image["patch"], image_size=image["size"]),
        image_token_id=ids[image.get("token", "<image>")], scale_factor=image["scale"],
        tie_word_embeddings=tied)


class Idefics3:
    """Tiles of pixels that patches do not divide, more of them than there are tokens for their
    places; images of one tile, whose patches look up positions that are not their own."""

    model_type = "idefics3"
    variants = ["tied", "untied"]
    images = {"tied": dict(patch=14, size=60, scale=2, n_tokens=4, edge=150),
              "untied": dict(patch=4, size=100, scale=5, n_tokens=25, edge=100)}

    @classmethod
    def config(cls, variant, ids, vocab):
        return idefics3_config(hf.Idefics3Config, variant, ids, vocab, cls.images[variant])

    model = hf.Idefics3ForConditionalGeneration

    @classmethod
    def processor(cls, variant):
        image = cls.images[variant]
        images = Idefics3ImageProcessorPil(size=dict(longest_edge=image["edge"]),
                                           max_image_size=dict(longest_edge=image["size"]))
        places = [f"<row_{row}_col_{col}>" for row in (1, 2) for col in (1, 2)]
        return hf.Idefics3Processor(images, tokenizer("<global-img>", *places),
                                    image_seq_len=image["n_tokens"],
                                    chat_template=SMOLVLM_TEMPLATE.replace(" | capitalize", ".capitalize()"))


class SmolVLM:
    """Images as they come, cut into tiles; images squeezed into one tile. The marks have names of
    the tokenizer's own in the one, and are plain text in the other."""

    model_type = "smolvlm"
    variants = ["tied", "untied"]
    images = {"tied": dict(patch=8, size=64, scale=4, n_tokens=4, token="<picture>"),
              "untied": dict(patch=14, size=84, scale=1, n_tokens=36)}

    @classmethod
    def config(cls, variant, ids, vocab):
        return idefics3_config(hf.SmolVLMConfig, variant, ids, vocab, cls.images[variant])

    model = hf.SmolVLMForConditionalGeneration

    @classmethod
    def processor(cls, variant):
        image, cut = cls.images[variant], variant == "tied"
        images = SmolVLMImageProcessorPil(
            do_resize=not cut, do_image_splitting=cut, size=dict(height=100, width=150),
            max_image_size=dict(longest_edge=image["size"]), image_mean=[0.4, 0.5, 0.6],
            image_std=[0.3, 0.25, 0.2])
        if cut:
            names = dict(fake_image_token="<mark>", image_token="<picture>", global_image_token="<all>")
            tokens = tokenizer(*names.values(), "<end_of_utterance>")
            tokens._set_model_specific_special_tokens(names)
        else:
            tokens = tokenizer("<image>")
        template = SMOLVLM_TEMPLATE.replace("<image>", image.get("token", "<image>"))
        return hf.SmolVLMProcessor(images, tokens, hf.SmolVLMVideoProcessor(),
                                   image_seq_len=image["n_tokens"], chat_template=template)


# As the hub's template: a first token, roles of its own, texts trimmed, an image as its opening mark.
TURNS = ("{{ bos_token }}{% for m in messages %}<start_of_turn>"
         "{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
         "{% if m['content'] is string %}{{ m['content'] | trim }}{% else %}{% for c in m['content'] %}"
         "{% if c['type'] == 'image' %}<start_of_image>{% elif 'text' in c %}{{ c['text'] | trim }}{% endif %}"
         "{% endfor %}{% endif %}<end_of_turn>\n{% endfor %}"
         "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}")


def rename(folder, starts):
    """Puts other starts in place of those of a folder's tensor names."""
    path = folder / "model.safetensors"

    def renamed(name):
        start = next((s for s in starts if name.startswith(s)), "")
        return starts.get(start, "") + name.removeprefix(start)

    save_file({renamed(name): tensor for name, tensor in load_file(path).items()}, path,
              metadata=dict(format="pt"))


class Gemma3:
    """Windows shorter than an image and than the prompt; kinds of layers named or by pattern; rope
    stretched on global layers; a first token that the tokenizer, too, would put; the names and keys of
    three generations."""

    model_type = "gemma3"
    variants = ["named", "pattern", "hub"]
    model = hf.Gemma3ForConditionalGeneration
    # Pixels on a side, and tokens of an image.
    sizes = dict(named=(56, 4), pattern=(84, 9), hub=(56, 16))

    @classmethod
    def config(cls, variant, ids, vocab):
        side, n_tokens = cls.sizes[variant]
        kinds = ["sliding_attention", "full_attention"]
        rope = dict(sliding_attention=dict(rope_type="default", rope_theta=100.0),
                    full_attention=dict(rope_type="linear", factor=8.0, rope_theta=1e4))
        more = dict(
            named=dict(layer_types=kinds[::-1] + kinds, sliding_window=5, head_dim=32, rope_parameters=rope,
                       query_pre_attn_scalar=24),
            pattern=dict(sliding_window_pattern=3, sliding_window=3, head_dim=16, attention_bias=True,
                         rope_scaling=dict(rope_type="linear", factor=2.0), rope_local_base_freq=1e3),
            hub=dict(sliding_window=20, head_dim=16, query_pre_attn_scalar=16,
                     rope_scaling=dict(rope_type="linear", factor=8.0)),
        )[variant]
        hidden, heads, kv, layers = dict(named=(64, 4, 2, 4), pattern=(96, 6, 1, 4), hub=(64, 4, 4, 7))[variant]
        return hf.Gemma3Config(
            text_config=text(hidden, heads, kv, 96, layers, vocab_size=vocab, model_type="gemma3_text", **more),
            vision_config=tower("siglip_vision_model", side, intermediate_size=80, vision_use_head=False),
            mm_tokens_per_image=n_tokens, boi_token_index=ids["<start_of_image>"],
            eoi_token_index=ids["<end_of_image>"], image_token_index=ids["<image_soft_token>"],
            tie_word_embeddings=variant != "pattern")

    @classmethod
    def processor(cls, variant):
        side, n_tokens = cls.sizes[variant]
        marks = dict(boi_token="<start_of_image>", eoi_token="<end_of_image>", image_token="<image_soft_token>")
        words = tokenizer("<bos>", "<start_of_turn>", "<end_of_turn>", *marks.values())
        words.add_special_tokens(dict(bos_token="<bos>"))
        words._set_model_specific_special_tokens(marks)
        words.backend_tokenizer.post_processor = TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", words.bos_token_id)])
        images = Gemma3ImageProcessorPil(size=dict(height=side, width=side))
        return hf.Gemma3Processor(images, words, chat_template=TURNS, image_seq_length=n_tokens)

    @staticmethod
    def publish(folder, variant):
        """Names and keys as they were when the variant's kind of folder was published."""
        if variant == "pattern":
            rename(folder, {"language_model.model.": "model.language_model.",
                            "language_model.lm_head.": "lm_head.",
                            "vision_tower.": "model.vision_tower.vision_model.",
                            "multi_modal_projector.": "model.multi_modal_projector."})
        if variant == "hub":
            rename(folder, {"vision_tower.": "vision_tower.vision_model."})
            path = folder / "config.json"
            config = json.loads(path.read_text())
            kept = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                    "head_dim", "model_type", "query_pre_attn_scalar", "sliding_window"]
            config["text_config"] = {key: config["text_config"][key] for key in kept}
            config["text_config"]["rope_scaling"] = dict(factor=8.0, rope_type="linear")
            del config["tie_word_embeddings"]
            path.write_text(json.dumps(config, indent=2))


class InternVL:
    """Several tiles and one, norms of both kinds, features before and after the tower's last norm, and
    rotary positions that are stretched beyond 32 tokens."""

    model_type = "internvl"
    variants = ["qwen2", "qwen3", "llama"]
    model = hf.InternVLForConditionalGeneration
    sides = dict(qwen2=56, qwen3=84, llama=28, converted=56)
    tiles = dict(qwen2=(1, 6), qwen3=(1, 1), llama=(2, 12), converted=(1, 12))

    @classmethod
    def config(cls, variant, ids, vocab):
        side, tied = cls.sides[variant], variant == "qwen2"
        texts = dict(
            qwen2=dict(max_position_embeddings=32,
                       rope_parameters=dict(rope_type="dynamic", rope_theta=1e4, factor=2.0)),
            qwen3=dict(head_dim=32, attention_bias=True), llama={}, converted={})
        towers = dict(
            # llama.cpp's converter knows the parts of the projector as layers, and so asks for four.
            converted=dict(num_hidden_layers=4, attention_bias=True),
            qwen2=dict(use_mean_pooling=False),
            qwen3=dict(use_qk_norm=True, norm_type="rms_norm", attention_bias=True),
            llama=dict(use_mean_pooling=False))
        return hf.InternVLConfig(
            text_config=text(64, 4, 2, 96, 2, vocab_size=vocab, tie_word_embeddings=tied,
                             model_type="qwen2" if variant == "converted" else variant, **texts[variant]),
            vision_config={**dict(hidden_size=48, num_attention_heads=3, num_hidden_layers=3, intermediate_size=80,
                                  image_size=[side, side]), **towers[variant]},
            vision_feature_layer=-2 if tied else -1, tie_word_embeddings=tied,
            image_token_id=ids["<IMG_CONTEXT>"], image_seq_length=(side // 28) ** 2)

    @classmethod
    def processor(cls, variant):
        side, (least, most) = cls.sides[variant], cls.tiles[variant]
        images = GotOcr2ImageProcessorPil(
            size=dict(height=side, width=side), min_patches=least, max_patches=most,
            image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225])
        named = dict(start_image_token="<img>", end_image_token="</img>",
                     context_image_token="<IMG_CONTEXT>", video_token="<video>")
        return hf.InternVLProcessor(
            images, tokenizer(*named.values(), **named), hf.InternVLVideoProcessor(),
            image_seq_length=(side // 28) ** 2,
            chat_template=SIMPLE.replace("<image>", "<IMG_CONTEXT>"))


# As the hub's templates: a first token, marks around what a user says, nothing before an answer.
INSTRUCTIONS = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST]"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}[IMG]{% elif 'text' in c %}{{ c['text'] }}{% endif %}"
    "{% endfor %}[/INST]{% elif m['role'] == 'system' %}[SYSTEM_PROMPT]{{ m['content'][0]['text'] }}[/SYSTEM_PROMPT]"
    "{% else %}{{ m['content'][0]['text'] }}<|im_end|>{% endif %}{% endfor %}")


def pixtral_processor(images, patch, **more):
    """The processor around images of any size; its tokenizer puts a first token that the template also
    writes."""
    marks = dict(image_token="[IMG]", image_break_token="[IMG_BREAK]", image_end_token="[IMG_END]")
    words = tokenizer("<s>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", *marks.values(), "[ROW]")
    words.add_special_tokens(dict(bos_token="<s>"))
    words.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", words.bos_token_id)])
    return hf.PixtralProcessor(PixtralImageProcessorPil(**images), words, patch_size=patch,
                               chat_template=INSTRUCTIONS, **{**marks, **more})


def rewrite(path, change):
    """Changes the JSON object in a file."""
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value, indent=2))


class Mistral3:
    """Squares of one, four and nine patches, some of which the sides leave over; windows and none; heads
    whose pairs of channels do not come out even between rows and columns; names and keys of three
    generations."""

    model_type = "mistral3"
    any_size = True
    variants = ["tied", "untied", "hub"]
    model = hf.Mistral3ForConditionalGeneration
    # Pixels on a side of a patch, and patches on a side of a token.
    sizes = dict(tied=(14, 2), untied=(8, 3), hub=(16, 1))

    @classmethod
    def config(cls, variant, ids, vocab):
        patch, merge = cls.sizes[variant]
        texts = dict(tied=dict(head_dim=32, sliding_window=None),
                     untied=dict(head_dim=24, sliding_window=9),
                     hub=dict(head_dim=32, sliding_window=None, rope_parameters=dict(
                         rope_type="default", rope_theta=1e9)))
        towers = dict(tied=dict(num_attention_heads=3, hidden_act="silu"),
                      untied=dict(num_attention_heads=8, hidden_act="gelu",
                                  rope_parameters=dict(rope_type="axial", rope_theta=100.0)),
                      hub=dict(num_attention_heads=2, hidden_act="gelu"))
        more = dict(tied=dict(vision_feature_layer=-1),
                    untied=dict(vision_feature_layer=-2, multimodal_projector_bias=True), hub={})
        return hf.Mistral3Config(
            text_config=text(64, 4, 2, 96, 3, vocab_size=vocab, model_type="mistral", **texts[variant]),
            vision_config=dict(model_type="pixtral", hidden_size=48, num_hidden_layers=3, intermediate_size=80,
                               image_size=112, patch_size=patch, **towers[variant]),
            image_token_index=ids["[IMG]"], spatial_merge_size=merge, tie_word_embeddings=variant == "tied",
            **more[variant])

    @classmethod
    def processor(cls, variant):
        patch, merge = cls.sizes[variant]
        images = dict(tied=dict(do_resize=False), untied=dict(size=dict(height=90, width=150)),
                      hub=dict(size=dict(longest_edge=100)))[variant]
        more = dict(image_break_token="[ROW]") if variant == "untied" else {}
        return pixtral_processor(images, patch, spatial_merge_size=merge, **more)

    @classmethod
    def publish(cls, folder, variant):
        """Names and keys as they were when the variant's kind of folder was published."""
        if variant == "untied":
            rename(folder, {"language_model.model.": "model.language_model.",
                            "language_model.lm_head.": "lm_head.", "vision_tower.": "model.vision_tower.",
                            "multi_modal_projector.": "model.multi_modal_projector."})
        if variant == "hub":
            rewrite(folder / "config.json", cls.as_on_the_hub)
            whole = json.loads((folder / "processor_config.json").read_text())
            images = whole.pop("image_processor")
            images["image_processor_type"] = "PixtralImageProcessorFast"
            (folder / "preprocessor_config.json").write_text(json.dumps(images))
            (folder / "processor_config.json").write_text(json.dumps(whole))

    @staticmethod
    def as_on_the_hub(config):
        """The keys of the first release, which is silent on tied embeddings and means none."""
        del config["tie_word_embeddings"]
        del config["text_config"]["tie_word_embeddings"]
        for part, theta in dict(text_config=1e9, vision_config=1e4).items():
            del config[part]["rope_parameters"]
            config[part]["rope_theta"] = theta
        config["vision_config"]["head_dim"] = 24


class Pixtral:
    """A LLaVA by its configuration: the tower's last layer and an inner one, language models of two
    kinds, linears with and without a bias."""

    model_type = "llava"
    name = "pixtral"
    any_size = True
    variants = ["untied", "tied"]
    model = hf.LlavaForConditionalGeneration

    @staticmethod
    def config(variant, ids, vocab):
        tied = variant == "tied"
        texts = (dict(model_type="llama") if tied else
                 dict(model_type="mistral", head_dim=32, sliding_window=None,
                      rope_parameters=dict(rope_type="default", rope_theta=1e9)))
        return hf.LlavaConfig(
            text_config=text(64, 4, 2, 96, 2, vocab_size=vocab, tie_word_embeddings=tied, **texts),
            vision_config=dict(model_type="pixtral", hidden_size=48, num_hidden_layers=3, intermediate_size=80,
                               image_size=112, patch_size=14 if tied else 16,
                               num_attention_heads=6 if tied else 3,
                               hidden_act="gelu" if tied else "silu"),
            vision_feature_layer=2 if tied else -1, vision_feature_select_strategy="full",
            image_token_index=ids["[IMG]"], tie_word_embeddings=tied, multimodal_projector_bias=not tied)

    @staticmethod
    def processor(variant):
        if variant == "tied":
            return pixtral_processor(dict(size=dict(longest_edge=150), image_mean=[0.4, 0.5, 0.6],
                                          image_std=[0.3, 0.25, 0.2]), 14)
        return pixtral_processor(dict(size=dict(longest_edge=100)), 16)


class PaliGemma:
    """Prompts that see all of themselves; one key head for all queries; caps that scores and logits come
    near, and none; windows shorter than an image and than the prompt; names of two generations. There is
    no template."""

    model_type = "paligemma"
    variants = ["gemma", "gemma2", "capless"]
    model = hf.PaliGemmaForConditionalGeneration

    @classmethod
    def config(cls, variant, ids, vocab):
        hidden, heads, kv = (64, 4, 1) if variant == "gemma" else (96, 6, 2)
        texts = dict(
            gemma=dict(model_type="gemma", head_dim=32),
            gemma2=dict(model_type="gemma2", head_dim=16, sliding_window=5, query_pre_attn_scalar=24,
                        attn_logit_softcapping=1.5, final_logit_softcapping=2.0),
            capless=dict(model_type="gemma2", head_dim=16, sliding_window=30, attn_logit_softcapping=None,
                         final_logit_softcapping=None))
        return hf.PaliGemmaConfig(
            text_config=text(hidden, heads, kv, 96, 3, vocab_size=vocab, **texts[variant]),
            vision_config=tower("siglip_vision_model", 84 if variant == "gemma" else 56, intermediate_size=80,
                                vision_use_head=False),
            projection_dim=hidden, hidden_size=hidden, vocab_size=vocab, image_token_index=ids["<image>"],
            tie_word_embeddings=variant != "capless")

    @staticmethod
    def processor(variant):
        side = 84 if variant == "gemma" else 56
        images = SiglipImageProcessorPil(size=dict(height=side, width=side))
        images.image_seq_length = (side // 14) ** 2
        words = tokenizer("<bos>", "<image>")
        words.chat_template = None
        words.add_special_tokens(dict(bos_token="<bos>"))
        words.backend_tokenizer.post_processor = TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", words.bos_token_id)])
        return hf.PaliGemmaProcessor(images, words)

    @staticmethod
    def publish(folder, variant):
        """Names as in releases 4.52 to 4.57, and the key of Gemma's first files."""
        if variant == "gemma":
            rewrite(folder / "config.json", lambda config: config["text_config"].update(hidden_act="gelu"))
        else:
            rename(folder, {"language_model.model.": "model.language_model.",
                            "language_model.lm_head.": "lm_head.", "vision_tower.": "model.vision_tower.",
                            "multi_modal_projector.": "model.multi_modal_projector."})


FAMILIES = {getattr(family, "name", family.model_type): family for family in
            [Qwen25VL, Qwen3VL, Qwen3VLMoe, Llava, LlavaNext, LlavaOnevision, Idefics3, SmolVLM, Gemma3, InternVL,
             Mistral3, Pixtral, PaliGemma]}


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
                matrices = p.ndim == 2 or "experts" in name
                p.copy_(torch.randn_like(p) * (0.8 / p.shape[-1] ** 0.5 if matrices else 0.05))
    model.generation_config.eos_token_id = ids["<|im_end|>"]
    model.to(dtype).save_pretrained(folder)
    processor.save_pretrained(folder)
    if hasattr(family, "publish"):
        family.publish(Path(folder), variant)
    return processor
