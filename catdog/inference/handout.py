"""The slices that a run has given to its workers and not yet got back, and which of them another worker should do, too.

One slow worker must not hold up a run at whose end all others are idle. Doing a slice twice does no harm: its part file
is published under the same name, as a whole, and the first result is the one that counts.
"""

import collections
import statistics
import threading
from dataclasses import dataclass
from typing import Final

SLOW_FACTOR: Final = 3.0
"""A slice is late if it takes so many times as long as the median slice, by the number of their images."""

MIN_LATE_S: Final = 5.0
"""No slice is late before. A worker that starts needs some seconds for its model."""

MAX_ATTEMPTS: Final = 3
"""How many workers may be given one slice."""

_IDLE_S: Final = 1.0
"""A worker is idle if it has had nothing to do for so long. It gets its next slice sooner while there is one."""

_SAMPLES: Final = 1001
"""Number of slices, the last ones, of which the median is taken."""


@dataclass
class _Given:
    """A slice that has no result yet."""

    packed: bytes
    num_images: int
    since: float
    """When it was given; then, when it was begun; then, when it was last given to another worker."""

    is_begun: bool = False
    num_attempts: int = 1


class Handout:
    """Keeps the slices that have no result. Thread-safe: one thread gives slices, another one takes the results.

    All times are those of one clock, in seconds.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._open: dict[int, _Given] = {}
        self._num_given = 0
        self._num_attempts = 0
        self._begun: dict[str, set[int]] = {}  # worker → the slices that it has begun
        self._free_since: dict[str, float] = {}  # worker → when it was done with the last of them
        self._s_per_image: collections.deque[float] = collections.deque(maxlen=_SAMPLES)
        self._all_given_at: float | None = None
        self.is_stopped = False

    def give(self, packed: bytes, num_images: int, now: float) -> int:
        """Note a slice that is given to the workers. Returns its number."""
        with self._changed:
            number = self._num_given
            self._num_given += 1
            self._num_attempts += 1
            self._open[number] = _Given(packed, num_images, since=now)
            return number

    def all_given(self, now: float) -> None:
        """Note that no new slice will come. From now on slices can be late."""
        with self._changed:
            self._all_given_at = now

    def is_below(self, most: float, timeout_s: float = 0) -> bool:
        """Wait until fewer than so many slices have no result, or the run stops. Whether that was within the time."""
        with self._changed:
            return self._changed.wait_for(lambda: self.is_stopped or len(self._open) < most, timeout_s)

    def begin(self, number: int, worker: str, begun: float) -> None:
        """Note when a worker has begun a slice. That may become known after its result."""
        with self._changed:
            given = self._open.get(number)
            if given is None:
                return
            self._begun.setdefault(worker, set()).add(number)
            self._free_since.pop(worker, None)
            if not given.is_begun:
                given.is_begun = True
                given.since = begun

    def finish(self, number: int, worker: str, took_s: float, now: float) -> bool:
        """Note that a worker is done with a slice. Whether it is the first one: only its result counts."""
        with self._changed:
            begun = self._begun.setdefault(worker, set())
            begun.discard(number)
            if not begun:
                self._free_since[worker] = now
            self._num_attempts -= 1
            given = self._open.pop(number, None)
            if given is None:
                return False
            if given.num_images:
                self._s_per_image.append(took_s / given.num_images)
            self._changed.notify_all()
            return True

    def late(self, now: float) -> list[tuple[int, bytes]]:
        """The slices that another worker should do, too, as (number, packed slice); no more than workers are idle.

        A slice that no worker has begun waits behind another one for a worker that is slow, or was lost.
        """
        with self._changed:
            if self._all_given_at is None or not self._s_per_image:
                return []
            num_idle = sum(now - since > _IDLE_S for since in self._free_since.values())
            median_s = statistics.median(self._s_per_image)
            found: list[tuple[int, bytes]] = []
            for number, given in self._open.items():
                allowed_s = max(MIN_LATE_S, SLOW_FACTOR * median_s * given.num_images)
                since = given.since if given.is_begun else max(given.since, self._all_given_at)
                if now - since > allowed_s and given.num_attempts < MAX_ATTEMPTS and len(found) < num_idle:
                    given.num_attempts += 1
                    given.since = now
                    self._num_attempts += 1
                    found.append((number, given.packed))
            return found

    def wait(self, timeout_s: float) -> bool:
        """Wait until all slices have a result, or the run stops, or the time is over. Whether nothing is to be done."""
        with self._changed:
            return self._changed.wait_for(lambda: self.is_stopped or self._is_complete(), timeout_s)

    def stop(self) -> None:
        """End all waiting."""
        with self._changed:
            self.is_stopped = True
            self._changed.notify_all()

    def has_only_doubles(self) -> bool:
        """Whether all slices have a result, and workers are still busy with slices that others have done."""
        with self._changed:
            return self._is_complete() and self._num_attempts > 0

    def _is_complete(self) -> bool:
        return self._all_given_at is not None and not self._open
