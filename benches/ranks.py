"""How a run is shared by ranks: seconds and bytes by their number.

Usage: ranks.py MODEL VLMQ RECORD [--ranks 1 2] [--rounds 3] [--method vlmq] [--samples 128] [--bits 3]
                [--group 128]

Every rank has one thread and a core of its own, so that one rank has the use of one core. The ranks' runs go
in turns. Of each layer rank 0 tells the seconds of every stage; `exchange` is the time that it waited for
the others' bytes, and so holds what the ranks are uneven by.

Prints medians and the speed-up, and adds all numbers to RECORD, which cluster.py foretells others from.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import tempfile
from pathlib import Path

DATA = Path(__file__).resolve().parents[1] / "testbed/calibration"
STAGES = ["forward", "importance", "statistics", "factor", "solve", "load", "write", "exchange"]


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def command(args, output):
    return [args.vlmq, "--json", "--threads", "1", "quantize", args.model, "--calibration", DATA, "--samples",
            str(args.samples), "--method", args.method, "--bits", str(args.bits), "--group-size", str(args.group),
            "--shards", str(max(args.ranks)), "--output", output]


def run(args, n_ranks, folder):
    port, output = free_port(), folder / "out"
    ranks = []
    for rank in range(n_ranks):
        own = {"RANK": str(rank), "WORLD_SIZE": str(n_ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        pin = ["taskset", "-c", str(rank % os.cpu_count())]
        ranks.append(subprocess.Popen(pin + command(args, output), env=os.environ | own, text=True,
                                      stdout=subprocess.PIPE, stderr=subprocess.DEVNULL))
    said = [rank.communicate()[0] for rank in ranks]
    if any(rank.returncode for rank in ranks):
        raise SystemExit("a rank failed")
    report = json.loads(said[0])["report"]
    row = {stage: report["seconds"].get(stage, 0.0) for stage in STAGES}
    row |= {"layers": sum(row.values()), "total": report["seconds"]["total"]}
    row["bytes"] = sum((report.get("ranks") or {}).get("bytes_exchanged", []))
    row["peak_bytes"] = report["peak_memory_bytes"]
    row["n_tokens"] = sum(report["calibration"]["n_tokens"].values())
    return row


def medians(rows):
    return {key: statistics.median(row[key] for row in rows) for key in rows[0]}


def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("model")
    p.add_argument("vlmq")
    p.add_argument("record", type=Path)
    p.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    p.add_argument("--method", default="vlmq")
    for name, default in [("rounds", 3), ("samples", 128), ("bits", 3), ("group", 128)]:
        p.add_argument(f"--{name}", type=int, default=default)
    args = p.parse_args()
    rows = {n: [] for n in args.ranks}
    for _ in range(args.rounds):
        for n in args.ranks:
            with tempfile.TemporaryDirectory() as folder:
                rows[n].append(run(args, n, Path(folder)))
            with args.record.open("a") as record:
                told = {"model": Path(args.model).name, "method": args.method, "n_ranks": n}
                record.write(json.dumps(told | rows[n][-1]) + "\n")
    middle = {n: medians(own) for n, own in rows.items()}
    one = middle[args.ranks[0]]
    print("| ranks | " + " | ".join(STAGES) + " | layers | speed-up | MB sent | peak MB of rank 0 |")
    print("|" + "---|" * (len(STAGES) + 5))
    for n, row in middle.items():
        cells = [f"{row[stage]:.2f}" for stage in STAGES]
        cells += [f"{row['layers']:.2f}", f"{one['layers'] / row['layers']:.2f}", f"{row['bytes'] / 1e6:.1f}",
                  f"{row['peak_bytes'] / 1e6:.0f}"]
        print(f"| {n} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
