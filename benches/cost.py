"""What methods cost beside each other: seconds of `vlmq quantize` by stage, runs in turns.

Usage: cost.py MODEL RECORD --run NAME=PROGRAM:METHOD[:KEY=VALUE…] … [--rounds 5] [--samples 128]
       [--bits 3] [--group 128] [--threads 2] [--processor]

With --processor seconds are those that the processor spent on the process, all threads together, instead of
the wall's: what other work on the machine does to them is little. (The clock that programs ask is exchanged
by a preloaded library; Linux, with a C compiler.) Reading samples and the vision tower are left out, since
all methods share them. Prints medians over rounds, and ratios to the first run; adds all numbers to RECORD.
"""

import argparse
import json
import os
import statistics
import subprocess
import tempfile
from pathlib import Path

DATA = Path(__file__).resolve().parents[1] / "testbed/calibration"
STAGES = ["load", "forward", "importance", "statistics", "factor", "solve", "write"]
CLOCK = """#define _GNU_SOURCE
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>
int clock_gettime(clockid_t clock, struct timespec *time) {
    return syscall(SYS_clock_gettime, clock == CLOCK_MONOTONIC ? CLOCK_PROCESS_CPUTIME_ID : clock, time);
}
"""


def processor_clock(folder):
    (folder / "clock.c").write_text(CLOCK)
    library = folder / "clock.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-O2", "-o", library, folder / "clock.c"], check=True)
    return str(library)


def measure(args, what, folder):
    program, method, *settings = what.split(":")
    command = [program, "--json", "--threads", str(args.threads), "quantize", args.model,
               "--calibration", DATA, "--samples", str(args.samples), "--method", method,
               "--bits", str(args.bits), "--group-size", str(args.group), "--output", folder / "out"]
    command += [word for setting in settings for word in ("--set", setting)]
    environment = os.environ | ({"LD_PRELOAD": processor_clock(folder)} if args.processor else {})
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True, env=environment,
                          stderr=subprocess.DEVNULL)
    report = json.loads(done.stdout)["report"]
    losses = [m["relative_loss"] for m in report["modules"] if m["relative_loss"] is not None]
    return dict({stage: report["seconds"].get(stage, 0.0) for stage in STAGES},
                peak_bytes=report["peak_memory_bytes"], mean_relative_loss=statistics.mean(losses))


def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("model")
    p.add_argument("record", type=Path)
    p.add_argument("--run", action="append", required=True)
    for name, default in [("rounds", 5), ("samples", 128), ("bits", 3), ("group", 128), ("threads", 2)]:
        p.add_argument(f"--{name}", type=int, default=default)
    p.add_argument("--processor", action="store_true")
    args = p.parse_args()
    runs = dict(run.split("=", 1) for run in args.run)
    rows = []
    for number in range(args.rounds):
        for name, what in runs.items():
            with tempfile.TemporaryDirectory() as folder:
                found = measure(args, what, Path(folder))
            rows.append(dict(run=name, round=number, model=Path(args.model).name, samples=args.samples,
                             bits=args.bits, group=args.group, threads=args.threads,
                             clock="processor" if args.processor else "wall", **found))
            with args.record.open("a") as record:
                record.write(json.dumps(rows[-1]) + "\n")
    print("| run | " + " | ".join(STAGES) + " | all | ratio | loss |\n|" + "---|" * (len(STAGES) + 4))
    first = None
    for name in runs:
        own = [row for row in rows if row["run"] == name]
        median = [statistics.median(row[stage] for row in own) for stage in STAGES]
        total = statistics.median(sum(row[stage] for stage in STAGES) for row in own)
        first = first or total
        cells = [f"{value:.2f}" for value in [*median, total, total / first]]
        print(f"| {name} | " + " | ".join(cells) + f" | {own[0]['mean_relative_loss']:.4e} |")


if __name__ == "__main__":
    main()
