"""Reading a prepared dataset: what `dataset.json` says, and the shards' rows as a stream."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq

from catdog import storage
from catdog.errors import DatasetError
from catdog.schema import CLASS_NAMES, DATASET_SCHEMA, SPLITS

INFO_NAME: Final = "dataset.json"
"""Written last: a directory that holds it holds a whole dataset."""

FORMAT: Final = "catdog-dataset"
FORMAT_VERSION: Final = 1


@dataclass(frozen=True, slots=True)
class DatasetInfo:
    """What `dataset.json` says, checked.

    Attributes:
        url: where the dataset lies.
        counts: images per split and class: `counts["train"]["dog"]`.
        parts: rows per shard: `parts["train"]["part-00000-000.parquet"]`.
        mean: of the training images' pixels, 0..255, per channel (RGB); every image counts the same.
        std: standard deviation, likewise.
        digest: SHA-256 over which image is in which split with which label.
        raw: the whole of `dataset.json`.
    """

    url: str
    counts: Mapping[str, Mapping[str, int]]
    parts: Mapping[str, Mapping[str, int]]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    digest: str
    raw: Mapping[str, Any]

    def num_images(self, split: str) -> int:
        """Number of images in a split."""
        return sum(self.counts[split].values())


def load_info(url: str) -> DatasetInfo:
    """Read and check `dataset.json`.

    Raises:
        DatasetError: there is none, or it is not one that this version understands.
    """
    path = storage.join(storage.absolute(url), INFO_NAME)
    try:
        raw = storage.read_json(path)
    except FileNotFoundError:
        raise DatasetError(f"A dataset must hold {INFO_NAME}, which prepare writes last. Received: {url}") from None
    except ValueError as error:
        raise DatasetError(f"{INFO_NAME} must be JSON. Received: {path} ({error})") from error
    return parse_info(url, raw)


def parse_info(url: str, raw: Mapping[str, Any]) -> DatasetInfo:
    """Check the content of a `dataset.json`; errors as `load_info`."""
    expected = FORMAT, FORMAT_VERSION, CLASS_NAMES
    try:
        found = raw["format"], raw["format_version"], tuple(raw["class_names"])
        if found != expected:
            raise DatasetError(f"{INFO_NAME} must have format, version, classes {expected}. Received: {found} in {url}")
        info = DatasetInfo(
            url=storage.absolute(url),
            counts={split: {name: int(raw["counts"][split][name]) for name in CLASS_NAMES} for split in SPLITS},
            parts={split: {name: int(num) for name, num in raw["parts"][split].items()} for split in SPLITS},
            mean=_three(raw["mean"]),
            std=_three(raw["std"]),
            digest=str(raw["digest"]),
            raw=raw,
        )
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise DatasetError(f"{INFO_NAME} must be one that prepare wrote. Received: {url} ({error!r})") from error
    for split in SPLITS:
        num_rows = sum(info.parts[split].values())
        if num_rows != info.num_images(split):
            raise DatasetError(
                f"A split's parts must hold as many rows as it has images. Received: {split} of {url} with "
                f"{num_rows} rows and {info.num_images(split)} images"
            )
    return info


def _three(values: Sequence[float]) -> tuple[float, float, float]:
    red, green, blue = (float(value) for value in values)
    return red, green, blue


def iter_split(
    dataset: str | DatasetInfo, split: str, columns: Sequence[str] | None = None, batch_size: int = 256
) -> Iterator[pa.RecordBatch]:
    """The rows of a split, in order, `batch_size` at a time, fewer at the end of a shard.

    Args:
        dataset: the URL of a dataset, or what `load_info` gave.
        split: one of `catdog.schema.SPLITS`.
        columns: names of those to read, or None for all.
        batch_size: rows per batch.

    Raises:
        DatasetError: a shard is missing, damaged, or holds other rows than `dataset.json` says.
    """
    info = dataset if isinstance(dataset, DatasetInfo) else load_info(dataset)
    for path, num_rows in shards(info, split):
        yield from iter_shard(path, num_rows, columns, batch_size)


def shards(info: DatasetInfo, split: str) -> list[tuple[str, int]]:
    """(URL, number of rows) of a split's shards, in order."""
    return [(storage.join(info.url, split, name), num_rows) for name, num_rows in sorted(info.parts[split].items())]


def iter_shard(
    path: str, num_rows: int, columns: Sequence[str] | None = None, batch_size: int = 256
) -> Iterator[pa.RecordBatch]:
    """The rows of one shard, as `iter_split`."""
    with _open_shard(path, num_rows) as shard:
        yield from shard.iter_batches(batch_size=batch_size, columns=None if columns is None else list(columns))


def read_rows(path: str, num_rows: int, start: int, stop: int, columns: Sequence[str]) -> pa.Table:
    """Rows `start` to `stop` of one shard of `num_rows`; only the row groups that hold them are read.

    Raises:
        DatasetError: as `iter_split`.
    """
    with _open_shard(path, num_rows) as shard:
        groups: list[int] = []
        first = seen = 0
        for group in range(shard.num_row_groups):
            end = seen + shard.metadata.row_group(group).num_rows
            if end > start and seen < stop:
                first = first if groups else seen
                groups.append(group)
            seen = end
        return shard.read_row_groups(groups, columns=list(columns)).slice(start - first, stop - start)


def check_shards(url: str) -> None:
    """Check that every shard that `dataset.json` names is there, with its schema and number of rows.

    Raises:
        DatasetError: one is not.
    """
    info = load_info(url)
    for split in SPLITS:
        for path, num_rows in shards(info, split):
            with _open_shard(path, num_rows):
                pass


@contextlib.contextmanager
def _open_shard(path: str, num_rows: int) -> Iterator[pq.ParquetFile]:
    try:
        with storage.open_read(path) as file:
            shard = pq.ParquetFile(file)
            if not shard.schema_arrow.equals(DATASET_SCHEMA):
                names = shard.schema_arrow.names
                raise DatasetError(
                    f"A shard must have the columns {DATASET_SCHEMA.names}. Received: {path} with {names}"
                )
            found = shard.metadata.num_rows
            if found != num_rows:
                raise DatasetError(f"{INFO_NAME} must tell a shard's rows, {num_rows}. Received: {path} with {found}")
            yield shard
    except (OSError, pa.ArrowInvalid) as error:  # OSError: it is missing, or a page of it is damaged
        raise DatasetError(f"Every shard in {INFO_NAME} must be there and whole. Received: {path} ({error})") from error
