"""Writes raw text to calibrate on and held-out text to measure on: documentation and source code of Django
and SQLAlchemy.

Usage: write_text.py CACHE; fetch_qwen.sh and assemble_qwen.py come first. Makes CACHE/text/calibration.jsonl
and CACHE/text/heldout/{prose,code}.jsonl, rows of `id` and `text`.

A document is a file. Each gives one text at most: so many tokens from the start of a line, drawn from
seed 0. Those of calibration and those held out are different documents.
"""

import argparse
import json
import random
import tarfile
from pathlib import Path

from transformers import AutoTokenizer

SEED, N_CALIBRATION, N_HELD, MAX_TOKENS = 0, 128, 32, 256
ARCHIVES = ["Django-5.2.tar.gz", "sqlalchemy-2.0.40.tar.gz"]
# Folders and endings; release notes and change logs are lists of numbers and names.
PROSE = [("docs/", ".txt"), ("doc/build/", ".rst")]
CODE = [("django/", ".py"), ("lib/sqlalchemy/", ".py")]
LEFT_OUT = ("docs/releases/", "doc/build/changelog/", "django/conf/locale/", "/migrations/")
MIN_CHARACTERS = 4096


def documents(cache, kinds):
    """Texts by name, in order of name."""
    found = {}
    for archive in ARCHIVES:
        with tarfile.open(cache / "sdists" / archive) as tar:
            for member in tar:
                name = member.name.partition("/")[2]
                wanted = any(name.startswith(folder) and name.endswith(end) for folder, end in kinds)
                if not wanted or any(part in name for part in LEFT_OUT) or not member.isfile():
                    continue
                text = tar.extractfile(member).read().decode()
                if len(text) >= MIN_CHARACTERS:
                    found[f"{archive.partition('-')[0].lower()}/{name}"] = text
    return sorted(found.items())


def excerpt(text, tokenizer, rng):
    """At most MAX_TOKENS tokens from the start of a line on, whole characters, and far enough from the end
    for as many where there are."""
    starts = [0] + [i + 1 for i, c in enumerate(text) if c == "\n"]
    enough = [s for s in starts if len(text) - s >= MIN_CHARACTERS] or [0]
    text = text[rng.choice(enough):][:16 * MAX_TOKENS]
    ends = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
    return text if len(ends) <= MAX_TOKENS else text[:ends[MAX_TOKENS - 1][1]]


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    print(f"{len(rows)} texts in {path}")


def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("cache", type=Path)
    args = p.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.cache / "model")
    rng = random.Random(SEED)
    calibration, folder = [], args.cache / "text"
    for kind, kinds in [("prose", PROSE), ("code", CODE)]:
        chosen = rng.sample(documents(args.cache, kinds), N_CALIBRATION // 2 + N_HELD)
        rows = [dict(id=name, text=excerpt(text, tokenizer, rng)) for name, text in chosen]
        write(folder / "heldout" / f"{kind}.jsonl", rows[:N_HELD])
        calibration += rows[N_HELD:]
    rng.shuffle(calibration)
    write(folder / "calibration.jsonl", calibration)


if __name__ == "__main__":
    main()
