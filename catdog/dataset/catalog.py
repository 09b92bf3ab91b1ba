"""The driver's catalogue of a collection: a DuckDB file on local disk with one small row for each listed file.

Table `listing(row, uri, version, num_bytes, label)`: `row` is the number of the file in the listing, from 0; `label` is
an index into `CLASS_NAMES`, or NULL for an unlabelled file whose name says that it is no image.
"""

import contextlib
import hashlib
import tempfile
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Final

import duckdb
import pyarrow as pa

from catdog import storage
from catdog.config import PrepareConfig
from catdog.dataset import labels
from catdog.errors import UsageError
from catdog.portions import portions
from catdog.schema import CLASS_NAMES

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
    with tempfile.TemporaryDirectory(prefix="catdog-prepare-") as directory:
        connection = duckdb.connect(str(Path(directory, "catalog.duckdb")))
        connection.execute(f"SET memory_limit = '{MEMORY_LIMIT}'")
        connection.execute(f"SET threads = {NUM_THREADS}")
        connection.execute("SET preserve_insertion_order = false")
        connection.execute(f"SET temp_directory = '{directory}'")
        try:
            yield connection
        finally:
            connection.close()


def insert(connection: duckdb.DuckDBPyConnection, table: str, rows: pa.Table) -> None:
    """Append `rows` to a table that has the same columns."""
    connection.register("_rows", rows)
    connection.execute(f"INSERT INTO {table} BY NAME SELECT * FROM _rows")
    connection.unregister("_rows")


def one_row(connection: duckdb.DuckDBPyConnection, query: str, parameters: Sequence[object] = ()) -> tuple[Any, ...]:
    """The row that a query returns, which must be exactly one."""
    (row,) = connection.execute(query, parameters).fetchall()
    return tuple(row)


def stream(connection: duckdb.DuckDBPyConnection, query: str) -> Iterator[pa.Table]:
    """The rows of a query, in batches. Meanwhile the connection may be used for other queries."""
    with connection.cursor() as cursor:
        for batch in cursor.sql(query).to_arrow_reader(BATCH_ROWS):
            yield pa.Table.from_batches([batch])


def list_collection(connection: duckdb.DuckDBPyConnection, config: PrepareConfig) -> None:
    """Fill the catalogue with the files of a collection and their labels.

    Raises:
        UsageError: an image has no label, two labels or an unknown one, or a class has no images.
    """
    table = labels.table_url(config.labels, config.images)
    connection.execute(
        "CREATE TABLE listing (row BIGINT, uri VARCHAR, version VARCHAR, num_bytes BIGINT, label TINYINT)"
    )
    files = enumerate(storage.list_images(config.images))
    while batch := list(islice(files, BATCH_ROWS)):
        rows = [
            (row, file.uri, file.version, file.num_bytes, None if table else labels.by_rule(config.labels, file.uri))
            for row, file in batch
        ]
        columns = dict(zip(LISTING_SCHEMA.names, zip(*rows, strict=True), strict=True))
        insert(connection, "listing", pa.table(columns, schema=LISTING_SCHEMA))
    if table:
        _set_labels_from_table(connection, table, config.images)
    _check_labels(connection)


def _set_labels_from_table(connection: duckdb.DuckDBPyConnection, table: str, images: str) -> None:
    """Set the labels of the listing from a table of labels."""
    connection.execute("CREATE TABLE named (uri VARCHAR, label VARCHAR)")
    for batch in labels.read_table(table, images):
        insert(connection, "named", batch)
    connection.execute("DELETE FROM named WHERE uri NOT IN (SELECT uri FROM listing)")
    num, uri, label = one_row(
        connection,
        "SELECT count(*), min(uri), arg_min(label, uri) FROM named WHERE list_contains(?, label) IS NOT TRUE",
        [list(CLASS_NAMES)],
    )
    if num:
        raise UsageError(
            f"Every label must be cat or dog. Received: {num} that are neither, the first: {label!r} of {uri}"
        )
    num, uri = one_row(
        connection,
        "SELECT count(*), min(uri) FROM (SELECT uri FROM named GROUP BY uri HAVING min(label) <> max(label))",
    )
    if num:
        raise UsageError(f"A file must have one label. Received: {num} files with two in {table}, the first: {uri}")
    connection.execute(
        "UPDATE listing SET label = list_position(?, named.label) - 1 FROM named WHERE listing.uri = named.uri",
        [list(CLASS_NAMES)],
    )


def _check_labels(connection: duckdb.DuckDBPyConnection) -> None:
    """Check that every image has a label, and every class an image."""
    (num_files,) = one_row(connection, "SELECT count(*) FROM listing")
    num_unlabelled, first = 0, ""
    for batch in stream(connection, "SELECT uri FROM listing WHERE label IS NULL ORDER BY row"):
        images = [uri for uri in batch["uri"].to_pylist() if not labels.is_other_file(uri)]
        num_unlabelled += len(images)
        first = first or (images[0] if images else "")
    if num_unlabelled:
        raise UsageError(
            "Every image needs a label: a folder named cat or dog, a file name like cat.123.jpg, or a row in a table "
            f"given with --labels. Received: {num_unlabelled} of {num_files} files without one, the first: {first}"
        )
    for index, name in enumerate(CLASS_NAMES):
        if one_row(connection, "SELECT count(*) FROM listing WHERE label = ?", [index]) == (0,):
            raise UsageError(f"Every class must have images. Received: none labelled {name} among {num_files} files")


def listing_digest(connection: duckdb.DuckDBPyConnection) -> str:
    """SHA-256 over every listed file's uri, version and label, in the order of the listing."""
    digest = hashlib.sha256()
    for batch in stream(connection, "SELECT uri, version, label FROM listing ORDER BY row"):
        for row in zip(*batch.to_pydict().values(), strict=True):
            digest.update(repr(row).encode())
    return digest.hexdigest()


def slices(connection: duckdb.DuckDBPyConnection) -> Iterator[pa.Table]:
    """The labelled files, in slices, in the order of the listing."""
    batches = stream(connection, "SELECT * FROM listing WHERE label IS NOT NULL ORDER BY row")
    files = (file for batch in batches for file in batch.to_pylist())
    for portion in portions(files, lambda file: (1, file["num_bytes"]), SLICE_ROWS, SLICE_BYTES):
        yield pa.Table.from_pylist(portion, schema=LISTING_SCHEMA)
