"""Runs contenders as processes of their own: each has its own libraries, threads and Ray."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, Final

from catdog.errors import TrainingError

Settings = dict[str, Any]
Epoch = dict[str, float]
"""What a contender says of one epoch: `num_images`; `seconds`; `input_s`, the seconds of waiting for images among
them; `train_loss`."""

POLL_S: Final = 0.2
STOP_TIMEOUT_S: Final = 30
"""How long a process that is stopped is given to end."""


def run(settings: Sequence[Settings], scratch: str) -> list[list[Epoch]]:
    """Run contenders side by side until all have ended. Returns the epochs of each.

    Args:
        settings: of each contender.
        scratch: a local directory.

    Raises:
        TrainingError: one failed; the others have been ended.
    """
    results = [Path(scratch, f"result-{index}.json") for index in range(len(settings))]
    with contextlib.ExitStack() as stack:
        started = []
        for each, result in zip(settings, results, strict=True):
            log = stack.enter_context(open(result.with_suffix(".log"), "w+b"))
            command = [sys.executable, "-m", "catdog.bench.contenders", json.dumps(each), str(result)]
            started.append((stack.enter_context(_running(command, log)), log))
        # Where one fails, the others wait for it, and must be ended.
        while any(process.poll() is None for process, _ in started):
            time.sleep(POLL_S)
            for (process, log), each in zip(started, settings, strict=True):
                if process.poll():
                    raise TrainingError(
                        f"a contender must finish. Received: {each['contender']} with exit code {process.returncode}: "
                        f"{_tail(log)}"
                    )
    return [json.loads(result.read_text()) for result in results]


def environment() -> dict[str, str]:
    """The environment of contenders. They run on this machine, also where there is a cluster."""
    return {name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "TF_CONFIG")}


@contextlib.contextmanager
def _running(command: list[str], log: IO[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    """Start a process, and end it when the block is left."""
    process = subprocess.Popen(command, env=environment(), stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        yield process
    finally:
        stop(process)


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a process: gently, then with SIGKILL."""
    process.terminate()
    try:
        process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _tail(log: IO[bytes]) -> str:
    log.seek(0)
    return " ".join(log.read().decode(errors="replace").split())[-500:]


def free_ports(num: int) -> list[int]:
    """Ports of this machine on which nobody listens."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(num)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
