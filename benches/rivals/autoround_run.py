"""Quantizes the decoder of a model folder with AutoRound on CPU and prints one JSON line.

Usage: autoround_run.py MODEL --samples FOLDER --out OUT --bits 3 --group 128

FOLDER: samples.jsonl in LLaVA form with its images, all of which are used. OUT becomes the same model
with the decoded weights of every decoder linear in f32, all else as it was: code, scale and zero point
are AutoRound's, and no rounding comes on top of theirs.
"""

import argparse
import json
import os
import random
import shutil
import time
from pathlib import Path

START = time.time()
THREADS = os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["HF_HUB_OFFLINE"] = "1"

import auto_round
import torch
import transformers
from auto_round import AutoRound
from auto_round.calibration.mllm import MLLMCalibrator
from auto_round.calibration.register import CALIBRATORS
from safetensors.torch import load_file, save_file
from torch.nn import functional

from samples import conversations, inputs_of, module_of, peak_bytes, processor_of

IGNORED = -100


class MaskedCalibrator(MLLMCalibrator):
    """AutoRound leaves padding out of its loss for text alone; this has it do so for images too."""

    # One row of ids a sample, with IGNORED in place of padding.
    masked_ids = []

    def calib(self, nsamples, bs):
        super().calib(nsamples, bs)
        self.inputs["input_ids"] = self.masked_ids


def batches(inputs, size):
    """Samples `size` at a time, padded on the right to one length, without a mask.

    Attention looks back only, so that no token sees the padding. All samples are alike up to their text,
    with one image of one size in one place, and so have the same positions: AutoRound takes those of the
    first batch for all."""
    longest = max(i["input_ids"].shape[1] for i in inputs)

    def joined(name, part):
        own = [i[name] for i in part]
        if name in ("input_ids", "mm_token_type_ids"):
            own = [functional.pad(t, (0, longest - t.shape[1])) for t in own]
        return torch.cat(own)

    names = set(inputs[0]) - {"attention_mask"}
    parts = [inputs[start:start + size] for start in range(0, len(inputs), size)]
    MaskedCalibrator.masked_ids = [
        functional.pad(i["input_ids"], (0, longest - i["input_ids"].shape[1]), value=IGNORED) for i in inputs]
    return [{name: joined(name, part) for name in names} for part in parts]


def quantizer(model, processor, inputs, args):
    """AutoRound with its own defaults but for what the arguments say."""
    return AutoRound(
        model, tokenizer=processor.tokenizer, processor=processor, dataset=batches(inputs, args.batch),
        nsamples=len(inputs), batch_size=args.batch, bits=args.bits, group_size=args.group,
        sym=args.symmetric, iters=args.iters, seed=args.seed, enable_alg_ext=args.extension,
        amp=not args.float32, enable_torch_compile=args.compile, device_map="cpu")


def decoded(layer, bits):
    """The weight as codes, scale and zero point say it, in f32.

    Fails where the tool's own weight is not that one, rounded once to the type it works in."""
    weight = layer.weight.detach()
    n_groups = layer.scale.shape[1]
    columns = weight.shape[1] // n_groups
    scale = layer.scale.float().repeat_interleave(columns, 1)
    zero = torch.as_tensor(layer.zp).float()
    if zero.numel() > 1:
        zero = zero.repeat_interleave(columns, 1)
    code = torch.round(weight.float() / scale + zero)
    if code.min() < 0 or code.max() >= 1 << bits or zero.min() < 0 or zero.max() >= 1 << bits:
        raise SystemExit("a code or zero point outside of its range")
    if not torch.equal(zero, zero.round()) or layer.scale.dtype != torch.float16:
        raise SystemExit("zero points are not whole, or scales not f16")
    exact = scale * (code - zero)
    if not torch.equal(exact.to(weight.dtype), weight):
        raise SystemExit("weights that are on no grid")
    return exact


def write_model(source, out, weights):
    """The folder `source` with other weights for its decoder linears."""
    out.mkdir(parents=True)
    left = set(weights)
    for path in source.iterdir():
        if path.suffix != ".safetensors":
            shutil.copy(path, out / path.name)
            continue
        tensors = load_file(path)
        for name in tensors:
            module = module_of(name.removesuffix(".weight"))
            if name.endswith(".weight") and module in weights:
                left.remove(module)
                tensors[name] = weights[module].contiguous()
        save_file(tensors, out / path.name, metadata={"format": "pt"})
    if left:
        raise SystemExit(f"not in the folder: {sorted(left)}")


def untouched(before, model, weights):
    """Whether all that is not a decoder linear is bit for bit what it was."""
    own = {name: t for name, t in model.state_dict().items()
           if module_of(name.removesuffix(".weight")) not in weights and name in before}
    return all(torch.equal(before[name].to(t.dtype), t) for name, t in own.items())


def arguments():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("model", type=Path)
    p.add_argument("--samples", type=Path, required=True)
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--bits", type=int, default=3)
    p.add_argument("--group", type=int, default=128)
    p.add_argument("--iters", type=int, default=200, help="AutoRound's own default")
    p.add_argument("--batch", type=int, default=8, help="samples a step; AutoRound's own default")
    p.add_argument("--seed", type=int, default=42, help="of the order of samples; AutoRound's own default")
    p.add_argument("--compile", action="store_true", help="with torch.compile")
    p.add_argument("--symmetric", action="store_true", help="all 2^b codes, the middle one zero")
    p.add_argument("--extension", action="store_true", help="its enable_alg_ext")
    p.add_argument("--float32", action="store_true", help="tune in f32 instead of bf16")
    return p.parse_args()


def main():
    args = arguments()
    torch.set_num_threads(int(THREADS))
    random.seed(args.seed)
    torch.manual_seed(args.seed)
    CALIBRATORS["mllm"] = MaskedCalibrator
    imported, import_peak = time.time(), peak_bytes()["peak_bytes"]
    model = transformers.AutoModelForImageTextToText.from_pretrained(args.model, dtype="auto")
    before = {name: t.clone() for name, t in model.state_dict().items()}
    processor = processor_of(args.model)
    inputs = [dict(inputs_of(processor, chat)) for chat in conversations(args.samples)]
    tokens = sum(i["input_ids"].numel() for i in inputs)
    loaded = time.time()
    model, _ = quantizer(model, processor, inputs, args).quantize()
    quantized = time.time()
    linears = {module_of(n): m for n, m in model.named_modules()
               if isinstance(m, torch.nn.Linear) and module_of(n)}
    weights = {n: decoded(m, args.bits) for n, m in linears.items()}
    if not untouched(before, model, weights):
        raise SystemExit("more than the decoder's linears has changed")
    write_model(args.model, args.out, weights)
    done = time.time()
    # A scale of 16 bits for each group, and a zero point of as many as a code if there is one.
    print(json.dumps(dict(
        tool="autoround",
        versions=dict(auto_round=auto_round.__version__, torch=torch.__version__,
                      transformers=transformers.__version__),
        samples=len(inputs), tokens=tokens, bits=args.bits, group=args.group, iters=args.iters,
        batch=args.batch, seed=args.seed, extension=args.extension, float32=args.float32,
        symmetric=args.symmetric, compile=args.compile,
        modules=len(weights), weights=sum(w.numel() for w in weights.values()),
        bits_per_weight=args.bits + (16 + args.bits * (not args.symmetric)) / args.group,
        seconds=quantized - loaded, save_seconds=done - quantized, load_seconds=loaded - imported,
        import_seconds=imported - START, total_seconds=done - START, **peak_bytes(),
        import_peak_bytes=import_peak, output=str(args.out))), flush=True)


if __name__ == "__main__":
    main()
