"""Each worker's batches of a split.

Where a split is held in memory, all its images are put in one order, and every batch is a slice of that. Where it is
streamed, each worker has chunks of its own decoded, a few ahead of its steps, also across the end of an epoch.

The batches depend on the seed, the epoch and the step alone, so a training that goes on after a crash sees the images
that it would have seen. Where a split is held in memory, the batches do not depend on the number of workers either.

Shapes: `N` images in a split; `B` images in this worker's share of a batch; `S` pixels per side; `C` = 3.
"""

from __future__ import annotations

import collections
import itertools
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import ray

from catdog.errors import CatdogError, StorageError
from catdog.training.decoding import Batch, Source, decode_here
from catdog.training.prefetch import prefetched

NUM_AHEAD: Final = 8
"""Chunks that a worker which streams has decoded ahead of its steps; their images are shuffled together."""

PATIENCE_S: Final = 10.0
"""How long a worker waits for its next chunk before it decodes the chunk itself."""

_PULL_S: Final = 1.0
"""How long a worker waits for a chunk that is in memory, perhaps in another node's, once a chunk has come too late."""


@dataclass(frozen=True, kw_only=True)
class Share:
    """Which rows of every batch are this worker's: `start` to `stop` of `batch_size`."""

    rank: int
    num_workers: int
    batch_size: int
    """Images per optimizer step, over all workers."""

    @property
    def start(self) -> int:
        """First row of the batch that is ours."""
        return self.rank * self.batch_size // self.num_workers

    @property
    def stop(self) -> int:
        """First row after ours."""
        return (self.rank + 1) * self.batch_size // self.num_workers


Example = tuple[npt.NDArray[np.uint8], np.int8]
"""One image, SSC, and its label."""


@dataclass(frozen=True, kw_only=True)
class _Window:
    """Chunks that a worker streams, and whose images it shuffles together."""

    seed: tuple[int, ...] | None
    chunks: Sequence[int]
    wanted: range
    """Which images, by their places in the new order: not those before the checkpoint, nor those after the epoch."""

    def rows(self, pieces: Sequence[Batch]) -> Iterator[Example]:
        """The wanted images, in their new order, out of `pieces`: the decoded chunks."""
        offsets = np.cumsum([0, *(len(labels) for _, labels in pieces)])
        order = np.arange(offsets[-1])
        if self.seed is not None:
            order = np.random.default_rng(self.seed).permutation(order)
        for piece, row in zip(*_places(offsets, order[self.wanted.start : self.wanted.stop]), strict=True):
            yield pieces[piece][0][row], pieces[piece][1][row]


class Feed:
    """One worker's images of a split, epoch after epoch."""

    def __init__(self, source: Source, share: Share) -> None:
        self._source = source
        self._share = share
        self._offsets = np.cumsum([0, *(chunk.num_rows for chunk in source.chunks)])
        self._held: list[Batch] | None = None
        self._patience_s = PATIENCE_S
        self._streamed: Iterator[Example] | None = None
        self._next: tuple[int | None, int, range] | None = None
        """The seed, the epoch and the steps whose images `_streamed` yields next."""

    def train_batches(self, *, seed: int | None, epoch: int, steps: range) -> Generator[Batch]:
        """This worker's share of an epoch's batches. A thread makes them ready while the worker computes.

        Args:
            seed: decides, with `epoch`, the order of the images; None keeps the shards' order.
            epoch: which epoch, from 0.
            steps: which of the epoch's steps: from one of them to its last.
        """
        batches = self._gather if self._source.decoded is not None else self._stream
        return prefetched(batches(seed, epoch, steps), 2)

    def all_batches(self, batch_size: int) -> Iterator[tuple[int, npt.NDArray[np.uint8], npt.NDArray[np.int8]]]:
        """This worker's share of the whole split, each image with one worker, in batches of up to `batch_size`.

        With each batch comes the place of its first image in the split.
        """
        mine = range(self._share.rank, len(self._source.chunks), self._share.num_workers)
        for index, (pixels, labels) in zip(mine, self._fetch(mine), strict=True):
            for start in range(0, len(labels), batch_size):
                place = int(self._offsets[index]) + start
                yield place, pixels[start : start + batch_size], labels[start : start + batch_size]

    def _gather(self, seed: int | None, epoch: int, steps: range) -> Iterator[Batch]:
        """The batches of a split that is held in memory."""
        if self._held is None:
            self._held = list(self._fetch(range(len(self._source.chunks))))
        order_N = np.arange(self._offsets[-1])
        if seed is not None:
            order_N = np.random.default_rng((seed, epoch)).permutation(order_N)
        for step in steps:
            first = step * self._share.batch_size
            rows_B = order_N[first + self._share.start : first + self._share.stop]
            places = zip(*_places(self._offsets, rows_B), strict=True)
            yield _batch((self._held[chunk][0][row], self._held[chunk][1][row]) for chunk, row in places)

    def _stream(self, seed: int | None, epoch: int, steps: range) -> Iterator[Batch]:
        """The batches of a split that is streamed, chunk by chunk.

        Every worker has chunks of its own, and begins with them again where they do not last for the epoch. What is
        decoded ahead at the end of an epoch belongs to the next epoch.
        """
        if self._streamed is None or self._next != (seed, epoch, steps):
            self._streamed = self._streamed_rows(seed, epoch, steps)
        self._next = None  # unless this comes to its end
        for _ in steps:
            yield _batch(itertools.islice(self._streamed, self._share.stop - self._share.start))
        self._next = (seed, epoch + 1, range(steps.stop))

    def _streamed_rows(self, seed: int | None, epoch: int, steps: range) -> Iterator[Example]:
        """This worker's images from one of an epoch's steps on, and those of all epochs after it."""
        windows, ahead = itertools.tee(self._windows(seed, epoch, steps))
        fetched = self._fetch(index for window in ahead for index in window.chunks)
        for window in windows:
            yield from window.rows(list(itertools.islice(fetched, len(window.chunks))))

    def _windows(self, seed: int | None, epoch: int, steps: range) -> Iterator[_Window]:
        """This worker's windows from one of an epoch's steps on, and those of all epochs after it."""
        size = self._share.stop - self._share.start
        num_seen, num_wanted = steps.start * size, steps.stop * size
        for each in itertools.count(epoch):
            order = np.arange(len(self._source.chunks))
            if seed is not None:  # the same order for every worker, so that no two take the same chunk
                order = np.random.default_rng((seed, each)).permutation(order)
            mine = order[self._share.rank % len(order) :: self._share.num_workers].tolist()
            windows = [mine[start : start + NUM_AHEAD] for start in range(0, len(mine), NUM_AHEAD)]
            num_before = 0
            for number, chunks in enumerate(itertools.cycle(windows)):
                if num_before >= num_wanted:
                    break
                num_rows = sum(self._source.chunks[index].num_rows for index in chunks)
                if num_before + num_rows > num_seen:  # else it is not worth decoding
                    yield _Window(
                        seed=None if seed is None else (seed, each, self._share.rank, number),
                        chunks=chunks,
                        wanted=range(max(0, num_seen - num_before), min(num_rows, num_wanted - num_before)),
                    )
                num_before += num_rows
            num_seen = 0

    def _fetch(self, indices: Iterable[int]) -> Iterator[Batch]:
        """The decoded chunks, in order. While the worker uses one, the next `NUM_AHEAD` are being decoded.

        A task waits for ever where training workers, or other jobs, hold every CPU of the cluster, and a chunk in the
        memory of a node that is gone never comes. In both cases this worker decodes the chunk itself.
        """
        remaining = iter(indices)
        pending: collections.deque[tuple[int, ray.ObjectRef[Any]]] = collections.deque()
        while True:
            ahead = itertools.islice(remaining, NUM_AHEAD - len(pending))
            pending.extend((index, self._source.fetch(index)) for index in ahead)
            if not pending:
                return
            index, task = pending.popleft()
            if ray.wait([task], timeout=self._patience_s)[0]:
                self._patience_s = PATIENCE_S
                batch = ray.get(task)
                if isinstance(batch, StorageError):  # it may have passed, and in memory it would stay for ever
                    batch = decode_here(self._source.chunks[index], self._source.image_size)
                yield _checked(batch)
                continue
            if self._source.decoded is None:
                ray.cancel(task)
                self._patience_s = 0.0  # until one is done in time again
            else:
                self._patience_s = _PULL_S
            yield decode_here(self._source.chunks[index], self._source.image_size)


def _places(offsets: npt.NDArray[np.int64], rows: npt.NDArray[np.int64]) -> tuple[list[int], list[int]]:
    """Which piece each row is in, and its place there, where rows are counted through all the pieces."""
    pieces = np.searchsorted(offsets, rows, side="right") - 1
    return pieces.tolist(), (rows - offsets[pieces]).tolist()


def _batch(rows: Iterable[Example]) -> Batch:
    pixels, labels = zip(*rows, strict=True)
    return np.stack(pixels), np.array(labels, np.int8)


def _checked(batch: Batch | CatdogError) -> Batch:
    if isinstance(batch, CatdogError):
        raise batch
    return batch
