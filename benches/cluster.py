"""What a run takes on a cluster: a model of one layer's work, its rates fitted to records of ranks.py.

Usage: cluster.py RECORD MODEL [--tokens 8049]
       cluster.py RECORD MODEL --shape 8192,29568,64,8,80 --tokens 262144 --ranks 64 --speed 500 --bytes 40e9

The first form fits a rate to every stage of one rank, in multiply-adds a second, and one to the exchange of
several, and says how well they foretell the runs in RECORD. The second also tells what a model of that
hidden size, MLP width, heads, key-value heads and layers would take on ranks that compute `speed` times as
fast in every stage and exchange so many bytes a second each. Speeds are what one assumes, not what was seen.

Of a layer with tokens n, inputs i and outputs o of its linears: both streams 2·n·i·o, the importance pass one
more of attention, H n·i²/2 for each group, the drift's moments n·i·o or n·i², factors 2·i³/3 at each rank of
a team, rows 4·o·i² (target, columns, sweeps). Samples are divided by the ranks, rows by the team.
"""

import argparse
import json
from pathlib import Path
from statistics import median

STAGES = ["forward", "importance", "statistics", "factor", "solve"]


def shape_of(model):
    config = json.loads((Path(model) / "config.json").read_text())
    config = {**config, **config.get("text_config", {})}
    return (config["hidden_size"], config["intermediate_size"], config["num_attention_heads"],
            config["num_key_value_heads"], config["num_hidden_layers"])


def linears(shape):
    """Groups of a layer: inputs, outputs of their linears, and whether they are attention's."""
    hidden, mlp, heads, kv, _ = shape
    kv = hidden // heads * kv
    return [(hidden, [hidden], True), (hidden, [kv], True), (hidden, [kv], True), (hidden, [hidden], True),
            (hidden, [mlp, mlp], False), (mlp, [hidden], False)]


def counts(shape, n_tokens):
    """Multiply-adds of a layer by stage, of one rank with all samples."""
    groups = linears(shape)
    weights = sum(i * sum(o) for i, o, _ in groups)
    of_attention = sum(i * sum(o) for i, o, is_attention in groups if is_attention)
    return {
        "forward": 2 * n_tokens * weights,
        "importance": 2 * n_tokens * of_attention,
        "statistics": n_tokens * sum(i * i / 2 + min(i * i, 2 * i * sum(o)) for i, o, _ in groups),
        "factor": sum(2 * i**3 / 3 for i, _, _ in groups),
        "solve": sum(4 * sum(o) * i * i for i, o, _ in groups),
    }


def n_moments(shape):
    """Numbers of the moments of a layer: H and what drift asks for, of the whole and of the held-out part."""
    return sum(2 * (i * i / 2 + min(i * i, i * sum(o))) for i, o, _ in linears(shape))


def n_bytes(shape, n_ranks, n_shards, bits):
    """Bytes of a layer that all ranks send: moments to their bands and on to teams, codes to all."""
    if n_ranks == 1:
        return 0
    weights = sum(i * sum(o) for i, o, _ in linears(shape))
    team = max(1.0, n_ranks / 3)
    moments = n_moments(shape) * 4 * (n_shards * (n_ranks - 1) / n_ranks + team * (n_ranks - 1) / n_ranks)
    return moments + (n_ranks - 1) * weights * bits / 8


def seconds(shape, n_tokens, n_ranks, rates, exchange, bits=3):
    by = {stage: counts(shape, n_tokens)[stage] / rates[stage] for stage in STAGES}
    for stage in ("forward", "importance", "statistics"):
        by[stage] /= n_ranks
    by["solve"] /= max(1.0, n_ranks / 3)
    by["exchange"] = n_bytes(shape, n_ranks, n_ranks, bits) / n_ranks / exchange if n_ranks > 1 else 0.0
    return by


def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("record", type=Path)
    p.add_argument("model")
    p.add_argument("--shape", help="hidden, MLP width, heads, key-value heads, layers")
    p.add_argument("--tokens", type=int, default=8049)
    p.add_argument("--ranks", type=int, default=64)
    p.add_argument("--speed", type=float, default=1.0)
    p.add_argument("--bytes", type=float)
    p.add_argument("--measured-tokens", type=int, default=8049)
    args = p.parse_args()
    rows = [json.loads(line) for line in args.record.read_text().splitlines()]
    measured = shape_of(args.model)
    middle = {}
    for n in sorted({row["n_ranks"] for row in rows}):
        own = [row for row in rows if row["n_ranks"] == n]
        middle[n] = {key: median(row[key] for row in own) for key in [*STAGES, "exchange", "bytes", "layers"]}
    work = {stage: count * measured[4] for stage, count in counts(measured, args.measured_tokens).items()}
    rates = {stage: work[stage] / middle[1][stage] for stage in STAGES}
    told = ", ".join(f"{stage} {rate / 1e9:.1f}" for stage, rate in rates.items())
    print(f"rates of one rank, 10⁹ multiply-adds a second: {told}")
    several = [n for n in middle if n > 1]
    exchange = median(middle[n]["bytes"] / n / middle[n]["exchange"] for n in several)
    print(f"exchange: {exchange / 1e6:.0f} MB/s a rank, waiting included")
    for n in several:
        told = sum(seconds(measured, args.measured_tokens, n, rates, exchange).values()) * measured[4]
        found = sum(middle[n][stage] for stage in [*STAGES, "exchange"])
        print(f"{n} ranks: foretold {told:.1f} s, found {found:.1f} s")
    if args.shape:
        shape = tuple(int(part) for part in args.shape.split(","))
        faster = {stage: rate * args.speed for stage, rate in rates.items()}
        by = seconds(shape, args.tokens, args.ranks, faster, args.bytes or exchange)
        print(f"{args.ranks} ranks, {args.tokens} tokens, {shape[4]} layers, {args.speed:g} × the speed: "
              f"{sum(by.values()) * shape[4] / 60:.1f} min; "
              + ", ".join(f"{k} {v * shape[4]:.0f} s" for k, v in by.items()))


if __name__ == "__main__":
    main()
