"""The part files of an output: publishing rows as a part file, atomically, and reading part files.

An output is a directory that holds `part-<digest>.parquet` files and `_runs/`. Names that start with `_` or `.` are not
data.
"""

import collections
import contextlib
import itertools
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from catdog import provenance, schema, storage
from catdog.errors import OutputRefusedError, StorageError
from catdog.schema import PREDICTIONS_SCHEMA

RUNS_NAME: Final = "_runs"
"""Name of the directory of the run records, and of open plans, in an output."""

LARGE_BYTES: Final = 4 * 2**20
"""Of a larger part file, only those pieces are read that hold the columns that are wanted."""

_SPILLED_ROWS: Final = 65_536
"""Rows in a row group of what `spill_keys` writes."""

_READERS: Final = 16
"""Largest number of part files that are read at the same time, or are read and wait."""

_LARGE_READERS: Final = 4
"""The same for large ones."""


def part_name(digest: str) -> str:
    """The name of the part file with this digest."""
    return f"part-{digest}.parquet"


def is_part(name: str) -> bool:
    """Whether a file of this name is a part file."""
    return name.startswith("part-") and name.endswith(".parquet")


def publish_part(
    output: str,
    part: str,
    rows: pa.Table,
    *,
    replaced: Iterable[tuple[str, str]] | None = None,
    columns: Sequence[str] = tuple(PREDICTIONS_SCHEMA.names),
) -> Counter[str]:
    """Publish rows as a part file, which replaces a file of the same name.

    Args:
        output: directory of the part files.
        part: name of the file.
        rows: rows in `PREDICTIONS_SCHEMA`.
        replaced: (uri, source_version) of rows to drop from the file of the same name. Its other rows are kept, less
            those that `rows` have anew. None to keep no row.
        columns: those of the file (`columns_of`).

    Returns:
        Run → number of its rows that were dropped.

    Raises:
        OutputRefusedError: the file whose rows are to be kept is not a part file of `predict`.
        StorageError: the file could not be written. The output is as it was.
    """
    url = storage.join(output, part)
    num_dropped = Counter[str]()
    if replaced is not None:
        before = _read_part(output, part)
        dropped = {*replaced, *_keys(rows)}
        is_kept = [key not in dropped for key in _keys(before)]
        runs = before["run_id"].to_pylist()
        num_dropped.update(run for run, kept in zip(runs, is_kept, strict=True) if not kept)
        others = before.filter(pa.array(is_kept, pa.bool_()))
        rows = pa.concat_tables([others, rows]).sort_by([("uri", "ascending"), ("source_version", "ascending")])
    storage.publish_parquet(url, schema.conformed(rows, schema.predictions_with(columns)))
    return num_dropped


def create_part(
    output: str, part: str, rows: pa.Table, *, columns: Sequence[str] = tuple(PREDICTIONS_SCHEMA.names)
) -> bool:
    """Publish rows as a new part file. Whether it was written.

    It is not if there is one of this name: another worker has done the same slice, or this one has, and the answer of
    the store was lost (`storage.create_bytes`). Arguments and errors as for `publish_part`.
    """
    return storage.create_parquet(storage.join(output, part), schema.conformed(rows, schema.predictions_with(columns)))


def _keys(rows: pa.Table) -> Iterator[tuple[str, str]]:
    return zip(rows["uri"].to_pylist(), rows["source_version"].to_pylist(), strict=True)


def refuse_foreign(output: str) -> None:
    """Raise `OutputRefusedError` if the output is a file, or holds something that predict did not write.

    An output that has run records is looked through by the plan.
    """
    if not storage.exists(storage.join(output, RUNS_NAME)):
        list_parts(output)


def list_parts(output: str) -> list[str]:
    """Names of the part files in an output. There are none if the output does not exist yet.

    Raises:
        OutputRefusedError: the output is a file, or holds something that predict did not write.
    """
    return checked_parts(output, storage.list_names(output))


def checked_parts(output: str, names: Sequence[str]) -> list[str]:
    """Those of the names in an output that are part files. Errors as `list_parts`."""
    if not any(map(is_part, names)):
        storage.refuse_foreign_output(output, ["_*"])
    parts = [name for name in names if not name.startswith("_")]
    for name in parts:
        if not is_part(name):
            raise OutputRefusedError(
                f"--output must hold predictions or nothing. Received: {provenance.redact(output)}, which holds {name}"
            )
    return parts


def columns_of(output: str, parts: Sequence[str]) -> tuple[str, ...]:
    """The columns of the part files of an output, as the first of them has them; of a new one, all that there are.

    An output keeps them: DuckDB and Polars refuse files that lie together and differ in their columns. One that was
    begun with a schema of an earlier version is added to in that version.

    Raises:
        OutputRefusedError: the file is not a part file of `predict`.
        StorageError: the storage failed.
    """
    if not parts:
        return tuple(PREDICTIONS_SCHEMA.names)
    with _opened(output, parts[0]) as file:
        return tuple(name for name in PREDICTIONS_SCHEMA.names if name in file.schema_arrow.names)


def read_parts(
    output: str,
    parts: Iterable[str],
    columns: Sequence[str] | None = None,
    *,
    large: Collection[str] = (),
    on_error: Callable[[OutputRefusedError], object] | None = None,
) -> Iterator[tuple[str, pa.Table]]:
    """Read part files, some of them ahead. Yields (name, rows) of each, in order.

    Args:
        output: directory of the part files.
        parts: names of the files.
        columns: names of the columns to read; None for all.
        large: names of files of which only those pieces are fetched that hold these columns.
        on_error: is told of each file that is not a part file of `predict`, which is then left out.

    Raises:
        OutputRefusedError: a file is not a part file of `predict`, and there is no `on_error`.
        StorageError: the storage failed.
    """

    def result(reading: "Future[pa.Table]") -> pa.Table | None:
        try:
            return reading.result()
        except OutputRefusedError as error:
            if on_error is None:
                raise
            on_error(error)
            return None

    ahead: collections.deque[tuple[str, Future[pa.Table]]] = collections.deque()
    with ThreadPoolExecutor(_READERS, thread_name_prefix="catdog-parts") as pool:
        for part in itertools.chain(parts, [None]):
            if part is not None:
                ahead.append((part, pool.submit(_read_part, output, part, columns, in_pieces=part in large)))
            most = 0 if part is None else _LARGE_READERS if part in large else _READERS
            while len(ahead) > most:
                name, reading = ahead.popleft()
                if (rows := result(reading)) is not None:
                    yield name, rows


def read_whole_part(output: str, part: str) -> pa.Table:
    """A part file with the columns that it has, which may be those of an earlier version.

    Raises:
        OutputRefusedError: the file is not a part file of `predict`.
        StorageError: the storage failed.
    """
    with _opened(output, part, in_pieces=False) as file:
        try:
            return file.read()
        except (ValueError, OSError) as error:
            raise _refusal(storage.join(output, part), error) from error


def _read_part(output: str, part: str, columns: Sequence[str] | None = None, *, in_pieces: bool = False) -> pa.Table:
    wanted = PREDICTIONS_SCHEMA if columns is None else pa.schema(map(PREDICTIONS_SCHEMA.field, columns))
    with _opened(output, part, in_pieces=in_pieces) as file:
        there = [name for name in wanted.names if name in file.schema_arrow.names]
        try:
            return schema.conformed(file.read(columns=there), wanted)
        except (ValueError, OSError) as error:
            raise _refusal(storage.join(output, part), error) from error


@contextlib.contextmanager
def _opened(output: str, part: str, *, in_pieces: bool = True) -> Iterator[pq.ParquetFile]:
    """A part file, whose schema is checked."""
    url = storage.join(output, part)
    with contextlib.ExitStack() as stack:
        try:
            source = (
                stack.enter_context(storage.open_read(url)) if in_pieces else pa.BufferReader(storage.read_bytes(url))
            )
        except FileNotFoundError:
            raise StorageError(
                f"a part file must not be deleted while it is read. Received: {provenance.redact(url)} is missing"
            ) from None
        try:
            file = pq.ParquetFile(source)
            schema.check(file.schema_arrow, PREDICTIONS_SCHEMA)
        except (ValueError, OSError) as error:  # ArrowInvalid is a ValueError
            raise _refusal(url, error) from error
        yield file


def _refusal(url: str, error: Exception) -> OutputRefusedError:
    return OutputRefusedError(
        f"--output must hold predictions or nothing. Received: {provenance.redact(url)}, which holds none: "
        + provenance.one_line(error)
    )


def rows_of_run(output: str, part: str, run_id: str) -> pa.Table | None:
    """The rows of a part file that a run has written; None where there is no such file, or none of them is the run's.

    Raises:
        OutputRefusedError: the file is not a part file of `predict`.
        StorageError: the storage failed.
    """
    if not storage.exists(storage.join(output, part)):
        return None
    own, _ = split_rows(output, part, run_id)
    return own if len(own) else None


def split_rows(output: str, part: str, run_id: str) -> tuple[pa.Table, pa.Table]:
    """The rows of a part file that a run has written, and those of other runs. Errors as `rows_of_run`."""
    rows = _read_part(output, part)
    is_own = pc.equal(rows["run_id"], run_id)
    return rows.filter(is_own), rows.filter(pc.invert(is_own))


def spill_keys(path: Path, parts: Iterable[tuple[str, pa.Table]], columns: Sequence[str]) -> None:
    """Write columns of part files, and the names of the files as a column `part`, to one local Parquet file."""
    fields = [PREDICTIONS_SCHEMA.field(name).with_nullable(True) for name in columns]
    spilled_schema = pa.schema([*fields, pa.field("part", pa.string())])
    waiting: list[pa.Table] = []
    with pq.ParquetWriter(path, spilled_schema) as writer:
        for part, rows in parts:
            # The column is built from buffers, because pa.array imports pandas, which takes half a second.
            ends = np.arange(len(rows) + 1, dtype=np.int32) * len(part)
            names = pa.StringArray.from_buffers(len(rows), pa.py_buffer(ends), pa.py_buffer(part.encode() * len(rows)))
            table = pa.Table.from_arrays([*rows.select(columns).columns, names], schema=spilled_schema)
            waiting.append(table)
            if sum(map(len, waiting)) >= _SPILLED_ROWS:
                writer.write_table(pa.concat_tables(waiting).combine_chunks())
                waiting.clear()
        if waiting:
            writer.write_table(pa.concat_tables(waiting).combine_chunks())
