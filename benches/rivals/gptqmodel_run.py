"""Quantizes a Qwen2-VL folder with GPTQModel's GPTQ or AWQ on CPU and prints one JSON line.

Usage: gptqmodel_run.py MODEL --samples FOLDER --out OUT --bits 4 --group 128

FOLDER: samples.jsonl in LLaVA form with its images, all of which are used. Columns go by falling
diagonal of the Hessian with groups fixed beforehand, damping is 1 %: vlmq's settings. AWQ knows neither.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

START = time.time()
THREADS = os.environ.setdefault("OMP_NUM_THREADS", "2")
# Its pool asks for more workers than a small machine has cores, and then fails.
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", THREADS)
# Where environments.sh let it compile its packing, and the ninja it asks for even when that is done.
BIN = Path(sys.prefix) / "bin"
os.environ.setdefault("GPTQMODEL_TORCH_EXTENSIONS_DIR", str(BIN.parent / "extensions"))
os.environ["PATH"] = f"{BIN}{os.pathsep}{os.environ['PATH']}"
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers
import gptqmodel
from gptqmodel import GPTQModel, QuantizeConfig

from samples import conversations, inputs_of, peak_bytes, processor_of


def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("model", type=Path)
    p.add_argument("--samples", type=Path, required=True)
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--bits", type=int, default=4)
    p.add_argument("--group", type=int, default=128)
    p.add_argument("--asymmetric", action="store_true")
    p.add_argument("--order", choices=["static", "group-aware", "scattered", "none"], default="static",
                   help="group-aware is GPTQModel's own default; scattered: groups as columns are visited")
    p.add_argument("--method", choices=["gptq", "awq"], default="gptq")
    args = p.parse_args()
    torch.set_num_threads(int(THREADS))
    imported, import_peak = time.time(), peak_bytes()["peak_bytes"]
    config = dict(bits=args.bits, group_size=args.group, sym=not args.asymmetric)
    if args.method == "awq":
        config |= dict(method="awq", format="gemm")
    else:
        config |= dict(damp_percent=0.01, desc_act=args.order in ("static", "scattered"),
                       static_groups=args.order == "static", act_group_aware=args.order == "group-aware")
    config = QuantizeConfig(**config)
    model = GPTQModel.load(str(args.model), config, device="cpu")
    processor = processor_of(args.model)
    chats = conversations(args.samples)
    inputs = [inputs_of(processor, chat) for chat in chats]
    # Its own preparation would end every conversation with the head of another answer, and resample
    # images otherwise; all tools are to see the same tokens and pixels.
    model.prepare_dataset = lambda **_: inputs
    loaded = time.time()
    log = model.quantize(chats, batch_size=1)
    quantized = time.time()
    model.save(str(args.out))
    done = time.time()
    entries = log.values() if isinstance(log, dict) else [log]
    print(json.dumps(dict(
        tool="gptqmodel", method=args.method,
        versions=dict(gptqmodel=gptqmodel.__version__, torch=torch.__version__,
                      transformers=transformers.__version__),
        model=str(args.model), samples=len(inputs),
        tokens=sum(i["input_ids"].numel() for i in inputs), images=True,
        bits=args.bits, group=args.group, symmetric=not args.asymmetric, order=args.order,
        seconds=quantized - loaded, save_seconds=done - quantized,
        load_seconds=loaded - imported, import_seconds=imported - START,
        total_seconds=done - START, **peak_bytes(),
        import_peak_bytes=import_peak,
        compiled_packing=hasattr(torch.ops.gptqmodel, "pack_block_cpu"),
        reported_loss=[e for part in entries for e in part], output=str(args.out))), flush=True)


if __name__ == "__main__":
    main()
