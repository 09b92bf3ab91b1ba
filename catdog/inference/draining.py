"""Draining: a run that is to end before its work is done takes no new slice, and publishes what it has begun.

That is so when the deadline has come, and after the first Ctrl-C or SIGTERM (`ray job stop`, an eviction, a node that
is reclaimed). A second signal does what it would have done without draining: it ends the run at once.
"""

import contextlib
import logging
import os
import signal
import threading
from collections.abc import Iterator
from datetime import datetime, timedelta
from types import FrameType
from typing import Final

from catdog.config.labelling import BEGIN_VARIABLE
from catdog.errors import UsageError

logger = logging.getLogger(__name__)

_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM)


class Drain:
    """Says whether a run is to take no further slice, and why."""

    def __init__(self, deadline: str | None = None, now: datetime | None = None) -> None:
        """A run that goes on until its end, a deadline or a signal.

        Args:
            deadline: a time of day, `HH:MM`, in the time zone of this machine; None for none.
            now: the time from which on the deadline is the next one; None for the beginning of the job.

        Raises:
            UsageError: the environment says no time at which the job began.
        """
        # A time without a zone is that of this machine, also after the clocks were put forward or back.
        self._at = None if deadline is None else next_time(deadline, now or _beginning()).astimezone()
        self._signal: int | None = None
        self._is_deadline_over = False
        if self._at is not None:
            logger.info("Labelling until %s at the latest", self._at.strftime("%Y-%m-%d %H:%M %Z (UTC%z)"))

    def is_over(self) -> bool:
        """Whether no further slice is to be begun."""
        if self._signal is None and not self._is_deadline_over and self._at is not None:
            self._is_deadline_over = datetime.now().astimezone() >= self._at
        return self._signal is not None or self._is_deadline_over

    @property
    def reason(self) -> str | None:
        """Why the run was drained: `deadline`, `SIGINT`, ...; None if it was not."""
        if self._signal is not None:
            return signal.Signals(self._signal).name
        return "deadline" if self._is_deadline_over else None

    @contextlib.contextmanager
    def on_signals(self) -> Iterator[None]:
        """Let the first SIGINT or SIGTERM drain the run, for the length of a `with` block in the main thread.

        At its end the signals have their former meaning again.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        # A handler that Python did not set is None, and cannot be set again.
        former = {number: handler for number in _SIGNALS if (handler := signal.getsignal(number)) is not None}

        def note(number: int, _frame: FrameType | None) -> None:
            self._signal = number
            for each, handler in former.items():
                signal.signal(each, handler)
            logger.warning("%s: the slices that were begun are published, and no further ones", self.reason)

        for number in former:
            signal.signal(number, note)
        try:
            yield
        finally:
            for number, handler in former.items():
                signal.signal(number, handler)

    def pass_on(self) -> None:
        """Do what the signal would have done that has drained the run, if there was one."""
        if self._signal is not None:
            os.kill(os.getpid(), self._signal)


def _beginning() -> datetime:
    """When this job began, on the clock of this machine: now, or when it was first started."""
    text = os.environ.get(BEGIN_VARIABLE)
    if not text:
        return datetime.now()
    try:
        return datetime.fromtimestamp(float(text))
    except (ValueError, OverflowError, OSError):
        raise UsageError(f"{BEGIN_VARIABLE} must be seconds since 1970. Received: {BEGIN_VARIABLE}={text}") from None


def next_time(time_of_day: str, now: datetime) -> datetime:
    """The next time at which a clock shows `HH:MM`.

    Args:
        time_of_day: the time.
        now: the time from which on. Its own minute counts as over.

    Example:
        >>> from datetime import UTC
        >>> str(next_time("06:00", datetime(2026, 3, 1, 22, 30, tzinfo=UTC)))
        '2026-03-02 06:00:00+00:00'
    """
    hour, minute = map(int, time_of_day.split(":"))
    found = now.replace(hour=hour, minute=minute, second=0, microsecond=0)
    return found if found > now else found + timedelta(days=1)
