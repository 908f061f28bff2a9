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
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "testbed"))
from tables import mean, ratio, read  # noqa: E402 (the path is needed first)

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
            add({"method": kind, "bits": bits, "group_size": args.group, "seed": seed,
                 "tasks": scores(args, output)})


def summary(record, bits):
    rows = read(record)
    among, n_seeds = ratio(rows, "apart", "in order", [bits])
    accuracy = {kind: mean([row["accuracy"] for key, row in rows.items() if key[:2] == (kind, bits)])
                for kind in ("apart", "in order")}
    return (f"{bits} bits, {n_seeds} seeds: KL {among} of that in order; accuracy {accuracy['apart']:.1f} apart, "
            f"{accuracy['in order']:.1f} in order")


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
        done = {(line["method"], line["bits"]) for line in lines if line["seed"] == number}
        wanted = [(kind, bits) for bits in widths for kind in ("apart", "in order")]
        if missing := [cell for cell in wanted if cell not in done]:
            seed(args, number, missing, add)
    for bits in widths:
        print(summary(args.record, bits))


if __name__ == "__main__":
    main()
