"""From a dataset's shards to each worker's batches, through Ray Data.

Shapes: `B` images in a batch; `S` pixels per side; `C` = 3.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final, cast

import numpy as np
import numpy.typing as npt
import ray
import ray.data
import ray.train

from catdog import images
from catdog.dataset import reading
from catdog.errors import DatasetError, ImageError

DECODE_ROWS: Final = 256
"""Images per block that a decoding task hands on: 17 MB of pixels at 150 x 150."""

SHUFFLE_ROWS: Final = 4096
"""Images in the shuffle buffer of a feed that streams."""

Batch = tuple[npt.NDArray[np.uint8], npt.NDArray[np.int8]]


def decoded(info: reading.DatasetInfo, split: str, image_size: int) -> ray.data.Dataset:
    """One split as a lazy Ray Dataset of `pixels`, uint8 (S, S, C), and `label`, int8, `DECODE_ROWS` to a block."""
    shards = [{"path": path, "num_rows": num_rows} for path, num_rows in reading.shards(info, split)]
    dataset = ray.data.from_items(shards, override_num_blocks=len(shards))
    return dataset.map_batches(_decode_shard, batch_size=1, fn_kwargs={"image_size": image_size})


def _decode_shard(batch: dict[str, Any], *, image_size: int) -> Iterator[dict[str, Any]]:
    (path,), (num_rows,) = batch["path"], batch["num_rows"]
    for rows in reading.iter_shard(str(path), int(num_rows), ["uri", "image", "label"], DECODE_ROWS):
        pixels = [
            _decode_row(uri, data, image_size)
            for uri, data in zip(rows["uri"].to_pylist(), rows["image"].to_pylist(), strict=True)
        ]
        yield {"pixels": np.stack(pixels), "label": rows["label"].to_numpy()}


def _decode_row(uri: str, data: bytes, image_size: int) -> npt.NDArray[np.uint8]:
    try:
        return images.decode(data, image_size).pixels_HWC
    except ImageError as error:
        raise DatasetError(f"a prepared dataset holds only images that decode. Received: {uri}: {error}") from error


class SplitOnce(ray.train.DataConfig):  # type: ignore[misc]
    """Give every row to one worker: `train` in equal shares, which drops a tail; every other split to the last row.

    Rows come in the shards' order, so that a run that is started again sees the same shares.
    """

    def configure(self, datasets: dict[str, Any], world_size: int, *_args: Any, **_kwargs: Any) -> list[dict[str, Any]]:
        """Called by Ray Train; see `ray.train.DataConfig.configure`."""
        shares: list[dict[str, Any]] = [{} for _ in range(world_size)]
        for name, dataset in datasets.items():
            copy = dataset.copy(dataset)
            copy.context.execution_options.preserve_order = True
            for share, iterator in zip(shares, copy.streaming_split(world_size, equal=name == "train"), strict=True):
                share[name] = iterator
        return shares


@dataclass
class Feed:
    """One worker's share of a split, epoch after epoch."""

    shard: Any
    """What `ray.train.get_dataset_shard` returned."""

    in_memory: bool
    """Whether to decode once and keep the pixels, or to stream the shards anew every epoch."""

    _kept: Batch | None = None

    def train_batches(
        self, *, num_batches: int, batch_size: int, shuffle_seed: tuple[int, ...] | None
    ) -> Iterator[Batch]:
        """An epoch's batches, all of `batch_size` images.

        Args:
            num_batches: how many; the rest of the share is left out of this epoch.
            batch_size: `B`, images per batch on this worker.
            shuffle_seed: a new order for each seed; None keeps the shards' order.
        """
        if self.in_memory:
            images_NSSC, labels_N = self._keep()
            order_N = np.arange(len(labels_N))
            if shuffle_seed is not None:
                order_N = np.random.default_rng(shuffle_seed).permutation(order_N)
            for start in range(0, num_batches * batch_size, batch_size):
                chosen_B = order_N[start : start + batch_size]
                yield images_NSSC[chosen_B], labels_N[chosen_B]
            return
        shuffle: dict[str, int] = {}
        if shuffle_seed is not None:
            shuffle["local_shuffle_buffer_size"] = SHUFFLE_ROWS
            shuffle["local_shuffle_seed"] = int(np.random.SeedSequence(shuffle_seed).generate_state(1)[0])
        for index, batch in enumerate(self.shard.iter_batches(batch_size=batch_size, drop_last=True, **shuffle)):
            # To the end, even past the last batch wanted: the shares of all workers come out of one stream.
            if index < num_batches:
                yield batch["pixels"], batch["label"]

    def all_batches(self, batch_size: int) -> Iterator[Batch]:
        """Every image of the share once, in batches of up to `batch_size`."""
        if self.in_memory:
            images_NSSC, labels_N = self._keep()
            for start in range(0, len(labels_N), batch_size):
                yield images_NSSC[start : start + batch_size], labels_N[start : start + batch_size]
            return
        for batch in self.shard.iter_batches(batch_size=batch_size):
            yield batch["pixels"], batch["label"]

    def _keep(self) -> Batch:
        if self._kept is None:
            batches = list(self.shard.iter_batches(batch_size=DECODE_ROWS))
            if batches:
                pixels = np.concatenate([batch["pixels"] for batch in batches])
                labels = np.concatenate([batch["label"] for batch in batches])
            else:
                pixels, labels = np.empty((0, 1, 1, 3), np.uint8), np.empty(0, np.int8)
            self._kept = cast(Batch, (pixels, labels))
        return self._kept


def fits_in_memory(num_images: int, image_size: int, memory_per_node_bytes: float, num_nodes: int) -> bool:
    """Whether the decoded pixels, spread over the nodes, take less than a quarter of each node's memory.

    They are there twice while they are gathered, and Ray, TensorFlow and the system want the rest.
    """
    return num_images * image_size**2 * 3 <= 0.25 * memory_per_node_bytes * num_nodes
