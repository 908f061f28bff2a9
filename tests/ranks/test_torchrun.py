"""Ranks that torchrun starts, with programs of which it knows nothing."""

import pathlib
import subprocess
import sys

import pytest
from conftest import command, environment, files, free_port

TORCHRUN = pathlib.Path(sys.executable).parent / "torchrun"


@pytest.mark.parametrize("ways", [["--standalone"], ["--master-addr", "127.0.0.1", "--master-port"]])
def test_the_bytes_are_those_of_one_process(ways, alone, tmp_path):
    if ways[-1] == "--master-port":
        ways = ways + [str(free_port())]
    output = tmp_path / "folder"
    launch = [str(TORCHRUN), *ways, "--nproc-per-node", "2", "--no-python"]
    run = subprocess.run(launch + command(output, "--shards", 4), env=environment(), capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert files(output) == alone
