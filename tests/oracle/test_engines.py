"""Folders in the formats of vLLM 0.33.0 and SGLang 0.5.23, read by these engines' own code.

The engines' Python sources come from their wheels (`engines.sh`). Each answers in a process of its own
(`engine_vllm.py`, `engine_sglang.py`), on what it takes for an NVIDIA GPU of SM 9.0. Exercised are, for
every linear of the decoder as the engine fuses them: the choice of the configuration's class and its
`from_config`; which linears it quantizes, with what bits, groups and symmetry, and which it leaves alone;
the kernel that vLLM would run; the parameters that `create_weights` makes; and that the weight loaders of
the layer classes take every tensor of ours into them, whole, by the names that vLLM's model classes map
ours to. SGLang's Qwen2-VL maps names within `load_weights`, whose few rules are written out here.

Not exercised: no kernel runs and no weight is repacked for one, no model is built (so that attention,
embeddings and vision towers are not), and there is one device only. Packages that the engines import and
that none of this needs are stood in for (`stand_ins.py`), compiled operations are absent.

Environment: as `folders.py` says; VLMQ_ENGINES, a folder that `engines.sh` filled or may fill (default:
target/engines). Where the wheels cannot be had tests are skipped, or fail if VLMQ_THIRD_PARTIES is
"required".
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from families import make
from folders import MODEL, ROOT, vlmq

HERE = Path(__file__).parent
ENGINES = Path(os.environ.get("VLMQ_ENGINES", ROOT / "target/engines"))
SCHEMES = [(bits, group, kind) for bits in (2, 3, 4, 8)
           for group, kind in ((64, "symmetric"), (64, "asymmetric"), (-1, "symmetric"))]
BY_AWQ = [scheme for scheme in SCHEMES if scheme[0] == 4]
# Down projections, or only the values of the attention, at 8 bits where the rest has 4.
MIXED = {"down": r"\.down_proj$", "value": r"\.v_proj$", "attention": r"layers\.1\.self_attn\.[qkv]_proj$"}
FAMILIES = [("qwen2_5_vl", "untied"), ("qwen3_vl", "untied"), ("llava", "clip")]
FORMS = ["compressed-tensors", "gptq", "awq"]


def name_of(scheme):
    return "-".join(map(str, scheme))


def quantize(output, model, scheme, *more):
    bits, group, kind = scheme
    vlmq("quantize", model, "--output", output, "--method", "rtn", "--bits", bits,
         f"--group-size={group}", f"--{kind}", *more)


def export(home, name, forms):
    for form in forms:
        source = home / f"compressed-tensors-{name}"
        vlmq("export", source, "--format", form, "--output", home / f"{form}-{name}")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Every folder that is asked about, as `form-name`."""
    home = tmp_path_factory.mktemp("engines")
    for scheme in SCHEMES:
        quantize(home / f"compressed-tensors-{name_of(scheme)}", MODEL, scheme)
        export(home, name_of(scheme), FORMS[1:3 if scheme in BY_AWQ else 2])
    for name, pattern in MIXED.items():
        recipe = home / f"{name}.toml"
        recipe.write_text(f"[[rule]]\npattern = '{pattern}'\nbits = 8\n")
        quantize(home / f"compressed-tensors-{name}", MODEL, (4, 64, "symmetric"), "--recipe", recipe)
        export(home, name, ["gptq"])
    for family, variant in FAMILIES:
        make(home / family, family, variant)
        quantize(home / f"compressed-tensors-{family}", home / family, (4, 32, "symmetric"))
        export(home, family, FORMS[2:])
    return home


@pytest.fixture(scope="module")
def engines():
    command = ["bash", HERE / "engines.sh", sys.prefix, ENGINES]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=900)
    if done.returncode:
        lack = pytest.fail if os.environ.get("VLMQ_THIRD_PARTIES") == "required" else pytest.skip
        lack(f"the engines' wheels are not to be had: {done.stderr[-500:]}")


def answers(script, sources, home):
    """What an engine says of all folders, and of GPTQ's when told to use Humming."""
    names = [path.name for path in sorted(home.iterdir()) if path.name.startswith(tuple(FORMS))]
    questions = [f":{home / name}" for name in names]
    questions += [f"humming:{home / name}" for name in names if name.startswith("gptq")]
    command = [sys.executable, HERE / script, ENGINES / sources, *questions]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=900)
    line = [line for line in done.stdout.splitlines() if line.startswith("ANSWER")]
    assert line, done.stderr[-3000:]
    found = json.loads(line[0].removeprefix("ANSWER"))
    return {question.replace(f"{home}/", ""): answer for question, answer in found.items()}


@pytest.fixture(scope="module")
def vllm(home, engines):
    return answers("engine_vllm.py", "vllm", home)


@pytest.fixture(scope="module")
def sglang(home, engines):
    return answers("engine_sglang.py", "sglang", home)


def check_whole(answer, expected, n_layers=4):
    """Every linear of the decoder has this format and takes our tensors; nothing else is quantized."""
    assert "refused" not in answer, answer
    assert not answer["problems"], answer["problems"]
    assert len(answer["layers"]) == 4 * n_layers
    assert all(found[:4] == expected for found in answer["layers"].values()), answer["layers"]
    assert set(answer["plain"].values()) <= {"UnquantizedLinearMethod", "NoneType"}, answer["plain"]
    assert any("visual" in name for name in answer["plain"])


def kernels(answer):
    return {found[4] for found in answer["layers"].values()}


@pytest.mark.parametrize("scheme", SCHEMES, ids=name_of)
def test_vllm_reads_compressed_tensors(vllm, scheme):
    bits, group, kind = scheme
    answer = vllm[f":compressed-tensors-{name_of(scheme)}"]
    check_whole(answer, ["CompressedTensorsLinearMethod", bits, group, kind == "symmetric"])
    assert (kernels(answer) == {"HummingLinearKernel"}) == (bits < 4)


@pytest.mark.parametrize("scheme", SCHEMES, ids=name_of)
def test_vllm_reads_gptq(vllm, scheme):
    bits, group, kind = scheme
    answer = vllm[f":gptq-{name_of(scheme)}"]
    if bits < 4 or kind == "asymmetric":
        assert "Unsupported quantization config" in answer["refused"]
    else:
        check_whole(answer, ["AutoGPTQLinearMethod", bits, group, True])


@pytest.mark.parametrize("scheme", BY_AWQ, ids=name_of)
def test_vllm_reads_awq(vllm, scheme):
    check_whole(vllm[f":awq-{name_of(scheme)}"], ["AutoAWQMarlinLinearMethod", 4, scheme[1], None])


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
@pytest.mark.parametrize("scheme", SCHEMES, ids=name_of)
def test_humming_reads_gptq(engine, scheme, request):
    bits, group, kind = scheme
    answer = request.getfixturevalue(engine)[f"humming:gptq-{name_of(scheme)}"]
    if group == -1:
        # Its schema divides by the size of a group, which is -1 here.
        assert all(found.startswith("RuntimeError") for found in answer["layers"].values())
    else:
        # It makes room for a plain weight, and for an order of columns that vLLM drops and nothing reads.
        spare = {"weight: no tensor for it", "g_idx: no tensor for it"}
        assert all(set(problems) <= spare for problems in answer["problems"].values())
        answer = answer | {"problems": {}}
        check_whole(answer, ["HummingLinearMethod", bits, group, kind == "symmetric"])


@pytest.mark.parametrize("scheme", SCHEMES, ids=name_of)
def test_sglang_reads_compressed_tensors(sglang, scheme):
    bits, group, kind = scheme
    answer = sglang[f":compressed-tensors-{name_of(scheme)}"]
    if bits < 4:
        assert all(found.startswith("ImportError") for found in answer["layers"].values())
    else:
        check_whole(answer, ["CompressedTensorsLinearMethod", bits, group, kind == "symmetric"])


@pytest.mark.parametrize("scheme", SCHEMES, ids=name_of)
def test_sglang_reads_gptq(sglang, scheme):
    bits, group, kind = scheme
    answer = sglang[f":gptq-{name_of(scheme)}"]
    if bits < 4 or kind == "asymmetric":
        assert "Invalid quantization method: gptq" in answer["refused"]
    else:
        check_whole(answer, ["GPTQMarlinLinearMethod", bits, group, True])


@pytest.mark.parametrize("scheme", BY_AWQ, ids=name_of)
def test_sglang_reads_awq(sglang, scheme):
    check_whole(sglang[f":awq-{name_of(scheme)}"], ["AWQLinearMethod", 4, scheme[1], None])


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
@pytest.mark.parametrize("form", FORMS[:2])
@pytest.mark.parametrize("mixture,last", [("down", ".down_proj"),
                                          ("attention", "layers.1.self_attn.qkv_proj")])
def test_wholes_have_their_own_bits(engine, form, mixture, last, request):
    answer = request.getfixturevalue(engine)[f":{form}-{mixture}"]
    assert not answer["problems"], answer["problems"]
    for name, found in answer["layers"].items():
        assert found[1] == (8 if name.endswith(last) else 4), name


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
@pytest.mark.parametrize("form", FORMS[:2])
def test_parts_of_one_linear_must_be_alike(engine, form, request):
    """Neither engine says so when it reads the configuration: a tensor does not fit its parameter."""
    answer = request.getfixturevalue(engine)[f":{form}-value"]
    of_attention = {name for name in answer["layers"] if name.endswith("qkv_proj")}
    assert set(answer["problems"]) == of_attention


@pytest.mark.parametrize("form", ["compressed-tensors", "awq"])
@pytest.mark.parametrize("family,variant", FAMILIES)
def test_vllm_knows_the_linears_of_families(vllm, form, family, variant):
    answer = vllm[f":{form}-{family}"]
    assert "refused" not in answer, answer
    assert not answer["problems"], answer["problems"]
    assert all(found[1:3] == [4, 32] for found in answer["layers"].values()), answer["layers"]
    assert set(answer["plain"].values()) <= {"UnquantizedLinearMethod", "NoneType"}, answer["plain"]
    assert len(answer["plain"]) > 4 and len(answer["layers"]) > 4
