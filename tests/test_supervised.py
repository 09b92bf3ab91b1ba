"""`catdog.cli.supervised`: what becomes of a child that is told to end, and does not, or dies on the way."""

import signal
import subprocess
import sys

import pytest

PROGRAM = """if True:
    import os, signal, sys, time
    from catdog.cli import supervised

    supervised._GRACE_S = 0.2
    supervised.outlive_deaths()
    num = 0

    def told(number, frame):
        global num
        num += 1
        print("told", flush=True)
        if num == int(sys.argv[1]):
            os.kill(os.getpid(), signal.SIGKILL)  # as the kernel does where memory runs out

    signal.signal(signal.SIGTERM, told)
    signal.signal(signal.SIGINT, told)
    print("labels", flush=True)
    while True:
        time.sleep(60)
"""


def started(dies_at: int) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", PROGRAM, str(dies_at)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "labels\n"
    return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_a_child_that_waits_for_a_storage(number: signal.Signals) -> None:
    with started(dies_at=0) as process:
        assert process.stdout is not None
        for _ in range(2):
            process.send_signal(number)
            assert process.stdout.readline() == "told\n"
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (-number, "", "")


def test_a_child_that_dies_when_it_is_told_to_end_is_not_started_again() -> None:
    with started(dies_at=1) as process:
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (-signal.SIGTERM, "told\n", "")


def test_a_child_that_dies_by_itself_is_started_again() -> None:
    with started(dies_at=0) as process:
        children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True).stdout
        subprocess.run(["kill", "-KILL", *children.split()], check=True)
        assert process.stdout is not None
        assert process.stdout.readline() == "labels\n"
        process.kill()
