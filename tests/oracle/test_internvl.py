"""InternVL in OpenGVLab's form: the random -hf folders with their parts renamed and their settings moved
to config.json must give the same as they do, and tiles the same as the published way to cut them.

Environment: VLMQ_BIN, the vlmq program (default: target/release/vlmq).
"""

import json
import re
import shutil
import subprocess

import pytest
import torch
import torchvision.transforms.functional as tvf
from families import InternVL, make
from PIL import Image
from safetensors.torch import load_file, save_file
from test_families import PROGRAM, PROMPT, ROOT, TOLERANCE, inputs_of, patches_of, saved_pictures, vlmq
from test_parity import IMAGES, relative
from transformers import AutoModelForImageTextToText

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]

# What transformers calls the parts, and what OpenGVLab does.
NAMES = [
    (r"^model\.language_model\.", "language_model.model."),
    (r"^lm_head\.", "language_model.lm_head."),
    (r"^model\.multi_modal_projector\.layer_norm", "mlp1.0"),
    (r"^model\.multi_modal_projector\.linear_1", "mlp1.1"),
    (r"^model\.multi_modal_projector\.linear_2", "mlp1.3"),
    (r"^model\.vision_tower\.", "vision_model."),
    (r"cls_token$", "class_embedding"),
    (r"patch_embeddings\.projection", "patch_embedding"),
    (r"position_embeddings$", "position_embedding"),
    (r"encoder\.layer\.", "encoder.layers."),
    (r"attention\.projection_layer", "attn.proj"),
    (r"attention\.([qk]_norm)", r"attn.\1"),
    (r"layernorm_before", "norm1"),
    (r"layernorm_after", "norm2"),
    (r"lambda_", "ls"),
]


def renamed(state):
    """The tensors under OpenGVLab's names, queries, keys and values of the tower in one."""
    found, apart = {}, {}
    for name, tensor in state.items():
        part = re.search(r"vision_tower.*attention\.([qkv])_proj", name)
        for old, new in NAMES:
            name = re.sub(old, new, name)
        if part:
            fused = re.sub(r"attention\.[qkv]_proj", "attn.qkv", name)
            apart.setdefault(fused, {})[part[1]] = tensor
        elif not name.startswith("vision_model.layernorm."):
            found[name] = tensor.contiguous()
    joined = {name: torch.cat([parts[p] for p in "qkv"]) for name, parts in apart.items()}
    return found | joined


def original_config(config, variant, side):
    """The settings of a -hf folder as OpenGVLab's code reads them, for images of another side too."""
    text, tower = dict(config["text_config"]), config["vision_config"]
    rope = text.pop("rope_parameters")
    text["rope_theta"] = rope.pop("rope_theta")
    text["rope_scaling"] = rope if rope["rope_type"] != "default" else None
    least, most = InternVL.tiles[variant]
    keys = ["hidden_size", "num_attention_heads", "num_hidden_layers", "intermediate_size", "hidden_act",
            "norm_type", "layer_norm_eps", "num_channels"]
    return dict(
        model_type="internvl_chat", architectures=["InternVLChatModel"], llm_config=text,
        vision_config={key: tower[key] for key in keys} | dict(
            model_type="intern_vit_6b", qkv_bias=tower["attention_bias"],
            qk_normalization=tower["use_qk_norm"], patch_size=14, image_size=tower["image_size"][0]),
        force_image_size=side, dynamic_image_size=most > 1, use_thumbnail=True,
        min_dynamic_patch=least, max_dynamic_patch=most, downsample_ratio=0.5, ps_version="v2",
        select_layer=config["vision_feature_layer"], template="internvl2_5",
        tie_word_embeddings=config["tie_word_embeddings"])


def make_original(folder, new, model, variant, side):
    """Writes the folder `new` of `model` in OpenGVLab's form."""
    folder.mkdir()
    state = renamed(model.state_dict())
    config = json.loads((new / "config.json").read_text())
    if config["tie_word_embeddings"]:
        del state["language_model.lm_head.weight"]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(original_config(config, variant, side)))
    for name in ["tokenizer.json", "tokenizer_config.json", "generation_config.json"]:
        (folder / name).write_bytes((new / name).read_bytes())
    template = (new / "chat_template.jinja").read_text().replace("<IMG_CONTEXT>", "<image>")
    (folder / "chat_template.jinja").write_text(template)
    if variant == "qwen3":
        (folder / "preprocessor_config.json").write_text(json.dumps(dict(
            feature_extractor_type="CLIPFeatureExtractor", crop_size=448, size=448, resample=3,
            do_center_crop=True, do_normalize=True, do_resize=True, image_mean=MEAN, image_std=STD)))


@pytest.fixture(scope="module", params=["qwen2", "qwen3"])
def pair(request, tmp_path_factory):
    """A -hf folder, the same in OpenGVLab's form, the processor and the model."""
    home, variant = tmp_path_factory.mktemp("internvl"), request.param
    new, old = home / "new", home / "old"
    processor = make(new, "internvl", variant)
    model = AutoModelForImageTextToText.from_pretrained(
        new, dtype=torch.float32, attn_implementation="eager").eval()
    make_original(old, new, model, variant, InternVL.sides[variant])
    return variant, new, old, processor, model


def trace(folder, paths, output):
    flags = [part for path in paths for part in ("--image", path)]
    vlmq("trace", folder, *flags, "--prompt", PROMPT, "--output", output)
    return load_file(output)


def published_tiles(path, side, least, most, adds_whole=True):
    """Pixel values as OpenGVLab's model cards describe them."""
    image = Image.open(path).convert("RGB")
    width, height = image.size
    grids = sorted(((c, r) for c in range(1, most + 1) for r in range(1, most + 1)
                    if least <= c * r <= most), key=lambda g: g[0] * g[1])
    nearest = min(abs(width / height - c / r) for c, r in grids)
    tied = [(c, r) for c, r in grids if abs(width / height - c / r) == nearest]
    filled = [(c, r) for c, r in tied[1:] if width * height > side * side * c * r / 2]
    cols, rows = (filled or tied[:1])[-1]
    whole = image.resize((cols * side, rows * side))
    tiles = [whole.crop((c * side, r * side, (c + 1) * side, (r + 1) * side))
             for r in range(rows) for c in range(cols)]
    if adds_whole and len(tiles) > 1:
        tiles.append(image.resize((side, side)))
    return torch.stack([tvf.normalize(tvf.to_tensor(tile), MEAN, STD) for tile in tiles])


@pytest.mark.parametrize("images", IMAGES)
def test_same_as_hf(pair, tmp_path, images):
    variant, new, old, _, _ = pair
    paths = saved_pictures(tmp_path, IMAGES[images])
    ours, theirs = (trace(f, paths, tmp_path / f"{f.name}.safetensors") for f in (old, new))
    assert ours.keys() == theirs.keys()
    for key in ours:
        same = torch.equal if key not in ("image_features", "logits") else \
            lambda a, b: relative(a, b) <= TOLERANCE
        assert same(ours[key], theirs[key]), key
    if paths:
        tiles = [published_tiles(p, InternVL.sides[variant], *InternVL.tiles[variant]) for p in paths]
        assert torch.equal(ours["pixel_values"], patches_of(torch.cat(tiles), 14))


def test_names_without_conversion(pair, tmp_path):
    """The names that the parts have in transformers itself, to which it converts those of its files."""
    _, new, _, _, model = pair
    folder = tmp_path / "model"
    shutil.copytree(new, folder)
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    if json.loads((new / "config.json").read_text())["tie_word_embeddings"]:
        del state["lm_head.weight"]
    assert not state.keys() & load_file(new / "model.safetensors").keys() - {"lm_head.weight"}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    paths = saved_pictures(tmp_path, IMAGES["odd"])
    ours, theirs = (trace(f, paths, tmp_path / f"{f.name}.safetensors") for f in (folder, new))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_internlm2_is_refused(pair, tmp_path):
    _, _, old, _, _ = pair
    folder = tmp_path / "model"
    shutil.copytree(old, folder)
    config = json.loads((folder / "config.json").read_text())
    config["llm_config"]["model_type"] = "internlm2"
    (folder / "config.json").write_text(json.dumps(config))
    done = subprocess.run([PROGRAM, "inspect", folder], capture_output=True, text=True)
    assert done.returncode == 2
    assert "wqkv" in done.stderr


def test_images_of_another_size(pair, tmp_path):
    """Learned positions are resampled when the tiles are larger than those of the first training."""
    variant, new, _, processor, model = pair
    side = InternVL.sides[variant] + 28
    make_original(tmp_path / "old", new, model, variant, side)
    paths = saved_pictures(tmp_path, IMAGES["odd"])
    ours = trace(tmp_path / "old", paths, tmp_path / "trace.safetensors")
    processor = InternVL.processor(variant)
    processor.image_processor.size = dict(height=side, width=side)
    processor.image_seq_length = (side // 28) ** 2
    inputs = inputs_of(processor, paths, PROMPT)
    with torch.no_grad():
        logits = model(**inputs).logits[0]
    assert ours["input_ids"].tolist() == inputs["input_ids"][0].tolist()
    assert relative(ours["logits"], logits) <= TOLERANCE


def test_quantized_like_hf(pair, tmp_path):
    _, new, old, _, _ = pair
    paths = saved_pictures(tmp_path, IMAGES["odd"])
    found = []
    for folder in (old, new):
        output = tmp_path / folder.name
        vlmq("quantize", folder, "--calibration", ROOT / "testbed/calibration", "--output", output,
             "--method", "vlmq-v2", "--samples", 4, "--bits", 3, "--group-size", 32, "--asymmetric",
             "--set", "importance_loss=layer")
        found.append(trace(output, paths, tmp_path / f"{folder.name}.safetensors")["logits"])
    assert relative(*found) <= TOLERANCE
