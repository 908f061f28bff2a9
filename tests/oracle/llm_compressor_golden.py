"""Writes testdata/others/llm-compressor: a small random Qwen2-VL that llm-compressor's GPTQ quantized,
attention to 4 bits, symmetric, the MLP to 3 bits, asymmetric, in groups of 32.

Usage: llm_compressor_golden.py, in an environment with llmcompressor 0.14.0.1 (see
benches/rivals/environments.sh). Only config.json and the packed tensors are kept; all else of the
folder is what `random_qwen2_vl.make` makes with the same seed.
"""

import shutil
import tempfile
from pathlib import Path

import compressed_tensors
import llmcompressor
import torch
import transformers
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from random_qwen2_vl import ROOT, make
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader

OUT = ROOT / "testdata/others/llm-compressor"


def scheme(target, bits, symmetric):
    weights = dict(num_bits=bits, type="int", symmetric=symmetric, strategy="group", group_size=32)
    return dict(targets=[target], weights=weights)


def quantize(source, out):
    model = transformers.Qwen2VLForConditionalGeneration.from_pretrained(source, dtype="auto")
    groups = dict(group_0=scheme("re:.*language_model.*self_attn.*", 4, True), group_1=scheme("re:.*language_model.*mlp.*", 3, False))
    recipe = GPTQModifier(config_groups=groups, ignore=["re:.*lm_head", "re:.*visual.*"],
                          actorder="static")
    generator = torch.Generator().manual_seed(0)
    inputs = [dict(input_ids=torch.randint(0, 200, (1, 64), generator=generator)) for _ in range(8)]
    oneshot(model=model, dataset=DataLoader(inputs, batch_size=None), recipe=recipe,
            num_calibration_samples=len(inputs), pipeline="sequential",
            sequential_targets=["Qwen2VLDecoderLayer"])
    model.save_pretrained(out, save_compressed=True)


def main():
    with tempfile.TemporaryDirectory() as home:
        source = make(Path(home) / "source", "tied", dtype=torch.bfloat16)
        quantize(source, Path(home) / "out")
        shutil.rmtree(OUT, ignore_errors=True)
        OUT.mkdir(parents=True)
        shutil.copy(Path(home) / "out/config.json", OUT / "config.json")
        packed = load_file(Path(home) / "out/model.safetensors")
    packed = {name: t for name, t in packed.items() if ".weight_" in name}
    save_file(packed, OUT / "packed.safetensors", metadata=dict(
        llmcompressor=llmcompressor.__version__, torch=torch.__version__,
        compressed_tensors=compressed_tensors.__version__, transformers=transformers.__version__))


if __name__ == "__main__":
    main()
