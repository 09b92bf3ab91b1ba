"""From a dataset's shards to each worker's batches.

A split is cut into chunks of some hundred consecutive rows of a shard. Ray tasks decode them, on whatever nodes have
CPUs to spare, into the object store, where every worker of a node sees the same pixels without a copy. Where a split
fits there, it is decoded once for the whole training and for every restart of its workers; where not, each worker has
its own chunks decoded a few ahead of its steps, across the ends of epochs.

The batches are a function of the seed, the epoch and the step alone: a training that goes on after a crash sees what it
would have seen. Held in memory, they do not depend on the number of workers either.

Shapes: `N` images in a split; `B` images in this worker's share of a batch; `S` pixels per side; `C` = 3.
"""

from __future__ import annotations

import collections
import itertools
import logging
import queue
import threading
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import numpy as np
import numpy.typing as npt
import ray

from catdog import images
from catdog.dataset import reading
from catdog.errors import CatdogError, DatasetError, ImageError

logger = logging.getLogger(__name__)

CHUNK_ROWS: Final = 256
"""Images that a task decodes: 17 MB of pixels at 150 x 150."""

NUM_AHEAD: Final = 8
"""Chunks that a worker which streams has decoded ahead of its steps; their images are shuffled together."""

PATIENCE_S: Final = 10.0
"""How long a worker waits for its next chunk before it decodes the chunk itself."""

_PULL_S: Final = 1.0
"""The same for a chunk that is in memory, perhaps another node's, once one did not come in time."""

REPORT_INTERVAL_S: Final = 10.0
"""Between two lines of the log while a split is decoded into memory."""

Batch = tuple[npt.NDArray[np.uint8], npt.NDArray[np.int8]]
"""`images_BSSC`, 0 to 255, and `labels_B`, indices into `CLASS_NAMES`."""

ItemT = TypeVar("ItemT")


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """Rows `start` to `stop` of one shard."""

    path: str
    shard_rows: int
    start: int
    stop: int

    @property
    def num_rows(self) -> int:
        """Images in the chunk."""
        return self.stop - self.start


def chunks(info: reading.DatasetInfo, split: str) -> list[Chunk]:
    """A split in chunks, in the shards' order."""
    return [
        Chunk(path=path, shard_rows=num_rows, start=start, stop=min(start + CHUNK_ROWS, num_rows))
        for path, num_rows in reading.shards(info, split)
        for start in range(0, num_rows, CHUNK_ROWS)
    ]


@dataclass(frozen=True, kw_only=True)
class Source:
    """A split on its way to the workers."""

    chunks: Sequence[Chunk]
    image_size: int
    """`S`."""

    decoded: Sequence[ray.ObjectRef[Any]] | None
    """What `decode` made of every chunk, where the split is held in memory; None where it is streamed."""

    @property
    def num_images(self) -> int:
        """`N`."""
        return sum(chunk.num_rows for chunk in self.chunks)

    def fetch(self, index: int) -> ray.ObjectRef[Any]:
        """The batch that holds a chunk; a task decodes it now, unless it is in memory."""
        return self.decoded[index] if self.decoded is not None else decode.remote(self.chunks[index], self.image_size)


def source(info: reading.DatasetInfo, split: str, image_size: int, *, in_memory: bool) -> Source:
    """A split for workers to read. Held in memory, its decoding starts now."""
    parts = chunks(info, split)
    decoded = [decode.remote(chunk, image_size) for chunk in parts] if in_memory else None
    return Source(chunks=parts, image_size=image_size, decoded=decoded)


def wait_until_decoded(*sources: Source) -> None:
    """Wait for what is to be held in memory. An error met on the way is left for the workers to raise."""
    num_chunks = len(pending := [ref for source in sources for ref in source.decoded or []])
    while pending:
        _, pending = ray.wait(pending, num_returns=len(pending), timeout=REPORT_INTERVAL_S, fetch_local=False)
        if pending:
            logger.info("Decoding the images: %.0f %% done", 100 * (1 - len(pending) / num_chunks))


@ray.remote(num_cpus=1, max_retries=-1)  # type: ignore[untyped-decorator]
def decode(chunk: Chunk, image_size: int) -> Batch | CatdogError:
    """A chunk as one batch. An error of ours is handed back as data: Ray would wrap it past recognition."""
    try:
        return decode_here(chunk, image_size)
    except CatdogError as error:
        return error


def decode_here(chunk: Chunk, image_size: int) -> Batch:
    """A chunk as one batch, decoded in this process.

    Raises:
        DatasetError: the shard is missing or damaged, or an image in it does not decode.
        StorageError: the storage failed.
    """
    rows = reading.read_rows(chunk.path, chunk.shard_rows, chunk.start, chunk.stop, ["uri", "image", "label"])
    pixels = np.empty((len(rows), image_size, image_size, 3), np.uint8)
    for index, (uri, data) in enumerate(zip(rows["uri"].to_pylist(), rows["image"].to_pylist(), strict=True)):
        pixels[index] = _decode_row(uri, data, image_size)
    return pixels, rows["label"].to_numpy()


def _decode_row(uri: str, data: bytes, image_size: int) -> npt.NDArray[np.uint8]:
    try:
        return images.decode(data, image_size).pixels_HWC
    except ImageError as error:
        raise DatasetError(f"a prepared dataset holds only images that decode. Received: {uri}: {error}") from error


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


@dataclass(frozen=True, kw_only=True)
class _Window:
    """Chunks whose images a worker that streams shuffles together."""

    seed: tuple[int, ...] | None
    chunks: Sequence[int]
    num_rows: int
    num_seen: int
    """Rows, of these in their new order, that came before the checkpoint."""

    def shuffled(self, pieces: Sequence[Batch]) -> Batch:
        """What `decode` made of the chunks, as one batch."""
        order = np.arange(self.num_rows)
        if self.seed is not None:
            order = np.random.default_rng(self.seed).permutation(order)
        pixels, labels = (np.concatenate(arrays) for arrays in zip(*pieces, strict=True))
        return pixels[order[self.num_seen :]], labels[order[self.num_seen :]]


class Feed:
    """One worker's images of a split, epoch after epoch."""

    def __init__(self, source: Source, share: Share) -> None:
        self._source = source
        self._share = share
        self._offsets = np.cumsum([0, *(chunk.num_rows for chunk in source.chunks)])
        self._held: list[Batch] | None = None
        self._patience_s = PATIENCE_S
        self._streamed: tuple[Iterator[_Window], Iterator[Batch]] | None = None
        self._next: tuple[int | None, int, range] | None = None
        """Seed, epoch and steps that `_streamed` goes on with."""

    def train_batches(self, *, seed: int | None, epoch: int, steps: range) -> Generator[Batch]:
        """This worker's share of an epoch's batches, made ready in a thread of its own while the worker computes.

        Args:
            seed: with `epoch`, of the order of the images; None keeps the shards' order.
            epoch: which epoch, from 0.
            steps: which of the epoch's steps: from one of them to its last.
        """
        batches = self._gather if self._source.decoded is not None else self._stream
        return _ahead(batches(seed, epoch, steps), 2)

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
        """Out of memory: a batch is a slice of one order of all images, and ours a slice of that."""
        if self._held is None:
            self._held = list(self._fetch(range(len(self._source.chunks))))
        order_N = np.arange(self._offsets[-1])
        if seed is not None:
            order_N = np.random.default_rng((seed, epoch)).permutation(order_N)
        for step in steps:
            first = step * self._share.batch_size
            yield self._rows(order_N[first + self._share.start : first + self._share.stop])

    def _rows(self, rows_B: npt.NDArray[np.int64]) -> Batch:
        assert self._held is not None
        chunk_B = np.searchsorted(self._offsets, rows_B, side="right") - 1
        places = list(zip(chunk_B.tolist(), (rows_B - self._offsets[chunk_B]).tolist(), strict=True))
        pixels = np.stack([self._held[chunk][0][row] for chunk, row in places])
        return pixels, np.array([self._held[chunk][1][row] for chunk, row in places], np.int8)

    def _stream(self, seed: int | None, epoch: int, steps: range) -> Iterator[Batch]:
        """Chunk by chunk: every worker has chunks of its own, and begins again where they do not last the epoch.

        What is decoded ahead at the end of an epoch is the next one's.
        """
        if self._streamed is None or self._next != (seed, epoch, steps):
            windows, ahead = itertools.tee(self._windows(seed, epoch, steps))
            self._streamed = windows, self._fetch(index for window in ahead for index in window.chunks)
        self._next = None  # unless this comes to its end
        windows, fetched = self._streamed
        size = self._share.stop - self._share.start
        pixels = np.empty((0, self._source.image_size, self._source.image_size, 3), np.uint8)
        labels = np.empty(0, np.int8)
        for _ in steps:
            while len(labels) < size:
                window = next(windows)
                more_pixels, more_labels = window.shuffled(list(itertools.islice(fetched, len(window.chunks))))
                pixels, labels = np.concatenate([pixels, more_pixels]), np.concatenate([labels, more_labels])
            yield pixels[:size], labels[:size]
            pixels, labels = pixels[size:], labels[size:]
        self._next = (seed, epoch + 1, range(steps.stop))

    def _windows(self, seed: int | None, epoch: int, steps: range) -> Iterator[_Window]:
        """This worker's windows from one of an epoch's steps on, and those of all epochs after it."""
        size = self._share.stop - self._share.start
        num_seen = steps.start * size
        for each in itertools.count(epoch):
            order = np.arange(len(self._source.chunks))
            if seed is not None:  # the same order for every worker, so that no two take the same chunk
                order = np.random.default_rng((seed, each)).permutation(order)
            mine = order[self._share.rank % len(order) :: self._share.num_workers].tolist()
            windows = [mine[start : start + NUM_AHEAD] for start in range(0, len(mine), NUM_AHEAD)]
            num_before = 0
            for number, chunks in enumerate(itertools.cycle(windows)):
                if num_before >= steps.stop * size:
                    break
                num_rows = sum(self._source.chunks[index].num_rows for index in chunks)
                if num_before + num_rows > num_seen:  # else it is not worth decoding
                    yield _Window(
                        seed=None if seed is None else (seed, each, self._share.rank, number),
                        chunks=chunks,
                        num_rows=num_rows,
                        num_seen=max(0, num_seen - num_before),
                    )
                num_before += num_rows
            num_seen = 0

    def _fetch(self, indices: Iterable[int]) -> Iterator[Batch]:
        """The batches of chunks, in order; `NUM_AHEAD` of them are being decoded while one is worked on.

        Tasks wait for ever where training workers, or other jobs, hold every CPU of the cluster, and so does what was
        in the memory of a node that is gone: then it is this worker that decodes.
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
                yield _checked(ray.get(task))
                continue
            if self._source.decoded is None:
                ray.cancel(task)
                self._patience_s = 0.0  # until one is done in time again
            else:
                self._patience_s = _PULL_S
            yield decode_here(self._source.chunks[index], self._source.image_size)


def _checked(batch: Batch | CatdogError) -> Batch:
    if isinstance(batch, CatdogError):
        raise batch
    return batch


def _ahead(items: Iterator[ItemT], depth: int) -> Generator[ItemT]:
    """The same items, up to `depth` of them made in a thread ahead of their use."""
    ready: queue.Queue[tuple[ItemT | None, BaseException | None]] = queue.Queue(depth)
    left = threading.Event()

    def hand_over(item: ItemT | None, error: BaseException | None = None) -> bool:
        while not left.is_set():
            try:
                ready.put((item, error), timeout=0.1)
            except queue.Full:
                continue
            return True
        return False

    def make() -> None:
        try:
            for item in items:
                if not hand_over(item):
                    return
        except BaseException as error:  # raised again where the items are used
            hand_over(None, error)
        else:
            hand_over(None)

    thread = threading.Thread(target=make, name="catdog-feed", daemon=True)
    thread.start()
    try:
        while True:
            item, error = ready.get()
            if error is not None:
                raise error
            if item is None:
                return
            yield item
    finally:
        left.set()
        thread.join()


def fits_in_memory(num_images: int, image_size: int, nodes: Sequence[Mapping[str, Any]]) -> bool:
    """Whether each node's object store holds all decoded pixels in half of its space.

    Args:
        num_images: of all splits that the training reads.
        image_size: `S`.
        nodes: what `ray.nodes()` says.
    """
    space = min(node["Resources"].get("object_store_memory", 0.0) for node in nodes if node["Alive"])
    return bool(num_images * image_size**2 * 3 <= 0.5 * space)
