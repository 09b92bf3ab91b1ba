"""The part files of an output: publishing rows as a part file, atomically, and reading part files.

An output is a directory that holds `part-<digest>.parquet` files and `_runs/`. Names that start with `_` or `.` are not
data.
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

from catdog import provenance, schema, storage
from catdog.errors import OutputRefusedError, StorageError
from catdog.schema import PREDICTIONS_SCHEMA

KEY_COLUMNS: Final = ("uri", "source_version", "model_id", "status")
"""The columns that tell what an output holds. The first three identify a row."""

_SPILLED_SCHEMA: Final = pa.schema([(name, pa.string()) for name in (*KEY_COLUMNS, "part")])

_READERS: Final = 16
"""Number of part files that are read at the same time."""


def part_name(digest: str) -> str:
    """The name of the part file with this digest."""
    return f"part-{digest}.parquet"


def publish_part(output: str, part: str, rows: pa.Table, *, keep_others: bool) -> None:
    """Publish rows as a part file, which replaces a file of the same name.

    Args:
        output: directory of the part files.
        part: name of the file.
        rows: rows in `PREDICTIONS_SCHEMA`.
        keep_others: whether to keep the rows of other uris that the file of the same name holds.

    Raises:
        OutputRefusedError: the file whose rows are to be kept is not a part file of `predict`.
        StorageError: the file could not be written. The output is as it was.
    """
    url = storage.join(output, part)
    if keep_others:
        _, before = _read_part(output, part, None)
        others = before.filter(pc.invert(pc.is_in(before["uri"], value_set=rows["uri"].combine_chunks())))
        rows = pa.concat_tables([others, rows]).sort_by("uri")
    storage.publish_parquet(url, rows)


def list_parts(output: str) -> list[str]:
    """Names of the part files in an output. There are none if the output does not exist yet.

    Raises:
        OutputRefusedError: the output is a file, or holds something that predict did not write.
    """
    storage.refuse_foreign_output(output, ["part-*.parquet", "_*"])
    names = [name for name in storage.list_names(output) if not name.startswith("_")]
    for name in names:
        if not (name.startswith("part-") and name.endswith(".parquet")):
            raise OutputRefusedError(
                f"--output must hold predictions or nothing. Received: {provenance.redact(output)}, which holds {name}"
            )
    return names


def read_parts(
    output: str, parts: Iterable[str], columns: Sequence[str] | None = None
) -> Iterator[tuple[str, pa.Table]]:
    """Read part files, some of them ahead. Yields (name, rows) of each, in order.

    Args:
        output: directory of the part files.
        parts: names of the files.
        columns: names of the columns to read; None for all.

    Raises:
        OutputRefusedError: a file is not a part file of `predict`.
        StorageError: the storage failed.
    """
    remaining = iter(parts)
    with concurrent.futures.ThreadPoolExecutor(_READERS, thread_name_prefix="catdog-parts") as pool:
        while group := list(itertools.islice(remaining, 4 * _READERS)):
            yield from pool.map(lambda part: _read_part(output, part, columns), group)


def _read_part(output: str, part: str, columns: Sequence[str] | None) -> tuple[str, pa.Table]:
    url = storage.join(output, part)
    wanted = PREDICTIONS_SCHEMA if columns is None else pa.schema(map(PREDICTIONS_SCHEMA.field, columns))
    try:
        data = storage.read_bytes(url)
    except FileNotFoundError:
        raise StorageError(
            f"a part file must not be deleted while it is read. Received: {provenance.redact(url)} is missing"
        ) from None
    try:
        file = pq.ParquetFile(pa.BufferReader(data))
        schema.check(file.schema_arrow, PREDICTIONS_SCHEMA)
        there = [name for name in wanted.names if name in file.schema_arrow.names]
        return part, schema.conformed(file.read(columns=there), wanted)
    except (ValueError, OSError) as error:  # ArrowInvalid is a ValueError
        reason = provenance.one_line(error)
        raise OutputRefusedError(
            f"--output must hold predictions or nothing. Received: {provenance.redact(url)}, which holds none: {reason}"
        ) from error


def spill_keys(path: Path, parts: Iterable[tuple[str, pa.Table]]) -> None:
    """Write the `KEY_COLUMNS` of part files, and their names as a column `part`, to one local Parquet file."""
    with pq.ParquetWriter(path, _SPILLED_SCHEMA) as writer:
        for part, keys in parts:
            # The column is built from buffers, because pa.array imports pandas, which takes half a second.
            ends = np.arange(len(keys) + 1, dtype=np.int32) * len(part)
            names = pa.StringArray.from_buffers(len(keys), pa.py_buffer(ends), pa.py_buffer(part.encode() * len(keys)))
            writer.write_table(pa.Table.from_arrays([*keys.select(KEY_COLUMNS).columns, names], schema=_SPILLED_SCHEMA))
