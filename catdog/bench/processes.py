"""Whatever a bench measures runs as a process of its own, with its own libraries and threads.

It is a command of catdog, or a role that a module of this package plays: `python -m MODULE SETTINGS RESULT`. `SETTINGS`
is JSON, of which `role` is the name of one of the module's functions; `RESULT` is the file that gets, as JSON, what the
function returns.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from catdog.errors import CatdogError

Settings = dict[str, Any]

STOP_TIMEOUT_S: Final = 30
"""How long a process that is stopped is given to end."""

_NOT_PASSED: Final = ("CATDOG_TOKEN", "RAY_ADDRESS", "TF_CONFIG")
"""Variables by which a process would ask for a token, or leave this machine."""

_QUIET: Final = {"TF_CPP_MIN_LOG_LEVEL": "2", "RAY_USAGE_STATS_ENABLED": "0"}

_TAIL_CHARS: Final = 600


def main(*roles: Callable[[Settings], Any]) -> None:
    """Play the role that this process was started for."""
    settings, result = json.loads(sys.argv[1]), Path(sys.argv[2])
    (play_role,) = (each for each in roles if each.__name__ == settings["role"])
    result.write_text(json.dumps(play_role(settings)))


def role(module: str, settings: Settings, result: str = os.devnull) -> list[str]:
    """The command line of a role."""
    return [sys.executable, "-m", f"catdog.bench.{module}", json.dumps(settings), result]


def catdog(*arguments: str, model: str | None = None) -> list[str]:
    """The command line of `catdog`, with `--model` where there is one."""
    return [sys.executable, "-m", "catdog", *arguments, *([] if model is None else ["--model", model])]


def environment(more: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment of a process, with more variables for this one."""
    passed = {name: value for name, value in os.environ.items() if name not in _NOT_PASSED}
    return {**_QUIET, **passed, **(more or {})}


def tail(text: str) -> str:
    """The end of what a process has written, as one line."""
    return " ".join(text.split())[-_TAIL_CHARS:]


def play(module: str, settings: Settings, scratch: str, variables: Mapping[str, str] | None = None) -> Any:
    """Play a role to its end, and return what it returns.

    Raises:
        CatdogError: it failed.
    """
    result = Path(scratch, "result.json")
    ran = subprocess.run(
        role(module, settings, str(result)),
        env=environment(variables),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    if ran.returncode:
        raise CatdogError(f"{settings['role']} must finish. Received: exit code {ran.returncode}: {tail(ran.stderr)}")
    return json.loads(result.read_text())


@contextlib.contextmanager
def running(command: Sequence[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that writes to a log, and is ended when the block is left."""
    process = start(command, log)
    try:
        yield process
    finally:
        stop(process)


def start(command: Sequence[str], log: Path, variables: Mapping[str, str] | None = None) -> subprocess.Popen[bytes]:
    """Start a process that writes to a log, in a session of its own: whoever starts it must end it."""
    with log.open("wb") as written:
        return subprocess.Popen(
            command,
            env=environment(variables),
            stdin=subprocess.DEVNULL,
            stdout=written,
            stderr=written,
            start_new_session=True,
        )


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a process: gently, then with SIGKILL."""
    process.terminate()
    try:
        process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def free_ports(num: int) -> list[int]:
    """Ports of this machine on which nobody listens."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(num)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
