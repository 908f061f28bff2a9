"""Scores of vlmq and of the original programs, on thousands of made-up answers of each benchmark.

Environment: VLMQ_BIN; VLMQ_PAIRS, answers per benchmark and protocol (default 4000).
"""

import json
import os
import random
import subprocess

import pytest
from benchmark_originals import ROOT, TASKS, lmms_score, vlm_score

PROGRAM = os.environ.get("VLMQ_BIN", str(ROOT / "target/debug/vlmq"))
N_PAIRS = int(os.environ.get("VLMQ_PAIRS", "4000"))

WORDS = """yes no none zero one two three ten a an the dont don't Im its it's Mark's cant y'allll twas red
Blue 1,000 1_000 1e3 1e999 -0 0 0.0 5% 50% 0.5 .5 5. +5 nan -NaN inf Infinity 1__0 _1 0x10 ½ ² ١٢ １２．５ 12% 5%%
% 105 100 104.999 105.01 95 94.99 $5 3.14 1.2.3 St. U.S.A. ... .5. A B C D E F Z a. B. (C) (d) [E] b) C: *D*
A, A.B answer</answer> <answer> </answer> ÅNGSTRÖM ß SS ﬁ ﬃ İ ı Σ ΑΣ ς Ⓐ Ａ Ｂ ａ ＂ ＿ ǅ K x^2 \\frac{1}{2}
-5 --5 5- a-b a/b ;x x; @ ` " ' ' s's 's ? ! ,, , 一 二 图 漢字 é é 🙂 nan% inf%""".split()
WORDS += ["\x1c", "\x85", "\u3000", "\u200b", "\xa0", "\n", "\t", "\r\n", "\x0b", ""]
PHRASES = """The best answer is|The correct answer is (C)|The answer is|The answer|Best answer: B|Best option:
The best option is|The correct option is|ASSISTANT:|Cannot determine the answer
Failed to obtain answer via API
I can't process this file.|one two three four five six seven eight|The best option isThe correct option is
Best answer:Best option:|I'm sorry, but without the image provided""".replace("\n", "|").split("|")
GAPS = [" ", " ", " ", "", "  ", "\n", "\t", ".", ", ", "-", "\u3000", "\x1c", "\xa0", ". ", " .", "; ", "/"]


def text(rng, most=6):
    parts = []
    for _ in range(rng.choice([0, 1, 1, 1, 2, 3, most])):
        parts += [rng.choice(WORDS if rng.random() < 0.85 else PHRASES), rng.choice(GAPS)]
    if parts and rng.random() < 0.8:
        parts.pop()
    return "".join(parts)


def number(rng):
    value = rng.choice([rng.uniform(-2, 2), rng.randint(-3, 120), 10 ** rng.uniform(-5, 12), 0])
    forms = [str(value), f"{value:.2f}", f"{value:e}", f"{value}%", f" {value}", f"{value}%%",
             f"{value:+.3f}", f"{int(value):_}", f"{int(value):,}",
             str(int(value)).translate({48 + i: 0x660 + i for i in range(10)})]
    return rng.choice(forms)


def near(rng, answer):
    """An answer that is right, or nearly."""
    kind = rng.randrange(10)
    if kind == 0:
        return answer
    if kind == 1:
        return answer.upper()
    if kind == 2:
        return answer.swapcase() + rng.choice([".", "!", " ", "\n", "%", ""])
    if kind == 3 and answer:
        at = rng.randrange(len(answer))
        return answer[:at] + rng.choice(["", "x", " ", "."]) + answer[at + 1:]
    if kind == 4:
        return rng.choice(GAPS) + answer + rng.choice(GAPS)
    if kind == 5:
        return text(rng) + " " + answer + " " + text(rng)
    if kind == 6:
        try:
            return repr(float(answer.rstrip("%")) * rng.choice([1.05, 0.95, 1.0500001, 1.04, 0.9499, -1]))
        except ValueError:
            return answer.replace(" ", "  ")
    if kind == 7:
        return answer.replace("'", "").replace(",", "")
    return text(rng)


def doc_of(benchmark, rng):
    """A row in lmms-eval's form and its right answers."""
    if benchmark == "chartqa":
        answer = number(rng) if rng.random() < 0.6 else text(rng, 2)
        return dict(answer=answer, type="human_test"), [answer]
    if benchmark == "docvqa":
        answers = [text(rng, 4) for _ in range(rng.randint(1, 4))]
        return dict(answers=answers), answers
    if benchmark in ("textvqa", "vizwiz"):
        pool = [text(rng, 3) for _ in range(rng.randint(1, 4))]
        answers = [near(rng, rng.choice(pool)) for _ in range(rng.choice([10, 10, 10, 1, 3, 9, 17, 150]))]
        return dict(answers=answers, question_id=1), answers
    if benchmark.startswith("mme"):
        answer = rng.choice("ABCDE")
        kind = {"category": "Perception/Monitoring", "l2-category": "x", "index": 1}
        return dict(kind, answer=answer), [answer]
    if benchmark == "scienceqa":
        choices = [text(rng, 3) for _ in range(rng.randint(2, 12))]
        at = rng.randrange(len(choices))
        return dict(choices=choices, answer=at), [chr(65 + at), chr(65 + at) + "."]
    if benchmark == "seedbench-2-plus":
        answer = rng.choice(["A", "B", "C", "D", "a", " B "])
        return dict(answer=answer, question_image_type="chart", question_id=1), [answer]
    kind, dataset = rng.choice([("Doc-oriented VQA", "docVQA"),
                                ("Handwritten Mathematical Expression Recognition", "HME100k")])
    answers = [text(rng, 4) for _ in range(rng.randint(1, 3))]
    return dict(answer=answers, question_type=kind, dataset=dataset), answers


def cells_of(benchmark, doc, rng):
    """The same as a row of VLMEvalKit's table."""
    row = dict(doc)
    if benchmark in ("scienceqa", "seedbench-2-plus"):
        choices = [text(rng, 3) or "x" for _ in range(rng.randint(2, 5))]
        row = {chr(65 + i): choice for i, choice in enumerate(choices)}
        row["answer"] = rng.choice(list(row))
        row["prediction_like"] = rng.choice(choices)
    elif benchmark == "ocrbench":
        row = dict(answer=repr(doc["answer"]), category=doc["question_type"])
    elif benchmark == "chartqa":
        answer = doc["answer"]
        row = dict(answer=rng.choice([repr([answer]), repr([answer, "7"]), answer]), split="x")
    elif "answers" in row:
        row = {"answers" if benchmark == "vizwiz" else "answer": repr(row["answers"])}
    return row


def ours(path, benchmark, protocol, lines):
    with open(path, "w") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
    command = [PROGRAM, "score", path, "--benchmark", benchmark, "--protocol", protocol, "--json"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def assert_same(lines, expected, found):
    scores = found["scores"]
    assert len(scores) == len(expected)
    differ = [(line, theirs, own) for line, theirs, own in zip(lines, expected, scores) if theirs != own]
    assert not differ, (len(differ), differ[:5])
    # A test of one outcome only would show nothing.
    assert 0.02 < sum(score > 0 for score in scores) / len(scores) < 0.98
    assert abs(found["score"]["percent"] - 100 * sum(expected) / len(expected)) < 1e-9


@pytest.mark.parametrize("benchmark", TASKS)
def test_lmms_eval(benchmark, tmp_path):
    rng = random.Random(f"lmms-eval {benchmark}")
    lines, expected = [], []
    while len(lines) < N_PAIRS:
        doc, answers = doc_of(benchmark, rng)
        prediction = near(rng, rng.choice(answers))
        expected.append(float(lmms_score(benchmark, doc, prediction)))
        lines.append(dict(doc=doc, filtered_resps=[prediction]))
    assert_same(lines, expected, ours(tmp_path / "pairs.jsonl", benchmark, "lmms-eval", lines))


@pytest.mark.parametrize("benchmark", TASKS)
def test_vlm_eval_kit(benchmark, tmp_path):
    rng = random.Random(f"vlmevalkit {benchmark}")
    lines, expected = [], []
    while len(lines) < N_PAIRS:
        doc, answers = doc_of(benchmark, rng)
        row = cells_of(benchmark, doc, rng)
        if benchmark in ("scienceqa", "seedbench-2-plus"):
            answers = [row.pop("prediction_like"), rng.choice("ABCDEZ"), row["answer"]]
        prediction = near(rng, rng.choice(answers))
        expected.append(float(vlm_score(benchmark, row, prediction)))
        if benchmark.startswith("mme"):
            row = doc
        lines.append(dict(doc=row, filtered_resps=[prediction]))
    assert_same(lines, expected, ours(tmp_path / "pairs.jsonl", benchmark, "vlmevalkit", lines))
