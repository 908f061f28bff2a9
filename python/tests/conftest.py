"""The bundled model, its calibration rows in memory, and the program as it is typed."""

import io
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "testbed/model"
CALIBRATION = ROOT / "testbed/calibration"
EVAL = ROOT / "testbed/eval"


@pytest.fixture(scope="session")
def rows():
    """The rows of testbed/calibration with their images as PIL has them."""
    archive = zipfile.ZipFile(CALIBRATION / "images.zip")
    found = []
    for line in (CALIBRATION / "samples.jsonl").read_text().splitlines():
        row = json.loads(line)
        with archive.open(row["image"]) as file:
            row["image"] = Image.open(io.BytesIO(file.read()))
            row["image"].load()
        found.append(row)
    return found


@pytest.fixture
def program():
    """Runs `python -m vlmq`; returns what it wrote, if it ended with this code."""
    def run(*words, exit_code=0):
        command = [sys.executable, "-m", "vlmq", *map(str, words)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
        assert done.returncode == exit_code, done.stderr
        return done
    return run
