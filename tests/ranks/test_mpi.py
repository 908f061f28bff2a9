"""Ranks that mpirun starts: the same bytes for any number, one end for all, and resuming."""

import json
import os
import pathlib
import signal
import subprocess
import time

import pytest
from conftest import command, environment, files

MPIRUN = pathlib.Path(os.environ["VLMQ_MPI"]) / "bin/mpirun"
# Seconds within which all must have ended; the run itself takes far longer than what is left of it.
SOON = 30


def mpirun(n_ranks, *words):
    launch = [str(MPIRUN), "--oversubscribe", "--bind-to", "none", "-n", str(n_ranks)]
    return launch + [str(word) for word in words]


def variables():
    return environment(OMPI_ALLOW_RUN_AS_ROOT=1, OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1,
                       PRTE_ALLOW_RUN_AS_ROOT=1, PRTE_ALLOW_RUN_AS_ROOT_CONFIRM=1)


@pytest.mark.parametrize("n_ranks", [1, 2, 4])
def test_the_bytes_are_those_of_one_process(n_ranks, alone, tmp_path):
    output = tmp_path / "folder"
    words = mpirun(n_ranks, *command(output, "--shards", 4, "--json"))
    run = subprocess.run(words, env=variables(), capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert files(output) == alone
    report = json.loads(run.stdout)["report"]
    assert report["ranks"]["n_ranks"] == n_ranks
    sent = report["ranks"]["bytes_exchanged"]
    assert len(sent) == 4 and all((n > 0) == (n_ranks > 1) for n in sent)


def children(pid):
    """The vlmq processes under a launcher."""
    found = []
    for stat in pathlib.Path("/proc").glob("[0-9]*/stat"):
        try:
            name, rest = stat.read_text().rsplit(")", 1)
        except OSError:
            continue
        if name.endswith("(vlmq"):
            parent = int(rest.split()[1])
            lineage = [parent]
            while lineage[-1] > 1 and lineage[-1] != pid:
                status = pathlib.Path(f"/proc/{lineage[-1]}/stat")
                lineage.append(int(status.read_text().rsplit(")", 1)[1].split()[1]))
            if lineage[-1] == pid:
                found.append(int(name.split()[0]))
    return sorted(found)


def test_a_killed_rank_ends_all_and_any_number_goes_on(tmp_path):
    output = tmp_path / "folder"
    words = command(output, "--shards", 4, samples=128)
    run = subprocess.Popen(mpirun(3, *words), env=variables(), stdout=subprocess.PIPE,
                           stderr=subprocess.STDOUT, text=True)
    said = ""
    while "layer 2 of 4" not in said:
        line = run.stdout.readline()
        assert line, said
        said += line
    ranks = children(run.pid)
    assert len(ranks) == 3, ranks
    os.kill(ranks[1], signal.SIGKILL)
    began = time.monotonic()
    said += run.communicate(timeout=SOON)[0]
    assert time.monotonic() - began < SOON and run.returncode != 0, said
    assert "signal 9" in said, said
    assert not children(run.pid) and not output.exists()
    again = subprocess.run(mpirun(2, *words, "--resume", "required"), env=variables(),
                           capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    straight = tmp_path / "straight"
    run = subprocess.run(command(straight, "--shards", 4, samples=128), env=environment(), capture_output=True)
    assert run.returncode == 0 and files(output) == files(straight)


def test_an_error_of_one_rank_is_told_and_ends_all(tmp_path):
    # The second rank alone is given another number of samples.
    output = tmp_path / "folder"
    words = mpirun(1, *command(output, samples=8)) + [":", "-n", "1"] + command(output, samples=9)
    run = subprocess.run(words, env=variables(), capture_output=True, text=True, timeout=SOON)
    assert run.returncode != 0 and not output.exists()
    assert "error: rank 1: it was started with another samples than rank 0" in run.stderr
    assert "hint: " in run.stderr
