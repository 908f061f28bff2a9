"""Where a run's token weights lie, layer by layer: what share of Σω vision tokens hold beside their share of
the tokens, and the effective sample size as a share of the tokens.

Usage: shares.py QUANTIZED/vlmq_report.json

Prints one table in Markdown; layers whose tokens weigh alike are left out.
"""

import json
import re
import sys

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj"]


def rows(report):
    n_tokens = sum(report["calibration"]["n_tokens"].values())
    layers = {}
    for module in report["modules"]:
        share = module.get("weight_share")
        if share:
            layer = int(re.search(r"layers\.(\d+)\.", module["name"]).group(1))
            linear = module["name"].rsplit(".", 1)[1]
            vision, size = share.get("vision", 0.0), module["effective_sample_size"] / n_tokens
            layers.setdefault(layer, {})[linear] = f"{100 * vision:.0f}, {100 * size:.0f}"
    return layers


def main():
    report = json.load(open(sys.argv[1]))
    counts = report["calibration"]["n_tokens"]
    share = counts.get("vision", 0) / sum(counts.values())
    print(f"{sum(counts.values()):,} tokens, {100 * share:.0f} % of them vision; "
          "vision's share of Σω in %, ESS in % of the tokens\n")
    print("| layer | " + " | ".join(name[0] for name in LINEARS) + " |")
    print("|---" * (len(LINEARS) + 1) + "|")
    for layer, found in sorted(rows(report).items()):
        print(f"| {layer} | " + " | ".join(found.get(name, "") for name in LINEARS) + " |")


if __name__ == "__main__":
    main()
