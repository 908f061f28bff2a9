"""Asks SGLang's own code what it makes of folders, and prints the answer as JSON.

    python engine_sglang.py SOURCES QUANTIZATION:FOLDER..

As `engine_vllm.py`, on what it takes for an NVIDIA GPU of SM 9.0. Names are turned as the model class's
`load_weights` turns them: prefixes, then parts of linears that run as one.
"""

import json
import re
import sys
import types

import stand_ins
import torch
import torch._dynamo  # noqa: F401
import torch._inductor.compile_fx  # noqa: F401  Before a stand-in answers for its Triton.
from engine_folders import Operations, answer_all, fits, groups_of

MISSING = ["IPython", "aiohttp", "cuda", "fastapi", "openai_harmony", "partial_json_parser",
           "pynvml", "sgl_kernel", "starlette", "triton", "tvm_ffi", "uvicorn", "uvloop", "xgrammar"]
DTYPE = torch.bfloat16
RUN_AS_ONE = [("qkv_proj", "q_proj", "q"), ("qkv_proj", "k_proj", "k"), ("qkv_proj", "v_proj", "v"),
              ("gate_up_proj", "up_proj", 1), ("gate_up_proj", "gate_proj", 0)]


def pretend_gpu():
    """One device of SM 9.0."""
    torch.ops._C = torch.ops.sgl_kernel = Operations()
    torch.version.cuda = "13.0"
    torch.cuda.is_available = lambda: True
    torch.cuda.device_count = lambda: 1
    torch.cuda.get_device_capability = lambda *_: (9, 0)
    torch.cuda.get_device_name = lambda *_: "NVIDIA H100"
    torch.cuda.current_device = lambda: 0
    torch.cuda.get_device_properties = lambda *_: types.SimpleNamespace(
        major=9, minor=0, name="NVIDIA H100", total_memory=80 << 30, multi_processor_count=132)


def quantization_of(config, asked, model):
    """SGLang's configuration object, by the rules of its `ModelConfig` and loader."""
    from sglang.srt.layers.quantization import QUANTIZATION_METHODS, get_quantization_config

    said = config["quantization_config"]
    overrides = (method.override_quantization_method(said, asked) for method in QUANTIZATION_METHODS.values())
    name = next(filter(None, overrides), said["quant_method"])
    assert asked in (None, name)
    mapping = getattr(model, "packed_modules_mapping", {})
    found = get_quantization_config(name).from_config(said | {"packed_modules_mapping": mapping})
    if DTYPE not in found.get_supported_act_dtypes():
        raise ValueError(f"{DTYPE} is not supported by {name}")
    found.apply_weight_name_mapper(model.hf_to_sglang_mapper)
    return found


def find(name):
    """Where a tensor of a Qwen2-VL goes."""
    for whole, part, shard in RUN_AS_ONE:
        if f".{part}." in name and "visual" not in name:
            return name.replace(part, whole), shard
    return name.replace("attn.qkv.", "attn.qkv_proj."), None


def build(name, config, group, quantization):
    """The linear that the decoder has under this name."""
    from sglang.srt.layers import linear

    linear._resolve_linear_group = lambda *_: None
    cols, rows = group.shape()
    shared = dict(bias=group.bias, params_dtype=DTYPE, quant_config=quantization, prefix=name)
    last = name.rsplit(".", 1)[1]
    if last == "qkv_proj":
        heads, kv = config["num_attention_heads"], config["num_key_value_heads"]
        return linear.QKVParallelLinear(cols, config["hidden_size"] // heads, heads, kv, **shared)
    if last == "gate_up_proj":
        return linear.MergedColumnParallelLinear(cols, [config["intermediate_size"]] * 2, **shared)
    return linear.RowParallelLinear(cols, rows, **shared)


def scheme_of(layer):
    """How SGLang reads a linear: kind of method, bits, group, symmetry."""
    method = layer.quant_method
    kind = type(method).__name__
    if kind == "UnquantizedLinearMethod":
        return None
    if kind == "CompressedTensorsLinearMethod":
        s = layer.scheme
        return [kind, 32 // s.pack_factor, s.group_size, s.symmetric]
    if kind == "HummingLinearMethod":
        s = method.weight_schema
        return [kind, s.bits, s.group_size, s.sym]
    q = method.quant_config
    return [kind, 32 // q.pack_factor, q.group_size, getattr(q, "is_sym", None)]


def treated(place, quantization):
    """Kind of method for a linear outside the decoder's layers."""
    from sglang.srt.layers.linear import ReplicatedLinear
    from sglang.srt.layers.vocab_parallel_embedding import ParallelLMHead

    kind = ParallelLMHead if place.endswith("lm_head") else ReplicatedLinear
    layer = kind.__new__(kind)
    torch.nn.Module.__init__(layer)
    layer.input_size, layer.output_size = 128, 128
    return type(quantization.get_quant_method(layer, place)).__name__


def describe(folder, asked):
    from sglang.srt.models.qwen2_vl import Qwen2VLForConditionalGeneration

    config = json.loads((folder / "config.json").read_text())
    quantization = quantization_of(config, asked, Qwen2VLForConditionalGeneration)
    groups, plain = groups_of(folder, find, "model.")
    answer = {"config": type(quantization).__name__, "layers": {}, "problems": {}}
    for place, group in groups.items():
        try:
            layer = build(place, config, group, quantization)
            answer["layers"][place] = scheme_of(layer)
            if problems := fits(layer, group.parts):
                answer["problems"][place] = problems
        except Exception as e:
            answer["layers"][place] = f"{type(e).__name__}: {e}"
    answer["plain"] = {place: treated(place, quantization) for place in [*plain, "lm_head"]}
    return answer


def main(sources, questions):
    sys.path.insert(0, sources)
    stand_ins.install(MISSING)
    pretend_gpu()
    answer_all(describe, questions)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
