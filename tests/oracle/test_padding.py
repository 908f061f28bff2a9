"""`vlmq pad`: every family's padded folder gives the source's logits, in transformers and in vlmq, or is
refused by name.

Environment: VLMQ_BIN, the vlmq program (default: target/release/vlmq).
"""

import json
import subprocess

import pytest
from families import FAMILIES, make
from test_families import PROGRAM, vlmq
from test_rotation import assert_same_logits

# Sums with zeros in them, which may be cut otherwise.
TOLERANCE = 1e-5
REFUSED = {"qwen3_vl_moe"}
GROUP = 40


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_stay_what_they_were(tmp_path, family):
    folder, padded = tmp_path / "model", tmp_path / "padded"
    processor = make(folder, family, next(iter(FAMILIES[family].variants)))
    arguments = ["pad", folder, "--output", padded, "--for-tp", 2, "--group-size", GROUP, "--json"]
    if family in REFUSED:
        run = subprocess.run([PROGRAM, *map(str, arguments)], capture_output=True, text=True)
        assert run.returncode == 2 and "mixtures of experts" in run.stderr
        assert not padded.exists()
        return
    report = json.loads(vlmq(*arguments))["padded"]
    assert report["to"] % (2 * GROUP) == 0 and 0 < report["to"] - report["from"] < 2 * GROUP
    assert_same_logits(tmp_path, processor, folder, padded, TOLERANCE)
