"""PaliGemma's answers: what comes after the prompt sees no further than itself, and the prompt sees none of it.

The divergence of a model of 2 bits from its original over right answers must be the same in vlmq and transformers,
with questions that share an image and so begin alike.

Environment: VLMQ_BIN, the vlmq program (default: target/release/vlmq).
"""

import io
import json

import pyarrow.parquet as pq
import pytest
import torch
from families import PaliGemma, make
from packing_fix import packed_zero_points_on_meta  # noqa: F401
from PIL import Image
from test_families import QUANTIZED_TOLERANCE, ROOT, vlmq
from transformers import AutoModelForImageTextToText

TASK, LIMIT = ROOT / "testbed/eval/counting.parquet", 6


def answer_distributions(model, processor, row):
    """Log probabilities at each token of the right answer and at the end token."""
    image = Image.open(io.BytesIO(row["image"]["bytes"]))
    inputs = processor(text=["<image>" + row["question"]], images=[[image]], return_tensors="pt")
    words = processor.tokenizer
    answer = words(row["answer"], add_special_tokens=False)["input_ids"] + [model.generation_config.eos_token_id]
    start = inputs["input_ids"].shape[1]
    ids = torch.cat([inputs["input_ids"], torch.tensor([answer])], 1)
    kinds = torch.cat([inputs["token_type_ids"], torch.ones(1, len(answer), dtype=torch.long)], 1)
    with torch.no_grad():
        logits = model(input_ids=ids, token_type_ids=kinds, attention_mask=torch.ones_like(ids),
                       pixel_values=inputs["pixel_values"]).logits[0]
    return logits[start - 1:-1].double().log_softmax(-1)


@pytest.mark.parametrize("variant", PaliGemma.variants)
def test_divergence_over_answers(tmp_path, variant):
    folders = [tmp_path / "original", tmp_path / "quantized"]
    processor = make(folders[0], "paligemma", variant)
    vlmq("quantize", folders[0], "--calibration", ROOT / "testbed/calibration", "--output", folders[1],
         "--method", "vlmq-v2", "--samples", 4, "--bits", 2, "--group-size", 32)
    found = json.loads(vlmq("eval", folders[1], "--reference", folders[0], "--task", TASK, "--limit", LIMIT, "--json"))
    ours = found["tasks"][TASK.stem]["kl_per_answer_token"]
    one, two = (AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager").eval() for folder in folders)
    divergences = []
    for row in pq.read_table(TASK).to_pylist()[:LIMIT]:
        p, q = (answer_distributions(model, processor, row) for model in (one, two))
        divergences.append((p.exp() * (p - q)).sum(-1))
    theirs = torch.cat(divergences).mean().item()
    assert abs(ours - theirs) <= QUANTIZED_TOLERANCE * theirs
