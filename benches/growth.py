"""Time and memory of `vlmq quantize` against samples, tokens per sample and layers, three sizes each.

Usage: growth.py --vlmq PROGRAM --python PYTHON --work DIR [--rounds 3] [--method vlmq-v2] [--bits 3]

PYTHON has torch and safetensors (tests/oracle/run makes such an environment); this script itself needs
nothing. On random weights of hidden 512 and MLP 2048, with the testbed's samples; the number of image
tokens is set by the model's preprocessor_config.json. The work folder must not exist. All runs take turns.
Prints a table, medians over rounds, and writes WORK/growth.json.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
DATA = HERE.parent / "testbed/calibration"
SAMPLES, SIDE, LAYERS = 64, 168, 2
# Sides are multiples of the 28 pixels of a token.
AXES = {"samples": [64, 128, 256], "side": [168, 336, 672], "layers": [2, 4, 8]}
STAGES = ["forward", "importance", "statistics", "factor", "solve", "write", "total"]


def make_model(args, side, layers):
    out = args.work / f"model-{side}-{layers}"
    if out.exists():
        return out
    script = HERE / "rivals/make_model.py"
    subprocess.run([args.python, script, out, "--size", "small", "--layers", str(layers)], check=True,
                   stdout=subprocess.DEVNULL)
    path = out / "preprocessor_config.json"
    config = json.loads(path.read_text())
    config |= dict(min_pixels=side * side, max_pixels=side * side,
                   size=dict(shortest_edge=side * side, longest_edge=side * side))
    path.write_text(json.dumps(config, indent=1))
    return out


def said(args, model, samples, more):
    command = [args.vlmq, "--json", "--threads", str(args.threads), "quantize", model, "--calibration", DATA,
               "--samples", str(samples), "--method", args.method, "--bits", str(args.bits),
               "--group-size", "64", *more]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout)


def measure(args, point):
    model = make_model(args, point["side"], point["layers"])
    out = args.work / "out"
    planned = said(args, model, point["samples"], ["--dry-run"])
    found = said(args, model, point["samples"], ["--output", out])["report"]
    shutil.rmtree(out)
    seconds = {stage: found["seconds"].get(stage, 0.0) for stage in STAGES}
    return seconds | dict(tokens=planned["n_tokens"], planned=planned["peak_memory_bytes"],
                          peak=found["peak_memory_bytes"])


def points():
    base = dict(samples=SAMPLES, side=SIDE, layers=LAYERS)
    return [(axis, base | {axis: size}) for axis, sizes in AXES.items() for size in sizes]


def table(rows):
    lines = ["| growing | size | tokens | " + " | ".join(f"{s}, s" for s in STAGES)
             + " | peak, MB | planned / peak |", "|---" * (len(STAGES) + 5) + "|"]
    for axis, point, runs in rows:
        middle = {key: statistics.median(r[key] for r in runs) for key in runs[0]}
        cells = " | ".join(f"{middle[s]:.2f}" for s in STAGES)
        lines.append(f"| {axis} | {point[axis]} | {middle['tokens']:.0f} | {cells} | {middle['peak'] / 1e6:.0f} "
                     f"| {middle['planned'] / middle['peak']:.2f} |")
    return "\n".join(lines)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--vlmq", type=Path, required=True)
    p.add_argument("--python", type=Path, required=True)
    p.add_argument("--work", type=Path, required=True)
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--threads", type=int, default=os.cpu_count())
    p.add_argument("--method", default="vlmq-v2")
    p.add_argument("--bits", type=int, default=3)
    args = p.parse_args()
    args.vlmq, args.python, args.work = args.vlmq.absolute(), args.python.absolute(), args.work.absolute()
    args.work.mkdir(parents=True)
    rows = [(axis, point, []) for axis, point in points()]
    for _ in range(args.rounds):
        for _, point, runs in rows:
            runs.append(measure(args, point))
    found = [dict(axis=axis, point=point, runs=runs) for axis, point, runs in rows]
    (args.work / "growth.json").write_text(json.dumps(found, indent=1) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
