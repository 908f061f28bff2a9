"""Asks vLLM's own code what it makes of folders, and prints the answer as JSON.

    python engine_vllm.py SOURCES QUANTIZATION:FOLDER..

It takes itself to be on an NVIDIA GPU of SM 9.0, so that it chooses the kernels that it would choose
there; none is run. Its linears are built on the CPU, outside any model, and the folder's tensors are
given to their own weight loaders under the names that the model classes' own mappers make of them.
"""

import json
import re
import sys
import types

import stand_ins
import torch
import torch._inductor.compile_fx  # noqa: F401  Before a stand-in answers for its Triton.
from engine_folders import Operations, answer_all, fits, groups_of

MISSING = ["aiohttp", "anthropic", "cuda", "cv2", "depyf", "fastapi", "ijson", "lark", "llguidance",
           "lmformatenforcer", "mcp", "mistral_common", "numba", "openai_harmony", "outlines_core",
           "partial_json_parser", "prometheus_client", "setproctitle", "starlette", "tiktoken",
           "triton_kernels.matmul", "uvicorn", "uvloop", "watchfiles", "xgrammar",
           # Compiled parts of vLLM itself, which are not unpacked.
           "vllm._C", "vllm._C_stable_libtorch", "vllm._moe_C", "vllm._moe_C_stable_libtorch",
           "vllm.vllm_flash_attn._vllm_fa2_C", "vllm.vllm_flash_attn._vllm_fa3_C"]
# Class that holds the decoder, by the configuration's model type, and the one around it.
DECODERS = {"qwen2": ("qwen2", "Qwen2ForCausalLM"), "llama": ("llama", "LlamaForCausalLM"),
            "qwen3": ("qwen3", "Qwen3ForCausalLM"), "qwen2_vl": ("qwen2", "Qwen2ForCausalLM"),
            "qwen2_vl_text": ("qwen2", "Qwen2ForCausalLM"),
            "qwen2_5_vl_text": ("qwen2", "Qwen2ForCausalLM"),
            "qwen3_vl_text": ("qwen3_vl", "Qwen3LLMForCausalLM")}
DTYPE = torch.bfloat16


def pretend_gpu():
    """One device of one group, of SM 9.0."""
    torch.ops._C = Operations()
    import vllm.platforms
    from vllm.platforms.cuda import NonNvmlCudaPlatform
    from vllm.platforms.interface import DeviceCapability

    class Gpu(NonNvmlCudaPlatform):
        @classmethod
        def get_device_capability(cls, device_id=0):
            return DeviceCapability(9, 0)

        @classmethod
        def get_device_name(cls, device_id=0):
            return "NVIDIA H100"

    vllm.platforms._current_platform = Gpu()
    import vllm.distributed.parallel_state as state
    state._TP = types.SimpleNamespace(world_size=1, rank_in_group=0)


def classes_of(config):
    """The model class of a folder's configuration, and that of its decoder."""
    from importlib import import_module

    from vllm.model_executor.models.registry import _VLLM_MODELS

    module, name = _VLLM_MODELS[config["architectures"][0]]
    text = config.get("text_config", config)
    pairs = [(module, name), DECODERS[text.get("model_type", config["model_type"])]]
    return [getattr(import_module(f"vllm.model_executor.models.{m}"), n) for m, n in pairs]


def quantization_of(folder, config, asked, outer, inner):
    """vLLM's configuration object, told of the mappers as vLLM tells it."""
    from vllm.model_executor.layers.quantization import get_quantization_config
    from vllm.model_executor.model_loader.utils import configure_quant_config

    said = config["quantization_config"]
    names = [said["quant_method"]]
    for name in (["humming"] if asked else []) + ["auto_gptq", "auto_awq"]:
        override = get_quantization_config(name).override_quantization_method(said, asked, hf_config=None)
        names += [override] if override else []
    name = "humming" if "humming" in names else names[-1]
    found = get_quantization_config(name).from_config(said)
    assert DTYPE in found.get_supported_act_dtypes()
    found.maybe_update_config(str(folder))
    configure_quant_config(found, outer)
    for model in (outer, inner):
        if hasattr(model, "_maybe_apply_model_mapping"):
            model._maybe_apply_model_mapping(types.SimpleNamespace(
                quant_config=found, hf_to_vllm_mapper=model.hf_to_vllm_mapper,
                packed_modules_mapping=getattr(model, "packed_modules_mapping", None)))
    return found


class Names:
    """Where a tensor of a checkpoint goes: parameter, and part of it."""

    def __init__(self, outer, inner, quantization):
        self.outer = outer.hf_to_vllm_mapper
        inner = getattr(inner, "hf_to_vllm_mapper", None)
        self.last = quantization.get_cache_scale_mapper() | quantization.get_checkpoint_weight_mapper()
        self.inner = inner | self.last if inner else self.last

    def find(self, name):
        name = self.outer.map_name(name)
        if name and name.startswith("language_model."):
            # The decoder's own mapper sees its own names.
            found = self.inner._map_name_with_shard(name.removeprefix("language_model."))
            return found and (f"language_model.{found[0]}", found[1])
        name = name and self.last.map_name(name)
        return name and (name, None)


def scheme_of(layer):
    """How vLLM reads a linear: kind of method, bits, group, symmetry, kernel."""
    method = layer.quant_method
    kind = type(method).__name__
    if kind == "UnquantizedLinearMethod":
        return None
    if kind == "CompressedTensorsLinearMethod":
        s = layer.scheme
        return [kind, s.num_bits, s.group_size, s.symmetric, type(s.kernel).__name__]
    if kind == "HummingLinearMethod":
        s = method.weight_schema
        return [kind, s.bits, s.group_size, s.sym, "humming"]
    q = method.quant_config
    return [kind, q.weight_bits, q.group_size, getattr(q, "is_sym", None),
            type(getattr(method, "kernel", None)).__name__]


def build(name, config, group, quantization):
    """The linear that the decoder has under this name."""
    from vllm.model_executor.layers import linear

    text = config.get("text_config", config)
    cols, rows = group.shape()
    shared = dict(bias=group.bias, params_dtype=DTYPE, quant_config=quantization, prefix=name)
    last = name.rsplit(".", 1)[1]
    if last == "qkv_proj":
        heads, kv = text["num_attention_heads"], text["num_key_value_heads"]
        head = text.get("head_dim") or text["hidden_size"] // heads
        return linear.QKVParallelLinear(cols, head, heads, kv, **shared)
    if last == "gate_up_proj":
        return linear.MergedColumnParallelLinear(cols, [text["intermediate_size"]] * 2, **shared)
    return linear.RowParallelLinear(cols, rows, **shared)


def describe(folder, asked):
    config = json.loads((folder / "config.json").read_text())
    outer, inner = classes_of(config)
    # Of Humming's own imports; vLLM has already found that it is without Triton.
    stand_ins.install(["triton"])
    quantization = quantization_of(folder, config, asked, outer, inner)
    names = Names(outer, inner, quantization)
    groups, plain = groups_of(folder, names.find, "language_model.")
    answer = {"config": type(quantization).__name__, "layers": {}, "problems": {}}
    for place, group in groups.items():
        try:
            layer = build(place, config, group, quantization)
            answer["layers"][place] = scheme_of(layer)
            if problems := fits(layer, group.parts):
                answer["problems"][place] = problems
        except Exception as e:
            answer["layers"][place] = f"{type(e).__name__}: {e}"
    plain += ["language_model.lm_head"]
    answer["plain"] = {place: treated(place, quantization) for place in plain}
    return answer


def treated(place, quantization):
    """Kind of method for a linear outside the decoder's layers."""
    from vllm.model_executor.layers.linear import ReplicatedLinear
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    kind = ParallelLMHead if place.endswith("lm_head") else ReplicatedLinear
    layer = kind.__new__(kind)
    torch.nn.Module.__init__(layer)
    layer.input_size, layer.output_size = 128, 128
    for fused, members in quantization.packed_modules_mapping.items():
        for member in members:
            place = re.sub(rf"\.{member}$", f".{fused}", place)
    return type(quantization.get_quant_method(layer, place)).__name__


def main(sources, questions):
    sys.path.insert(0, sources)
    stand_ins.install(MISSING)
    pretend_gpu()
    answer_all(describe, questions)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
