"""What tests of several ranks share: the program, a small run, and how its folder is compared."""

import os
import pathlib
import socket
import subprocess

import pytest

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
BIN = os.environ["VLMQ_BIN"]
# Of a launcher around this test, its ranks must not take these for their own.
LAUNCHERS = ("OMPI_", "PMI", "RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "TORCHELASTIC", "SLURM_")


def environment(**more):
    """This process's variables but those of launchers, and more."""
    own = {k: v for k, v in os.environ.items() if not k.startswith(LAUNCHERS)}
    return own | {k: str(v) for k, v in more.items()}


def command(output, *more, samples=80):
    """`vlmq quantize` of the bundled model."""
    model, data = REPOSITORY / "testbed/model", REPOSITORY / "testbed/calibration"
    words = [BIN, "quantize", model, "--calibration", data, "--samples", samples, "--bits", 3]
    words += ["--group-size", 64, "--threads", 1, *more, "--output", output]
    return [str(word) for word in words]


def files(folder):
    """Every file but the report, which tells times, and the card, which tells its name."""
    left_out = ("vlmq_report.json", "README.md")
    return {f.name: f.read_bytes() for f in folder.iterdir() if f.name not in left_out}


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="session")
def alone(tmp_path_factory):
    """The folder that one process makes with four shards."""
    output = tmp_path_factory.mktemp("alone") / "folder"
    run = subprocess.run(command(output, "--shards", 4), env=environment(), capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return files(output)
