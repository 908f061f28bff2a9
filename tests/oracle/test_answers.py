"""Greedy answers of vlmq and of transformers on the evaluation sets, question by question.

Environment: VLMQ_BIN and VLMQ_MODEL as in test_parity.py; VLMQ_LIMIT, questions of each task
(default 40; 0 for all).
"""

import io
import json
import os
import subprocess
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, Qwen2VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = os.environ.get("VLMQ_BIN", str(ROOT / "target/release/vlmq"))
MODEL = Path(os.environ.get("VLMQ_MODEL", ROOT / "testbed/model"))
LIMIT = int(os.environ.get("VLMQ_LIMIT", "40")) or 10**9
TASKS = sorted((ROOT / "testbed/eval").glob("*.parquet"))


@pytest.fixture(scope="module")
def transformers_model():
    processor = AutoProcessor.from_pretrained(MODEL)
    processor.image_processor = Qwen2VLImageProcessorPil.from_pretrained(MODEL)
    model = Qwen2VLForConditionalGeneration.from_pretrained(MODEL, dtype=torch.float32).eval()
    return processor, model


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    output = tmp_path_factory.mktemp("eval") / "answers"
    command = [PROGRAM, "eval", MODEL, "--task", ROOT / "testbed/eval", "--output", output]
    subprocess.run([*command, "--limit", str(LIMIT)], check=True, capture_output=True)
    return json.loads((output / "predictions.json").read_text())


def answer(processor, model, row):
    content = [{"type": "image"}, {"type": "text", "text": row["question"]}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True)
    image = Image.open(io.BytesIO(row["image"]["bytes"]))
    inputs = processor(text=[text], images=[image], return_tensors="pt")
    with torch.no_grad():
        ids = model.generate(**inputs, do_sample=False, max_new_tokens=32)
    return processor.decode(ids[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True).strip()


@pytest.mark.parametrize("path", TASKS, ids=lambda path: path.stem)
def test_greedy_answers_agree(ours, transformers_model, path):
    rows = pq.read_table(path).to_pylist()[:LIMIT]
    predictions = ours[path.stem]
    assert len(rows) == len(predictions)
    differ = [(row["id"], p["answer"], theirs) for row, p in zip(rows, predictions)
              if (theirs := answer(*transformers_model, row)) != p["answer"]]
    assert not differ, differ[:5]
