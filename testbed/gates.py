"""What the testbed model must be before methods are ranked on it: good, looking at its pictures,
unharmed by 4 bits, harmed by 3 and ruined by 2. Prints one Markdown table.

Usage: gates.py [--testbed DIR] [--limit N]   (questions of each task)
"""

import argparse
import io
import json
import random
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image
from tokenizers import Tokenizer
from transformers import Qwen2VLForConditionalGeneration

from data import TASKS, scenes
from network import Pack, hidden_states, image_features, patches
from train import SLOT


def blind_answers(task):
    """The most frequent training answer to each question text, and to all of them."""
    seen, every = defaultdict(Counter), Counter()
    for scene in scenes(task, 3000, 0, held=False):
        for _, question, answer in scene.questions:
            seen[question][answer] += 1
            every[answer] += 1
    return {q: c.most_common(1)[0][0] for q, c in seen.items()}, every.most_common(1)[0][0]


@torch.no_grad()
def accuracy(model, pack, rows, pixels):
    right = 0
    for at in range(0, len(rows), 60):
        part = rows[at:at + 60]
        features = image_features(model.model.visual, patches(pixels[at:at + 60]))
        ids, labels = pack.batch([[(r["question"], r["answer"])] for r in part])
        scores = model.lm_head(hidden_states(model, pack, features, ids))
        right += ((scores.argmax(-1) == labels) | (labels < 0)).all(-1).sum().item()
    return 100 * right / len(rows)


def round_to_nearest(model, bits, group):
    """Asymmetric min-max grids on the decoder's linears, scales in bf16."""
    top = 2 ** bits - 1
    for name, p in model.model.language_model.named_parameters():
        if p.ndim != 2 or "embed" in name:
            continue
        w = p.data.view(len(p), -1, group)
        low, high = w.amin(-1, True).clamp(max=0), w.amax(-1, True).clamp(min=0)
        scale = ((high - low) / top).bfloat16().float()
        zero = (-low / scale).round().clamp(0, top)
        p.data = (((w / scale).round() + zero).clamp(0, top) - zero).mul(scale).view_as(p.data)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--limit", type=int, default=10 ** 9)
    parser.add_argument("--testbed", type=Path, default=Path(__file__).resolve().parent,
                        help="folder with model/ and eval/")
    args = parser.parse_args()
    here, limit = args.testbed, args.limit
    load = lambda: Qwen2VLForConditionalGeneration.from_pretrained(
        here / "model", dtype=torch.float32, attn_implementation="sdpa").eval()
    pack = Pack(Tokenizer.from_file(str(here / "model/tokenizer.json")), 1, SLOT + 16)
    data = {}
    for task in TASKS:
        rows = pq.read_table(here / f"eval/{task}.parquet").to_pylist()[:limit]
        pixels = np.stack([np.asarray(Image.open(io.BytesIO(r["image"]["bytes"])).convert("RGB"))
                           for r in rows])
        data[task] = rows, pixels
    columns = {}
    model = load()
    columns["full precision"] = {t: accuracy(model, pack, *data[t]) for t in TASKS}
    shuffled = {}
    for task, (rows, pixels) in data.items():
        order = list(range(len(rows)))
        random.Random(0).shuffle(order)
        shuffled[task] = accuracy(model, pack, rows, pixels[order])
    columns["wrong picture"] = shuffled
    blind = {}
    for task, (rows, _) in data.items():
        known, common = blind_answers(task)
        blind[task] = 100 * np.mean([known.get(r["question"], common) == r["answer"] for r in rows])
    columns["no picture"] = blind
    for bits, group in [(4, 64), (4, 128), (3, 64), (3, 128), (2, 64), (2, 128)]:
        model = load()
        round_to_nearest(model, bits, group)
        columns[f"RTN {bits} g{group}"] = {t: accuracy(model, pack, *data[t]) for t in TASKS}
    print("| |" + "".join(f" {name} |" for name in columns))
    print("|---|" + "---|" * len(columns))
    for task in TASKS:
        print(f"| {task} |" + "".join(f" {c[task]:.1f} |" for c in columns.values()))
    print("| mean |" + "".join(f" {np.mean(list(c.values())):.1f} |" for c in columns.values()))
    opens = [r for r in data["easy_vqa"][0] if r["category"] == "open"]
    pixels = np.stack([p for r, p in zip(*data["easy_vqa"]) if r["category"] == "open"])
    print(f"\neasy_vqa, open questions: {accuracy(load(), pack, opens, pixels):.1f} of {len(opens)}")


if __name__ == "__main__":
    main()
