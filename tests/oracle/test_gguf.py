"""GGUF folders against three readers that are not ours: the `gguf` package, which makes weights of
blocks; llama.cpp's converter, whose files of the same folders must be equal key by key and byte by byte;
and llama.cpp itself.

Environment: VLMQ_BIN, the vlmq program (default: target/release/vlmq); VLMQ_LLAMA_CPP, a source tree of
llama.cpp with its converter, and VLMQ_LLAMA_CPP_BIN, a folder with its programs llama-mtmd-cli and
llama-quantize. Tests that need what is not named are skipped, or fail if VLMQ_THIRD_PARTIES is "required".
`run` makes both, by llama_cpp.sh.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGUFReader
from safetensors import safe_open
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = os.environ.get("VLMQ_BIN", str(ROOT / "target/release/vlmq"))
MODEL = ROOT / "testbed/model"
CALIBRATION = ROOT / "testbed/calibration"
LLAMA_CPP = os.environ.get("VLMQ_LLAMA_CPP")
LLAMA_CPP_BIN = os.environ.get("VLMQ_LLAMA_CPP_BIN")

# What a file says of its maker and name; the converter guesses them from the folder's name.
# Where its tensors come from only vlmq writes.
IDENTITY = ["vlmq.origins", "general.name", "general.size_label", "general.basename", "general.finetune",
            "general.version", "general.quantized_by", "GGUF.kv_count"]


def vlmq(*arguments):
    done = subprocess.run([PROGRAM, *map(str, arguments)], capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr
    return done.stdout


def export(source, output):
    vlmq("export", source, "--format", "gguf", "--output", output)
    return [next(output.glob(f"{kind}-*.gguf"), None) for kind in ("model", "mmproj")]


def stream(words, bits, n):
    """The first n codes of dense little-endian bitstreams `[.., words]` of int32."""
    flat = np.unpackbits(words.astype("<u4").view(np.uint8), bitorder="little", axis=-1)
    codes = flat[..., :n * bits].reshape(*flat.shape[:-1], n, bits)
    return (codes << np.arange(bits, dtype=np.uint8)).sum(-1)


def dequantized(folder, module, bits):
    """The weight of a compressed-tensors module, in float32, by nothing but numpy."""
    with safe_open(next(folder.glob("*.safetensors")), "pt") as tensors:
        names = set(tensors.keys())
        rows, cols = tensors.get_tensor(f"{module}.weight_shape").tolist()
        codes = stream(tensors.get_tensor(f"{module}.weight_packed").numpy(), bits, cols).astype(np.float32)
        scales = tensors.get_tensor(f"{module}.weight_scale").float().numpy()
        zeros = np.full(scales.shape, 2 ** (bits - 1), np.float32)
        if f"{module}.weight_zero_point" in names:
            packed = tensors.get_tensor(f"{module}.weight_zero_point").numpy()
            zeros = stream(np.ascontiguousarray(packed.T), bits, rows).T.astype(np.float32)
    repeated = cols // scales.shape[1]
    return (codes - np.repeat(zeros, repeated, 1)) * np.repeat(scales, repeated, 1), scales


def weights(reader):
    return {t.name: t for t in reader.tensors}


LINEARS = dict(attn_q="self_attn.q_proj", attn_k="self_attn.k_proj", attn_v="self_attn.v_proj",
               attn_output="self_attn.o_proj", ffn_gate="mlp.gate_proj", ffn_up="mlp.up_proj",
               ffn_down="mlp.down_proj")


@pytest.mark.parametrize("bits,group,symmetry,kind", [
    (4, 64, "--symmetric", "Q4_0"), (3, 32, "--symmetric", "Q4_0"), (2, -1, "--symmetric", "Q4_0"),
    (4, 64, "--asymmetric", "Q4_1"), (3, -1, "--asymmetric", "Q4_1"), (2, 32, "--asymmetric", "Q4_1"),
    (8, 64, "--symmetric", "Q8_0")])
def test_blocks_are_our_weights(tmp_path, bits, group, symmetry, kind):
    folder = tmp_path / "quantized"
    vlmq("quantize", MODEL, "--calibration", CALIBRATION, "--samples", 1, "--method", "rtn", "--bits", bits,
         "--group-size", group, symmetry, "--output", folder)
    model, _ = export(folder, tmp_path / "gguf")
    assert model.name == f"model-{kind}.gguf"
    found = weights(GGUFReader(model))
    config = json.loads((MODEL / "config.json").read_text())
    n_moved = 0
    for layer in range(config["num_hidden_layers"]):
        for name, module in LINEARS.items():
            tensor = found[f"blk.{layer}.{name}.weight"]
            assert tensor.tensor_type.name == kind
            ours, scales = dequantized(folder, f"model.layers.{layer}.{module}", bits)
            theirs = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            if kind != "Q4_1":
                np.testing.assert_array_equal(theirs, ours)
                continue
            # The offset -d·z has up to 12 bits, of which f16 keeps 11: half a unit of the last at 15 steps.
            steps = np.abs(theirs - ours) / np.repeat(scales, ours.shape[1] // scales.shape[1], 1)
            assert steps.max() <= (2 ** bits - 1) * 2 ** -11
            n_moved += (steps > 0).sum()
    if kind == "Q4_1" and bits == 2:
        # Products of 8 and 2 bits fit.
        assert n_moved == 0


def on_super_blocks(folder, bits, home):
    """Quantizes the bundled model to scales that Q2_K or Q3_K hold."""
    recipe = home / "superblock.toml"
    recipe.write_text(f"[[rule]]\npattern = '.'\nbits = {bits}\ngroup_size = 16\nsymmetric = true\n"
                      "scale_dtype = 'superblock'\n")
    vlmq("quantize", MODEL, "--calibration", CALIBRATION, "--samples", 8, "--bits", bits, "--symmetric",
         "--recipe", recipe, "--set", "act_order=true", "--output", folder)


@pytest.mark.parametrize("bits,kind", [(3, "Q3_K"), (2, "Q2_K")])
def test_super_blocks_are_our_weights(tmp_path, bits, kind):
    folder = tmp_path / "quantized"
    on_super_blocks(folder, bits, tmp_path)
    model, _ = export(folder, tmp_path / "gguf")
    assert model.name == f"model-{kind}.gguf"
    found = weights(GGUFReader(model))
    for layer in range(json.loads((MODEL / "config.json").read_text())["num_hidden_layers"]):
        for name, module in LINEARS.items():
            tensor = found[f"blk.{layer}.{name}.weight"]
            ours, _ = dequantized(folder, f"model.layers.{layer}.{module}", bits)
            np.testing.assert_array_equal(gguf.quants.dequantize(tensor.data, tensor.tensor_type), ours)


CONVERTER = """
import runpy, sys
root, pre = sys.argv[1:3]
sys.path.insert(0, root)
import conversion.base as base
known = base.TextModel.get_vocab_base_pre
def named(self, tokenizer):
    try:
        return known(self, tokenizer)
    except NotImplementedError:
        # A vocabulary that nobody published: the converter knows no other.
        return pre
base.TextModel.get_vocab_base_pre = named
sys.argv = [root + "/convert_hf_to_gguf.py", *sys.argv[3:]]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def lacks(what):
    """Skips a test of somebody else's program that is not here, unless all of them must be."""
    (pytest.fail if os.environ.get("VLMQ_THIRD_PARTIES") == "required" else pytest.skip)(what)


def run_converter(folder, path, dtype, *more):
    if not LLAMA_CPP:
        lacks("VLMQ_LLAMA_CPP names no source tree of llama.cpp")
    command = [sys.executable, "-c", CONVERTER, LLAMA_CPP, "qwen2", str(folder), "--outfile", str(path),
               "--outtype", dtype, *more]
    return subprocess.run(command, capture_output=True, text=True)


def convert(folder, path, *more):
    """The converter's file of a folder, in the type that its tensors have."""
    with safe_open(next(folder.glob("*.safetensors")), "pt") as tensors:
        dtype = next(t.get_dtype() for t in map(tensors.get_slice, tensors.keys()) if len(t.get_shape()) == 2)
    done = run_converter(folder, path, {"BF16": "bf16", "F16": "f16", "F32": "f32"}[dtype], *more)
    assert done.returncode == 0, done.stderr[-3000:]
    return GGUFReader(path)


# Folders of codes that the converter makes numbers of, and what it says to those that it does not.
CONVERTED = [("compressed-tensors", bits, 64, kind, None) for bits in (2, 4, 8)
             for kind in ("symmetric", "asymmetric")]
CONVERTED += [("gptq", bits, group, kind, None) for bits in (2, 4, 8)
              for group, kind in ((64, "symmetric"), (64, "asymmetric"), (-1, "symmetric"))]
CONVERTED += [("compressed-tensors", 3, 64, "symmetric", "RuntimeError"),
              ("compressed-tensors", 4, -1, "symmetric", "AssertionError"),
              ("compressed-tensors", "mixed", 64, "symmetric", "multiple config groups"),
              ("gptq", 3, 64, "symmetric", "3-bit gptq dequantization is not yet implemented"),
              ("gptq", "mixed", 64, "symmetric", "Error")]


@pytest.mark.parametrize("form,bits,group,kind,refusal", CONVERTED)
def test_the_converter_makes_our_numbers_of_our_codes(tmp_path, form, bits, group, kind, refusal):
    folder, numbers = tmp_path / "quantized", tmp_path / "f32"
    recipe, more = tmp_path / "recipe.toml", []
    if bits == "mixed":
        recipe.write_text("[[rule]]\npattern = 'down_proj'\nbits = 8\n")
        bits, more = 4, ["--recipe", recipe]
    vlmq("quantize", MODEL, "--method", "rtn", "--bits", bits, f"--group-size={group}", f"--{kind}",
         "--format", form, "--output", folder, *more)
    done = run_converter(folder, tmp_path / "model.gguf", "f32")
    is_said = "its own converter takes this folder too" in (folder / "README.md").read_text()
    if refusal:
        print(done.stderr.strip().splitlines()[-1])
        assert done.returncode and refusal in done.stderr and not is_said
        return
    assert done.returncode == 0, done.stderr[-3000:]
    assert is_said
    vlmq("export", folder, "--format", "f32", "--output", numbers)
    ours, theirs = load_file(numbers / "model.safetensors"), weights(GGUFReader(tmp_path / "model.gguf"))
    for layer in range(json.loads((MODEL / "config.json").read_text())["num_hidden_layers"]):
        for name, module in LINEARS.items():
            expected = ours[f"model.layers.{layer}.{module}.weight"].numpy()
            np.testing.assert_array_equal(theirs[f"blk.{layer}.{name}.weight"].data, expected)


def compare(ours, theirs, ignored=(), class_last=False):
    """With `class_last` our table of positions has the class token's last, as llama.cpp reads it."""
    def keys(reader):
        values = {f.name: ([t.name for t in f.types], f.contents()) for f in reader.fields.values()}
        return {name: value for name, value in values.items() if name not in [*IDENTITY, *ignored]}

    ours_keys, theirs_keys = keys(ours), keys(theirs)
    assert sorted(ours_keys) == sorted(theirs_keys)
    for name, value in theirs_keys.items():
        assert ours_keys[name] == value, name
    ours, theirs = weights(ours), weights(theirs)
    assert sorted(ours) == sorted(theirs)
    for name, tensor in theirs.items():
        assert ours[name].tensor_type == tensor.tensor_type, name
        assert list(ours[name].shape) == list(tensor.shape), name
        if class_last and name == "v.position_embd.weight":
            np.testing.assert_array_equal(ours[name].data, np.roll(tensor.data, -1, axis=-2))
            continue
        assert ours[name].data.tobytes() == tensor.data.tobytes(), name


def test_the_bundled_model_is_as_the_converter_has_it(tmp_path):
    model, mmproj = export(MODEL, tmp_path / "gguf")
    assert (model.name, mmproj.name) == ("model-BF16.gguf", "mmproj-BF16.gguf")
    compare(GGUFReader(model), convert(MODEL, tmp_path / "model.gguf"))
    compare(GGUFReader(mmproj), convert(MODEL, tmp_path / "mmproj.gguf", "--mmproj"))


# Families of which the converter has both parts, and those of which it has the language model only.
CASES = [("qwen2_5_vl", "tied", True), ("qwen2_5_vl", "untied", False), ("qwen3_vl", "tied", True),
         ("qwen3_vl", "untied", True), ("idefics3", "tied", True), ("idefics3", "untied", True),
         ("smolvlm", "tied", True), ("smolvlm", "untied", True), ("llava", "clip", False),
         ("internvl", "converted", True)]


def edit(folder, family):
    """What the small folders have otherwise than those of the hub, and the converter asks for."""
    if family == "internvl":
        from families import rename
        rename(folder, {"language_model.model.": "model.language_model.", "language_model.lm_head.": "lm_head.",
                        "vision_tower.": "model.vision_tower.",
                        "multi_modal_projector.": "model.multi_modal_projector."})
    path = folder / "config.json"
    config = json.loads(path.read_text())
    if family in ("idefics3", "smolvlm"):
        config["text_config"]["architectures"] = ["LlamaForCausalLM"]
    if family == "qwen2_5_vl":
        # llama.cpp knows windows of this size only.
        config["vision_config"]["window_size"] = 112
    if family == "internvl":
        config["vision_config"]["architectures"] = ["InternVisionModel"]
        config["text_config"]["architectures"] = ["Qwen2ForCausalLM"]
    path.write_text(json.dumps(config))


def without_output_biases(folder):
    """llama.cpp has none for the output of attention."""
    path = folder / "model.safetensors"
    kept = {name: t for name, t in load_file(path).items() if not name.endswith("o_proj.bias")}
    save_file(kept, path, metadata=dict(format="pt"))


def test_biases_that_llama_cpp_does_not_load_are_refused(tmp_path):
    from families import make
    make(tmp_path / "model", "qwen3_vl", "untied")
    command = [PROGRAM, "export", tmp_path / "model", "--format", "gguf", "--output", tmp_path / "gguf"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 2 and "o_proj.bias" in done.stderr
    assert not (tmp_path / "gguf").exists()


@pytest.mark.parametrize("family,variant,has_mmproj", CASES)
def test_families_are_as_the_converter_has_them(tmp_path, family, variant, has_mmproj):
    from families import make
    folder = tmp_path / "model"
    make(folder, family, variant)
    edit(folder, family)
    if (family, variant) == ("qwen3_vl", "untied"):
        without_output_biases(folder)
    model, mmproj = export(folder, tmp_path / "gguf")
    compare(GGUFReader(model), convert(folder, tmp_path / "model.gguf"))
    if has_mmproj:
        theirs = convert(folder, tmp_path / "mmproj.gguf", "--mmproj")
        compare(GGUFReader(mmproj), theirs, class_last=family == "internvl")


def test_both_forms_of_internvl_have_one_mmproj(tmp_path):
    from families import InternVL, make
    from test_internvl import make_original
    from transformers import AutoModelForImageTextToText
    new, old, variant = tmp_path / "new", tmp_path / "old", "converted"
    make(new, "internvl", variant)
    make_original(old, new, AutoModelForImageTextToText.from_pretrained(new), variant, InternVL.sides[variant])
    (_, ours), (_, theirs) = (export(folder, tmp_path / f"{folder.name}-gguf") for folder in (new, old))
    compare(GGUFReader(ours), GGUFReader(theirs))


# Towers whose projectors are written, each with the side of images that neither side resizes and what
# its template has between image and question. llama.cpp names the others' image tokens by itself.
# The seed is one whose answers differ from picture to picture.
TOWERS = [("qwen2_5_vl", "tied", 3, 112, ""), ("qwen3_vl", "tied", 3, 128, ""),
          ("llava", "siglip-biased", 3, 56, "<__media__>\n"), ("internvl", "converted", 0, 56, "<__media__>\n")]


def weigh_positions(folder):
    """Makes where a patch is as telling as what it shows: random tables are small beside random patches."""
    path = folder / "model.safetensors"
    save_file({name: t * 20 if "position_embedding" in name else t for name, t in load_file(path).items()}, path,
              metadata=dict(format="pt"))


def spelled(folder, ids):
    """The bytes of a byte-level BPE's tokens, special ones left out."""
    from tokenizers import Tokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    special = tokenizer.get_added_tokens_decoder()
    byte_of = {character: byte for byte, character in bytes_to_unicode().items()}
    return bytes(byte_of[c] for i in ids if i not in special for c in tokenizer.id_to_token(i) or "")


@pytest.mark.parametrize("family,variant,seed,side,lead", TOWERS)
def test_llama_cpp_generates_as_we_do(tmp_path, family, variant, seed, side, lead):
    """Answers of random weights about random pictures, which no small mistake in a tower leaves the same."""
    from families import make
    from PIL import Image
    folder, png = tmp_path / "model", tmp_path / "image.png"
    make(folder, family, variant, seed)
    edit(folder, family)
    weigh_positions(folder)
    files = export(folder, tmp_path / "gguf")
    ours, theirs = [], []
    for picture in range(8):
        pixels = np.random.default_rng(picture).integers(0, 255, (side // 14, side // 14, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((side, side), Image.BICUBIC).save(png)
        question = ["what is this?", "how many of them are there, and where?"][picture % 2]
        answer = json.loads(vlmq("generate", folder, "--image", png, "--prompt", question, "--max-new-tokens", 24,
                                 "--json"))
        ours.append(spelled(folder, answer["output_ids"]).replace(b"\0", b"").strip())
        # llama.cpp prints special tokens too, and no byte zero.
        found = llama_answer(*files, lead + question, png, n=24)
        theirs.append(re.sub(rb"<\|?\w+\|?>", b"", found).strip())
    print(*zip(ours, theirs), sep="\n")
    assert len(set(ours)) >= 3
    assert sum(a[:12] == b[:12] for a, b in zip(ours, theirs)) >= 7


def llama_cpp(program):
    """A program of llama.cpp's own."""
    path = Path(LLAMA_CPP_BIN or "") / program
    if not LLAMA_CPP_BIN:
        lacks("VLMQ_LLAMA_CPP_BIN names no folder with programs of llama.cpp")
    return path


def llama_answer(model, mmproj, question, png, n=32):
    """llama.cpp's greedy answer about an image, on the CPU and with nothing in memory below f32. Bytes: a model
    of random weights writes halves of characters."""
    command = [llama_cpp("llama-mtmd-cli"), "-m", model, "--mmproj", mmproj, "--image", png, "-p", question,
               "--temp", "0", "-n", n, "-c", "512", "-t", "2", "-fa", "off", "-ctk", "f32", "-ctv", "f32",
               "--no-warmup"]
    done = subprocess.run(list(map(str, command)), capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip()


# Images of 168 × 168, which neither side resizes.
TASK, N_QUESTIONS = ROOT / "testbed/eval/counting.parquet", 60


def answers(folder, output):
    vlmq("eval", folder, "--task", TASK, "--limit", N_QUESTIONS, "--output", output)
    found = json.loads((output / "predictions.json").read_text())["counting"]
    return {entry["id"]: entry["answer"] for entry in found}


# llama.cpp rounds the inputs of a linear: to bfloat16 beside weights of it, to 8 bits beside blocks.
@pytest.mark.parametrize("scheme,n_equal", [
    (None, 58), ((4, 64, "--symmetric"), 56), ((4, 64, "--asymmetric"), 56), ((3, 32, "--symmetric"), 56),
    ("super-blocks", 54)])
def test_llama_cpp_answers_as_we_do(tmp_path, scheme, n_equal):
    import pyarrow.parquet as pq
    folder = MODEL
    if scheme == "super-blocks":
        folder = tmp_path / "quantized"
        on_super_blocks(folder, 3, tmp_path)
    elif scheme:
        folder = tmp_path / "quantized"
        bits, group, symmetry = scheme
        vlmq("quantize", MODEL, "--calibration", CALIBRATION, "--samples", 8, "--bits", bits,
             "--group-size", group, symmetry, "--output", folder)
    files = export(folder, tmp_path / "gguf")
    ours = answers(folder, tmp_path / "eval")
    theirs, png = {}, tmp_path / "image.png"
    for row in pq.read_table(TASK).slice(0, N_QUESTIONS).to_pylist():
        png.write_bytes(row["image"]["bytes"])
        theirs[row["id"]] = llama_answer(*files, row["question"], png).decode()
    different = {key: (ours[key], theirs[key]) for key in theirs if ours[key] != theirs[key]}
    print(f"{scheme}: {len(theirs) - len(different)} of {len(theirs)} answers are equal")
    assert len(theirs) - len(different) >= n_equal, different


def test_the_importance_matrix_has_an_entry_for_every_linear(tmp_path):
    folder = tmp_path / "quantized"
    vlmq("quantize", MODEL, "--calibration", CALIBRATION, "--samples", 4, "--imatrix", "--output", folder)
    _, _ = export(folder, tmp_path / "gguf")
    reader = GGUFReader(tmp_path / "gguf/imatrix.gguf")
    assert reader.fields["general.type"].contents() == "imatrix"
    found = weights(reader)
    model = weights(GGUFReader(next((tmp_path / "gguf").glob("model-*.gguf"))))
    linears = [name for name in model if name.split(".")[-2] in LINEARS and name.endswith(".weight")]
    assert sorted(found) == sorted(f"{name}.{part}" for name in linears for part in ("counts", "in_sum2"))
    for name in linears:
        sums, counts = found[f"{name}.in_sum2"], found[f"{name}.counts"]
        assert list(sums.shape) == [model[name].shape[0], 1] and list(counts.shape) == [1, 1]
        assert np.isfinite(sums.data).all() and (sums.data >= 0).all() and counts.data[0, 0] > 0


def test_the_importance_matrix_has_the_means_of_squares(tmp_path, monkeypatch):
    """Of plain GPTQ, whose tokens weigh alike, they are those of the inputs that transformers' linears see,
    the diagonal of H: exactly in the first layer's attention, and nearly behind weights of 8 bits."""
    monkeypatch.syspath_prepend(ROOT / "benches/rivals")
    import torch
    from samples import conversations, inputs_of, processor_of, write_folder
    from transformers import AutoModelForImageTextToText
    folder, samples = tmp_path / "quantized", tmp_path / "samples"
    write_folder(CALIBRATION, samples, 0, 4)
    vlmq("quantize", MODEL, "--calibration", samples, "--samples", 4, "--method", "gptq", "--bits", 8,
         "--group-size", 32, "--imatrix", "--output", folder)
    found = weights(GGUFReader(folder / "imatrix.gguf"))
    model = AutoModelForImageTextToText.from_pretrained(MODEL, dtype=torch.float32).eval()
    sums, n_tokens = {}, {}

    def watch(name):
        def hook(_, arguments):
            seen = arguments[0].reshape(-1, arguments[0].shape[-1]).double()
            sums[name] = sums.get(name, 0) + (seen ** 2).sum(0)
            n_tokens[name] = n_tokens.get(name, 0) + len(seen)
        return hook

    layers = model.model.language_model.layers
    for layer, block in enumerate(layers):
        for name, module in LINEARS.items():
            block.get_submodule(module).register_forward_pre_hook(watch(f"blk.{layer}.{name}.weight"))
    processor = processor_of(MODEL)
    with torch.no_grad():
        for chat in conversations(samples):
            model(**inputs_of(processor, chat))
    assert sorted(f"{name}.in_sum2" for name in sums) == sorted(n for n in found if n.endswith(".in_sum2"))
    worst = {}
    for name, expected in sums.items():
        assert found[f"{name}.counts"].data.item() == n_tokens[name], name
        theirs, ours = expected.numpy(), found[f"{name}.in_sum2"].data.reshape(-1)
        worst[name] = np.abs(ours - theirs).max() / theirs.max()
    print({name: f"{value:.1e}" for name, value in worst.items()})
    first = [worst[f"blk.0.attn_{part}.weight"] for part in "qkv"]
    assert max(first) < 1e-5 and max(worst.values()) < 5e-3


def test_llama_quantize_reads_the_importance_matrix(tmp_path):
    """With it a file is made of 2-bit blocks that llama.cpp refuses to make without, and another one."""
    folder = tmp_path / "quantized"
    vlmq("quantize", MODEL, "--calibration", CALIBRATION, "--samples", 4, "--imatrix", "--output", folder)
    plain, _ = export(MODEL, tmp_path / "plain")

    def requantized(kind, imatrix):
        output = tmp_path / f"{kind}-{imatrix is not None}.gguf"
        more = ["--imatrix", imatrix] if imatrix else []
        command = [llama_cpp("llama-quantize"), *more, plain, output, kind]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
        return output if done.returncode == 0 else None, done.stdout + done.stderr

    matrix = folder / "imatrix.gguf"
    assert requantized("IQ2_XS", None)[0] is None
    output, told = requantized("IQ2_XS", matrix)
    assert output, told
    # llama.cpp tells what it does not find: the embedding alone, which is no linear.
    missed = [line.split("did not find weights for ")[1].split()[0] for line in told.splitlines()
              if "did not find weights for " in line]
    assert missed == ["token_embd.weight"]
    kinds = {name: tensor.tensor_type.name for name, tensor in weights(GGUFReader(output)).items()}
    assert kinds["blk.1.ffn_up.weight"] == "IQ2_XS"
    with_matrix, without = (requantized("Q4_K_S", m)[0].read_bytes() for m in (matrix, None))
    assert with_matrix != without
