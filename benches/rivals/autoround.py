"""AutoRound's block tuning on the samples that vlmq draws, judged by `vlmq eval`.

Usage: autoround.py run MODEL --calibration DATA --tasks DATA --work DIR --output ROWS.jsonl \\
           --vlmq PROGRAM --choose PROGRAM --python PYTHON --seeds 0,1,2,3,4 --formats 3:128,3:64,2:128,2:64
       autoround.py table ROWS.jsonl... [--of METHOD]

`run` adds to ROWS one line of the form of `vlmq compare` for each seed and format that it lacks, in
which `seconds` are those of tuning and `process` has the whole process as the kernel counts it.
CHOOSE is the example choose_samples, PYTHON that of an environment with auto-round. With --beside each
run has vlmq's methods before it, timed alike. `table` has means and the ratios of KL paired by seed, with
95 % intervals of Student's t, of every method to METHOD, over the seeds that METHOD has.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from run import measured
from samples import write_lines

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parents[1] / "testbed"))


def chosen(args, seed):
    """A folder with the samples that vlmq draws with this seed, in its order."""
    folder = args.work / f"samples-{seed}"
    if not folder.exists():
        command = [args.choose, args.calibration, str(args.samples), str(seed)]
        told = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
        write_lines(args.calibration, folder, [int(line.split()[-1]) - 1 for line in told.splitlines()])
    return folder


def environment(args):
    threads = str(args.threads)
    return os.environ | dict(
        OMP_NUM_THREADS=threads, MKL_NUM_THREADS=threads, RAYON_NUM_THREADS=threads, HF_HUB_OFFLINE="1",
        HF_DATASETS_OFFLINE="1", CUDA_VISIBLE_DEVICES="", PYTHONDONTWRITEBYTECODE="1",
        TOKENIZERS_PARALLELISM="false")


def timed(command, name, args):
    """One process, and what the kernel counted of it."""
    logs = args.work / "logs"
    logs.mkdir(exist_ok=True)
    done = measured([str(part) for part in command], environment(args), args.work, logs / name, args.limit)
    if done["exit"]:
        raise SystemExit(f"{name} failed; see {logs / name}")
    return done


def scores(folder, name, args):
    """What `vlmq eval` finds of each task, as `vlmq compare` writes it."""
    command = [args.vlmq, "--threads", args.threads, "eval", folder, "--task", args.tasks, "--reference",
               args.model, "--skip", args.skip, "--limit", args.limit_questions, "--json"]
    tasks = timed(command, f"{name}-eval", args)["said"]["tasks"]
    return {task: dict(accuracy=found["accuracy"]["percent"], kl=found["kl_per_answer_token"],
                       same_top=found["same_top_percent"], n=found["accuracy"]["n"])
            for task, found in tasks.items()}


def row_of(method, bits, group, seed, tasks, done, said):
    process = {key: done[key] for key in ["wall_seconds", "cpu_seconds", "peak_bytes"]}
    return dict(method=method, bits=bits, group_size=group, seed=seed, tasks=tasks, process=process, **said)


def own_row(method, bits, group, seed, args):
    """vlmq itself, a process of its own, on the same samples."""
    out = args.work / "own"
    shutil.rmtree(out, ignore_errors=True)
    name, *settings = method.split(":")
    command = [args.vlmq, "--threads", args.threads, "quantize", args.model, "--calibration",
               args.calibration, "--samples", args.samples, "--seed", seed, "--output", out, "--method", name,
               "--bits", bits, "--group-size", group, "--asymmetric", "--json",
               *[part for setting in settings for part in ("--set", setting)]]
    done = timed(command, f"own-{bits}-{group}-{seed}", args)
    report = done["said"]["report"]
    tokens = sum(report["calibration"]["n_tokens"].values())
    tasks = scores(out, f"own-{bits}-{group}-{seed}", args)
    return row_of(method, bits, group, seed, tasks, done,
                  dict(seconds=report["seconds"]["total"], tokens=tokens, threads=args.threads))


def rival_row(method, bits, group, seed, args):
    name = f"{args.name}-{bits}-{group}-{seed}"
    out = args.work / f"out-{name}"
    shutil.rmtree(out, ignore_errors=True)
    command = [args.python, HERE / "autoround_run.py", args.model, "--samples", chosen(args, seed), "--out",
               out, "--bits", bits, "--group", group, *args.extra]
    done = timed(command, name, args)
    tasks = scores(out, name, args)
    shutil.rmtree(out)
    keys = ["seconds", "tokens", "iters", "batch", "extension", "float32", "symmetric", "compile",
            "bits_per_weight"]
    said = {key: done["said"][key] for key in keys}
    return row_of(method, bits, group, seed, tasks, done, said | dict(threads=args.threads))


def run(args):
    args.work.mkdir(parents=True, exist_ok=True)
    text = args.output.read_text() if args.output.exists() else ""
    rows = [json.loads(line) for line in text.splitlines()]
    key = lambda row: (row["method"], row["bits"], row["group_size"], row["seed"])
    have = {key(row) for row in rows}
    runs = [(bits, group, seed) for seed in args.seeds for bits, group in args.formats]
    for bits, group, seed in runs:
        todo = [(NAMES.get(method, method), lambda m=method: own_row(m, bits, group, seed, args))
                for method in args.beside]
        todo.append((args.name, lambda: rival_row(args.name, bits, group, seed, args)))
        for name, work in todo:
            if (name, bits, group, seed) in have:
                continue
            row = work()
            with open(args.output, "a") as file:
                file.write(json.dumps(row) + "\n")
            kl = sum(t["kl"] for t in row["tasks"].values()) / len(row["tasks"])
            print(f"{name} {bits} {group} {seed}: KL {kl:.4f}, {row['process']['cpu_seconds']:.0f} s",
                  file=sys.stderr)


def table(args):
    from tables import mean, ratio, read

    rows = {}
    for path in args.rows:
        rows |= read(path)
    formats = sorted({key[1:3] for key in rows if key[1]}, key=lambda f: (-f[0], f[1]))
    print("| bits, group | method | seeds | accuracy | KL | KL to " + args.of + " |\n" + "|---" * 6 + "|")
    for bits, group in formats:
        seeds = {key[3] for key in rows if key[:3] == (args.of, bits, group)}
        own = {key: row for key, row in rows.items() if key[1:3] == (bits, group) and key[3] in seeds}
        for method in dict.fromkeys(key[0] for key in own):
            mine = [row for key, row in own.items() if key[0] == method]
            accuracy, kl = (mean([row[name] for row in mine]) for name in ["accuracy", "kl"])
            to = ratio(own, method, args.of, [bits])[0] if method != args.of else ""
            print(f"| {bits}, {group} | {method} | {len(mine)} | {accuracy:.1f} | {kl:.4f} | {to} |")


def arguments():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = p.add_subparsers(dest="command", required=True)
    r = commands.add_parser("run")
    r.add_argument("model", type=Path)
    for name in ["calibration", "tasks", "work", "output", "vlmq", "choose", "python"]:
        r.add_argument(f"--{name}", type=Path, required=True)
    r.add_argument("--samples", type=int, default=128)
    r.add_argument("--seeds", type=lambda s: [int(part) for part in s.split(",")], required=True)
    r.add_argument("--formats", type=lambda s: [tuple(map(int, f.split(":"))) for f in s.split(",")],
                   required=True, help="BITS:GROUP, comma after each")
    r.add_argument("--skip", type=int, default=0, help="questions of each task, as for vlmq compare")
    r.add_argument("--limit-questions", type=int, required=True, help="questions of each task")
    r.add_argument("--name", default="autoround", help="what the rows are called")
    r.add_argument("--beside", type=lambda s: s.split(","), default=[], help="METHOD or METHOD:KEY=VALUE")
    r.add_argument("--threads", type=int, default=2)
    r.add_argument("--limit", type=float, default=14400, help="seconds after which a process is ended")
    r.add_argument("--extra", type=str.split, default=[], help='for autoround_run.py, as "--iters 1000"')
    t = commands.add_parser("table")
    t.add_argument("rows", type=Path, nargs="+")
    t.add_argument("--of", default="gptq")
    return p.parse_args()


def main():
    args = arguments()
    if args.command == "table":
        table(args)
        return
    # Not resolved: a link is what makes PYTHON the environment's.
    for name in ["model", "calibration", "tasks", "work", "output", "vlmq", "choose", "python"]:
        setattr(args, name, getattr(args, name).absolute())
    run(args)


if __name__ == "__main__":
    main()
