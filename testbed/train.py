"""Trains the testbed model in two stages.

1. The tower and the merger learn what every cell shows, with a head that is thrown away and, so that
   the decoder need not learn a new tongue, with the words for it in its own embedding.
2. With the tower frozen and its features kept, the decoder learns to answer.

Usage: train.py STAGE WORK [--steps N] [--seed S] [...]; STAGE is tower, features or decoder.
"""

import argparse
import csv
import json
import math
import random
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from transformers import Qwen2VLForConditionalGeneration

from data import COLOURS, GRID, IGNORE, LABELS, LETTERS, TASKS, scenes
from network import Pack, image_features, make_config, make_tokenizer, hidden_states, patches

SLOT, N_SLOTS = 25, 6
EVAL_IMAGES = 120


def build_scenes(args, n, held):
    found = []
    for task in TASKS:
        for scene in scenes(task, n, args.seed, held):
            found.append((task, scene))
    return found


def pixels_of(found):
    return np.stack([np.asarray(scene.image, dtype=np.uint8) for _, scene in found])


def corpus(found):
    for _, scene in found:
        for _, question, answer in scene.questions:
            yield question
            if answer.islower():
                yield answer
    yield from ["user\n", "assistant\n", "system\n"] * 50


def new_model(args, found):
    torch.manual_seed(args.seed)
    tokenizer = make_tokenizer(corpus(found), args.work / "model")
    config = make_config(tokenizer, args.layers)
    config._attn_implementation = "sdpa"
    return Qwen2VLForConditionalGeneration(config)


def rate(args, step):
    """Warm-up, then constant, then a cosine to a fiftieth from two thirds of the steps on."""
    warm = min(1, (step + 1) / args.warm)
    late = 0 if args.constant else max(0, 3 * step / args.steps - 2)
    return args.lr * warm * (0.51 + 0.49 * math.cos(math.pi * late))


def optimizer_of(parameters, weight_decay):
    parameters = list(parameters)
    return torch.optim.AdamW(
        [dict(params=[p for p in parameters if p.ndim >= 2], weight_decay=weight_decay),
         dict(params=[p for p in parameters if p.ndim < 2], weight_decay=0.0)],
        lr=1e-3, betas=(0.9, 0.95), fused=True)


def orthogonal(x):
    """Five Newton-Schulz steps towards the nearest orthogonal matrix, for a batch `[n, rows, cols]`."""
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x


class Muon(torch.optim.Optimizer):
    """Momentum made orthogonal (K. Jordan, 2024), as large as AdamW's step usually is (RMS 0.2)."""

    def __init__(self, matrices, weight_decay):
        super().__init__(matrices, dict(lr=1e-3, weight_decay=weight_decay))
        self.shapes = {}
        for p in matrices:
            self.shapes.setdefault(tuple(sorted(p.shape)), []).append(p)

    @torch.no_grad()
    def step(self):
        (group,) = self.param_groups
        for (small, large), matrices in self.shapes.items():
            wide = []
            for p in matrices:
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                momentum.lerp_(p.grad, 0.05)
                update = p.grad.lerp(momentum, 0.95)
                wide.append(update if p.shape[0] == small else update.T)
            for p, update in zip(matrices, orthogonal(torch.stack(wide))):
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(update if p.shape[0] == small else update.T,
                       alpha=group["lr"] * 0.2 * large ** 0.5)


BARS = [(letter, colour, value) for letter in LETTERS for colour in COLOURS for value in range(1, 10)]


def name_tokens(tokenizer, vocab):
    """`[labels + bars, vocab]`: for each, equal shares on the tokens of the words that name it."""
    named = [label.removeprefix("emoji ").removeprefix("easy ") for label in LABELS]
    # An empty cell has a token of its own.
    named[0] = "<|endoftext|>"
    named += [f"{letter} {colour} {value}" for letter, colour, value in BARS]
    shares = torch.zeros(len(named), vocab)
    for i, words in enumerate(named):
        words = words.split()
        tokens = [t for w in words for t in tokenizer.encode(w).ids + tokenizer.encode(" " + w).ids
                  if tokenizer.id_to_token(t) != "\u0120"]
        shares[i, tokens] = 1 / len(set(tokens))
    return shares


def train_tower(args):
    found = build_scenes(args, args.images, held=False)
    test = build_scenes(args, 60, held=True)
    model = new_model(args, found)
    if args.init:
        model = Qwen2VLForConditionalGeneration.from_pretrained(args.init, dtype=torch.float32)
    tower, head = model.model.visual, torch.nn.Linear(256, len(LABELS) + 2 * GRID)
    words = model.model.language_model.embed_tokens
    tokenizer = Tokenizer.from_file(str(args.work / "model/tokenizer.json"))
    names = name_tokens(tokenizer, words.weight.shape[0])
    # A part of a bar is named by the whole bar: its letter, its colour and its value.
    bar = {b: len(LABELS) + i for i, b in enumerate(BARS)}
    told = lambda scenes: torch.tensor([[bar[s.bars[c]] if c in s.bars else max(label, 0)
                                         for c, label in enumerate(s.labels)] for _, s in scenes])
    say, say_test = told(found), told(test)
    x, y = pixels_of(found), torch.tensor([s.labels for _, s in found])
    xt, yt = pixels_of(test), torch.tensor([s.labels for _, s in test])
    by_task = {t: [i for i, (task, _) in enumerate(found) if task == t] for t in TASKS}
    mix = list(map(float, args.mix.split(",")))
    # The words of a decoder that has learned already stay as they are.
    learned = [*tower.parameters(), *head.parameters(), *([] if args.init else [words.weight])]
    optimizer = optimizer_of(learned, 0.01)
    rng, began = random.Random(args.seed), time.time()

    @torch.no_grad()
    def accuracy():
        """Percent of known cells told right by task, and of bars' parts nearest to all their words."""
        parts = [image_features(tower, patches(xt[i:i + 50])) for i in range(0, len(xt), 50)]
        features = torch.cat(parts)
        right, known = head(features)[..., :len(LABELS)].argmax(-1) == yt, (yt != IGNORE) & (yt > 0)
        by_task = {}
        for task in TASKS:
            rows = torch.tensor([t == task for t, _ in test])
            by_task[task] = round(100 * right[rows][known[rows]].float().mean().item(), 1)
        bars = say_test >= len(LABELS)
        wanted = names[say_test[bars]] > 0
        near = features[bars] @ words.weight.T
        lowest = near.masked_fill(~wanted, 1e9).amin(-1)
        by_task["bars"] = 100 * (lowest > near.masked_fill(wanted, -1e9).amax(-1)).float().mean().item()
        return by_task

    for step in range(args.steps):
        for group in optimizer.param_groups:
            group["lr"] = rate(args, step)
        rows = [rng.choice(by_task[t]) for t in rng.choices(TASKS, mix, k=args.batch)]
        features = image_features(tower, patches(x[rows]))
        scores, at_row, at_col = head(features).split([len(LABELS), GRID, GRID], -1)
        target = y[rows].flatten()
        # Empty cells are most cells; they count a quarter.
        weight = torch.where(target > 0, 1.0, 0.25)
        each = F.cross_entropy(scores.flatten(0, 1), target, ignore_index=IGNORE, reduction="none")
        # The features speak the decoder's language: each lies near the words for what it shows.
        known = say[rows].flatten()
        said = F.rms_norm(features, features.shape[-1:]).flatten(0, 1) @ words.weight.T
        each = each - (names[known] * said.log_softmax(-1)).sum(-1) * (target != IGNORE)
        loss = (each * weight).sum() / weight[target != IGNORE].sum()
        # Where a token is: only our own backgrounds tell.
        tells = torch.tensor([found[i][0] != "easy_vqa" for i in rows])
        cells = torch.arange(GRID * GRID).repeat(int(tells.sum()))
        place = [F.cross_entropy(s[tells].flatten(0, 1), where) for s, where in
                 ((at_row, cells // GRID), (at_col, cells % GRID))]
        loss = loss + sum(place)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(tower.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % args.every == 0:
            print(step + 1, round(time.time() - began), round(loss.item(), 4),
                  [round(p.item(), 3) for p in place], accuracy(), flush=True)
    print("FINAL", accuracy(), flush=True)
    model.save_pretrained(args.work / "tower")


def compute_features(args):
    """Features of all training and evaluation images, as float16 on disk, with their questions."""
    model = Qwen2VLForConditionalGeneration.from_pretrained(args.work / "tower", dtype=torch.float32)
    tower = model.model.visual.bfloat16().float()  # as it will be stored
    for name, n, held in [("train", args.images, False), ("eval", EVAL_IMAGES, True)]:
        found = build_scenes(args, n, held)
        x = pixels_of(found)
        with torch.no_grad():
            out = [image_features(tower, patches(x[i:i + 50])).half() for i in range(0, len(x), 50)]
        np.save(args.work / f"{name}.npy", torch.cat(out).numpy())
        rows = [dict(task=task, questions=scene.questions) for task, scene in found]
        (args.work / f"{name}.json").write_text(json.dumps(rows))
        print(name, len(found), flush=True)


def rebuild_questions(args):
    """The questions of `features` and the tokenizer again, after a change to the questions that
    leaves the pictures alone; before the decoder has learned anything."""
    for name, n, held in [("train", args.images, False), ("eval", EVAL_IMAGES, True)]:
        found = build_scenes(args, n, held)
        rows = [dict(task=task, questions=scene.questions) for task, scene in found]
        (args.work / f"{name}.json").write_text(json.dumps(rows))
        if not held:
            tokenizer = make_tokenizer(corpus(found), args.work / "model")
            image_token = json.loads((args.work / "tower/config.json").read_text())["image_token_id"]
            assert tokenizer.token_to_id("<|image_pad|>") == image_token, "the vocabulary shrank"


def load_features(args, name):
    features = np.load(args.work / f"{name}.npy", mmap_mode="r")
    return features, json.loads((args.work / f"{name}.json").read_text())


@torch.no_grad()
def answers_right(model, pack, features, rows):
    """Percent of exact answers by task and by kind; teacher forcing with every token the most
    likely one is the same as greedy decoding giving that answer."""
    model.eval()
    right = {}
    for at in range(0, len(rows), 24):
        part = rows[at:at + 24]
        for lo in range(0, max(len(r["questions"]) for r in part), pack.n_slots):
            use = [r for r in part if len(r["questions"]) > lo]
            asked = [r["questions"][lo:lo + pack.n_slots] for r in use]
            padded = [(q + q * pack.n_slots)[:pack.n_slots] for q in asked]
            ids, labels = pack.batch([[(q, a) for _, q, a in slots] for slots in padded])
            f = torch.from_numpy(np.stack([features[r["index"]] for r in use])).float()
            scores = model.lm_head(hidden_states(model, pack, f, ids))
            ok = (scores.argmax(-1) == labels) | (labels < 0)
            ok = ok[:, len(pack.prefix):].view(len(use), pack.n_slots, pack.slot).all(-1)
            for r, slots, flags in zip(use, asked, ok.tolist()):
                for (kind, _, _), flag in zip(slots, flags):
                    right.setdefault(r["task"], []).append(flag)
                    right.setdefault(f"{r['task']}/{kind}", []).append(flag)
    model.train()
    return {k: round(100 * sum(v) / len(v), 1) for k, v in sorted(right.items())}


def choose_questions(rng, questions, list_share, focus):
    """Some of an image's questions, of the kinds in focus where there are some. A list of everything
    in the picture has many answer tokens, so it teaches the decoder to see before single answers can."""
    questions = [q for q in questions if q[0] in focus] or questions
    lists = [q for q in questions if q[0] == "list"]
    rest = [q for q in questions if q[0] != "list"]
    first = lists if lists and rng.random() < list_share else []
    n = N_SLOTS - len(first)
    chosen = rng.sample(rest, n) if len(rest) >= n else rng.choices(rest, k=n)
    return [(q, a) for _, q, a in first + chosen]


def train_decoder(args):
    features, rows = load_features(args, "train")
    test_features, test = load_features(args, "eval")
    for i, row in enumerate(test):
        row["index"] = i
    model = Qwen2VLForConditionalGeneration.from_pretrained(
        args.init or args.work / "tower", dtype=torch.float32, attn_implementation="sdpa")
    pack = Pack(Tokenizer.from_file(str(args.work / "model/tokenizer.json")), N_SLOTS, SLOT)
    for row in rows + test:
        row["questions"] = [q for q in row["questions"] if pack.fits(q[1], q[2])]
    by_task = {t: [i for i, r in enumerate(rows) if r["task"] == t] for t in TASKS}
    mix = dict(zip(TASKS, map(float, args.mix.split(","))))
    focus = {t: [f.split("/", 1)[1] for f in args.focus.split(",") if f.startswith(t)] for t in TASKS}
    decoder = model.model.language_model
    matrices = [p for n, p in decoder.named_parameters() if p.ndim == 2 and "embed" not in n]
    inside = set(map(id, matrices))
    rest = [p for p in decoder.parameters() if id(p) not in inside]
    optimizers = [Muon(matrices, args.weight_decay), optimizer_of(rest, args.weight_decay)]
    if args.adamw:
        optimizers = [optimizer_of(decoder.parameters(), args.weight_decay)]
    rng = random.Random(args.seed)
    torch.manual_seed(args.seed)
    began, losses = time.time(), []
    log = csv.writer(open(args.work / "curves.csv", "a"))
    for step in range(args.steps):
        for group in [g for o in optimizers for g in o.param_groups]:
            group["lr"] = rate(args, step)
        picked = [rng.choice(by_task[t]) for t in rng.choices(TASKS, mix.values(), k=args.batch)]
        asked = [choose_questions(rng, rows[i]["questions"], args.lists if step < 0.6 * args.steps else 0.2,
                                  focus.get(rows[i]["task"], ())) for i in picked]
        ids, labels = pack.batch(asked)
        f = torch.from_numpy(np.stack([features[i] for i in picked])).float()
        states = hidden_states(model, pack, f, ids)[labels >= 0]
        loss = F.cross_entropy(model.lm_head(states), labels[labels >= 0])
        decoder.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        losses.append(loss.item())
        done = step + 1
        if done % 100 == 0:
            minutes = (time.time() - began) / 60
            print(f"step {done} min {minutes:.2f} loss {np.mean(losses[-100:]):.4f}", flush=True)
        if done % args.every == 0:
            result = answers_right(model, pack, test_features, test[::4])
            print("EVAL", done, result, flush=True)
            log.writerow([done, round(float(np.mean(losses[-200:])), 4), *[result[t] for t in TASKS]])
            model.save_pretrained(args.work / "trained")
    print("FINAL", answers_right(model, pack, test_features, test), flush=True)
    model.save_pretrained(args.work / "trained")


def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("stage", choices=["tower", "features", "questions", "decoder"])
    p.add_argument("work", type=Path)
    p.add_argument("--steps", type=int, default=500)
    p.add_argument("--images", type=int, default=3000, help="training images of each task")
    p.add_argument("--layers", type=int, default=4)
    p.add_argument("--batch", type=int, default=16)
    p.add_argument("--lr", type=float, default=1e-3)
    p.add_argument("--adamw", action="store_true", help="step matrices by AdamW too, not Muon")
    p.add_argument("--constant", action="store_true", help="no fall of the rate at the end")
    p.add_argument("--warm", type=int, default=100)
    p.add_argument("--weight-decay", type=float, default=0.05)
    p.add_argument("--every", type=int, default=200, help="steps between evaluations")
    p.add_argument("--mix", default=".12,.26,.24,.22,.16", help="share of each task")
    p.add_argument("--lists", type=float, default=0.8,
                   help="share of pictures whose list is asked, in the first 60 percent of the steps")
    p.add_argument("--focus", default="", help="only these kinds of a task, as charts/value,charts/look")
    p.add_argument("--init", type=Path)
    p.add_argument("--seed", type=int, default=0)
    args = p.parse_args()
    torch.set_num_threads(2)
    dict(tower=train_tower, features=compute_features,
         questions=rebuild_questions, decoder=train_decoder)[args.stage](args)


if __name__ == "__main__":
    main()
