"""Tokenizer, configuration, and fast forms of transformers' own forward for equal-sized images."""

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import Qwen2VLConfig

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>",
           "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"]
# Qwen2's rule of what a word is.
SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
         r"|\s*[\r\n]+|\s+(?!\S)|\s+")
# ChatML as Qwen2-VL writes it, without a system message of its own.
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' or 'image' in part %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif 'text' in part %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
MEAN, STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
N_PATCHES, N_TOKENS = 144, 36


def make_tokenizer(corpus, folder, vocab=512):
    """Trains a byte-level BPE and writes the tokenizer's and the processor's files."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(SPLIT), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(corpus, trainers.BpeTrainer(
        vocab_size=vocab - len(SPECIAL), min_frequency=2, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    tokenizer.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in SPECIAL])
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    write = lambda name, value: (folder / name).write_text(json.dumps(value, indent=1) + "\n")
    write("tokenizer_config.json", dict(
        tokenizer_class="Qwen2Tokenizer", eos_token="<|im_end|>", pad_token="<|endoftext|>",
        bos_token=None, unk_token=None, model_max_length=4096, errors="replace",
        additional_special_tokens=SPECIAL[1:], chat_template=TEMPLATE,
        clean_up_tokenization_spaces=False, split_special_tokens=False, add_prefix_space=False))
    write("chat_template.json", dict(chat_template=TEMPLATE))
    pixels = N_PATCHES * 14 * 14
    write("preprocessor_config.json", dict(
        image_processor_type="Qwen2VLImageProcessor", processor_class="Qwen2VLProcessor",
        min_pixels=pixels, max_pixels=pixels, size=dict(shortest_edge=pixels, longest_edge=pixels),
        patch_size=14, temporal_patch_size=2, merge_size=2, do_resize=True, do_rescale=True,
        do_normalize=True, do_convert_rgb=True, resample=3, rescale_factor=1 / 255,
        image_mean=MEAN, image_std=STD))
    return tokenizer


def make_config(tokenizer, layers):
    ids = tokenizer.token_to_id
    vocab = -(-tokenizer.get_vocab_size() // 64) * 64
    # Base 100: over 6 columns the six slowest angles turn by 0.05 to 0.3 radians, so that what a
    # question names is found wherever it stands. Base 3 turned them by 2 to 3, and every place was
    # learned for itself. Places are told by the features.
    rope = dict(rope_type="default", rope_theta=100.0, mrope_section=[4, 6, 6])
    return Qwen2VLConfig(
        text_config=dict(
            vocab_size=vocab, hidden_size=256, intermediate_size=768, num_hidden_layers=layers,
            num_attention_heads=8, num_key_value_heads=2, max_position_embeddings=4096,
            rms_norm_eps=1e-6, rope_parameters=rope, initializer_range=0.06,
            bos_token_id=ids("<|endoftext|>"), eos_token_id=ids("<|im_end|>"), pad_token_id=None,
            tie_word_embeddings=True),
        vision_config=dict(depth=4, embed_dim=128, hidden_size=256, num_heads=4, mlp_ratio=4,
                           patch_size=14, spatial_merge_size=2, temporal_patch_size=2,
                           in_channels=3, initializer_range=0.05),
        image_token_id=ids("<|image_pad|>"), video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids("<|vision_start|>"), vision_end_token_id=ids("<|vision_end|>"),
        tie_word_embeddings=True)


_MEAN = torch.tensor(MEAN).view(1, 3, 1, 1) * 255
_STD = torch.tensor(STD).view(1, 3, 1, 1) * 255


def patches(pixels):
    """uint8 `[batch, 168, 168, 3]` to `[batch, 144, 1176]` in the processor's order."""
    x = (torch.as_tensor(pixels).permute(0, 3, 1, 2).float() - _MEAN) / _STD
    x = x.view(len(x), 3, 6, 2, 14, 6, 2, 14).permute(0, 2, 5, 3, 6, 1, 4, 7)
    return x.unsqueeze(6).expand(-1, -1, -1, -1, -1, -1, 2, -1, -1).reshape(len(x), N_PATCHES, -1)


def _half_turned(x):
    a, b = x.chunk(2, -1)
    return torch.cat([-b, a], -1)


def _patch_angles(head_dim):
    at = torch.arange(N_PATCHES)
    group, inner = at // 4, at % 4
    row, col = group // 6 * 2 + inner // 2, group % 6 * 2 + inner % 2
    freqs = 1.0 / 10000 ** (torch.arange(0, head_dim // 2, 2) / (head_dim // 2))
    angles = torch.cat([row[:, None] * freqs, col[:, None] * freqs], 1)
    return torch.cat([angles, angles], 1)


def image_features(tower, x):
    """The tower's `[batch, 36, hidden]` for patches `[batch, 144, 1176]`, all images at once."""
    h = F.linear(x, tower.patch_embed.proj.weight.flatten(1))
    for block in tower.blocks:
        a = block.attn
        q, k, v = a.qkv(block.norm1(h)).view(len(h), N_PATCHES, 3, a.num_heads, -1).permute(2, 0, 3, 1, 4)
        angles = _patch_angles(q.shape[-1])
        cos, sin = angles.cos(), angles.sin()
        turn = lambda t: t * cos + _half_turned(t) * sin
        out = F.scaled_dot_product_attention(turn(q), turn(k), v)
        h = h + a.proj(out.transpose(1, 2).reshape(h.shape))
        h = h + block.mlp(block.norm2(h))
    return tower.merger(h.reshape(-1, h.shape[-1])).view(len(h), N_TOKENS, -1)


class Pack:
    """One image and `n_slots` questions in a sequence. A question sees the image and itself, at
    the positions of a prompt of its own: the same function as `n_slots` prompts, at less cost."""

    def __init__(self, tokenizer, n_slots, slot):
        self.n_slots, self.slot = n_slots, slot
        self.encode = lambda text: tokenizer.encode(text).ids
        image = [tokenizer.token_to_id("<|image_pad|>")] * N_TOKENS
        before = self.encode("<|im_start|>user\n<|vision_start|>")
        self.prefix = before + image + self.encode("<|vision_end|>")
        self.start = len(before)
        self.middle = self.encode("<|im_end|>\n<|im_start|>assistant\n")
        self.end, self.pad = self.encode("<|im_end|>"), tokenizer.token_to_id("<|endoftext|>")
        p, a = len(self.prefix), len(before)
        text = lambda lo, n: torch.arange(lo, lo + n).expand(3, n)
        g = torch.arange(N_TOKENS)
        spread = torch.stack([torch.full((N_TOKENS,), a), a + g // 6, a + g % 6])
        self.positions = torch.cat(
            [text(0, a), spread, text(a + 6, 1)] + [text(a + 7, slot)] * n_slots, 1)
        n = p + n_slots * slot
        seen = torch.zeros(n, n, dtype=torch.bool)
        seen[:, :p] = True
        for k in range(n_slots):
            b = p + k * slot
            seen[b:b + slot, b:b + slot] = True
        self.mask = (seen & torch.ones_like(seen).tril())[None, None]
        self.cache = {}

    def fits(self, question, answer):
        return len(self._row(question, answer)[0]) <= self.slot

    def _row(self, question, answer):
        if (question, answer) not in self.cache:
            x, y = self.encode(question) + self.middle, self.encode(answer) + self.end
            free = self.slot - len(x) - len(y)
            labels = [-100] * (len(x) - 1) + y + [-100] * (free + 1)
            self.cache[question, answer] = (x + y + [self.pad] * free, labels)
        return self.cache[question, answer]

    def batch(self, questions):
        """Ids and labels `[batch, n]`; the label at a token is the token after it, or -100."""
        ids, labels = [], []
        for slots in questions:
            i, l = list(self.prefix), [-100] * len(self.prefix)
            for question, answer in slots:
                a, b = self._row(question, answer)
                i, l = i + a, l + b
            ids.append(i)
            labels.append(l)
        return torch.tensor(ids), torch.tensor(labels)


def hidden_states(model, pack, features, ids):
    """The decoder's output `[batch, n, hidden]` for image features `[batch, 36, hidden]`."""
    decoder = model.model.language_model
    x = decoder.embed_tokens(ids)
    x = torch.cat([x[:, :pack.start], features, x[:, pack.start + N_TOKENS:]], 1)
    positions = pack.positions[:, None].expand(3, len(ids), -1)
    return decoder(inputs_embeds=x, position_ids=positions, use_cache=False,
                   attention_mask={"full_attention": pack.mask}).last_hidden_state
