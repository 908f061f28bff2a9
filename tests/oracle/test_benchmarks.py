"""Benchmarks from file to score with the bundled model: prompts against the original programs' own, answers
scored once more by their code, and runs that are killed.

Environment: VLMQ_BIN.
"""

import json
import os
import signal
import subprocess
import time

import pandas as pd
import pytest
import torch
from benchmark_files import write_chartqa, write_jsonl, write_parquet, write_table
from benchmark_originals import (ROOT, TASKS, lmms_limit, lmms_metrics, lmms_prompt, lmms_score, vlm_prompt,
                                 vlm_score)
from folders import inputs_for
from transformers import AutoModelForImageTextToText, AutoTokenizer

PROGRAM = os.environ.get("VLMQ_BIN", str(ROOT / "target/debug/vlmq"))
MODEL = ROOT / "testbed/model"
N = 9


def command(benchmark, path, output, *more):
    return [PROGRAM, "eval", MODEL, "--task", f"{benchmark}={path}", "--output", output, "--json", *more]


def evaluate(benchmark, path, output, *more):
    run = subprocess.run(command(benchmark, path, output, *more), capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    lines = (output / f"samples_{benchmark}.jsonl").read_text().splitlines()
    return json.loads(run.stdout)["tasks"][benchmark], [json.loads(line) for line in lines]


@pytest.mark.parametrize("benchmark", TASKS)
@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_lmms_eval(benchmark, kind, tmp_path):
    path = tmp_path / f"data.{kind}"
    rows = (write_parquet if kind == "parquet" else write_jsonl)(path, benchmark, N)
    summary, samples = evaluate(benchmark, path, tmp_path / "out")
    assert [s["arguments"][0] for s in samples] == [lmms_prompt(benchmark, row) for row in rows]
    metric = summary["score"]["metric"]
    assert metric in lmms_metrics(benchmark)
    # Where the task sets no limit, that of lmms-eval's Qwen2-VL.
    assert summary["score"]["max_new_tokens"] == (lmms_limit(benchmark) or 128)
    # Each written row, and the answer in it, is enough for the original to score it again.
    again = [float(lmms_score(benchmark, sample["doc"], sample["filtered_resps"][0])) for sample in samples]
    assert again == [sample[metric] for sample in samples]
    assert abs(summary["score"]["percent"] - 100 * sum(again) / N) < 1e-9


@pytest.mark.parametrize("benchmark", TASKS)
def test_vlm_eval_kit(benchmark, tmp_path):
    path = tmp_path / "data.tsv"
    write_table(path, benchmark, N)
    more = ["--protocol", "vlmevalkit", "--max-new-tokens", "8"]
    summary, samples = evaluate(benchmark, path, tmp_path / "out", *more)
    table = pd.read_csv(path, sep="\t")
    cells = [{key: value for key, value in table.iloc[i].items()} for i in range(N)]
    assert [s["arguments"][0] for s in samples] == [vlm_prompt(benchmark, row) for row in cells]
    # The table that was written is the one that was read, with answers.
    written = pd.read_csv(tmp_path / "out" / f"{benchmark}.tsv", sep="\t", keep_default_na=False)
    answers = [str(answer) for answer in written["prediction"]]
    assert answers == [sample["filtered_resps"][0] for sample in samples]
    texts = [{key: str(value) for key, value in row.items() if not pd.isna(value)} for row in cells]
    again = [float(vlm_score(benchmark, row, answer)) for row, answer in zip(texts, answers)]
    assert again == [sample["score"] for sample in samples]
    assert summary["score"]["protocol"] == "vlmevalkit"


@pytest.mark.parametrize("protocol, kind", [("lmms-eval", "parquet"), ("vlmevalkit", "tsv")])
def test_chartqas_own_folder_is_its_table(protocol, kind, tmp_path):
    {"parquet": write_parquet, "tsv": write_table}[kind](tmp_path / f"data.{kind}", "chartqa", N)
    write_chartqa(tmp_path / "test", N)
    more = ["--protocol", protocol, "--max-new-tokens", "8"]
    expected, table = evaluate("chartqa", tmp_path / f"data.{kind}", tmp_path / "table", *more)
    found, own = evaluate("chartqa", tmp_path / "test", tmp_path / "own", *more)
    # The same questions in another order; some images of the table are references to others.
    sizes = [{name: group["n"] for name, group in summary["groups"].items()} for summary in (expected, found)]
    assert sizes[0] == sizes[1]
    keys = ["arguments", "target"] + ["filtered_resps"] * (kind == "parquet")
    asked = [sorted([sample[key] for key in keys] for sample in samples) for samples in (table, own)]
    assert asked[0] == asked[1]
    if kind == "parquet":
        assert abs(found["score"]["percent"] - expected["score"]["percent"]) < 1e-9


def test_first_tokens_are_those_that_transformers_finds(tmp_path):
    """Letter by letter: which is likeliest to come first, and its share among the letters."""
    path = tmp_path / "data.jsonl"
    write_jsonl(path, "seedbench-2-plus", N)
    summary, samples = evaluate("seedbench-2-plus", path, tmp_path / "out")
    model = AutoModelForImageTextToText.from_pretrained(MODEL, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    n_right = 0
    for i, sample in enumerate(samples):
        inputs = inputs_for(MODEL, tmp_path / f"{i}.png", sample["arguments"][0])
        with torch.no_grad():
            logits = model(**inputs).logits[0, -1]
        ids = [tokenizer(letter, add_special_tokens=False).input_ids[0] for letter in "ABCD"]
        shares = logits[ids].softmax(0)
        found = sample["first_token"]
        assert found["letter"] == "ABCD"[int(shares.argmax())]
        assert abs(found["probability"] - float(shares.max())) < 1e-3
        n_right += found["letter"] == sample["target"][0]
    assert summary["first_token"]["n"] == N
    assert abs(summary["first_token"]["percent"] - 100 * n_right / N) < 1e-9


def test_sub_scores(tmp_path):
    expected = {
        "chartqa": {"relaxed_human_split": 5, "relaxed_augmented_split": 4},
        "mme-realworld": {"Perception": 5, "Reasoning": 4, "Perception/OCR with Complex Context": 5,
                          "Perception/OCR with Complex Context/license": 5, "Reasoning/Monitoring": 4,
                          "Reasoning/Monitoring/person/attribute": 4},
        "seedbench-2-plus": {f"seedbench_2_plus_{kind}": 3 for kind in ("Chart", "Map", "Web")},
        "ocrbench": {"Regular Text Recognition": 3, "Text Recognition": 3, "Doc-oriented VQA": 3,
                     "Handwritten Mathematical Expression Recognition": 3},
    }
    for benchmark, groups in expected.items():
        path = tmp_path / f"{benchmark}.parquet"
        write_parquet(path, benchmark, N)
        summary, _ = evaluate(benchmark, path, tmp_path / benchmark)
        assert {name: score["n"] for name, score in summary["groups"].items()} == groups


def test_a_killed_run_goes_on(tmp_path):
    path, n = tmp_path / "data.parquet", 160
    write_parquet(path, "docvqa", n)
    reference = ["--reference", str(MODEL)]
    whole, samples = evaluate("docvqa", path, tmp_path / "whole", *reference)
    stopped = tmp_path / "stopped"
    file = stopped / "samples_docvqa.jsonl"
    n_kills = 0
    for share in (0.1, 0.5):
        run = subprocess.Popen(command("docvqa", path, stopped, *reference), stdout=subprocess.DEVNULL)
        while run.poll() is None and not (file.exists() and file.read_text().count("\n") >= share * n):
            time.sleep(0.01)
        run.send_signal(signal.SIGKILL)
        run.wait()
        n_kills += run.returncode == -signal.SIGKILL
    assert n_kills == 2 and 0 < file.read_text().count("\n") < n
    # As a kill in the middle of a write leaves it.
    file.write_text(file.read_text()[:-7])
    refused = subprocess.run(command("docvqa", path, stopped), capture_output=True, text=True)
    assert refused.returncode == 2 and "with another reference" in refused.stderr
    again, found = evaluate("docvqa", path, stopped, *reference)
    assert again == whole and found == samples
    finished = subprocess.run(command("docvqa", path, stopped, *reference), capture_output=True, text=True)
    assert finished.returncode == 2 and "exists already" in finished.stderr


def test_two_models_are_compared(tmp_path):
    quantized = tmp_path / "quantized"
    quantize = [PROGRAM, "quantize", MODEL, "--output", quantized, "--method", "rtn", "--bits", "2"]
    settings = ["--group-size", "128", "--calibration", ROOT / "testbed/calibration"]
    subprocess.run([*quantize, *settings], check=True, capture_output=True)
    sets = ROOT / "testbed/eval/counting.parquet"

    def run(model, name, *more):
        base = [PROGRAM, "eval", model, "--task", sets, "--limit", "100", "--json"]
        done = subprocess.run([*base, "--output", tmp_path / name, *more], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)["tasks"]["counting"]

    one = run(quantized, "one", "--reference", MODEL)
    other = run(MODEL, "other")
    files = [tmp_path / name / "samples_counting.jsonl" for name in ("one", "other")]
    score = [PROGRAM, "score", files[0], "--against", files[1], "--json"]
    compared = json.loads(subprocess.run(score, check=True, capture_output=True, text=True).stdout)
    assert compared["pairs"] == one["pairs"]
    keys = ("id", "answer", "reference_answer", "expected")
    lists = [[[flip[key] for key in keys] for flip in found["flipped"]] for found in (compared, one)]
    assert lists[0] == lists[1]
    pairs = one["pairs"]
    assert pairs["n_both"] + pairs["n_only_second"] == other["accuracy"]["n_correct"]
    assert pairs["n_both"] + pairs["n_only_first"] == one["accuracy"]["n_correct"]
    assert len(one["flipped"]) == pairs["n_only_first"] + pairs["n_only_second"] > 0
    b, c = pairs["n_only_first"], pairs["n_only_second"]
    total = sum(binomial(b + c, k) for k in range(min(b, c) + 1))
    assert abs(pairs["p_value"] - min(1, 2 * total / 2 ** (b + c))) < 1e-9


def binomial(n, k):
    value = 1
    for i in range(k):
        value = value * (n - i) // (i + 1)
    return value


@pytest.mark.parametrize("line, words", [
    ({"question": "q", "image": "0.png", "answer": "1"}, "missing column type or split in"),
    ({"question": "q", "image": "0.png", "answer": [], "type": "x"}, "at least one text expected"),
    ({"image": "0.png", "answer": "1", "type": "x"}, "missing column question in"),
    ({"question": "q", "answer": "1", "type": "x"}, "missing image in"),
    ({"question": "q", "image": "../0.png", "answer": "1", "type": "x"}, "relative name"),
    ({"question": "q", "image": "none.png", "answer": "1", "type": "x"}, "none.png"),
])
def test_rows_that_are_not_sound_are_refused_at_the_start(line, words, tmp_path):
    path = tmp_path / "data.jsonl"
    write_jsonl(path, "chartqa", 40)
    with open(path, "a") as file:
        file.write(json.dumps(line) + "\n")
    run = subprocess.run(command("chartqa", path, tmp_path / "out"), capture_output=True, text=True)
    assert run.returncode == 2 and words in run.stderr and "line 41" in run.stderr, run.stderr
    assert not (tmp_path / "out").exists()
