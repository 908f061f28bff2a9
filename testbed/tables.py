"""The tables of README.md and docs/results.md, from the rows of `vlmq compare`.

Usage: tables.py target/sweep.jsonl

Prints mean accuracy and mean KL by method (mean, lowest and highest over seeds), and ratios of the KL of pairs
of methods: paired by bits, group and seed, geometric mean with the 95 % interval of Student's t.
"""

import json
import math
import sys
from pathlib import Path

METHODS = ["rtn", "gptq", "gptaq", "vlmq-v1", "vlmq-v2"]
PAIRS = [("gptaq", "gptq"), ("vlmq-v1", "gptaq"), ("vlmq-v2", "gptaq"), ("vlmq-v1", "gptq"),
         ("vlmq-v2", "gptq"), ("vlmq-v2", "vlmq-v1")]


def mean(values):
    return sum(values) / len(values)


def student(df):
    """The 97.5 % quantile of Student's t, by bisection of its integral."""
    scale = math.exp(math.lgamma((df + 1) / 2) - math.lgamma(df / 2)) / math.sqrt(df * math.pi)
    density = lambda x: scale * (1 + x * x / df) ** (-(df + 1) / 2)

    def below(x, n=2000):
        step = x / n
        return 0.5 + step * (density(0) / 2 + sum(density(i * step) for i in range(1, n)) + density(x) / 2)

    low, high = 0.0, 100.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if below(middle) < 0.975 else (low, middle)
    return low


def read(path):
    """{(method, bits, group, seed): {"accuracy", "kl"}}, each a mean over tasks."""
    rows = {}
    for line in Path(path).read_text().splitlines():
        row = json.loads(line)
        tasks = row["tasks"].values()
        key = row["method"], row["bits"], row["group_size"], row["seed"]
        rows[key] = {name: mean([task[name] for task in tasks]) for name in ["accuracy", "kl"]}
    return rows


def table(rows, name, form):
    print("| bits, group | " + " | ".join(METHODS) + " |\n" + "|---" * (len(METHODS) + 1) + "|")
    for bits, group in sorted({key[1:3] for key in rows if key[1]}, key=lambda at: (-at[0], at[1])):
        cells = []
        for method in METHODS:
            found = [r[name] for key, r in rows.items() if key[:3] == (method, bits, group)]
            spread = f" ({min(found):{form}}–{max(found):{form}})" if len(found) > 1 else ""
            cells.append(f"{mean(found):{form}}{spread}")
        print(f"| {bits}, {group} | " + " | ".join(cells) + " |")


def ratio(rows, above, below, bits):
    logs = [math.log(r["kl"] / rows[below, *key[1:]]["kl"]) for key, r in rows.items()
            if key[0] == above and key[1] in bits]
    middle = mean(logs)
    deviation = math.sqrt(sum((x - middle) ** 2 for x in logs) / (len(logs) - 1))
    half = student(len(logs) - 1) * deviation / math.sqrt(len(logs))
    low, high = math.exp(middle - half), math.exp(middle + half)
    return f"{math.exp(middle):.3f} [{low:.3f}, {high:.3f}]", len(logs)


def main():
    rows = read(sys.argv[1])
    table(rows, "accuracy", ".1f")
    print()
    table(rows, "kl", ".4f")
    columns = [((4, 3), "4 and 3 bits"), ((4,), "4 bits"), ((3,), "3 bits"), ((2,), "2 bits")]
    heads = [f"{head} ({ratio(rows, *PAIRS[0], bits)[1]})" for bits, head in columns]
    print("\n| ratio | " + " | ".join(heads) + " |\n" + "|---" * 5 + "|")
    for pair in PAIRS:
        print(f"| {pair[0]} / {pair[1]} | " + " | ".join(ratio(rows, *pair, bits)[0] for bits, _ in columns)
              + " |")


if __name__ == "__main__":
    main()
