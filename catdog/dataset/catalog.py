"""The driver's catalogue of a collection: a DuckDB file on local disk with one small row for each listed file.

The tables:
    listing(row, uri, version, num_bytes, label)  `row`: number of the file in the listing, from 0; `label`: index into
                                                  `CLASS_NAMES`, or NULL for an unlabelled file that is no image
    others(row, reason, message)                  the files without a label
    row_splits(row, split)                        the splits that a table names, also `train`
    given(row, split)                             the files that are given to the split `val` or `test`: by a table, or
                                                  by the names of their folders
"""

import contextlib
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import duckdb
import pyarrow as pa

from catdog import scratch
from catdog.portions import portions

LISTING_SCHEMA: Final = pa.schema(
    [
        pa.field("row", pa.int64()),
        pa.field("uri", pa.string()),
        pa.field("version", pa.string()),
        pa.field("num_bytes", pa.int64()),
        pa.field("label", pa.int8()),
    ]
)

MEMORY_LIMIT: Final = "512MB"
"""Memory that DuckDB may take before it spills to disk."""

NUM_THREADS: Final = 4
"""Threads of DuckDB, each of which wants 125 MB of memory."""

BATCH_ROWS: Final = 16_384
"""Rows that are written to or read from the catalogue at a time."""

SLICE_ROWS: Final = 256
SLICE_BYTES: Final = 64 * 2**20
"""Size of a slice: of the files, consecutive in the listing, that one task reads. A slice ends as soon as it reaches
either limit. Consecutive files often lie side by side in an archive, so that a remote archive is read in long
stretches."""


@contextlib.contextmanager
def open_catalog() -> Iterator[duckdb.DuckDBPyConnection]:
    """Open an empty catalogue in a temporary directory, for the length of a `with` block."""
    with scratch.directory("prepare") as directory:
        connection = duckdb.connect(str(Path(directory, "catalog.duckdb")))
        connection.execute(f"SET memory_limit = '{MEMORY_LIMIT}'")
        connection.execute(f"SET threads = {NUM_THREADS}")
        connection.execute("SET preserve_insertion_order = false")
        connection.execute(f"SET temp_directory = '{directory}'")
        try:
            yield connection
        finally:
            connection.close()


def create(connection: duckdb.DuckDBPyConnection, table: str, schema: pa.Schema) -> None:
    """Create an empty table."""
    connection.register("_empty", schema.empty_table())
    connection.execute(f"CREATE TABLE {table} AS SELECT * FROM _empty")
    connection.unregister("_empty")


def insert(connection: duckdb.DuckDBPyConnection, table: str, rows: pa.Table) -> None:
    """Append `rows` to a table that has the same columns."""
    connection.register("_rows", rows)
    connection.execute(f"INSERT INTO {table} BY NAME SELECT * FROM _rows")
    connection.unregister("_rows")


def one_row(
    connection: duckdb.DuckDBPyConnection, query: str, parameters: Sequence[object] | Mapping[str, object] = ()
) -> tuple[Any, ...]:
    """The row that a query returns, which must be exactly one."""
    (row,) = connection.execute(query, parameters).fetchall()
    return tuple(row)


def stream(connection: duckdb.DuckDBPyConnection, query: str) -> Iterator[pa.Table]:
    """The rows of a query, in batches. Meanwhile the connection may be used for other queries."""
    with connection.cursor() as cursor:
        for batch in cursor.sql(query).to_arrow_reader(BATCH_ROWS):
            yield pa.Table.from_batches([batch])


def listing_digest(connection: duckdb.DuckDBPyConnection) -> str:
    """SHA-256 over every listed file's uri, version and label, in the order of the listing; and over splits of tables.

    (The splits that folders name follow from the uri.)
    """
    return _digest_of(connection, "SELECT uri, version, label FROM listing ORDER BY row")


def content_digest(connection: duckdb.DuckDBPyConnection, contents: str) -> str:
    """As `listing_digest`, but over what the files hold instead of their versions.

    Args:
        connection: the catalogue.
        contents: a table that has `row` and `content` of the labelled files.
    """
    return _digest_of(
        connection, f"SELECT uri, label, content FROM listing LEFT JOIN {contents} USING (row) ORDER BY row"
    )


def _digest_of(connection: duckdb.DuckDBPyConnection, files: str) -> str:
    digest = hashlib.sha256()
    for query in (files, "SELECT * FROM row_splits ORDER BY row"):
        for batch in stream(connection, query):
            for row in zip(*batch.to_pydict().values(), strict=True):
                digest.update(repr(row).encode())
    return digest.hexdigest()


def slices(connection: duckdb.DuckDBPyConnection) -> Iterator[pa.Table]:
    """The labelled files, in slices, in the order of the listing."""
    batches = stream(connection, "SELECT * FROM listing WHERE label IS NOT NULL ORDER BY row")
    files = (file for batch in batches for file in batch.to_pylist())
    for portion in portions(files, lambda file: (1, file["num_bytes"]), SLICE_ROWS, SLICE_BYTES):
        yield pa.Table.from_pylist(portion, schema=LISTING_SCHEMA)
