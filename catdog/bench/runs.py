"""A run of `catdog predict` or `catdog compact` as a real process, and how it ends."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from catdog.bench import processes

STUCK_S: Final = 300.0
"""A run that takes longer than this without an end is stuck."""

_REFUSED: Final = "--output must not be in use by another run"
_TOO_MANY_DEATHS: Final = (
    "the process that labels must not die",
    "An actor must not die more than",
)
"""How the error of a run begins that gave up because its workers were killed."""


class Run:
    """A run of `catdog predict`, or of `catdog compact`, as a process of its own."""

    def __init__(self, arguments: Sequence[str], log: Path) -> None:
        """Start `catdog` with these arguments."""
        self._log = log
        self._started = time.monotonic()
        with log.open("wb") as written:
            self.process = subprocess.Popen(
                processes.catdog(*arguments),
                env=processes.environment(),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=written,
            )
        self.is_killed = False

    def kill(self) -> bool:
        """Kill the process with SIGKILL; whether it was alive."""
        if self.process.poll() is not None:
            return False
        self.process.kill()
        self.process.wait()
        self.is_killed = True
        return True

    @property
    def is_stuck(self) -> bool:
        """Whether it takes longer than any run should."""
        return self.process.poll() is None and time.monotonic() - self._started > STUCK_S

    @property
    def end(self) -> str:
        """How the run that has ended did so; what is not expected begins with `exit code`."""
        code = self.process.returncode
        if self.is_killed:
            return "killed"
        if code == 0:
            return "done"
        text = self._log.read_text(errors="replace")
        error = text[text.rfind("error: ") + len("error: ") :] if "error: " in text else text
        if code == 2 and error.startswith(_REFUSED):
            return "refused"
        if code == 1 and error.startswith(_TOO_MANY_DEATHS):
            return "gave up"
        return f"exit code {code}: {processes.tail(error)}"
