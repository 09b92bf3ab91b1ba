"""DuckDB, which plans a run and recounts an output, and spills to the local temporary directory."""

import contextlib
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Final

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from catdog import scratch

_MEMORY_LIMIT: Final = "1GB"


@contextlib.contextmanager
def open_database(memory_limit: str = _MEMORY_LIMIT) -> Iterator[tuple[duckdb.DuckDBPyConnection, Path]]:
    """An empty database in memory, and the temporary directory to which it spills, for the length of a `with` block.

    Whoever reads a file there says `hive_partitioning = false`, as `reading` does. Without it, DuckDB takes a directory
    above that is named `uri=x` for a column, which replaces the file's own.
    """
    with scratch.directory("plan") as directory:
        settings: dict[str, str | bool | int | float | list[str]] = {
            "memory_limit": memory_limit,
            "temp_directory": directory,
            "preserve_insertion_order": False,
            "python_enable_replacements": False,  # they would import pandas, too
        }
        with duckdb.connect(config=settings) as database:
            yield database, Path(directory)


def quoted(text: str) -> str:
    """A text as a literal of SQL, for where a parameter cannot stand.

    Example:
        >>> quoted("cat's")
        "'cat''s'"
    """
    return "'" + text.replace("'", "''") + "'"


def reading(paths: Iterable[Path], *options: str) -> str:
    """What reads local Parquet files in SQL. Nothing in their names is a pattern."""
    files = ", ".join(quoted(_escaped(str(path))) for path in paths)
    return f"read_parquet([{files}], {', '.join(['hive_partitioning = false', *options])})"


def _escaped(path: str) -> str:
    """A path as a glob that matches it alone."""
    return re.sub(r"([*?\[])", r"[\1]", path)


def copy(
    database: duckdb.DuckDBPyConnection,
    rows: str,
    path: Path,
    schema: pa.Schema,
    *,
    order: str,
    group_rows: int,
    parameters: Mapping[str, object] | None = None,
) -> int:
    """Write the rows of a query to a local Parquet file in a versioned schema. Returns their number.

    Args:
        database: the database.
        rows: the query, whose columns are those of the schema, in any order.
        path: the file.
        schema: the schema.
        order: the columns by which the rows are sorted, or what else may follow ORDER BY.
        group_rows: number of rows in a row group.
        parameters: those of the query.
    """
    names = ", ".join(schema.names)
    metadata = ", ".join(f"{quoted(key.decode())}: {quoted(value.decode())}" for key, value in schema.metadata.items())
    options = f"FORMAT parquet, COMPRESSION zstd, ROW_GROUP_SIZE {group_rows}, KV_METADATA {{{metadata}}}"
    sql = f"COPY (SELECT {names} FROM ({rows}) ORDER BY {order}) TO {quoted(str(path))} ({options})"
    result = database.execute(sql, parameters)
    return int(result.fetchall()[0][0])


def num_rows(path: Path) -> int:
    """Number of rows in a local Parquet file."""
    with pq.ParquetFile(path) as file:
        return int(file.metadata.num_rows)
