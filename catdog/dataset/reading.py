"""Reading a dataset: the content of `dataset.json`, and the rows of the shards."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq

from catdog import schema, storage
from catdog.errors import DatasetError
from catdog.schema import CLASS_NAMES, DATASET_SCHEMA, SPLITS

INFO_NAME: Final = "dataset.json"
"""Name of the file that is written last: a directory that holds it holds a whole dataset."""

FORMAT: Final = "catdog-dataset"
FORMAT_VERSION: Final = 1


@dataclass(frozen=True, slots=True)
class DatasetInfo:
    """The content of `dataset.json`, checked.

    Attributes:
        url: directory of the dataset.
        counts: number of images by split and class, as in `counts["train"]["dog"]`.
        parts: number of rows by split and shard, as in `parts["train"]["part-00000.parquet"]`.
        mean: mean of the training images' pixels, 0..255, per channel (RGB). Every image has the same weight.
        std: standard deviation of the same pixels, per channel.
        digest: SHA-256 over the split, id and label of every image.
        raw: the JSON object itself.
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
        DatasetError: `dataset.json` is missing or damaged, or this version does not know its format.
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
    """Check the content of a `dataset.json`. Raises the errors of `load_info`."""
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
                f"A split's shards must hold as many rows as the split has images. Received: {split} of {url} with "
                f"{num_rows} rows and {info.num_images(split)} images"
            )
    return info


def _three(values: Sequence[float]) -> tuple[float, float, float]:
    red, green, blue = (float(value) for value in values)
    return red, green, blue


def iter_split(
    dataset: str | DatasetInfo, split: str, columns: Sequence[str] | None = None, batch_size: int = 256
) -> Iterator[pa.RecordBatch]:
    """The rows of a split, in order and in batches.

    Args:
        dataset: URL of a dataset, or what `load_info` returned.
        split: one of `catdog.schema.SPLITS`.
        columns: names of the columns to read; None for all.
        batch_size: rows per batch. The last batch of a shard may have fewer.

    Raises:
        DatasetError: a shard is missing or damaged, or has another number of rows than `dataset.json` says.
    """
    info = dataset if isinstance(dataset, DatasetInfo) else load_info(dataset)
    for path, num_rows in shards(info, split):
        yield from iter_shard(path, num_rows, columns, batch_size)


def shards(info: DatasetInfo, split: str) -> list[tuple[str, int]]:
    """(URL, number of rows) of each shard of a split, in order."""
    return [(storage.join(info.url, split, name), num_rows) for name, num_rows in sorted(info.parts[split].items())]


def iter_shard(
    path: str, num_rows: int, columns: Sequence[str] | None = None, batch_size: int = 256
) -> Iterator[pa.RecordBatch]:
    """The rows of one shard, which has `num_rows` rows. Otherwise as `iter_split`."""
    with _open_shard(path, num_rows) as shard:
        yield from shard.iter_batches(batch_size=batch_size, columns=None if columns is None else list(columns))


def read_rows(path: str, num_rows: int, start: int, stop: int, columns: Sequence[str]) -> pa.Table:
    """Rows `start` to `stop` of one shard, which has `num_rows` rows. Only the row groups with these rows are read.

    Raises:
        DatasetError: as in `iter_split`.
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
    """Check that every shard in `dataset.json` exists, and has the right schema and number of rows.

    Raises:
        DatasetError: a shard does not.
    """
    info = load_info(url)
    for split in SPLITS:
        for path, num_rows in shards(info, split):
            with _open_shard(path, num_rows):
                pass


@contextlib.contextmanager
def _open_shard(path: str, num_rows: int) -> Iterator[pq.ParquetFile]:
    """Open a shard for the length of a `with` block, and check its schema and number of rows."""
    try:
        with storage.open_read(path) as file:
            shard = pq.ParquetFile(file)
            try:
                schema.check(shard.schema_arrow, DATASET_SCHEMA)
            except ValueError as error:
                raise DatasetError(
                    f"A shard must have the columns {DATASET_SCHEMA.names}. Received: {path}, but {error}"
                ) from error
            found = shard.metadata.num_rows
            if found != num_rows:
                raise DatasetError(
                    f"A shard must have as many rows as {INFO_NAME} says, {num_rows}. Received: {path} with {found}"
                )
            yield shard
    except (OSError, pa.ArrowInvalid) as error:  # OSError: the shard is missing, or a page of it is damaged
        raise DatasetError(f"Every shard in {INFO_NAME} must be there and whole. Received: {path} ({error})") from error
