"""The tables of README.md and docs/results.md, from the rows of `vlmq compare`.

Usage: tables.py target/sweep.jsonl

Prints mean accuracy (of tasks with questions), perplexity (of each task with texts) and mean KL by method (mean,
lowest and highest over seeds), and ratios of the KL of pairs of methods: paired by bits, group and seed, geometric
mean with the 95 % interval of Student's t; in brackets how many pairs. Cells and pairs that the rows lack are left out.
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
    """{(method, bits, group, seed): {"accuracy", "kl", "perplexity of TASK"}}, the first two means over tasks."""
    rows = {}
    for line in Path(path).read_text().splitlines():
        row = json.loads(line)
        tasks = row["tasks"]
        found = {name: [task[name] for task in tasks.values() if name in task] for name in ["accuracy", "kl"]}
        values = {name: mean(numbers) for name, numbers in found.items() if numbers}
        values |= {f"perplexity of {name}": t["perplexity"] for name, t in tasks.items() if "perplexity" in t}
        rows[row["method"], row["bits"], row["group_size"], row["seed"]] = values
    return rows


def table(rows, name, form):
    print("| bits, group | " + " | ".join(METHODS) + " |\n" + "|---" * (len(METHODS) + 1) + "|")
    for bits, group in sorted({key[1:3] for key in rows if key[1]}, key=lambda at: (-at[0], at[1] or 0)):
        cells = []
        for method in METHODS:
            found = [r[name] for key, r in rows.items() if key[:3] == (method, bits, group)]
            if not found:
                cells.append("")
                continue
            spread = f" ({min(found):{form}}–{max(found):{form}})" if len(found) > 1 else ""
            cells.append(f"{mean(found):{form}}{spread}")
        print(f"| {bits}, {group} | " + " | ".join(cells) + " |")


def ratio(rows, above, below, bits):
    logs = [math.log(r["kl"] / rows[below, *key[1:]]["kl"]) for key, r in rows.items()
            if key[0] == above and key[1] in bits and (below, *key[1:]) in rows]
    if not logs:
        return "", 0
    middle = mean(logs)
    if len(logs) == 1:
        return f"{math.exp(middle):.3f}", 1
    deviation = math.sqrt(sum((x - middle) ** 2 for x in logs) / (len(logs) - 1))
    half = student(len(logs) - 1) * deviation / math.sqrt(len(logs))
    low, high = math.exp(middle - half), math.exp(middle + half)
    return f"{math.exp(middle):.3f} [{low:.3f}, {high:.3f}]", len(logs)


def main():
    rows = read(sys.argv[1])
    original = rows.get(("original", None, None, None), {})
    original.pop("kl", None)
    names = sorted({name for row in rows.values() for name in row} - {"kl"})
    for name, form in [*((name, ".1f" if name == "accuracy" else ".3f") for name in names), ("kl", ".4f")]:
        print(f"{name}, of the original {original[name]:{form}}" if name in original else name)
        table(rows, name, form)
        print()
    columns = [((4, 3), "4 and 3 bits"), ((4,), "4 bits"), ((3,), "3 bits"), ((2,), "2 bits")]
    columns = [(bits, head) for bits, head in columns if set(bits) <= {key[1] for key in rows}]
    heads = [f"{head} ({ratio(rows, *PAIRS[0], bits)[1]})" for bits, head in columns]
    print("| ratio | " + " | ".join(heads) + " |\n" + "|---" * (len(heads) + 1) + "|")
    for pair in PAIRS:
        cells = [ratio(rows, *pair, bits) for bits, _ in columns]
        usual = [ratio(rows, *PAIRS[0], bits)[1] for bits, _ in columns]
        cells = [text if n in (0, most) else f"{text} ({n})" for (text, n), most in zip(cells, usual)]
        print(f"| {pair[0]} / {pair[1]} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
