"""What this process knows of each remote storage: whether it answers, since when it fails, how much it can bear.

While a storage fails with errors that can pass, every request to it is tried again, after pauses that grow and have
full jitter, until nothing has been got from it for `patience_s` seconds. That budget is the storage's, not the file's:
when a storage is down, a thousand files wait together and end together. A file that fails while others can be read has
a budget of its own, as long, which starts anew when the storage comes back from an outage.

With each fault, the number of requests in flight to the storage is halved. With each success it grows again.
"""

import contextlib
import os
import random
import threading
import time
from collections.abc import Iterator
from typing import Final

from catdog import ray_session
from catdog.errors import UsageError
from catdog.storage.urls import storage_of

MAX_CONNECTIONS: Final = 32
"""Requests in flight to one remote storage, per process."""

PATIENCE_VARIABLE: Final = "CATDOG_STORAGE_PATIENCE_S"
"""The environment variable that says another number of seconds than `_PATIENCE_S`."""

_PATIENCE_S: Final = 300.0
_LOCAL_PATIENCE_S: Final = 6.0
"""For a local path. A network file system has tried for minutes by itself before it says that it cannot."""

_FIRST_CONTACT_S: Final = 6.0
"""For an address where nobody has listened since this process began: the address is probably wrong."""

FOREIGN_PATIENCE_S: Final = 20.0
"""For a host that only some images of a collection lie on."""

_FOREIGN_REMEMBERED_S: Final = 300.0
"""For this long after such a host was given up, its images are given up at once."""

_OUTAGE_S: Final = 60.0
"""A storage that gave nothing for this long was down. It is longer than the time between two renewals of a claim, so
that a few files which always fail are not taken for an outage."""

_FIRST_PAUSE_S: Final = 0.5
_LONGEST_PAUSE_S: Final = 10.0

_STALE_S: Final = 60.0
"""When a storage has not been asked for this long after its last fault, its budget starts anew."""

_POLL_S: Final = 0.1


def patience_s() -> float:
    """For how many seconds a storage that fails is tried again: 300, or as `CATDOG_STORAGE_PATIENCE_S` says."""
    text = os.environ.get(PATIENCE_VARIABLE)
    if text is None:
        return _PATIENCE_S
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        raise UsageError(f"{PATIENCE_VARIABLE} must be a number of seconds. Received: {PATIENCE_VARIABLE}={text}")
    return seconds


class Storage:
    """What this process knows of one storage. Thread-safe. `known` gives the one for a URL."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._changed = threading.Condition()
        self._has_answered = False
        self._has_succeeded = False
        self._failing_since: float | None = None
        self._back_since = 0.0
        self._last_fault = 0.0
        self._failing: set[str] = set()
        self._is_unreachable = False
        self._failure = ""
        self._given_up = 0.0
        self._limit = float(MAX_CONNECTIONS)
        self._halved = 0.0
        self._num_in_flight = 0

    @property
    def limit(self) -> int:
        """Requests that may be in flight now."""
        return int(self._limit)

    @property
    def has_succeeded(self) -> bool:
        """Whether it has done what it was asked for: for this process, or for the driver of this worker.

        A driver asks every storage before it starts a worker.
        """
        return self._has_succeeded or ray_session.is_worker()

    @property
    def failure(self) -> str:
        """The last fault, in one line."""
        return self._failure

    @contextlib.contextmanager
    def slot(self, started: float) -> Iterator[float | None]:
        """Wait until one more request may be in flight, for the length of a `with` block.

        Gives the time when the wait was over; None if the storage was given up after `started`, or nobody waits for the
        request any more.
        """
        if self.name == "" or self.name in _holding.names:  # an action that asks for something else on its way
            yield time.monotonic()
            return
        with self._changed:
            while self._num_in_flight >= int(self._limit) and not self._is_over(started):
                self._changed.wait(_POLL_S)
            if self._is_over(started):
                yield None
                return
            self._num_in_flight += 1
        _holding.names.add(self.name)
        try:
            yield time.monotonic()
        finally:
            _holding.names.discard(self.name)
            with self._changed:
                self._num_in_flight -= 1
                self._changed.notify_all()

    def _is_over(self, started: float) -> bool:
        return self._given_up > started or is_stopping()

    def succeeded(self) -> None:
        """It has done what it was asked for."""
        with self._changed:
            self._has_answered = self._has_succeeded = True
            now = time.monotonic()
            if self._failing_since is not None and len(self._failing) > 1 and now - self._failing_since >= _OUTAGE_S:
                self._back_since = now
            self._failing_since = None
            self._failing.clear()
            self._is_unreachable = False
            self._limit = min(MAX_CONNECTIONS, self._limit + 0.5)
            self._changed.notify_all()

    def answered(self) -> None:
        """It has answered, though with an error."""
        with self._changed:
            self._has_answered = True

    def failed(self, url: str, failure: str, begun: float, *, is_unreachable: bool) -> None:
        """A request about `url` that was sent at `begun` failed with an error that can pass."""
        with self._changed:
            now = time.monotonic()
            self._failure = failure
            self._is_unreachable |= is_unreachable
            if len(self._failing) < 2:
                self._failing.add(url)
            self._has_answered |= not is_unreachable
            if self._failing_since is None or now - self._last_fault > _STALE_S:
                self._failing_since = begun
            self._last_fault = now
            if begun > self._halved:  # what was in flight together fails together, and counts once
                self._limit = max(1.0, self._limit / 2)
                self._halved = now

    def tried_s(self, started: float, patience: float, *, is_unreachable: bool) -> float | None:
        """For how long it has been tried, if that was long enough; None as long as it is to be tried again.

        Args:
            started: when the one request was sent for the first time.
            patience: seconds.
            is_unreachable: whether nobody listens.
        """
        if self.name == "":
            patience = min(patience, _LOCAL_PATIENCE_S)
        elif is_unreachable and not (self._has_answered or ray_session.is_worker()):
            patience = min(patience, _FIRST_CONTACT_S)
        with self._changed:
            now = time.monotonic()
            started = max(started, self._back_since)  # an outage is not the file's fault
            since = started if self.name == "" or self._failing_since is None else self._failing_since
            # One file that always fails does not say that the storage is down.
            if now - since >= patience and (self._is_unreachable or len(self._failing) > 1):
                self._given_up = now
                self._changed.notify_all()
            tried_s = now - min(started, since)
        return tried_s if tried_s >= patience else None

    @property
    def is_given_up(self) -> bool:
        """Whether it was given up lately, and nothing has been got from it since."""
        return (
            self._given_up > 0
            and self._failing_since is not None
            and time.monotonic() - self._given_up < _FOREIGN_REMEMBERED_S
        )

    def pause(self, num_tries: int, started: float, patience: float) -> None:
        """Wait before the next try. The wait ends early when there is no more reason to wait."""
        if self._is_over(started):
            return
        longest = min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2.0 ** min(num_tries, 10))
        deadline = max(started, self._back_since) + patience
        end = min(time.monotonic() + random.uniform(0, longest), deadline)
        while (left_s := end - time.monotonic()) > 0 and not self._is_over(started):
            time.sleep(min(left_s, _POLL_S))


class _Holding(threading.local):
    def __init__(self) -> None:
        self.names: set[str] = set()
        self.stop: threading.Event | None = None


_holding = _Holding()
_known: dict[tuple[str, int, str | None], Storage] = {}
_lock = threading.Lock()


def known(url: str) -> Storage:
    """What this process knows of the storage that holds a URL."""
    name = storage_of(url)
    endpoint = os.environ.get("AWS_ENDPOINT_URL") if name.startswith("s3:") else None
    key = (name, os.getpid(), endpoint)
    with _lock:
        if key not in _known:
            _known[key] = Storage(name)
        return _known[key]


def forget_all() -> None:
    """For tests: know nothing of any storage."""
    with _lock:
        _known.clear()


@contextlib.contextmanager
def stoppable(stop: threading.Event) -> Iterator[None]:
    """When `stop` is set, what this thread does in the `with` block is not tried again."""
    _holding.stop = stop
    try:
        yield
    finally:
        _holding.stop = None


def is_stopping() -> bool:
    """Whether nobody waits any more for what this thread does."""
    return _holding.stop is not None and _holding.stop.is_set()
