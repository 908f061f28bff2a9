"""The example, from transformers to a folder that loads there and answers as vlmq does."""

import runpy
import sys
from pathlib import Path

import torch
import vlmq
from conftest import EVAL, MODEL, ROOT
from transformers import AutoModelForImageTextToText, CompressedTensorsConfig

EXAMPLE = ROOT / "python/examples/quantize_and_serve.py"


def test_the_whole_way(tmp_path, monkeypatch, capsys):
    arguments = [EXAMPLE, MODEL, tmp_path, EVAL / "counting.parquet"]
    monkeypatch.setattr(sys, "argv", [str(argument) for argument in arguments])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    said = capsys.readouterr().out
    assert "% right" in said and "vision tokens hold" in said
    assert f"vllm serve {tmp_path / '3bit'}" in said
    assert Path(tmp_path, "3bit/report.html").is_file()
    model = AutoModelForImageTextToText.from_pretrained(
        tmp_path / "3bit", dtype=torch.float32, quantization_config=CompressedTensorsConfig(dequantize=True))
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        own = model(input_ids=ids).logits
        original = AutoModelForImageTextToText.from_pretrained(MODEL, dtype=torch.float32)
        original = original(input_ids=ids).logits
    difference = (own - original).abs().max() / original.abs().max()
    assert 0 < difference < 0.5
    assert vlmq.inspect(tmp_path / "3bit")["n_quantized_modules"] == 28
