"""Loading of folders with quantized experts in transformers.

Such folders name each expert's linears, as quantized mixtures are published and as vLLM reads them.
transformers 5.23 keeps the experts of a layer in one parameter and merges them only for model types
whose checkpoints are published expert by expert, which Qwen3-VL-MoE's are not.
"""

import torch
import transformers as hf
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
from safetensors.torch import load_file
from transformers.conversion_mapping import (get_checkpoint_conversion_mapping,
                                             register_checkpoint_conversion_mapping)


def load_merged(folder):
    """By transformers alone, told that experts come one by one. It knows no zero points there."""
    before = get_checkpoint_conversion_mapping("qwen3_vl_moe")
    register_checkpoint_conversion_mapping(
        "qwen3_vl_moe", get_checkpoint_conversion_mapping("qwen2_moe"), overwrite=True)
    try:
        return hf.AutoModelForImageTextToText.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True,
            quantization_config=hf.CompressedTensorsConfig(dequantize=True))
    finally:
        register_checkpoint_conversion_mapping("qwen3_vl_moe", before, overwrite=True)


def load_unpacked(folder):
    """By transformers, but for the experts, which compressed-tensors unpacks one by one."""
    model, report = hf.AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True)
    tensors = {k: v for path in folder.glob("*.safetensors") for k, v in load_file(path).items()}
    scheme = next(m.quantization_scheme for m in model.modules() if hasattr(m, "quantization_scheme"))
    known = set()
    for name, experts in model.named_modules():
        if type(experts).__name__ != "Qwen3VLMoeTextExperts":
            continue

        def weight(expert, role):
            prefix = f"{name}.{expert}.{role}."
            own = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
            known.update(prefix + k for k in own)
            return PackedQuantizationCompressor.decompress(own, scheme)["weight"]

        with torch.no_grad():
            for e in range(experts.num_experts):
                gate_up = torch.cat([weight(e, "gate_proj"), weight(e, "up_proj")])
                experts.gate_up_proj[e].copy_(gate_up)
                experts.down_proj[e].copy_(weight(e, "down_proj"))
        for role in ("gate_up_proj", "down_proj"):
            report["missing_keys"].remove(f"{name}.{role}")
    report["unexpected_keys"] = set(report["unexpected_keys"]) - known
    return model, report
