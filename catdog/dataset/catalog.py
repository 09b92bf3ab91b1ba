"""The driver's catalogue of a collection: one light row per listed file, in a DuckDB file that spills to disk.

Table `listing(row, uri, version, num_bytes, label)`: `row` counts in the order of the listing; `label` is an index into
`CLASS_NAMES`, NULL for a file that is no image by its name.
"""

import contextlib
import hashlib
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Final, TypeVar

import duckdb
import pyarrow as pa

from catdog import storage
from catdog.config import PrepareConfig
from catdog.dataset import labels
from catdog.errors import UsageError
from catdog.schema import CLASS_NAMES

T = TypeVar("T")

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
NUM_THREADS: Final = 4
"""What DuckDB may hold before it spills. It wants 125 MB per thread."""

BATCH_ROWS: Final = 16_384

SLICE_ROWS: Final = 256
SLICE_BYTES: Final = 64 * 2**20
"""A slice is what one task reads at once. It ends where it has so many files, or reaches so many bytes of them. They
were listed one after the other, and so lie side by side in an archive: a remote one is read in long stretches."""


@contextlib.contextmanager
def open_catalog() -> Iterator[duckdb.DuckDBPyConnection]:
    """An empty catalogue in a temporary directory, for the length of a `with` block."""
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
    """Append `rows` to a table of the same columns."""
    connection.register("_rows", rows)
    connection.execute(f"INSERT INTO {table} BY NAME SELECT * FROM _rows")
    connection.unregister("_rows")


def one_row(connection: duckdb.DuckDBPyConnection, query: str, parameters: Sequence[object] = ()) -> tuple[Any, ...]:
    """The one row that a query answers with."""
    (row,) = connection.execute(query, parameters).fetchall()
    return tuple(row)


def stream(connection: duckdb.DuckDBPyConnection, query: str) -> Iterator[pa.Table]:
    """The rows of a query, in batches, while the connection stays free for others."""
    with connection.cursor() as cursor:
        for batch in cursor.sql(query).to_arrow_reader(BATCH_ROWS):
            yield pa.Table.from_batches([batch])


def list_collection(connection: duckdb.DuckDBPyConnection, config: PrepareConfig) -> None:
    """Fill the catalogue from storage, every file labelled, or raise `UsageError`."""
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
        _join_labels(connection, table, config.images)
    _check_labels(connection)


def _join_labels(connection: duckdb.DuckDBPyConnection, table: str, images: str) -> None:
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
        raise UsageError(f"A file must have one label. Received: {num} files with both in {table}, the first: {uri}")
    connection.execute(
        "UPDATE listing SET label = list_position(?, named.label) - 1 FROM named WHERE listing.uri = named.uri",
        [list(CLASS_NAMES)],
    )


def _check_labels(connection: duckdb.DuckDBPyConnection) -> None:
    (num_files,) = one_row(connection, "SELECT count(*) FROM listing")
    num_unlabelled, first = 0, ""
    for batch in stream(connection, "SELECT uri FROM listing WHERE label IS NULL ORDER BY row"):
        images = [uri for uri in batch["uri"].to_pylist() if not labels.is_other_file(uri)]
        num_unlabelled += len(images)
        first = first or (images[0] if images else "")
    if num_unlabelled:
        raise UsageError(
            "Every image needs a label: a folder named cat or dog, a file name like cat.123.jpg, or a row in a table "
            f"given with --labels. Received: {num_unlabelled} of {num_files} files without, the first: {first}"
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
    """The files that can be images, in slices, in order."""
    batches = stream(connection, "SELECT * FROM listing WHERE label IS NOT NULL ORDER BY row")
    files = (file for batch in batches for file in batch.to_pylist())
    for run in runs(files, lambda file: (1, file["num_bytes"]), SLICE_ROWS, SLICE_BYTES):
        yield pa.Table.from_pylist(run, schema=LISTING_SCHEMA)


def runs(items: Iterable[T], weigh: Callable[[T], tuple[int, int]], max_rows: int, max_bytes: int) -> Iterator[list[T]]:
    """Cut items into runs. Each ends where its weight, in rows and in bytes, reaches either limit."""
    run: list[T] = []
    num_rows = num_bytes = 0
    for item in items:
        rows, size = weigh(item)
        run.append(item)
        num_rows += rows
        num_bytes += size
        if num_rows >= max_rows or num_bytes >= max_bytes:
            yield run
            run, num_rows, num_bytes = [], 0, 0
    if run:
        yield run
