"""Writes calibration and evaluation data of the real testbed, in the formats of the bundled one.

Usage: write_data.py CACHE; fetch.sh comes first. Makes CACHE/calibration (LLaVA JSONL and an archive
of pictures) and CACHE/eval (one Parquet file a task).
"""

import argparse
import json
import random
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from tasks import TASKS, generator, scenes

# Of each task; calibration pictures come from a seed of their own.
N_CALIBRATION, N_QUESTIONS, CALIBRATION_SEED, EVAL_SEED = 40, 200, 77, 0


def write_calibration(cache, png):
    out = cache / "calibration"
    out.mkdir(exist_ok=True)
    r = random.Random(CALIBRATION_SEED)
    lines = []
    with zipfile.ZipFile(out / "images.zip", "w", zipfile.ZIP_STORED) as archive:
        for task in TASKS:
            made = scenes(cache, task, N_CALIBRATION, CALIBRATION_SEED, held=False)
            for i, (image, questions, _) in enumerate(made):
                name = f"{task}/{i:04}.png"
                archive.writestr(zipfile.ZipInfo(name, (2026, 1, 1, 0, 0, 0)), png(image))
                _, question, answer = r.choice(questions)
                lines.append(dict(id=f"{task}-{i:04}", image=name, conversations=[
                    {"from": "human", "value": f"<image>\n{question}"},
                    {"from": "gpt", "value": answer}]))
    r.shuffle(lines)
    (out / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_eval(cache, png):
    out = cache / "eval"
    out.mkdir(exist_ok=True)
    schema = pa.schema([
        ("id", pa.string()), ("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
        ("question", pa.string()), ("answer", pa.string()), ("category", pa.string())])
    for task in TASKS:
        r = random.Random(f"eval {task}")
        rows = []
        for i, (image, questions, _) in enumerate(scenes(cache, task, 150, EVAL_SEED, held=True)):
            for kind, question, answer in r.sample(questions, min(2, len(questions))):
                rows.append(dict(id=f"{task}-{len(rows):04}", image=dict(bytes=png(image), path=f"{i:04}.png"),
                                 question=question, answer=answer, category=kind))
        pq.write_table(pa.Table.from_pylist(rows[:N_QUESTIONS], schema=schema), out / f"{task}.parquet",
                       compression="zstd", compression_level=19)


def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("cache", type=Path)
    args = p.parse_args()
    generator(args.cache)  # sets the sources, and the way to the bundled testbed's modules
    from export import png
    write_calibration(args.cache, png)
    write_eval(args.cache, png)


if __name__ == "__main__":
    main()
