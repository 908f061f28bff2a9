"""Trains the testbed model in two stages.

1. The tower and the merger learn what every cell shows, with a head that is thrown away and, so that
   the decoder need not learn a new tongue, with the words for it in its own embedding.
2. With the tower frozen and its features kept, the decoder learns to answer.

Usage: train.py STAGE WORK [--minutes M] [--seed S] [...]; STAGE is tower, features or decoder.
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

from data import IGNORE, LABELS, TASKS, scenes
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


def rate(args, step, share):
    """Warm-up, then constant, then a cosine to a fiftieth from two thirds of the time on."""
    warm = min(1, (step + 1) / args.warm)
    late = max(0, (share - 2 / 3) * 3)
    return args.lr * warm * (0.51 + 0.49 * math.cos(math.pi * late))


def optimizer_of(parameters, weight_decay):
    parameters = list(parameters)
    return torch.optim.AdamW(
        [dict(params=[p for p in parameters if p.ndim >= 2], weight_decay=weight_decay),
         dict(params=[p for p in parameters if p.ndim < 2], weight_decay=0.0)],
        lr=1e-3, betas=(0.9, 0.95), fused=True)


def name_tokens(tokenizer, vocab):
    """`[labels, vocab]`: for each label, equal shares on the tokens of the words that name it."""
    shares = torch.zeros(len(LABELS), vocab)
    for i, label in enumerate(LABELS):
        words = label.removeprefix("emoji ").removeprefix("easy ")
        # A cell of a bar shows one unit or two; an empty one has a token of its own.
        words = words.replace("bar half", "1").replace("bar full", "2")
        words = words.replace("nothing", "<|endoftext|>").split()
        tokens = [t for w in words for t in tokenizer.encode(w).ids + tokenizer.encode(" " + w).ids
                  if tokenizer.id_to_token(t) != "\u0120"]
        shares[i, tokens] = 1 / len(set(tokens))
    return shares


def train_tower(args):
    found = build_scenes(args, args.images, held=False)
    test = build_scenes(args, 60, held=True)
    model = new_model(args, found)
    tower, head = model.model.visual, torch.nn.Linear(256, len(LABELS))
    words = model.model.language_model.embed_tokens
    tokenizer = Tokenizer.from_file(str(args.work / "model/tokenizer.json"))
    names = name_tokens(tokenizer, words.weight.shape[0])
    x, y = pixels_of(found), torch.tensor([s.labels for _, s in found])
    xt, yt = pixels_of(test), torch.tensor([s.labels for _, s in test])
    optimizer = optimizer_of([*tower.parameters(), *head.parameters(), words.weight], 0.01)
    rng, began, step, log = random.Random(args.seed), time.time(), 0, []

    def accuracy():
        with torch.no_grad():
            guess = torch.cat([head(image_features(tower, patches(xt[i:i + 50]))).argmax(-1)
                               for i in range(0, len(xt), 50)])
        right, known = guess == yt, (yt != IGNORE) & (yt > 0)
        by_task = {}
        for task in TASKS:
            rows = torch.tensor([t == task for t, _ in test])
            by_task[task] = round(100 * right[rows][known[rows]].float().mean().item(), 1)
        return by_task

    while (share := (time.time() - began) / (args.minutes * 60)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = rate(args, step, share)
        rows = rng.sample(range(len(found)), args.batch)
        features = image_features(tower, patches(x[rows]))
        scores = head(features)
        target = y[rows].flatten()
        # Empty cells are most cells; they count a quarter.
        weight = torch.where(target > 0, 1.0, 0.25)
        each = F.cross_entropy(scores.flatten(0, 1), target, ignore_index=IGNORE, reduction="none")
        # The features speak the decoder's language: each lies near the words for what it shows.
        known = target.clamp(min=0)
        said = F.rms_norm(features, features.shape[-1:]).flatten(0, 1) @ words.weight.T
        each = each - (names[known] * said.log_softmax(-1)).sum(-1) * (target != IGNORE)
        loss = (each * weight).sum() / weight[target != IGNORE].sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(tower.parameters(), 1.0)
        optimizer.step()
        step += 1
        if step % 200 == 0:
            log.append((step, round(time.time() - began), round(loss.item(), 4), accuracy()))
            print(*log[-1], flush=True)
    print("final", step, accuracy(), flush=True)
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


def choose_questions(rng, questions, list_share):
    """Some of an image's questions. A list of everything in the picture has many answer tokens,
    so it teaches the decoder to see before single answers can."""
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
    decoder = model.model.language_model
    optimizer = optimizer_of(decoder.parameters(), args.weight_decay)
    rng = random.Random(args.seed)
    torch.manual_seed(args.seed)
    began, step, losses, spent = time.time(), 0, [], 0.0
    log = csv.writer(open(args.work / "curves.csv", "a"))
    evaluations = 0
    while (share := (time.time() - began - spent) / (args.minutes * 60)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = rate(args, step, share)
        picked = [rng.choice(by_task[t]) for t in rng.choices(TASKS, mix.values(), k=args.batch)]
        asked = [choose_questions(rng, rows[i]["questions"], 0.8 if share < 0.6 else 0.2)
                 for i in picked]
        ids, labels = pack.batch(asked)
        f = torch.from_numpy(np.stack([features[i] for i in picked])).float()
        states = hidden_states(model, pack, f, ids)[labels >= 0]
        loss = F.cross_entropy(model.lm_head(states), labels[labels >= 0])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
        optimizer.step()
        step += 1
        losses.append(loss.item())
        elapsed = time.time() - began - spent
        if step % 100 == 0:
            print(f"step {step} min {elapsed / 60:.2f} loss {np.mean(losses[-100:]):.4f} "
                  f"s/step {elapsed / step:.3f}", flush=True)
        if elapsed / 60 >= args.every * (evaluations + 1):
            evaluations += 1
            t0 = time.time()
            some = [r for r in test if r["index"] % 4 == 0]
            result = answers_right(model, pack, test_features, some)
            print("EVAL", round(elapsed / 60, 1), step, result, flush=True)
            log.writerow([round(elapsed / 60, 1), step, round(float(np.mean(losses[-200:])), 4),
                          *[result[t] for t in TASKS]])
            model.save_pretrained(args.work / "trained")
            spent += time.time() - t0
    print("FINAL", step, answers_right(model, pack, test_features, test), flush=True)
    model.save_pretrained(args.work / "trained")


def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("stage", choices=["tower", "features", "questions", "decoder"])
    p.add_argument("work", type=Path)
    p.add_argument("--minutes", type=float, default=6)
    p.add_argument("--images", type=int, default=3000, help="training images of each task")
    p.add_argument("--layers", type=int, default=4)
    p.add_argument("--batch", type=int, default=16)
    p.add_argument("--lr", type=float, default=1e-3)
    p.add_argument("--warm", type=int, default=100)
    p.add_argument("--weight-decay", type=float, default=0.05)
    p.add_argument("--every", type=float, default=3, help="minutes between evaluations")
    p.add_argument("--mix", default=".12,.26,.24,.22,.16", help="share of each task")
    p.add_argument("--init", type=Path)
    p.add_argument("--seed", type=int, default=0)
    args = p.parse_args()
    torch.set_num_threads(2)
    dict(tower=train_tower, features=compute_features,
         questions=rebuild_questions, decoder=train_decoder)[args.stage](args)


if __name__ == "__main__":
    main()
