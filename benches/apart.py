"""What is given away when calibration and quantization are done apart: GPTQ solved from statistics of the
full-precision stream beside GPTQ in its own order, in which linears see what those before them became.

Usage: apart.py VLMQ MODEL CALIBRATION TASKS RECORD [--seeds 5] [--bits 3,2] [--group 64] [--samples 128]
                [--limit 75]

Adds a line to RECORD for every run that it does not have yet, and prints the ratio of KL divergences, apart to
in order: the geometric mean over seeds with a 95 % interval (Student's t), and the mean accuracies.
"""

import argparse
import json
import subprocess
import tempfile
from math import exp, log, sqrt
from pathlib import Path
from statistics import mean, stdev

# Student's t at 97.5 %, by degrees of freedom.
T = [None, 12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26]


def run(vlmq, *words):
    command = [str(word) for word in (vlmq, "--quiet", *words)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def scores(args, folder):
    """KL divergence to the model and accuracy of each task."""
    told = json.loads(run(args.vlmq, "--json", "eval", folder, "--task", args.tasks, "--limit", args.limit,
                          "--reference", args.model))
    return {name: {"kl": task["kl_per_answer_token"], "accuracy": task["accuracy"]["percent"]}
            for name, task in told["tasks"].items()}


def seed(args, seed, missing, add):
    """The runs of a seed that are `missing`, [(kind, bits)]."""
    data = ["--calibration", args.calibration, "--samples", args.samples, "--seed", seed]
    with tempfile.TemporaryDirectory() as work:
        statistics = Path(work) / "statistics"
        if any(kind == "apart" for kind, _ in missing):
            run(args.vlmq, "calibrate", args.model, *data, "--output", statistics)
        for number, (kind, bits) in enumerate(missing):
            output = Path(work) / str(number)
            source = ["--statistics", statistics] if kind == "apart" else data
            run(args.vlmq, "quantize", args.model, *source, "--method", "gptq", "--bits", bits,
                "--group-size", args.group, "--output", output)
            add({"kind": kind, "bits": bits, "group_size": args.group, "seed": seed,
                 "tasks": scores(args, output)})


def summary(lines, bits):
    kl = {}
    accuracy = {"apart": [], "in order": []}
    for line in lines:
        if line["bits"] == bits:
            tasks = line["tasks"].values()
            kl[line["kind"], line["seed"]] = mean(task["kl"] for task in tasks)
            accuracy[line["kind"]].append(mean(task["accuracy"] for task in tasks))
    seeds = sorted(seed for kind, seed in kl if kind == "apart" and ("in order", seed) in kl)
    ratios = [log(kl["apart", seed] / kl["in order", seed]) for seed in seeds]
    half = T[len(ratios) - 1] * stdev(ratios) / sqrt(len(ratios)) if len(ratios) > 1 else float("nan")
    low, middle, high = (exp(mean(ratios) + d) for d in (-half, 0, half))
    return (f"{bits} bits, {len(seeds)} seeds: KL {middle:.2f} [{low:.2f}, {high:.2f}] of that in order; accuracy "
            f"{mean(accuracy['apart']):.1f} apart, {mean(accuracy['in order']):.1f} in order")


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    for name in ["vlmq", "model", "calibration", "tasks"]:
        p.add_argument(name)
    p.add_argument("record", type=Path)
    for name, default in [("seeds", 5), ("group", 64), ("samples", 128), ("limit", 75)]:
        p.add_argument(f"--{name}", type=int, default=default)
    p.add_argument("--bits", default="3,2")
    args = p.parse_args()
    widths = [int(bits) for bits in args.bits.split(",")]
    lines = [json.loads(line) for line in args.record.open()] if args.record.exists() else []

    def add(line):
        lines.append(line)
        with args.record.open("a") as record:
            record.write(json.dumps(line) + "\n")

    for number in range(args.seeds):
        done = {(line["kind"], line["bits"]) for line in lines if line["seed"] == number}
        wanted = [(kind, bits) for bits in widths for kind in ("apart", "in order")]
        if missing := [cell for cell in wanted if cell not in done]:
            seed(args, number, missing, add)
    for bits in widths:
        print(summary(lines, bits))


if __name__ == "__main__":
    main()
