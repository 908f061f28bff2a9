"""Trains the projector between the frozen tower and the frozen language model of assemble.py.

First by itself: every image token should lie near the words, in the language model's embedding, for
what its place shows. Then by the answers, through the language model.

Usage: train.py features CACHE; train.py words CACHE --steps 800; train.py answers CACHE --minutes M;
train.py test CACHE [--blind | --wrong | --prior]. `words` starts anew and `answers` goes on from
CACHE/projector.safetensors (its optimizer starts anew); both save there. `features` keeps what is there.
"""

import argparse
import json
import math
import random
import time
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, LlavaForConditionalGeneration

from assemble import FEATURE_LAYER, IMAGE_TOKEN, MEAN, N_TOKENS, STD
from tasks import TASKS, scenes

N_TRAIN = dict(easy_vqa=3000, names=3000, emoji=800, counting=1500)
N_HELD = 150
MIX = dict(easy_vqa=.35, names=.35, emoji=.12, counting=.18)
N_QUESTIONS = 4  # of a picture, in one sequence


def load_model(cache, dtype=torch.float32):
    model = LlavaForConditionalGeneration.from_pretrained(cache / "model", dtype=dtype)
    return model.eval().requires_grad_(False)


# ---- features -----------------------------------------------------------------------------------

@torch.no_grad()
def features_of(tower, images):
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    pixels = torch.stack([torch.from_numpy(np.array(i)).permute(2, 0, 1) / 255 for i in images])
    pixels = ((pixels - mean) / std).to(tower.dtype)
    states = tower(pixels, output_hidden_states=True).hidden_states
    return states[FEATURE_LAYER][:, 1:].half()


def compute_features(args):
    """What the tower makes of all pictures, with their questions, on disk."""
    tower = load_model(args.cache).model.vision_tower.bfloat16()
    for name, held in [("held", True), ("train", False)]:
        if (args.cache / f"{name}.json").exists():
            continue
        found, rows = [], []
        for task in TASKS:
            made = scenes(args.cache, task, N_HELD if held else N_TRAIN[task], args.seed, held)
            rows += [dict(task=task, questions=q, words=words) for _, q, words in made]
            images = [image for image, _, _ in made]
            found += [features_of(tower, images[i:i + 25]) for i in range(0, len(images), 25)]
            print(name, task, len(made), time.strftime("%H:%M:%S"), flush=True)
        np.save(args.cache / f"{name}.npy", torch.cat(found).numpy())
        (args.cache / f"{name}.json").write_text(json.dumps(rows))


def load_features(cache, name):
    return np.load(cache / f"{name}.npy"), json.loads((cache / f"{name}.json").read_text())


# ---- the projector ------------------------------------------------------------------------------

class Projector(torch.nn.Module):
    """LLaVA's two linears, on features of mean 0 and variance 1 by channel while they learn."""

    def __init__(self, features):
        super().__init__()
        sample = torch.from_numpy(features[::4]).float().flatten(0, 1)
        self.mean, self.std = sample.mean(0), sample.std(0) + 1e-3
        self.linear_1, self.linear_2 = torch.nn.Linear(384, 576), torch.nn.Linear(576, 576)

    def forward(self, x):
        return self.linear_2(F.gelu(self.linear_1((x - self.mean) / self.std)))

    def save(self, path):
        weight = self.linear_1.weight / self.std
        tensors = {"linear_1.weight": weight, "linear_1.bias": self.linear_1.bias - weight @ self.mean,
                   "linear_2.weight": self.linear_2.weight, "linear_2.bias": self.linear_2.bias}
        save_file({k: v.detach().bfloat16().contiguous() for k, v in tensors.items()}, path,
                  metadata={"format": "pt"})

    @torch.no_grad()
    def load(self, path):
        found = {k: v.float() for k, v in load_file(path).items()}
        self.linear_1.weight.copy_(found["linear_1.weight"] * self.std)
        self.linear_1.bias.copy_(found["linear_1.bias"] + found["linear_1.weight"] @ self.mean)
        self.linear_2.weight.copy_(found["linear_2.weight"])
        self.linear_2.bias.copy_(found["linear_2.bias"])


def step_rate(done, peak):
    """A half cosine over `done`, the share of the run from 0 to 1."""
    return peak * (0.5 + 0.5 * math.cos(math.pi * min(1, done))) + 1e-6


# ---- words --------------------------------------------------------------------------------------

def cell_of_token():
    """For each of the 8 x 8 tokens the cell of the 6 x 6 grid that its middle lies in."""
    at = [int((i + .5) * 6 / 8) for i in range(8)]
    return torch.tensor([at[row] * 6 + at[col] for row in range(8) for col in range(8)])


def word_targets(rows, tokenizer, table):
    """All that cells show, as mean embeddings of its words, and the index of each token's."""
    every = sorted({w for r in rows for w in r["words"] if w})
    index = {w: i for i, w in enumerate(every)} | {None: -100}
    ids = [tokenizer(" " + w, add_special_tokens=False).input_ids for w in every]
    targets = torch.stack([table[i].mean(0) for i in ids])
    cells = torch.tensor([[index[w] for w in r["words"]] for r in rows])
    return targets, cells[:, cell_of_token()]


def train_words(args):
    model, tokenizer = load_model(args.cache), AutoTokenizer.from_pretrained(args.cache / "model")
    table = model.get_input_embeddings().weight
    features, rows = load_features(args.cache, "train")
    targets, labels = word_targets(rows, tokenizer, table)
    tokens, labels = torch.from_numpy(features).flatten(0, 1), labels.flatten()
    tokens, labels = tokens[labels >= 0], labels[labels >= 0]
    weight = torch.bincount(labels)[labels].float().pow(-.6)  # what is rare is drawn more often
    unit = F.normalize(targets - table.mean(0), dim=-1)
    projector = Projector(features)
    optimizer = torch.optim.AdamW(projector.parameters(), 2e-3, weight_decay=.01)
    for step in range(args.steps):
        optimizer.param_groups[0]["lr"] = step_rate(step / args.steps, 2e-3)
        drawn = torch.multinomial(weight, 512)
        out, label = projector(tokens[drawn].float()), labels[drawn]
        scores = 20 * F.normalize(out - table.mean(0), dim=-1) @ unit.T
        named = F.cross_entropy(scores, label)
        near = ((out - targets[label]) ** 2).sum(-1).mean() / targets.var(0).sum()
        loss = named + near
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (step + 1) % 200 == 0:
            projector.save(args.cache / "projector.safetensors")
            right = (scores.argmax(-1) == label).float().mean()
            print(f"step {step + 1} named {named.item():.3f} near {near.item():.3f} "
                  f"right {100 * right:.1f}", flush=True)
    projector.save(args.cache / "projector.safetensors")


# ---- answers ------------------------------------------------------------------------------------

class Sequences:
    """A picture and several questions in one sequence; each question sees the picture and itself."""

    def __init__(self, tokenizer):
        self.encode = lambda text: tokenizer(text, add_special_tokens=False).input_ids
        self.prefix = self.encode("<|im_start|>user\n") + [IMAGE_TOKEN] * N_TOKENS + self.encode("\n")
        self.first = self.prefix.index(IMAGE_TOKEN)

    def question(self, question, answer):
        asked = self.encode(f"{question}<|im_end|>\n<|im_start|>assistant\n")
        said = self.encode(f"{answer}<|im_end|>")
        return asked + said, [-100] * len(asked) + said

    def batch(self, asked):
        """ids, labels, positions [n, length] and which token sees which [n, 1, length, length]."""
        rows = []
        for pairs in asked:
            ids, labels, n = list(self.prefix), [-100] * len(self.prefix), len(self.prefix)
            part, positions = [0] * n, list(range(n))
            for i, (question, answer) in enumerate(pairs):
                one, label = self.question(question, answer)
                ids, labels, part = ids + one, labels + label, part + [i + 1] * len(one)
                positions += range(n, n + len(one))
            rows.append((ids, labels, positions, part))
        length = max(len(r[0]) for r in rows)
        padded = [[r[k] + [fill] * (length - len(r[k])) for r in rows]
                  for k, fill in enumerate((0, -100, 0, -1))]
        ids, labels, positions, part = map(torch.tensor, padded)
        same = (part[:, :, None] == part[:, None, :]) | (part[:, None, :] == 0)
        return ids, labels, positions, (same & torch.ones(length, length).tril().bool())[:, None]


def hidden_states(model, sequences, images, ids, positions, seen):
    """The language model's last states; `images` are projected features, or None for no picture,
    in which case nothing sees the picture's place."""
    embedded = model.get_input_embeddings()(ids)
    span = slice(sequences.first, sequences.first + N_TOKENS)
    if images is None:
        seen = seen.clone()
        seen[..., N_TOKENS + sequences.first:, span] = False
    else:
        embedded = torch.cat([embedded[:, :span.start], images.to(embedded.dtype),
                              embedded[:, span.stop:]], 1)
    bias = torch.zeros(seen.shape, dtype=embedded.dtype).masked_fill(~seen, -1e9)
    return model.model.language_model(inputs_embeds=embedded, attention_mask=bias,
                                      position_ids=positions, use_cache=False).last_hidden_state


def held_questions(rows, n_each):
    """Batches of (task, indices of the rows, up to four questions on each), the same every time."""
    r = random.Random(1)
    for task in TASKS:
        indices = [i for i, row in enumerate(rows) if row["task"] == task][:n_each]
        for at in range(0, len(indices), 8):
            part = indices[at:at + 8]
            yield task, part, [r.sample(q, min(4, len(q))) for q in (rows[i]["questions"] for i in part)]


def percents(flags):
    """`flags` are (task, kind, is right)."""
    share = lambda known: round(100 * sum(known) / len(known), 1)
    tasks = {t: share([ok for task, _, ok in flags if task == t]) for t in TASKS}
    kinds = {k: share([ok for t, kind, ok in flags if f"{t}/{kind}" == k])
             for k in sorted({f"{t}/{kind}" for t, kind, _ in flags})}
    return tasks | {"mean": round(sum(tasks.values()) / len(tasks), 1), "questions": len(flags)}, kinds


@torch.no_grad()
def accuracies(model, sequences, projector, features, rows, blind=False, wrong=False, n_each=None):
    """Percent of exact answers. Every token of an answer must be the likeliest after those before it,
    which is what greedy decoding needs to give the answer."""
    flags = []
    for task, part, asked in held_questions(rows, n_each):
        ids, labels, positions, seen = sequences.batch([[q[1:] for q in a] for a in asked])
        shown = [i + 7 if i + 7 < len(rows) and rows[i + 7]["task"] == task else i - 7 for i in part]
        images = torch.from_numpy(features[shown if wrong else part]).float()
        images = None if blind else projector(images)
        states = hidden_states(model, sequences, images, ids, positions, seen)
        at_answer = labels[:, 1:] >= 0
        said = model.lm_head(states[:, :-1][at_answer]).argmax(-1) == labels[:, 1:][at_answer]
        said = iter(said.tolist())
        for kind, _, answer in [q for questions in asked for q in questions]:
            n = len(sequences.encode(f"{answer}<|im_end|>"))
            flags.append((task, kind, all([next(said) for _ in range(n)])))
    return percents(flags)


def prior_accuracies(train, rows, n_each):
    """Percent of questions whose most frequent training answer is right; no picture is looked at."""
    by_question, by_kind = defaultdict(Counter), defaultdict(Counter)
    for row in train:
        for kind, question, answer in row["questions"]:
            by_question[row["task"], question][answer] += 1
            by_kind[row["task"], kind][answer] += 1
    flags = []
    for task, _, asked in held_questions(rows, n_each):
        for kind, question, answer in [q for questions in asked for q in questions]:
            known = by_question.get((task, question)) or by_kind[task, kind]
            flags.append((task, kind, known.most_common(1)[0][0] == answer))
    return percents(flags)


def prepared(args):
    torch.set_num_threads(args.threads)
    model = load_model(args.cache, getattr(torch, args.dtype))
    tokenizer = AutoTokenizer.from_pretrained(args.cache / "model")
    features, rows = load_features(args.cache, "train")
    projector = Projector(features)
    projector.load(args.cache / "projector.safetensors")
    return model, Sequences(tokenizer), projector, features, rows


def train_answers(args):
    model, sequences, projector, features, rows = prepared(args)
    held_features, held = load_features(args.cache, "held")
    by_task = {t: [i for i, r in enumerate(rows) if r["task"] == t] for t in TASKS}
    optimizer = torch.optim.AdamW(projector.parameters(), args.lr, betas=(.9, .98), weight_decay=.01)
    r = random.Random(args.seed)
    began, losses, step = time.time(), [], 0
    while time.time() - began < 60 * args.minutes and step < args.steps:
        done = max((time.time() - began) / (60 * args.minutes), step / args.steps)
        optimizer.param_groups[0]["lr"] = step_rate(done, args.lr) * min(1, (step + 1) / 15)
        picked = [r.choice(by_task[t]) for t in r.choices(TASKS, [MIX[t] for t in TASKS], k=args.batch)]
        asked = [r.sample(q, min(N_QUESTIONS, len(q))) for q in (rows[i]["questions"] for i in picked)]
        ids, labels, positions, seen = sequences.batch([[q[1:] for q in a] for a in asked])
        images = projector(torch.from_numpy(features[picked]).float())
        states = hidden_states(model, sequences, images, ids, positions, seen)[:, :-1]
        at_answer = labels[:, 1:] >= 0
        loss = F.cross_entropy(model.lm_head(states[at_answer]).float(), labels[:, 1:][at_answer])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(projector.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        step += 1
        if step % 5 == 0:
            print(f"step {step} seconds {time.time() - began:.0f} loss {np.mean(losses[-5:]):.3f}", flush=True)
            projector.save(args.cache / "projector.safetensors")
        if step % args.every == 0:
            print("held", accuracies(model, sequences, projector, held_features, held, n_each=16)[0], flush=True)
    projector.save(args.cache / "projector.safetensors")


def test(args):
    features, rows = load_features(args.cache, "held")
    if args.prior:
        found = prior_accuracies(json.loads((args.cache / "train.json").read_text()), rows, args.pictures)
    else:
        model, sequences, projector, _, _ = prepared(args)
        found = accuracies(model, sequences, projector, features, rows, args.blind, args.wrong, args.pictures)
    print(*found, sep="\n", flush=True)


def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("stage", choices=["features", "words", "answers", "test"])
    p.add_argument("cache", type=Path)
    p.add_argument("--minutes", type=float, default=60, help="of training by answers")
    p.add_argument("--steps", type=int, default=2000)
    p.add_argument("--batch", type=int, default=8, help="pictures of a step")
    p.add_argument("--lr", type=float, default=1e-3)
    p.add_argument("--every", type=int, default=100, help="steps between accuracies")
    p.add_argument("--pictures", type=int, default=N_HELD, help="held-out pictures of each task to test")
    p.add_argument("--blind", action="store_true", help="test without the picture")
    p.add_argument("--prior", action="store_true", help="test the most frequent training answers")
    p.add_argument("--wrong", action="store_true", help="test with another picture of the task")
    p.add_argument("--dtype", default="bfloat16", help="in which the language model computes")
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--seed", type=int, default=0)
    args = p.parse_args()
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    dict(features=compute_features, words=train_words, answers=train_answers, test=test)[args.stage](args)


if __name__ == "__main__":
    main()
