"""The part files of an output: publishing rows as one, atomically, and reading them back.

An output is a directory of `part-<digest>.parquet` and `_runs/`. Names that start with `_` or `.` are not data.
"""

import concurrent.futures
import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from catdog import storage
from catdog.errors import OutputRefusedError, StorageError
from catdog.schema import PREDICTIONS_SCHEMA

KEY_COLUMNS: Final = ("uri", "source_version", "model_id", "status")
_SPILLED_SCHEMA: Final = pa.schema([(name, pa.string()) for name in (*KEY_COLUMNS, "part")])

_READERS: Final = 16
"""Parts that are read at the same time."""


def part_name(digest: str) -> str:
    """The name of the part file of a digest."""
    return f"part-{digest}.parquet"


def publish_part(output: str, part: str, rows: pa.Table, *, keep_others: bool) -> None:
    """Publish rows as a part file; one of that name is replaced.

    Args:
        output: directory of the part files.
        part: name of the file.
        rows: in `PREDICTIONS_SCHEMA`.
        keep_others: rows that the file holds already, of other uris, stay in it.

    Raises:
        StorageError: it could not be written. The output is as it was.
    """
    url = storage.join(output, part)
    if keep_others:
        _, before = _read_part(output, part, None)
        others = before.filter(pc.invert(pc.is_in(before["uri"], value_set=rows["uri"].combine_chunks())))
        rows = pa.concat_tables([others, rows]).sort_by("uri")
    storage.publish_parquet(url, rows)


def list_parts(output: str) -> list[str]:
    """Names of the part files in an output; none where there is no output yet.

    Raises:
        OutputRefusedError: the output is a file, or holds something that predict did not write.
    """
    storage.refuse_foreign_output(output, ["part-*.parquet", "_*"])
    names = [name for name in storage.list_names(output) if not name.startswith("_")]
    for name in names:
        if not (name.startswith("part-") and name.endswith(".parquet")):
            raise OutputRefusedError(
                f"--output must hold predictions or nothing. Received: {storage.redact(output)}, which holds {name}"
            )
    return names


def read_parts(
    output: str, parts: Iterable[str], columns: Sequence[str] | None = None
) -> Iterator[tuple[str, pa.Table]]:
    """Part files with their names, in order, or some of their columns; read ahead.

    Raises:
        OutputRefusedError: one is no part file of predict.
        StorageError: the storage failed.
    """
    remaining = iter(parts)
    with concurrent.futures.ThreadPoolExecutor(_READERS, thread_name_prefix="catdog-parts") as pool:
        while group := list(itertools.islice(remaining, 4 * _READERS)):
            yield from pool.map(lambda part: _read_part(output, part, columns), group)


def _read_part(output: str, part: str, columns: Sequence[str] | None) -> tuple[str, pa.Table]:
    url = storage.join(output, part)
    try:
        data = storage.read_bytes(url)
    except FileNotFoundError:
        raise StorageError(f"{storage.redact(url)} was there, and went while it was to be read") from None
    try:
        file = pq.ParquetFile(pa.BufferReader(data))
        if not file.schema_arrow.equals(PREDICTIONS_SCHEMA):
            raise pa.ArrowInvalid("its columns are others")
        return part, file.read(columns=None if columns is None else list(columns))
    except (pa.ArrowInvalid, OSError) as error:
        reason = " ".join(str(error).split())
        raise OutputRefusedError(
            f"--output must hold predictions or nothing. Received: {storage.redact(url)}, which holds none: {reason}"
        ) from error


def spill_keys(path: Path, parts: Iterable[tuple[str, pa.Table]]) -> None:
    """Write the `KEY_COLUMNS` of parts to one local Parquet file, the part's name as a further column `part`."""
    with pq.ParquetWriter(path, _SPILLED_SCHEMA) as writer:
        for part, keys in parts:
            # By hand: pa.array and its like import pandas, which takes half a second.
            ends = np.arange(len(keys) + 1, dtype=np.int32) * len(part)
            names = pa.StringArray.from_buffers(len(keys), pa.py_buffer(ends), pa.py_buffer(part.encode() * len(keys)))
            writer.write_table(pa.Table.from_arrays([*keys.select(KEY_COLUMNS).columns, names], schema=_SPILLED_SCHEMA))
