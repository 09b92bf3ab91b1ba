"""Places in the code where a test lets this process die, stand still, or find the disk full.

    CATDOG_FAIL_AT=before:publish:3=kill catdog predict ...

kills the process (SIGKILL) when it is about to publish its third file. Without the environment variable, `step` does
nothing. The steps of a job lie in `with failpoints.step(...)` where they are done. Those of a file (`write`, `sync`,
`publish`, `delete`) happen within those of a job (`plan`, `index`, `record`, ...), so that both are counted.
"""

import contextlib
import errno
import os
import re
import signal
import threading
from collections import Counter
from collections.abc import Iterator
from typing import Final, Literal

from catdog.errors import UsageError

VARIABLE: Final = "CATDOG_FAIL_AT"
"""The environment variable that says where, the first or which other time, and what happens there."""

STEPS: Final = (
    "claim",  # an output is claimed
    "list",  # the images are listed
    "plan",  # a plan is published
    "read",  # the images of a portion are read
    "write",  # a file is written under its temporary name
    "sync",  # its bytes are forced to the disk
    "publish",  # it gets its name, or is put into an object store
    "delete",  # a file is removed
    "index",  # the index of what is done is published
    "record",  # a run record is published
    "journal",  # the journal of a compaction is published
    "merge",  # merged rows are published under a hidden name
    "empty",  # a part file whose rows were merged is replaced by one without rows
    "replace",  # the first of them is replaced by the merged rows
    "close",  # the journal of a compaction is closed
)
"""What a process does step by step, where a test can hit it."""

ACTIONS: Final = ("kill", "stop", "full")
"""`kill` kills the process with SIGKILL; `stop` stops it with SIGSTOP; `full` raises the error of a disk without
space, this time and each time after it."""

_FORM: Final = re.compile(rf"(before|after):({'|'.join(STEPS)}):([1-9]\d*)=({'|'.join(ACTIONS)})")

_text: str | None = os.environ.get(VARIABLE)
_reached: Counter[tuple[str, str]] = Counter()
_lock = threading.Lock()
_nothing: Final = contextlib.nullcontext()


def step(name: str) -> contextlib.AbstractContextManager[None]:
    """The step of this name, for the length of a `with` block. It has a point before it, and one after it.

    Raises:
        UsageError: the environment variable names no point.
        OSError: it says that the disk is full here.
    """
    return _nothing if _text is None else _step(_text, name)


@contextlib.contextmanager
def _step(text: str, name: str) -> Iterator[None]:
    _reach(text, "before", name)
    yield
    _reach(text, "after", name)


def _reach(text: str, moment: Literal["before", "after"], name: str) -> None:
    match = _FORM.fullmatch(text)
    if match is None:
        raise UsageError(
            f"{VARIABLE} must have the form before|after:STEP:NUMBER=kill|stop|full with a step of "
            f"{', '.join(STEPS)}. Received: {VARIABLE}={text}"
        )
    with _lock:
        _reached[moment, name] += 1
        number = _reached[moment, name]
    if (moment, name) != (match[1], match[2]) or number < int(match[3]):
        return
    if match[4] == "full":
        raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)} ({VARIABLE}={text})")
    if number == int(match[3]):
        os.kill(os.getpid(), signal.SIGKILL if match[4] == "kill" else signal.SIGSTOP)
