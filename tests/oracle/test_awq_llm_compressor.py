"""`vlmq quantize --method awq` against llm-compressor's AWQModifier: every loss of every search, and
so the scales chosen. Skipped where llmcompressor is not installed; it is no part of the usual
environment, because it asks for older versions of torch and transformers. Agreed with 0.14.0.1.

On text: under transformers 5.23 its tracing of Qwen2-VL leaves the image features out.

Environment: VLMQ_BIN, the vlmq program (default: target/release/vlmq).
"""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from awq import N_RATIOS, load, write_samples
from random_qwen2_vl import make

pytest.importorskip("llmcompressor")
from llmcompressor import oneshot  # noqa: E402
from llmcompressor.modifiers.quantization import QuantizationModifier  # noqa: E402
from llmcompressor.modifiers.transform.awq import AWQMapping  # noqa: E402
from llmcompressor.modifiers.transform.awq.base import AWQModifier  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = os.environ.get("VLMQ_BIN", str(ROOT / "target/release/vlmq"))
BITS, GROUP = 3, 32
TOLERANCE = 1e-5

LAYER = "re:.*language_model.*layers.*"
MAPPINGS = {
    "input_layernorm": ["q_proj", "k_proj", "v_proj"],
    "v_proj": ["o_proj"],
    "post_attention_layernorm": ["gate_proj", "up_proj"],
    "up_proj": ["down_proj"],
}


def text_samples(folder):
    """The samples of `folder` without their images, as rows."""
    path = folder / "samples.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        del row["image"]
        human = row["conversations"][0]
        human["value"] = human["value"].removeprefix("<image>\n")
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [[turn["value"] for turn in row["conversations"]] for row in rows]


def their_losses(model, samples, monkeypatch):
    """Losses of each search by what its scales are taken out of."""
    losses, compute_loss = {}, AWQModifier._compute_loss
    best_scale = AWQModifier._compute_best_scale

    def keep_loss(self, *arguments):
        loss = compute_loss(self, *arguments)
        losses[self.at].append(float(loss))
        return loss

    def search(self, mapping, *arguments, **named):
        object.__setattr__(self, "at", mapping.smooth_name)
        losses[mapping.smooth_name] = []
        return best_scale(self, mapping, *arguments, **named)

    # Its grid ends at 1, that of AWQ's authors and ours a step before.
    monkeypatch.setattr(AWQModifier, "_get_grid_search_params",
                        lambda _: [(i / N_RATIOS, False) for i in range(N_RATIOS)])
    monkeypatch.setattr(AWQModifier, "_compute_loss", keep_loss)
    monkeypatch.setattr(AWQModifier, "_compute_best_scale", search)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self, *_: self)
    mappings = [AWQMapping(f"{LAYER}{source}$", [f"{LAYER}{name}$" for name in names])
                for source, names in MAPPINGS.items()]
    weights = dict(num_bits=BITS, type="int", symmetric=False, strategy="group", group_size=GROUP)
    groups = {"group_0": dict(targets=[f"{LAYER}_proj$"], weights=weights)}
    recipe = [AWQModifier(mappings=mappings, duo_scaling=False),
              QuantizationModifier(config_groups=groups, ignore=["re:.*visual.*", "lm_head"])]
    loader = torch.utils.data.DataLoader(samples, batch_size=1, collate_fn=lambda batch: batch[0])
    oneshot(model=model, dataset=loader, recipe=recipe, pipeline="sequential")
    return losses


@pytest.mark.parametrize("shape", ["tied", "ungrouped"])
def test_losses_of_all_scales_agree(shape, tmp_path, monkeypatch):
    folder = make(tmp_path / "model", shape, seed=5)
    data = write_samples(tmp_path / "data")
    turns = text_samples(data)
    run = subprocess.run(
        [PROGRAM, "quantize", folder, "--calibration", data, "--output", tmp_path / "out", "--json",
         "--method", "awq", "--bits", str(BITS), "--group-size", str(GROUP), "--samples", "3"],
        check=True, capture_output=True, text=True, timeout=1800)
    ours = json.loads(run.stdout)["report"]["scales"]
    processor, model = load(folder)
    samples = []
    for human, gpt in turns:
        chat = [{"role": "user", "content": [{"type": "text", "text": human}]},
                {"role": "assistant", "content": gpt}]
        text = processor.apply_chat_template(chat)
        samples.append(dict(processor(text=[text], return_tensors="pt")))
    theirs = their_losses(model, samples, monkeypatch)
    assert len(ours) == len(theirs) == (9 if shape == "tied" else 8)
    for search in ours:
        role = search["modules"][0].split(".")[-1]
        source = next(s for s, names in MAPPINGS.items() if role in names and s != role)
        name, = [n for n in theirs
                 if f"layers.{search['layer_idx']}." in n and n.endswith(source)]
        assert search["losses"] == pytest.approx(theirs[name], rel=TOLERANCE), name
        assert search["ratio"] == theirs[name].index(min(theirs[name])) / N_RATIOS
