"""What vlmq takes on a GPU at the widths of a 7B model: time, memory, and shares of the card's ceilings.

Usage: measure.py VLMQ WORK [--device 0] [--layers 28] [--samples 512] [--tokens 512]
       [--methods gptq,gptaq,vlmq] [--products f32,bf16] [--record FILE]

VLMQ is a program with the feature `cuda`. Needs torch with CUDA, for random weights, for the ceilings
and for the loop that vlmq is compared with, which runs on the same card in the same run: GPTQ as its
authors wrote it (Cholesky, inverse, Cholesky; columns one by one; blocks of 128), restated here.

It has never run on a GPU yet. Weights are random, so losses mean nothing; sizes and times do. The
first thing it does is to compare the codes of a small model on the GPU with the CPU's.
"""

import argparse
import itertools
import json
import random
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
STAGES = ["load", "forward", "importance", "statistics", "factor", "solve", "write"]
HIDDEN, INTERMEDIATE, KEYS = 3584, 18944, 512
# Outputs and inputs of a layer's linears; linears with one H by one.
MODULES = [(HIDDEN, HIDDEN), (KEYS, HIDDEN), (KEYS, HIDDEN), (HIDDEN, HIDDEN),
           (INTERMEDIATE, HIDDEN), (INTERMEDIATE, HIDDEN), (HIDDEN, INTERMEDIATE)]
HESSIANS = [HIDDEN, HIDDEN, HIDDEN, INTERMEDIATE]


class Memory(threading.Thread):
    """The most memory that a process has on the GPU, as nvidia-smi tells it five times a second."""

    def __init__(self, pid):
        super().__init__(daemon=True)
        self.pid, self.peak_mib, self.is_over = pid, 0, threading.Event()
        self.start()

    def run(self):
        query = ["nvidia-smi", "--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits"]
        while not self.is_over.wait(0.2):
            for line in subprocess.run(query, capture_output=True, text=True).stdout.splitlines():
                pid, mib = line.split(",")
                if int(pid) == self.pid and mib.strip().isdigit():
                    self.peak_mib = max(self.peak_mib, int(mib))


def write_texts(path, n_samples, n_tokens):
    """Raw texts, each long enough for a piece of `n_tokens` tokens."""
    draw = random.Random(0)
    words = ["the", "a", "chart", "shows", "red", "blue", "line", "over", "bars", "seven", "nine", "of"]
    with path.open("w") as lines:
        for _ in range(n_samples):
            lines.write(json.dumps({"text": " ".join(draw.choices(words, k=n_tokens))}) + "\n")


def quantize(vlmq, model, texts, method, output, device, extra=()):
    command = [vlmq, "--json", "quantize", model, "--calibration", texts, "--method", method, "--bits", "3",
               "--group-size", "128", "--device", device, "--output", output, *extra]
    began = time.time()
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, text=True)
    memory = Memory(process.pid)
    out, _ = process.communicate()
    memory.is_over.set()
    if process.returncode != 0:
        sys.exit(f"{method}: vlmq ended with {process.returncode}")
    report = json.loads(out)["report"]
    return dict(wall=time.time() - began, peak_mib=memory.peak_mib, engine=report["engine"],
                peak_host_bytes=report["peak_memory_bytes"], seconds=report["seconds"],
                n_tokens=sum(report["calibration"]["n_tokens"].values()),
                loss=sum(m["loss"] or 0.0 for m in report["modules"]))


def same_as_cpu(vlmq, work, device, products):
    """Relative difference of the summed losses of the bundled model, GPU against CPU, by method."""
    data = ROOT / "testbed/calibration"
    found = {}
    for method in ["gptq", "gptaq", "vlmq-v2", "vlmq"]:
        runs = []
        for where, kind in [("cpu", "f32"), (device, products)]:
            with tempfile.TemporaryDirectory(dir=work) as folder:
                extra = ["--samples", "32", "--group-size", "64", "--products", kind]
                runs.append(quantize(vlmq, ROOT / "testbed/model", data, method, Path(folder) / "out",
                                     where, extra)["loss"])
        found[method] = runs[1] / runs[0] - 1
    return found


def timed(work, n=5):
    """Seconds of the quickest of `n`, after one to warm up."""
    import torch
    work()
    seconds = []
    for _ in range(n):
        torch.cuda.synchronize()
        began = time.perf_counter()
        work()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def ceilings():
    """Operations a second of products of 8192-square matrices, and bytes a second of a copy."""
    import torch
    n, found = 8192, {}
    for name, dtype in [("f32", torch.float32), ("tf32", torch.float32), ("bf16", torch.bfloat16)]:
        torch.backends.cuda.matmul.allow_tf32 = name == "tf32"
        a, b = (torch.randn(n, n, device="cuda", dtype=dtype) for _ in range(2))
        found[name] = 2 * n**3 / timed(lambda: a @ b)
    torch.backends.cuda.matmul.allow_tf32 = False
    a = torch.empty(1 << 28, device="cuda")
    found["bytes"] = 2 * 4 * (1 << 28) / timed(lambda: a.clone())
    return found


def reference(rows, columns, bits=3, group=128):
    """Seconds of the authors' loop on one weight: arXiv:2210.17323, algorithm 1."""
    import torch
    torch.manual_seed(0)
    weight = torch.randn(rows, columns, device="cuda") * 0.02
    x = torch.randn(2 * columns, columns, device="cuda")
    hessian = x.T @ x
    del x
    most = 2**bits - 1

    def solve():
        w, h = weight.clone(), hessian.clone()
        h.diagonal().add_(0.01 * h.diagonal().mean())
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(h))
        upper = torch.linalg.cholesky(inverse, upper=True)
        for start in range(0, columns, 128):
            end = min(start + 128, columns)
            block, errors = w[:, start:end].clone(), torch.zeros(rows, end - start, device="cuda")
            own = upper[start:end, start:end]
            for i in range(end - start):
                if (start + i) % group == 0:
                    part = w[:, start + i:start + i + group]
                    low, high = part.amin(1).clamp(max=0), part.amax(1).clamp(min=0)
                    scale = (high - low) / most
                    zero = torch.round(-low / scale)
                column = block[:, i]
                code = torch.clamp(torch.round(column / scale) + zero, 0, most)
                error = (column - scale * (code - zero)) / own[i, i]
                block[:, i:] -= error.unsqueeze(1) * own[i, i:].unsqueeze(0)
                errors[:, i] = error
            w[:, end:] -= errors @ upper[start:end, end:]

    return timed(solve, 2)


def operations(n_tokens, n_layers):
    """What a run of gptq must do by stage, in floating-point operations."""
    weights = sum(out * n for out, n in MODULES)
    return dict(forward=2 * weights * n_tokens * n_layers,
                statistics=sum(n * n for n in HESSIANS) * n_tokens * n_layers,
                factor=sum(n**3 / 3 for n in HESSIANS) * n_layers,
                solve=sum(out * n * n for out, n in MODULES) * n_layers)


def print_shares(run, n_layers, products, ceilings):
    """Each stage's rate beside that of the products it is made of."""
    for stage, n in operations(run["n_tokens"], n_layers).items():
        kind = products if stage == "forward" else "f32"
        share = n / run["seconds"][stage] / ceilings[kind]
        print(f"gptq {stage}: {100 * share:.0f} % of the {kind} product's rate", flush=True)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("vlmq")
    p.add_argument("work", type=Path)
    for name, default in [("device", 0), ("layers", 28), ("samples", 512), ("tokens", 512)]:
        p.add_argument(f"--{name}", type=int, default=default)
    p.add_argument("--methods", default="gptq,gptaq,vlmq")
    p.add_argument("--products", default="f32,bf16")
    p.add_argument("--record", type=Path)
    args = p.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    device, record, all_products = f"cuda:{args.device}", {}, args.products.split(",")
    record["loss_against_cpu"] = {p: same_as_cpu(args.vlmq, args.work, device, p) for p in all_products}
    print("loss on the GPU against the CPU's, less one:", record["loss_against_cpu"], flush=True)
    record["ceilings"] = ceilings()
    print("ceilings, operations and bytes a second:", record["ceilings"], flush=True)
    model, texts = args.work / "7b", args.work / "texts.jsonl"
    if not model.exists():
        subprocess.run([sys.executable, ROOT / "benches/rivals/make_model.py", model, "--size", "7B",
                        "--layers", str(args.layers)], check=True)
    write_texts(texts, args.samples, args.tokens)
    record["runs"] = {}
    for products, method in itertools.product(all_products, args.methods.split(",")):
        extra = ["--samples", args.samples, "--max-tokens", args.tokens, "--products", products]
        with tempfile.TemporaryDirectory(dir=args.work) as folder:
            run = quantize(args.vlmq, model, texts, method, Path(folder) / "out", device, extra)
        name = f"{method} {products}"
        record["runs"][name] = run
        stages = "  ".join(f"{s} {run['seconds'].get(s, 0.0):.1f}" for s in STAGES)
        print(f"{name}: {run['wall']:.1f} s, {run['peak_mib']} MiB on the GPU; {stages}", flush=True)
        if method == "gptq":
            print_shares(run, args.layers, products, record["ceilings"])
    record["reference_seconds"] = {f"{out}x{n}": reference(out, n) for out, n in dict.fromkeys(MODULES)}
    print("the authors' loop, seconds by weight:", record["reference_seconds"])
    if args.record:
        args.record.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
