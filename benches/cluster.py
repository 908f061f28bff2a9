"""What a run takes on a cluster: a model of one layer's work, its rates fitted to a record of ranks.py.

Usage: cluster.py RECORD MODEL [--group 128]
       cluster.py RECORD MODEL --shape 8192,29568,64,8,80 --tokens 262144 --ranks 64 --speed 500 --bytes 40e9

The first form fits a rate to every stage of one rank, in multiply-adds a second, and one to the exchange, and
says how well they foretell the seconds and bytes of several ranks. The second also tells what the method
`vlmq` would take at that hidden size, MLP width, heads, key-value heads and layers, on ranks that compute
`speed` times as fast in every stage and exchange so many bytes a second each. Speeds are what one assumes, not
what was seen.

Of a layer with n tokens, linears of i inputs and o outputs: two streams n·i·o each, the importance pass two
more of attention; for each group of linears H n·i²/2, and the drift C n·i², or S 2·n·i·o where that is less;
factors of all samples and of the part held out i³/3 each, of which every rank of a team makes one; rows 4·o·i²
(target, columns, α), shared by the team. Samples are divided by the ranks. Who solves what is as
src/pipeline/teams.rs has it. A rank sends and receives all moments once to add them up, receives them again if
it solves with them, and the factor that it does not make, i²/2, and receives all codes.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from statistics import median

STAGES = ["forward", "importance", "statistics", "factor", "solve"]
ROW_UNIT = 128


@dataclass
class Group:
    """Linears that share statistics."""

    inputs: int
    outputs: list
    is_attention: bool = False
    to_stream: bool = False

    @property
    def factor(self):
        """Of one of the two."""
        return self.inputs**3 / 3

    @property
    def rows(self):
        return 4 * self.inputs**2 * sum(self.outputs)

    @property
    def weights(self):
        return self.inputs * sum(self.outputs)

    @property
    def is_at_output(self):
        out = self.outputs[0]
        return len(self.outputs) == 1 and 2 * out <= self.inputs + (out if self.to_stream else 0)

    @property
    def drift_macs(self):
        return 2 * self.weights if self.is_at_output else self.inputs**2

    @property
    def moments(self):
        """Numbers, of all samples but the part and of the part."""
        drift = self.weights if self.is_at_output else self.inputs**2
        return 2 * (self.inputs * (self.inputs + 1) // 2 + drift)


@dataclass
class Shape:
    hidden: int
    mlp: int
    heads: int
    kv_heads: int
    layers: int

    @classmethod
    def of(cls, model):
        config = json.loads((Path(model) / "config.json").read_text())
        config = {**config, **config.get("text_config", {})}
        return cls(*(config[key] for key in ["hidden_size", "intermediate_size", "num_attention_heads",
                                             "num_key_value_heads", "num_hidden_layers"]))

    def stages(self, is_first):
        """Groups that are solved at once; in the first layer q, k and v weigh tokens alike."""
        hidden, kv = self.hidden, self.hidden // self.heads * self.kv_heads
        qkv = [Group(hidden, [hidden, kv, kv], True)]
        if not is_first:
            qkv = [Group(hidden, [out], True) for out in (hidden, kv, kv)]
        return [qkv, [Group(hidden, [hidden], True, True)], [Group(hidden, [self.mlp] * 2)],
                [Group(self.mlp, [hidden], False, True)]]


def teams(groups, n_ranks):
    """(factors, rows) in multiply-adds of every rank, and how many ranks solve each group."""
    factors = lambda group, size: group.factor * (2 if size == 1 else 1)
    each = lambda group, size: factors(group, size) + group.rows / min(size, -(-max(group.outputs) // ROW_UNIT))
    ranks = [[0.0, 0.0] for _ in range(n_ranks)]
    if len(groups) >= n_ranks:
        for group in sorted(groups, key=lambda group: -each(group, 1)):
            least = min(ranks, key=sum)
            least[0] += factors(group, 1)
            least[1] += group.rows
        return ranks, [1] * len(groups)
    sizes = [1] * len(groups)
    for _ in range(len(groups), n_ranks):
        can_grow = [i for i, g in enumerate(groups) if sizes[i] < -(-max(g.outputs) // ROW_UNIT)]
        if not can_grow:
            break
        sizes[max(can_grow, key=lambda i: each(groups[i], sizes[i]))] += 1
    work = [[factors(group, size), group.rows / size] for group, size in zip(groups, sizes)]
    return [own for own, size in zip(work, sizes) for _ in range(size)], sizes


def layer(shape, is_first, n_tokens, n_ranks, bits, group_len):
    """Multiply-adds of the slowest rank by stage; bytes that the busiest rank receives, that all send, and
    that they would at least: moments to one rank who solves, codes to all."""
    stages = shape.stages(is_first)
    groups = sum(stages, [])
    weights = sum(group.weights for group in groups)
    attention = sum(group.weights for group in groups if group.is_attention)
    statistics = sum(group.inputs**2 / 2 + group.drift_macs for group in groups)
    work = dict(zip(STAGES, [2 * n_tokens * weights / n_ranks, 2 * n_tokens * attention / n_ranks,
                             n_tokens * statistics / n_ranks, 0.0, 0.0]))
    received, sent, least = 0.0, 0.0, 0.0
    code_bytes = weights * (bits / 8 + 3 / group_len)
    for groups in stages:
        ranks, sizes = teams(groups, n_ranks)
        slowest = max(ranks, key=sum)
        work["factor"] += slowest[0]
        work["solve"] += slowest[1]
        moments = [4 * group.moments for group in groups]
        # Of each rank of a team the other's triangle.
        handed = [2 * group.inputs**2 if size > 1 else 0 for group, size in zip(groups, sizes)]
        received += (sum(moments) + max(moments)) * (n_ranks - 1) / n_ranks + max(handed)
        least += (n_ranks - 1) * sum(moments)
        sent += sum((n_ranks + size) * (n_ranks - 1) / n_ranks * m for m, size in zip(moments, sizes))
        sent += sum(size * triangle for size, triangle in zip(sizes, handed))
    codes = code_bytes * (n_ranks - 1)
    return work, received + codes / n_ranks, sent + codes, least + codes


def whole(shape, n_tokens, n_ranks, bits, group_len):
    """As [`layer`], of all layers."""
    first, other = (layer(shape, is_first, n_tokens, n_ranks, bits, group_len) for is_first in (True, False))
    total = lambda a, b: a + (shape.layers - 1) * b
    work = {stage: total(first[0][stage], other[0][stage]) for stage in STAGES}
    return work, *(total(a, b) for a, b in zip(first[1:], other[1:]))


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("record", type=Path)
    p.add_argument("model")
    p.add_argument("--shape", help="hidden, MLP width, heads, key-value heads, layers")
    p.add_argument("--tokens", type=int, default=262144)
    p.add_argument("--ranks", type=int, default=64)
    p.add_argument("--bits", type=int, default=3)
    p.add_argument("--group", type=int, default=128)
    p.add_argument("--speed", type=float, default=1.0)
    p.add_argument("--bytes", type=float)
    args = p.parse_args()
    rows = [json.loads(line) for line in args.record.read_text().splitlines()]
    rows = [row for row in rows if row["model"] == Path(args.model).name]
    middle = {}
    for n in sorted({row["n_ranks"] for row in rows}):
        own = [row for row in rows if row["n_ranks"] == n]
        middle[n] = {key: median(row[key] for row in own) for key in [*STAGES, "exchange", "bytes", "n_tokens"]}
    measured, n_tokens = Shape.of(args.model), middle[1]["n_tokens"]
    work, *_ = whole(measured, n_tokens, 1, args.bits, args.group)
    rates = {stage: work[stage] / middle[1][stage] for stage in STAGES}
    print("rates of one rank, 10⁹ multiply-adds a second: "
          + ", ".join(f"{stage} {rate / 1e9:.1f}" for stage, rate in rates.items()))
    rate = None
    for n in [n for n in middle if n > 1]:
        work, received, sent, least = whole(measured, n_tokens, n, args.bits, args.group)
        rate = received / middle[n]["exchange"]
        print(f"{n} ranks: {rate / 1e6:.0f} MB/s received by a rank while exchanging, waiting included; all send "
              f"{middle[n]['bytes'] / 1e6:.1f} MB, {sent / 1e6:.1f} foretold, {least / 1e6:.1f} the least")
        found = sum(middle[n][stage] for stage in STAGES)
        told = sum(work[stage] / rates[stage] for stage in STAGES)
        each = ", ".join(f"{s} {work[s] / rates[s]:.2f} ({middle[n][s]:.2f})" for s in STAGES)
        print(f"  foretold of one rank's rates {told:.2f} s of computing, found {found:.2f}: {each}")
    if args.shape:
        shape = Shape(*(int(part) for part in args.shape.split(",")))
        work, received, *_ = whole(shape, args.tokens, args.ranks, args.bits, args.group)
        by = {stage: work[stage] / (rates[stage] * args.speed) for stage in STAGES}
        by["exchange"] = received / (args.bytes or rate)
        print(f"{args.ranks} ranks, {args.tokens} tokens, {args.speed:g} × the speed, "
              f"{(args.bytes or rate) / 1e9:.1f} GB/s: {sum(by.values()) / 60:.1f} min; "
              + ", ".join(f"{stage} {seconds:.0f} s" for stage, seconds in by.items()))


if __name__ == "__main__":
    main()
