"""Two ranks that share no network but a cable: namespaces joined by a pair of virtual devices."""

import os
import shutil
import subprocess

import pytest
from conftest import command, environment, files

FIRST, SECOND = "10.123.0.1", "10.123.0.2"


def ip(*words):
    return subprocess.run(["ip", *words], capture_output=True, text=True)


@pytest.fixture
def machines():
    """Names of two namespaces, or the reason why there are none."""
    names = [f"vlmq-{os.getpid()}-{i}" for i in range(2)]
    if not shutil.which("ip") or any(ip("netns", "add", name).returncode for name in names):
        pytest.skip("namespaces need iproute2 and the rights to make them")
    cable = [f"vq{os.getpid() % 10000}{end}" for end in "ab"]
    made = ip("link", "add", cable[0], "type", "veth", "peer", "name", cable[1])
    if made.returncode:
        for name in names:
            ip("netns", "del", name)
        pytest.skip(f"no virtual cable: {made.stderr.strip()}")
    for name, end, address in zip(names, cable, (FIRST, SECOND)):
        ip("link", "set", end, "netns", name)
        ip("-n", name, "addr", "add", f"{address}/24", "dev", end)
        ip("-n", name, "link", "set", end, "up")
        ip("-n", name, "link", "set", "lo", "up")
    yield names
    for name in names:
        ip("netns", "del", name)


def start(machine, rank, output, *more):
    words = ["ip", "netns", "exec", machine, *command(output, *more)]
    variables = environment(RANK=rank, WORLD_SIZE=2, MASTER_ADDR=FIRST, MASTER_PORT=29400)
    return subprocess.Popen(words, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_the_bytes_are_those_of_one_process(machines, alone, tmp_path):
    output = tmp_path / "folder"
    ranks = [start(machine, rank, output, "--shards", 4) for rank, machine in enumerate(machines)]
    said = [rank.communicate()[1] for rank in ranks]
    assert all(rank.returncode == 0 for rank in ranks), said
    assert files(output) == alone


def test_a_cut_cable_ends_the_run_within_seconds(machines, tmp_path):
    output = tmp_path / "folder"
    ranks = [start(machine, rank, output) for rank, machine in enumerate(machines)]
    line = ranks[0].stderr.readline()
    while line and "layer 1 of 4" not in line:
        line = ranks[0].stderr.readline()
    assert line, "it never began"
    cut = ip("-n", machines[1], "link", "set", "lo", "down")
    cable = ip("-n", machines[1], "-o", "link", "show", "type", "veth").stdout.split(": ")[1].split("@")[0]
    assert cut.returncode == 0 and ip("-n", machines[1], "link", "set", cable, "down").returncode == 0
    said = ranks[0].communicate(timeout=60)[1]
    assert ranks[0].returncode == 2, said
    assert said.count("error: ") == 1 and "rank 1 is lost" in said, said
    ranks[1].communicate(timeout=60)
    assert ranks[1].returncode == 2 and not output.exists()
