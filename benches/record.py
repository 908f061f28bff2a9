"""Keeps the last results of `cargo bench` as one JSON file, with the machine and the commit.

Usage: record.py record/benches.json

Reads target/criterion; needs nothing but Python and git.
"""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def said(*command):
    return subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout.strip()


def processor():
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    fields = {key.strip(): value.strip() for key, value in fields.items()}
    known = {"avx2", "fma", "f16c", "avx512f", "avx512_bf16", "amx_bf16"}
    return dict(model=fields.get("model name"), cores=os.cpu_count(),
                features=sorted(known & set(fields.get("flags", "").split())))


def result(path):
    about = json.loads((path.parent / "benchmark.json").read_text())
    mean = json.loads(path.read_text())["mean"]
    interval = mean["confidence_interval"]
    found = dict(id=about["full_id"], mean_ns=round(mean["point_estimate"]),
                 interval_95_ns=[round(interval["lower_bound"]), round(interval["upper_bound"])])
    for kind, n in (about.get("throughput") or {}).items():
        found |= {f"{kind.lower()}_per_second": round(n / mean["point_estimate"] * 1e9)}
    return found


def main():
    out = Path(sys.argv[1])
    paths = sorted((ROOT / "target/criterion").glob("**/new/estimates.json"))
    if not paths:
        sys.exit("target/criterion has no results; run cargo bench first")
    machine = processor() | dict(system=platform.system(), architecture=platform.machine())
    record = dict(commit=said("git", "rev-parse", "--short", "HEAD"),
                  rustc=said("rustc", "--version"), machine=machine,
                  results=[result(path) for path in paths])
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(record, indent=1) + "\n")
    print(f"{out}: {len(paths)} results")


if __name__ == "__main__":
    main()
