"""vlmq, GPTQModel and llm-compressor on one model and the same samples: time, memory and layer loss.

Usage: run.py MODEL --vlmq PROGRAM --environments DIR --work DIR [--samples 128] [--bits 4,3]

DIR of environments is what environments.sh made; the work folder must not exist. The tools take turns
(A B C A B C ...), each run in a fresh process, measured from outside: wall clock, processor time and
peak resident memory as the kernel counts them. Afterwards one judge (layer_loss.py) decodes every
result and measures it on held-out samples. Results: WORK/runs.jsonl with all that was said, record.json with
the numbers of each run, and the table on stdout and in table.md. Needs nothing but Python itself.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

from samples import write_folder

HERE = Path(__file__).resolve().parent
DATA = HERE.parents[1] / "testbed/calibration"
RIVALS = {"gptqmodel": "gptqmodel", "llm-compressor": "llmcompressor"}
# Held-out samples are the last ones of the set, calibration samples the first.
N_DATA = 700


def measured(command, environment, cwd, log, limit):
    """Runs a command to its end; its last line of output as JSON, and what the kernel counted.

    In a folder of its own, since the rivals leave logs where they run."""
    with open(log, "w") as errors, open(f"{log}.out", "w+") as output:
        start = time.monotonic()
        process = subprocess.Popen(command, env=environment, cwd=cwd, stdout=output, stderr=errors)
        timer = threading.Timer(limit, process.kill)
        timer.start()
        _, status, usage = os.wait4(process.pid, 0)
        timer.cancel()
        wall = time.monotonic() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        lines = output.read().strip().splitlines()
    found = dict(exit=process.returncode, wall_seconds=wall,
                 cpu_seconds=usage.ru_utime + usage.ru_stime, peak_bytes=usage.ru_maxrss * 1024)
    if process.returncode == 0:
        found["said"] = json.loads(lines[-1])
    return found


def command_of(tool, bits, out, args):
    samples = args.work / "calibration"
    if tool.startswith("vlmq:"):
        method, *settings = tool.removeprefix("vlmq:").split(":")
        return [args.vlmq, "--threads", str(args.threads), "quantize", args.model,
                "--calibration", samples, "--samples", str(args.samples), "--output", out,
                "--method", method, "--bits", str(bits),
                "--group-size", str(args.group), "--json",
                "--asymmetric" if args.asymmetric else "--symmetric",
                *[part for setting in settings for part in ("--set", setting)]]
    name = RIVALS[tool]
    return [args.environments / name / "bin/python", HERE / f"{name}_run.py", args.model,
            "--samples", samples, "--out", out, "--bits", str(bits), "--group", str(args.group),
            *["--asymmetric"] * args.asymmetric]


def own_seconds(tool, said):
    """Seconds of the quantization itself, as the tool's process tells; samples are read before it.

    vlmq's include reading the model and writing the result, which it does layer by layer."""
    return said["report"]["seconds"]["total"] if tool.startswith("vlmq:") else said["seconds"]


def n_tokens(tool, said):
    if tool.startswith("vlmq:"):
        return sum(said["report"]["calibration"]["n_tokens"].values())
    return said["tokens"]


def judge(runs, args, environment):
    folders = [r["output"] for r in runs if r["exit"] == 0]
    command = [args.environments / "gptqmodel/bin/python", HERE / "layer_loss.py", args.model, *folders,
               "--samples", args.work / "heldout"]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True,
                          stderr=open(args.work / "logs/judge", "w"))
    if done.returncode:
        print(f"the judge failed; see {args.work / 'logs/judge'}", file=sys.stderr)
    judged = {}
    for line in done.stdout.splitlines():
        found = json.loads(line)
        judged[found["folder"]] = found
    for run in runs:
        run["judge"] = judged.get(run["output"])


def table(runs, tools, args):
    """Medians over rounds, and their ratios to the first tool's."""
    columns = [("whole process, s", "wall_seconds", 1, ".1f"), ("quantizing, s", "own_seconds", 1, ".1f"),
               ("processor, s", "cpu_seconds", 1, ".1f"), ("peak memory, MB", "peak_bytes", 1e6, ".0f"),
               ("layer loss", "loss", 1, ".3e")]
    heads = [c[0] for c in columns]
    lines = ["| bits | tool | " + " | ".join(h + " | ratio" for h in heads) + " |",
             "|---|---|" + "---|" * (2 * len(columns))]
    for bits in args.bits:
        first = None
        for tool in tools:
            mine = [r for r in runs if r["tool"] == tool and r["bits"] == bits and r["exit"] == 0]
            if not mine:
                lines.append(f"| {bits} | {tool} | failed |" + " |" * (2 * len(columns) - 1))
                continue
            for r in mine:
                r["loss"] = r["judge"]["mean"] if r["judge"] else float("nan")
            middle = [statistics.median(r[key] for r in mine) for _, key, _, _ in columns]
            first = first or middle
            cells = [f"{m / unit:{form}} | {m / f:.2f}"
                     for m, f, (_, _, unit, form) in zip(middle, first, columns)]
            lines.append(f"| {bits} | {tool} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def record(runs, about):
    """The numbers of each run, without the places of things on this machine."""
    keys = ["tool", "bits", "round", "exit", "wall_seconds", "own_seconds", "cpu_seconds", "peak_bytes",
            "tokens", "loss"]
    return dict(about=about, runs=[{k: r[k] for k in keys if k in r} for r in runs])


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("model", type=Path)
    p.add_argument("--vlmq", type=Path, required=True)
    p.add_argument("--environments", type=Path, required=True)
    p.add_argument("--work", type=Path, required=True)
    p.add_argument("--data", type=Path, default=DATA)
    p.add_argument("--samples", type=int, default=128)
    p.add_argument("--heldout", type=int, default=32)
    p.add_argument("--bits", type=lambda s: [int(b) for b in s.split(",")], default=[4, 3])
    p.add_argument("--group", type=int, default=128)
    p.add_argument("--asymmetric", action="store_true")
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--tools", type=lambda s: s.split(","),
                   default=["vlmq:gptq", "gptqmodel", "llm-compressor"],
                   help="in the order of their turns; vlmq:METHOD or vlmq:METHOD:KEY=VALUE, gptqmodel, "
                   "llm-compressor")
    p.add_argument("--limit", type=float, default=7200, help="seconds after which a run is ended")
    args = p.parse_args()
    if args.samples + args.heldout > N_DATA:
        p.error(f"--samples and --heldout: at most {N_DATA} together")
    for name in ["model", "vlmq", "environments", "work", "data"]:
        setattr(args, name, getattr(args, name).absolute())
    args.work.mkdir(parents=True)
    (args.work / "logs").mkdir()
    (args.work / "results").mkdir()
    write_folder(args.data, args.work / "calibration", 0, args.samples)
    write_folder(args.data, args.work / "heldout", N_DATA - args.heldout, args.heldout)
    threads = str(args.threads)
    environment = os.environ | dict(
        OMP_NUM_THREADS=threads, MKL_NUM_THREADS=threads, OPENBLAS_NUM_THREADS=threads,
        RAYON_NUM_THREADS=threads, GPTQMODEL_CPU_WORKERS=threads, HF_HUB_OFFLINE="1",
        HF_DATASETS_OFFLINE="1", CUDA_VISIBLE_DEVICES="", PYTHONDONTWRITEBYTECODE="1",
        TOKENIZERS_PARALLELISM="false")
    runs = []
    for round_ in range(args.rounds):
        for bits in args.bits:
            for tool in args.tools:
                name = f"{tool.replace(':', '-')}-{bits}-{round_}"
                out = args.work / "results" / name
                run = dict(tool=tool, bits=bits, round=round_, output=str(out))
                run |= measured(command_of(tool, bits, out, args), environment, args.work,
                                args.work / "logs" / name, args.limit)
                if run["exit"] == 0:
                    run["own_seconds"] = own_seconds(tool, run["said"])
                    run["tokens"] = n_tokens(tool, run["said"])
                else:
                    print(f"{name} failed; see {args.work / 'logs' / name}", file=sys.stderr)
                runs.append(run)
                print(f"{name}: {run['wall_seconds']:.1f} s, {run['peak_bytes'] / 1e6:.0f} MB",
                      file=sys.stderr)
    tokens = {r["tokens"] for r in runs if r["exit"] == 0}
    if len(tokens) > 1:
        print(f"the tools saw different numbers of tokens: {sorted(tokens)}", file=sys.stderr)
    judge(runs, args, environment)
    made = table(runs, args.tools, args)
    (args.work / "runs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in runs))
    versions = [r["said"]["versions"] for r in runs if r["exit"] == 0 and "versions" in r["said"]]
    about = (f"{args.model.name}: {args.samples} samples with images, {'/'.join(map(str, tokens))} tokens, "
             f"groups of {args.group}, {'asymmetric' if args.asymmetric else 'symmetric'}, "
             f"{args.threads} threads, medians of {args.rounds}, ratios to {args.tools[0]}, "
             f"layer loss on {args.heldout} held-out samples. {platform.machine()}, {os.cpu_count()} cores.")
    for v in versions:
        text = ", ".join(f"{k} {n}" for k, n in v.items())
        if text not in about:
            about += f" {text}."
    (args.work / "record.json").write_text(json.dumps(record(runs, about), indent=1) + "\n")
    (args.work / "table.md").write_text(f"{about}\n\n{made}\n")
    print(f"{about}\n\n{made}")
    sys.exit(any(r["exit"] for r in runs))


if __name__ == "__main__":
    main()
