"""The first images of a dataset, as a small dataset of its own and as the folders of JPEG files that Keras reads."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pyarrow as pa

from catdog import storage
from catdog.dataset import reading, shards
from catdog.errors import UsageError
from catdog.schema import CLASS_NAMES, DATASET_SCHEMA, SPLITS

JPEG_SIGNATURE: Final = b"\xff\xd8\xff"


def write_dataset(info: reading.DatasetInfo, directory: str, *, num_train: int, num_val: int) -> reading.DatasetInfo:
    """A dataset of the first JPEG files to train on, and of up to `num_val` to validate with.

    Raises:
        UsageError: there are fewer than `num_train`.
    """
    parts: dict[str, dict[str, int]] = {split: {} for split in SPLITS}
    counts = {split: dict.fromkeys(CLASS_NAMES, 0) for split in SPLITS}
    for split, num_images in (("train", num_train), ("val", num_val)):
        rows = pa.Table.from_pylist(list(itertools.islice(_jpegs(info, split), num_images)), schema=DATASET_SCHEMA)
        if split == "train" and rows.num_rows < num_images:
            raise UsageError(
                f"--num-images must be at most the number of JPEG files to train on, {rows.num_rows}. "
                f"Received: --num-images={num_images}"
            )
        for number, start in enumerate(range(0, rows.num_rows, shards.SHARD_ROWS)):
            name, shard = f"part-{number:05d}.parquet", rows.slice(start, shards.SHARD_ROWS)
            url = storage.join(directory, split, name)
            storage.publish_parquet(url, shard, row_group_rows=shards.ROW_GROUP_ROWS)
            parts[split][name] = shard.num_rows
        for label, name in enumerate(CLASS_NAMES):
            counts[split][name] = rows["label"].to_pylist().count(label)
    url = storage.join(directory, reading.INFO_NAME)
    storage.publish_json(url, {**info.raw, "counts": counts, "parts": parts})
    return reading.load_info(directory)


def write_pictures(info: reading.DatasetInfo, directory: str) -> None:
    """The training images of a dataset as `cat/00000000.jpg` and so on."""
    for name in CLASS_NAMES:
        Path(directory, name).mkdir(parents=True)
    for number, row in enumerate(_jpegs(info, "train")):
        Path(directory, CLASS_NAMES[row["label"]], f"{number:08d}.jpg").write_bytes(row["image"])


def _jpegs(info: reading.DatasetInfo, split: str) -> Iterator[dict[str, Any]]:
    for batch in reading.iter_split(info, split):
        yield from (row for row in batch.to_pylist() if row["image"].startswith(JPEG_SIGNATURE))
