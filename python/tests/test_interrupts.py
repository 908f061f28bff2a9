"""Ctrl-C ends commands, here and in the program, and what was done is kept."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import vlmq
from conftest import CALIBRATION, EVAL, MODEL


@pytest.fixture
def interrupt():
    """Presses Ctrl-C as soon as it is called."""
    def press():
        os.kill(os.getpid(), signal.SIGINT)
    return press


def test_quantize_ends_at_its_next_step(interrupt, tmp_path):
    pressed = []

    def hear(progress):
        if progress.n_done == 1 and not pressed:
            pressed.append(time.monotonic())
            interrupt()

    with pytest.raises(KeyboardInterrupt):
        vlmq.quantize(MODEL, tmp_path / "model", calibration=CALIBRATION, bits=3, group_size=64,
                      samples=64, progress=hear)
    assert time.monotonic() - pressed[0] < 30
    assert not (tmp_path / "model").exists()
    found = vlmq.quantize(MODEL, tmp_path / "model", calibration=CALIBRATION, bits=3, group_size=64,
                          samples=64)
    # One, or another that was done before the interruption was noticed; never all four.
    assert 1 <= found["report"]["n_resumed_layers"] <= 3


def test_without_a_listener_it_ends_too(interrupt, tmp_path):
    timer = threading.Timer(0.3, interrupt)
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        vlmq.quantize(MODEL, tmp_path / "model", calibration=CALIBRATION, bits=2, group_size=64,
                      samples=400)
    timer.join()
    assert not (tmp_path / "model").exists()


def test_evaluate_ends_and_goes_on(interrupt, tmp_path):
    pressed = []

    def hear(progress):
        if progress.n_done > 70 and not pressed:
            pressed.append(progress)
            interrupt()

    with pytest.raises(KeyboardInterrupt):
        vlmq.evaluate(MODEL, EVAL, limit=100, output=tmp_path / "answers", progress=hear)
    steps = []
    found = vlmq.evaluate(MODEL, EVAL, limit=100, output=tmp_path / "answers", progress=steps.append)
    assert steps[0].n_done >= 64
    assert found == vlmq.evaluate(MODEL, EVAL, limit=100)


@pytest.mark.parametrize("words", [
    ["quantize", MODEL, "--calibration", CALIBRATION, "--samples", 400, "--output", "model"],
    ["eval", MODEL, "--task", EVAL],
])
def test_the_program_ends(words, tmp_path):
    command = [sys.executable, "-m", "vlmq", *map(str, words)]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE)
    time.sleep(1.5)
    assert process.poll() is None, process.stderr.read()
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) in {2, -signal.SIGINT}
    assert not (tmp_path / "model").exists()
