"""Comparing what `prepare` has written with what it was to write, by reading it back."""

import concurrent.futures
from collections import Counter
from collections.abc import Mapping
from typing import Any, Final

import pyarrow as pa

from catdog import storage
from catdog.dataset.reading import INFO_NAME, iter_shard, load_info
from catdog.errors import DatasetError
from catdog.schema import CLASS_NAMES, SPLITS

_NUM_READERS: Final = 16
"""Shards that are read together. Of each, only the labels are read."""


def check_shards(output: str, parts: Mapping[str, Mapping[str, int]], counts: Mapping[str, Mapping[str, int]]) -> None:
    """Check that an output holds these shards and no others, each with its rows, and together these labels.

    Args:
        output: the directory of the dataset.
        parts: number of rows by split and shard.
        counts: number of images by split and class.

    Raises:
        DatasetError: it does not.
    """
    for split in SPLITS:
        found = storage.list_names(storage.join(output, split), ".parquet")
        if found != sorted(parts[split]):
            other = sorted(set(found) ^ set(parts[split]))[0]
            raise DatasetError(
                f"{split} must hold the {len(parts[split])} shards that this run wrote. Received: {output} with "
                f"{len(found)}, and {other} is {'one too many' if other in found else 'missing'}"
            )

    def count(shard: tuple[str, str, int]) -> Counter[int]:
        split, name, num_rows = shard
        batches = iter_shard(storage.join(output, split, name), num_rows, ["label"])
        return Counter(label for batch in batches for label in batch["label"].to_pylist())

    with concurrent.futures.ThreadPoolExecutor(_NUM_READERS) as pool:
        for split in SPLITS:
            shards = [(split, name, num_rows) for name, num_rows in parts[split].items()]
            by_label = sum(pool.map(count, shards), Counter[int]())
            by_class = {name: by_label[label] for label, name in enumerate(CLASS_NAMES)}
            if by_class != dict(counts[split]):
                raise DatasetError(
                    f"The shards of {split} must hold the images that were kept, {dict(counts[split])}. "
                    f"Received: {output} with {by_class}"
                )


def check_rejects(url: str, expected: pa.Table) -> None:
    """Check that `rejects.parquet` says what was rejected.

    Raises:
        DatasetError: it does not.
    """
    found = storage.read_parquet(url)
    if not found.equals(expected):
        raise DatasetError(
            f"{url} must hold the {expected.num_rows} files that were rejected. Received: {found.num_rows} rows"
            + (", of which some differ" if found.num_rows == expected.num_rows else "")
        )


def check_info(output: str, expected: Mapping[str, Any]) -> None:
    """Check that `dataset.json` says what this run wrote.

    Raises:
        DatasetError: it does not. The message names the fields.
    """
    found = load_info(output).raw
    if differing := sorted(name for name in {*found, *expected} if found.get(name) != expected.get(name)):
        raise DatasetError(
            f"{INFO_NAME} must be that of this run. Received: {output} with other {', '.join(differing)}"
        )
