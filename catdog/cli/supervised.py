"""A command that outlives its own death: it runs in a child process, which is started again when it dies.

A decoder is native code, and an image can make it crash, or take all the memory there is. `catdog predict` and `catdog
serve` decode in their own process, and die with it. The child that takes the place of `predict` finds the claim of a
dead run in the output, so it tries the images that were under way in a process of their own first
(`catdog.inference.trial`), and those that kill that process become rows. The child that takes the place of `serve`
serves on; whoever waited for an answer finds the connection closed.

The parent forks before it has imported anything heavy. So the child costs no time, and the parent next to no memory.
Whoever kills the parent kills the child.
"""

import contextlib
import functools
import logging
import mmap
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Final

from catdog.config.labelling import BEGIN_VARIABLE
from catdog.errors import CatdogError

logger = logging.getLogger(__name__)

_FATAL: Final = frozenset(
    {signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE, signal.SIGABRT, signal.SIGTRAP, signal.SIGKILL}
)
"""What a process dies of that crashes, or that the kernel kills because memory runs out."""

_MAX_DEATHS: Final = 3
"""How many children may die one after the other of which none has got anywhere."""

_GRACE_S: Final = 5.0
"""For how long a child may go on that was told twice to end."""

_HANDLED: Final = frozenset({signal.SIGCHLD, signal.SIGINT, signal.SIGTERM, signal.SIGTSTP})

_PR_SET_PDEATHSIG: Final = 1
"""Linux: the signal that a process gets when its parent dies."""


def outlive_deaths() -> Callable[[], None]:
    """Go on as a child of this process. The process itself does nothing any more but wait for the child's end.

    Returns:
        In each child: a function that the child calls when it has got somewhere: published something, begun to serve.

    Raises:
        SystemExit: in the parent; with the exit code of the child.
        CatdogError: in the parent; children keep dying.
    """
    has_progressed = mmap.mmap(-1, 1)  # shared with the children
    num_deaths = 0
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, _HANDLED)
    os.environ.setdefault(BEGIN_VARIABLE, str(time.time()))  # all children count their deadline from here
    parent, on_child = os.getpid(), signal.signal(signal.SIGCHLD, lambda *_: None)  # to ignore it would be to lose it
    while True:
        has_progressed[0] = 0
        if (child := os.fork()) == 0:
            _die_with(parent)
            os.setpgid(0, 0)  # Ctrl-C reaches the parent alone, which passes it on: the child is to get it once
            signal.signal(signal.SIGCHLD, on_child)
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            return functools.partial(has_progressed.__setitem__, 0, 1)
        status, told = _wait(child)
        exit_code = os.waitstatus_to_exitcode(status)
        if told is not None and -exit_code in _FATAL:  # it was to end, and does not begin anew
            exit_code = -told
        num_deaths = 1 if has_progressed[0] else num_deaths + 1
        if -exit_code not in _FATAL or num_deaths > _MAX_DEATHS:
            break
        logger.warning("The process that labels died of %s, and is started again", signal.Signals(-exit_code).name)
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    if -exit_code in _FATAL:
        raise CatdogError(
            f"the process that labels must not die {_MAX_DEATHS + 1} times in a row without having got anywhere. "
            f"Received: {signal.Signals(-exit_code).name}"
        )
    if exit_code < 0:  # nobody but a user sends such a signal
        signal.signal(-exit_code, signal.SIG_DFL)
        os.kill(parent, -exit_code)
    raise SystemExit(exit_code if exit_code >= 0 else 128 - exit_code)


def _wait(child: int) -> tuple[int, signal.Signals | None]:
    """Wait for the end of a child, and pass on to it what this process is told.

    A child that was told twice to end, and has not ended some seconds later, is killed: it waits for a storage.

    Returns:
        The child's status, and the last signal that told it to end, if there was one.
    """
    told: signal.Signals | None = None
    last_moment: float | None = None
    while True:
        left_s = 3600.0 if last_moment is None else max(0.0, last_moment - time.monotonic())
        if (received := signal.sigtimedwait(_HANDLED, left_s)) is None:
            if last_moment is not None:
                os.kill(child, signal.SIGKILL)
                last_moment = None
            continue
        number = signal.Signals(received.si_signo)
        if number == signal.SIGCHLD:
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                return status, told
        elif number == signal.SIGTSTP:  # Ctrl-Z; what follows comes with `fg`
            os.kill(child, signal.SIGSTOP)
            os.kill(os.getpid(), signal.SIGSTOP)
            os.kill(child, signal.SIGCONT)
        else:
            os.kill(child, number)
            if told is not None:
                last_moment = last_moment or time.monotonic() + _GRACE_S
            told = number


def _die_with(parent: int) -> None:
    """Have the kernel kill this process when its parent is gone (Linux)."""
    import ctypes

    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)
