"""Perplexity of raw texts and KL between two models, as vlmq eval tells them, against transformers' logits.

Two models of each family with random weights of different seeds: one family whose tokenizer puts a start
token before a text, one whose does not.

Environment: VLMQ_BIN, the vlmq program (default: target/release/vlmq).
"""

import json
import math

import pytest
import torch
from families import make
from test_families import vlmq
from transformers import AutoModelForImageTextToText, AutoTokenizer

TEXTS = [
    "The quick brown fox jumps over the lazy dog.\n\nIt did not wake up; why should it?",
    "def area(side: int) -> int:\n    return side * side  # of a square\n" * 4,
    "Größe, naïve, 数, \U0001f600 and <|im_end|> inside.",
    "It is",
]
TOLERANCE = 1e-4
CASES = [("qwen2_5_vl", "untied", False), ("llava", None, False), ("gemma3", None, True)]


def folders(home, family, variant):
    from families import FAMILIES
    variant = variant or FAMILIES[family].variants[0]
    found = home / "original", home / "other"
    for seed, folder in enumerate(found):
        make(folder, family, variant, seed=seed)
    return found


def pieces(ids, has_start, max_tokens):
    """Every token but the first once, after the start token or the token before."""
    for at in range(1, len(ids), max_tokens - 1):
        yield [ids[0 if has_start else at - 1]] + ids[at:at + max_tokens - 1]


def log_probabilities(model, ids):
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0, :-1].double()
    return torch.log_softmax(logits, -1)


def theirs(original, other, has_start, max_tokens):
    """Perplexity of both models, mean KL(original ‖ other), share of equal top tokens, and tokens."""
    tokenizer = AutoTokenizer.from_pretrained(original)
    models = [AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
              for folder in (original, other)]
    nll, kl, same, n = [0.0, 0.0], 0.0, 0, 0
    for text in TEXTS:
        ids = tokenizer(text)["input_ids"]
        assert (ids[0] == tokenizer.bos_token_id) == has_start
        for piece in pieces(ids, has_start, max_tokens):
            p, q = [log_probabilities(model, piece) for model in models]
            expected = torch.tensor(piece[1:])[:, None]
            nll = [a - rows.gather(1, expected).sum().item() for a, rows in zip(nll, (p, q))]
            kl += (p.exp() * (p - q)).sum().item()
            same += (p.argmax(-1) == q.argmax(-1)).sum().item()
            n += len(piece) - 1
    return [math.exp(a / n) for a in nll], kl / n, 100 * same / n, n


@pytest.mark.parametrize("max_tokens", [2048, 7])
@pytest.mark.parametrize("family, variant, has_start", CASES)
def test_perplexity_and_divergence(tmp_path, family, variant, has_start, max_tokens):
    original, other = folders(tmp_path, family, variant)
    task = tmp_path / "texts.jsonl"
    task.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    done = vlmq("eval", other, "--reference", original, "--task", task, "--max-tokens", max_tokens, "--json")
    ours = json.loads(done)["tasks"]["texts"]
    (reference, perplexity), kl, same, n = theirs(original, other, has_start, max_tokens)
    assert ours["n_tokens"] == n
    assert ours["perplexity"] == pytest.approx(perplexity, rel=TOLERANCE)
    assert ours["reference_perplexity"] == pytest.approx(reference, rel=TOLERANCE)
    assert ours["kl_per_token"] == pytest.approx(kl, rel=TOLERANCE)
    assert ours["same_top_percent"] == pytest.approx(same, abs=1e-9)
