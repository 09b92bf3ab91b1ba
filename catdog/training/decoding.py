"""A split in chunks, and the Ray tasks that decode them.

A chunk is some hundred consecutive rows of a shard. Tasks decode chunks on whatever nodes have CPUs to spare, and put
the pixels into the object store, where all workers of a node see them without a copy. A split that fits there is
decoded once, for the whole training and every restart of its workers. Another one is decoded as the workers ask for it.

Shapes: `N` images in a split; `S` pixels per side; `C` = 3.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import ray

from catdog import images
from catdog.dataset import reading
from catdog.errors import CatdogError, DatasetError, ImageError

logger = logging.getLogger(__name__)

CHUNK_ROWS: Final = 256
"""Images that a task decodes: 17 MB of pixels at 150 x 150."""

REPORT_INTERVAL_S: Final = 10.0
"""Between two lines of the log while a split is decoded into memory."""

Batch = tuple[npt.NDArray[np.uint8], npt.NDArray[np.int8]]
"""`images_BSSC`, 0 to 255, and `labels_B`, indices into `CLASS_NAMES`."""


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
    """Every chunk decoded, where the split is held in memory; None where it is streamed."""

    @property
    def num_images(self) -> int:
        """`N`."""
        return sum(chunk.num_rows for chunk in self.chunks)

    def fetch(self, index: int) -> ray.ObjectRef[Any]:
        """A chunk as one batch. Unless the chunk is in memory, a task begins to decode it now."""
        return self.decoded[index] if self.decoded is not None else decode.remote(self.chunks[index], self.image_size)


def source(info: reading.DatasetInfo, split: str, image_size: int, *, in_memory: bool) -> Source:
    """A split for workers to read. Held in memory, its decoding starts now."""
    parts = chunks(info, split)
    decoded = [decode.remote(chunk, image_size) for chunk in parts] if in_memory else None
    return Source(chunks=parts, image_size=image_size, decoded=decoded)


def sources(info: reading.DatasetInfo, image_size: int, *, in_memory: bool | None) -> tuple[Source, Source]:
    """The splits `train` and `val` for workers to read. What is held in memory is decoded when this returns.

    Args:
        info: the dataset.
        image_size: `S`.
        in_memory: whether to hold both splits in memory; None does so where they fit.
    """
    if in_memory is None:
        num_images = info.num_images("train") + info.num_images("val")
        in_memory = fits_in_memory(num_images, image_size, ray.nodes())
        if not in_memory:
            logger.info("The images are streamed: decoded, they do not fit in the object store of every node")
    train, val = (source(info, split, image_size, in_memory=in_memory) for split in ("train", "val"))
    # While tasks are waiting for CPUs the workers would not get theirs, and Ray Train would give up after a minute.
    wait_until_decoded(train, val)
    return train, val


def wait_until_decoded(*sources: Source) -> None:
    """Wait for the splits that are held in memory. An error met on the way is left for the workers to raise."""
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


def fits_in_memory(num_images: int, image_size: int, nodes: Sequence[Mapping[str, Any]]) -> bool:
    """Whether each node's object store holds all decoded pixels in half of its space.

    Args:
        num_images: of all splits that the training reads.
        image_size: `S`.
        nodes: what `ray.nodes()` says.
    """
    space = min(node["Resources"].get("object_store_memory", 0.0) for node in nodes if node["Alive"])
    return bool(num_images * image_size**2 * 3 <= 0.5 * space)
