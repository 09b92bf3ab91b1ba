"""Batching: images that come one by one are decoded by threads, and scored in batches that fill by themselves.

A thread that is free decodes the image that has waited longest. Once a batch of decoded images is full, or nothing is
left to decode, it scores what there is. So nobody waits for a batch to fill: a single image is scored at once, and
while all threads are busy, the next batch grows. There are as many threads as cores, and each computes on one.
"""

import collections
import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Final

from catdog.errors import CatdogError, ImageError
from catdog.labelling import Labeller, Seen, Verdict

logger = logging.getLogger(__name__)

_DEFAULT_BATCH_SIZE: Final = 16
"""Of an engine that does not say how many images it computes at a time."""


@dataclass(frozen=True, slots=True)
class Answer:
    """The result for one image."""

    verdict: Verdict
    format: str | None = None
    """Pillow's name for the file format; None on error, as the next field."""

    orientation: int | None = None
    """EXIF orientation by which the picture was turned upright, 1..8."""


@dataclass(frozen=True, slots=True)
class _Waiting:
    content: bytes | ImageError
    answer: "Future[Answer]" = field(default_factory=Future)


_Decoded = tuple["Future[Answer]", Seen]
"""An answer that is owed, and the decoded image that it is about."""


class Batcher:
    """Labels images on its own threads. It is thread-safe."""

    def __init__(self, labeller: Labeller, *, num_threads: int, note_batch: Callable[[int], None]) -> None:
        """Start the threads.

        Args:
            labeller: decodes and scores. Its own threads are not used.
            num_threads: number of threads.
            note_batch: is told the number of images of each batch.
        """
        self.labeller = labeller
        self._batch_size = int(getattr(labeller.engine, "batch_size", _DEFAULT_BATCH_SIZE))
        self._note_batch = note_batch
        self._encoded: collections.deque[_Waiting] = collections.deque()
        self._decoded: collections.deque[_Decoded] = collections.deque()
        self._changed = threading.Condition()
        self._is_closed = False
        self._threads = [
            threading.Thread(target=self._work, name=f"catdog-serve-{number}", daemon=True)
            for number in range(num_threads)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, content: bytes | ImageError) -> "Future[Answer]":
        """Have an image labelled."""
        waiting = _Waiting(content)
        with self._changed:
            if self._is_closed:
                raise CatdogError("an image must be submitted before the batcher is closed. Received: one after that")
            self._encoded.append(waiting)
            self._changed.notify()
        return waiting.answer

    def close(self) -> None:
        """Wait until every image that was submitted has its answer, and end the threads."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _work(self) -> None:
        while (task := self._next()) is not None:
            if isinstance(task, _Waiting):
                self._decode(task)
            else:
                self._score(task)

    def _next(self) -> "_Waiting | list[_Decoded] | None":
        """An image to decode, or decoded images to score. Waits for them; None after the last."""
        with self._changed:
            self._changed.wait_for(lambda: self._encoded or self._decoded or self._is_closed)
            if self._decoded and (len(self._decoded) >= self._batch_size or not self._encoded):
                num_images = min(len(self._decoded), self._batch_size)
                return [self._decoded.popleft() for _ in range(num_images)]
            return self._encoded.popleft() if self._encoded else None

    def _decode(self, waiting: _Waiting) -> None:
        if not waiting.answer.set_running_or_notify_cancel():
            return  # who asked has gone
        try:
            seen = self.labeller.look(waiting.content)
        except Exception as error:
            logger.exception("An image could not be decoded")
            waiting.answer.set_exception(error)
            return
        if seen.image is None:
            waiting.answer.set_result(Answer(seen.verdict))
            return
        with self._changed:
            self._decoded.append((waiting.answer, seen))
            self._changed.notify()

    def _score(self, batch: Sequence[_Decoded]) -> None:
        self._note_batch(len(batch))
        try:
            verdicts = self.labeller.judge([seen for _, seen in batch])
        except Exception as error:
            logger.exception("A batch could not be scored")
            for owed, _ in batch:
                owed.set_exception(error)
            return
        for (owed, seen), verdict in zip(batch, verdicts, strict=True):
            image = seen.image
            owed.set_result(Answer(verdict, image.format if image else None, image.orientation if image else None))
