"""How far a run is, for those who watch it: a bar on a terminal, lines in a log, and slices that take too long.

Nothing of this is needed for labelling, and nothing of it may stop it.
"""

import collections
import contextlib
import logging
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final, TextIO

from catdog.inference.plan import Slice
from catdog.provenance import redact

logger = logging.getLogger(__name__)

LOG_INTERVAL_S: Final = 10.0
"""Seconds between two lines of the log while images are labelled."""

_BAR_INTERVAL_S: Final = 0.5
_WINDOW_S: Final = 30.0
"""The speed is that of the last so many seconds."""

_BAR_CHARS: Final = 24

SLOW_S: Final = 60.0
"""A slice that takes longer, and `_SLOW_FACTOR` times as long as the others, is named."""

_SLOW_FACTOR: Final = 3.0
_CHECK_S: Final = 2.0


@dataclass(frozen=True)
class State:
    """How far a run is."""

    done: int
    """Number of images that were tried."""

    total: int | None
    """Number of images to try; None if not even a part of it is known."""

    is_final: bool
    """Whether `total` is all of it. It is not while the listing goes on."""

    errors: int
    images_per_s: float

    def text(self) -> str:
        """The state in one line.

        Example:
            >>> State(done=1200, total=4000, is_final=True, errors=3, images_per_s=200.0).text()
            '1,200 of 4,000 images (30 %), 200 images/s, 3 errors, 14 s left'
            >>> State(done=1200, total=4000, is_final=False, errors=0, images_per_s=0.25).text()
            '1,200 of 4,000 images listed so far, 0.2 images/s, no errors'
        """
        parts = [f"{self.done:,} images" if self.total is None else self._share()]
        parts.append(f"{self.images_per_s:,.{'0' if self.images_per_s >= 10 else '1'}f} images/s")
        parts.append(f"{self.errors:,} error{'s' * (self.errors != 1)}" if self.errors else "no errors")
        if self.is_final and self.total is not None and self.images_per_s > 0:
            parts.append(f"{_duration(max(self.total - self.done, 0) / self.images_per_s)} left")
        return ", ".join(parts)

    def _share(self) -> str:
        assert self.total is not None
        if not self.is_final:
            return f"{self.done:,} of {self.total:,} images listed so far"
        return f"{self.done:,} of {self.total:,} images ({int(100 * self.fraction)} %)"

    @property
    def fraction(self) -> float:
        """Share of the images that were tried, of those that are known."""
        return min(1.0, self.done / self.total) if self.total else 0.0

    def bar(self, width: int) -> str:
        """The state with a bar, in at most so many characters."""
        filled = int(self.fraction * _BAR_CHARS)
        ahead = "░" if self.is_final else "·"
        return f"{'█' * filled}{ahead * (_BAR_CHARS - filled)} {self.text()}"[: max(width - 1, 0)]


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


_lock: Final = threading.Lock()
_watches: Final["set[Watch]"] = set()
"""Those of the workers in this process."""

_num_past = 0
"""Number of images that workers have tried that are no more."""


def _num_labelled_here() -> int:
    """Number of images that workers in this process have ever tried."""
    with _lock:
        return _num_past + sum(watch.num_labelled for watch in _watches)


class Progress:
    """Shows how far a run is, for the length of a `with` block. Thread-safe."""

    def __init__(
        self,
        total: Callable[[], tuple[int | None, bool]],
        stream: TextIO | None = None,
        details: Callable[[], str] = str,
    ) -> None:
        """Prepare to show; nothing is shown yet.

        Args:
            total: returns how many images there are to try, as far as that is known, and whether that is all.
            stream: where to show it, by default stderr. If it is a terminal, a bar; else lines in the log.
            details: returns what the lines of the log say besides.
        """
        self._total = total
        self._details = details
        self._stream = stream or sys.stderr
        self._is_terminal = self._stream.isatty()
        self._lock = threading.Lock()
        self._done = self._errors = 0
        now = time.monotonic()
        self._marks = collections.deque([(now, 0)])
        self._labelled_before = _num_labelled_here()
        self._last_line = now
        self._is_drawn = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="catdog-progress", daemon=True)

    def __enter__(self) -> "Progress":
        if self._is_terminal:
            self._give_way(self)
        self._thread.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        self._stop.set()
        self._thread.join()
        self._clear()
        if self._is_terminal:
            self._give_way(None)

    def add(self, num_images: int, num_errors: int) -> None:
        """Count images that were tried, and the errors among them.

        Those that a worker in this process has tried show before, when a portion of them is labelled (`Watch`).
        """
        with self._lock:
            self._done += num_images
            self._errors += num_errors

    def state(self) -> State:
        """How far the run is now."""
        now = time.monotonic()
        total, is_final = self._total()
        with self._lock:
            done = max(self._done, _num_labelled_here() - self._labelled_before)
            self._marks.append((now, done))
            while len(self._marks) > 2 and now - self._marks[1][0] > _WINDOW_S:
                self._marks.popleft()
            since, before = self._marks[0]
            rate = (done - before) / max(now - since, 1e-3)
            return State(done, total, is_final, self._errors, rate)

    def _run(self) -> None:
        while not self._stop.wait(_BAR_INTERVAL_S if self._is_terminal else 1.0):
            try:
                self._show()
            except (OSError, ValueError):  # the terminal has gone
                return

    def _show(self) -> None:
        if self._is_terminal:
            with self._lock:
                self._is_drawn = True
            self._stream.write(f"\r\x1b[2K{self.state().bar(_width(self._stream))}")
            self._stream.flush()
        elif time.monotonic() - self._last_line >= LOG_INTERVAL_S:
            self._last_line = time.monotonic()
            details = self._details()
            logger.info("Labelled %s%s", self.state().text(), f"; {details}" if details else "")

    def _clear(self) -> None:
        with self._lock, contextlib.suppress(OSError, ValueError):
            if self._is_drawn:
                self._stream.write("\r\x1b[2K")
                self._stream.flush()
                self._is_drawn = False

    def _give_way(self, progress: "Progress | None") -> None:
        """Have the log clear the bar before each of its lines, or no longer."""
        for handler in logging.getLogger().handlers:
            for each in [each for each in handler.filters if isinstance(each, _ClearsBar)]:
                handler.removeFilter(each)
            if progress is not None:
                handler.addFilter(_ClearsBar(progress))


class _ClearsBar(logging.Filter):
    """Lets every line through, but first clears the bar where the line will stand."""

    def __init__(self, progress: Progress) -> None:
        super().__init__()
        self._progress = progress

    def filter(self, _record: logging.LogRecord) -> bool:
        self._progress._clear()
        return True


def _width(stream: TextIO) -> int:
    """Columns of a terminal."""
    try:
        return os.get_terminal_size(stream.fileno()).columns or 80
    except (OSError, ValueError):
        return 80


@dataclass
class _UnderWay:
    piece: Slice
    since: float
    is_labelled: Callable[[], bool]
    named_at: float = 0.0


class Watch:
    """Names the slices of a worker that take too long, with their first image. Thread-safe.

    A slice is named after `SLOW_S`, and again each time that it has taken twice as long. It is not if it is large and
    the others took as long for each image.
    """

    num_labelled: int
    """Number of images that the worker has tried."""

    def __init__(self, slow_s: float = SLOW_S, check_s: float = _CHECK_S) -> None:
        self._slow_s = slow_s
        self._check_s = check_s
        self._lock = threading.Lock()
        self._under_way: dict[str, _UnderWay] = {}
        self._s_per_image: collections.deque[float] = collections.deque(maxlen=100)
        self.num_labelled = 0
        self._stop = threading.Event()
        with _lock:
            _watches.add(self)
        threading.Thread(target=self._run, name="catdog-watch", daemon=True).start()

    def begin(self, piece: Slice, is_labelled: Callable[[], bool]) -> None:
        """Note that a slice is begun. `is_labelled` says later whether all that is left is to publish it."""
        with self._lock:
            self._under_way[piece.part] = _UnderWay(piece, time.monotonic(), is_labelled)

    def add(self, num_images: int) -> None:
        """Count images that were tried."""
        with self._lock:
            self.num_labelled += num_images

    def end(self, part: str) -> None:
        """Note that a slice is done, or has failed."""
        with self._lock:
            if (done := self._under_way.pop(part, None)) is not None:
                self._s_per_image.append((time.monotonic() - done.since) / len(done.piece.files))

    def close(self) -> None:
        """Watch no more."""
        global _num_past
        self._stop.set()
        with _lock:
            if self in _watches:
                _watches.remove(self)
                _num_past += self.num_labelled

    def slow(self, now: float) -> Iterator[tuple[Slice, float, str]]:
        """(slice, seconds, what it is at) of those to be named now."""
        with self._lock:
            usual = statistics.median(self._s_per_image) if self._s_per_image else 0.0
            for each in self._under_way.values():
                took = now - each.since
                allowed = max(self._slow_s, _SLOW_FACTOR * usual * len(each.piece.files), 2 * each.named_at)
                if took >= allowed:
                    each.named_at = took
                    yield each.piece, took, "is being published" if each.is_labelled() else "is being labelled"

    def _run(self) -> None:
        while not self._stop.wait(self._check_s):
            for piece, took, what in list(self.slow(time.monotonic())):
                logger.warning(
                    "A slice of %d images %s for %.0f s now, its first image is %s",
                    *(len(piece.files), what, took, redact(piece.files[0].uri)),
                )
