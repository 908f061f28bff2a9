"""Ranks that srun starts, on a cluster of Slurm's own daemons: two nodes that are both this machine.

Needs slurmctld, slurmd and srun (Debian: slurmctld, slurmd, slurm-client, slurm-wlm-basic-plugins)."""

import json
import os
import pwd
import shutil
import signal
import socket
import subprocess
import time

import pytest
from conftest import command, environment, files, free_port

DAEMONS = ("slurmctld", "slurmd", "srun", "sinfo")
HOST = socket.gethostname().split(".")[0]
NODES = (HOST, f"{HOST}2")
# Seconds within which all must have ended; the run itself takes far longer than what is left of it.
SOON = 30


def configuration(folder):
    """Of two nodes, without munge and without cgroups, all files in `folder`."""
    user = pwd.getpwuid(os.getuid()).pw_name
    lines = [
        "ClusterName=test", f"SlurmctldHost={HOST}(127.0.0.1)", f"SlurmctldPort={free_port()}",
        f"SlurmUser={user}", f"SlurmdUser={user}", "AuthType=auth/none", "CredType=cred/none",
        f"StateSaveLocation={folder}/state", f"SlurmdSpoolDir={folder}/spool-%n",
        f"SlurmctldPidFile={folder}/slurmctld.pid", f"SlurmdPidFile={folder}/%n.pid",
        f"SlurmctldLogFile={folder}/slurmctld.log", f"SlurmdLogFile={folder}/%n.log",
        # Two nodes of one machine need a folder each for what MPI keeps in files.
        f"TmpFS={folder}/tmp-%n",
        "ProctrackType=proctrack/pgid", "TaskPlugin=task/none", "SwitchType=switch/none",
        "SelectType=select/cons_tres", "SelectTypeParameters=CR_Core", "MpiDefault=none",
        "SlurmdParameters=config_overrides", "ReturnToService=2",
        *(f"NodeName={name} NodeHostname={HOST} NodeAddr=127.0.0.1 Port={free_port()} CPUs=4" for name in NODES),
        f"PartitionName=all Nodes={','.join(NODES)} Default=YES",
    ]
    return "\n".join(lines) + "\n"


def pids(folder):
    for name in ("slurmctld", *NODES):
        try:
            yield int((folder / f"{name}.pid").read_text())
        except (OSError, ValueError):
            pass


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """The variables with which srun finds a cluster that has begun to work."""
    if missing := [name for name in DAEMONS if not shutil.which(name)]:
        pytest.skip(f"no {', '.join(missing)} on the path")
    folder = tmp_path_factory.mktemp("slurm")
    for name in ("state", *(f"{kind}-{node}" for node in NODES for kind in ("tmp", "spool"))):
        (folder / name).mkdir()
    (folder / "slurm.conf").write_text(configuration(folder))
    variables = {"SLURM_CONF": folder / "slurm.conf"}
    try:
        for words in (["slurmctld", "-c"], *(["slurmd", "-N", node] for node in NODES)):
            subprocess.run(words, env=environment(**variables), check=True, capture_output=True, timeout=SOON)
        until = time.monotonic() + SOON
        while nodes(variables).count("idle") < len(NODES):
            assert time.monotonic() < until, (folder / "slurmctld.log").read_text()
            time.sleep(0.2)
        yield variables
    finally:
        for pid in pids(folder):
            os.kill(pid, signal.SIGTERM)


def nodes(variables):
    words = ["sinfo", "--noheader", "-N", "-o", "%t"]
    return subprocess.run(words, env=environment(**variables), capture_output=True, text=True).stdout.split()


def srun(cluster, words, *options, **more):
    """A step of tasks that run `words`."""
    step = ["srun", *options, *words]
    variables = environment(**cluster, **more)
    return subprocess.Popen(step, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def done(step, timeout=600):
    out, err = step.communicate(timeout=timeout)
    assert step.returncode == 0, err
    return out


@pytest.mark.parametrize("options", [
    ["--ntasks=1"],
    ["--nodes=1", "--ntasks=2"],
    ["--nodes=2", "--ntasks=4"],
    # As on the clusters whose default this is; the program uses the MPI that it was built with.
    ["--nodes=1", "--ntasks=2", "--mpi=pmix"],
    ["--nodes=2", "--ntasks=3", "--mpi=pmix"],
], ids=" ".join)
def test_the_bytes_are_those_of_one_process(options, cluster, alone, tmp_path):
    output = tmp_path / "folder"
    # The first node's name is a host's, but the second's is none.
    said = done(srun(cluster, command(output, "--shards", 4, "--json"), f"--nodelist={HOST}", *options))
    assert files(output) == alone
    ranks = json.loads(said)["report"]["ranks"]
    assert f"--ntasks={ranks['n_ranks']}" in options
    assert len(ranks["bytes_exchanged"]) == 4


def test_steps_beside_each_other_do_not_meet(cluster, alone, tmp_path):
    outputs = [tmp_path / name for name in ("one", "other")]
    steps = [srun(cluster, command(output, "--shards", 4), f"--nodelist={HOST}", "--ntasks=2") for output in outputs]
    for step, output in zip(steps, outputs):
        done(step)
        assert files(output) == alone


def tasks(output):
    """The processes of a run that writes to `output`."""
    words = subprocess.run(["pgrep", "-f", f"^[^ ]*vlmq quantize.*{output}"], capture_output=True, text=True)
    return [int(pid) for pid in words.stdout.split()]


def test_a_killed_task_ends_all_and_any_number_goes_on(cluster, tmp_path):
    output = tmp_path / "folder"
    words = command(output, "--shards", 4, samples=128)
    step = srun(cluster, words, "--nodes=2", "--ntasks=3")
    said = ""
    while "layer 2 of 4" not in said:
        line = step.stderr.readline()
        assert line, said
        said += line
    ranks = tasks(output)
    assert len(ranks) == 3, ranks
    os.kill(ranks[-1], signal.SIGKILL)
    began = time.monotonic()
    said += step.communicate(timeout=SOON)[1]
    assert time.monotonic() - began < SOON and step.returncode != 0, said
    assert said.count("is lost: its connection has ended") == 1, said
    assert not tasks(output) and not output.exists()
    # Wherever these two are put, they are told where to meet.
    done(srun(cluster, [*words, "--resume", "required"], "--ntasks=2", MASTER_ADDR="127.0.0.1"))
    straight = tmp_path / "straight"
    run = subprocess.run(command(straight, "--shards", 4, samples=128), env=environment(), capture_output=True)
    assert run.returncode == 0 and files(output) == files(straight)
