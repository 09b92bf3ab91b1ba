"""The driver's catalogue of a collection: a DuckDB file on local disk with one small row for each listed file.

The tables:
    listing(row, uri, version, num_bytes, label)  `row`: number of the file in the listing, from 0; `label`: index into
                                                  `CLASS_NAMES`, or NULL for an unlabelled file that is no image
    others(row, reason, message)                  the files without a label
    given(row, split)                             the files whose folder names the split `val` or `test`
"""

import contextlib
import hashlib
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Final

import duckdb
import pyarrow as pa

from catdog import scratch, storage
from catdog.config import PrepareConfig
from catdog.dataset import labels, sidecars
from catdog.dataset.split import HELD_OUT, named_split
from catdog.errors import ImageError, UsageError
from catdog.portions import portions
from catdog.provenance import redact
from catdog.schema import CLASS_NAMES, SPLITS
from catdog.storage.names import is_other_name, looks_like_image
from catdog.storage.patterns import Chosen

logger = logging.getLogger(__name__)

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


@dataclass(frozen=True, kw_only=True)
class Collection:
    """What is to be said of a collection besides its files."""

    label_rows: int | None
    """Number of rows of the table of labels; None if there is no table."""

    unmatched_label_rows: int | None
    """How many of these rows name no listed file, or lack a label."""

    given: dict[str, int]
    """Split → number of labelled files whose folders name it. Empty if the folders do not decide the split."""


def list_collection(connection: duckdb.DuckDBPyConnection, config: PrepareConfig) -> Collection:
    """Fill the catalogue with the files of a collection, their labels, and the splits that their folders name.

    Raises:
        UsageError: an image has no label, two labels or an unknown one, or a class has no images.
    """
    table = _table_of_labels(config)
    connection.execute(
        "CREATE TABLE listing (row BIGINT, uri VARCHAR, version VARCHAR, num_bytes BIGINT, label TINYINT)"
    )
    files = enumerate(_list_sources(config))
    while batch := list(islice(files, BATCH_ROWS)):
        rows = [
            (row, file.uri, file.version, file.num_bytes, None if table else labels.by_rule(config.labels, file.uri))
            for row, file in batch
        ]
        columns = dict(zip(LISTING_SCHEMA.names, zip(*rows, strict=True), strict=True))
        insert(connection, "listing", pa.table(columns, schema=LISTING_SCHEMA))
    num_rows, num_unmatched = _set_labels_from_table(connection, table, config.sources[0]) if table else (None, None)
    if config.labels == "auto" and table is None:
        sidecars.set_labels(connection)
    _check_labels(connection)
    return Collection(
        label_rows=num_rows, unmatched_label_rows=num_unmatched, given=_set_given_splits(connection, config)
    )


def _list_sources(config: PrepareConfig) -> Iterator[storage.SourceFile]:
    chosen = Chosen(include=config.include, exclude=config.exclude)
    for source in config.sources:
        yield from storage.list_images(source, exclude=config.output, chosen=chosen)


def _table_of_labels(config: PrepareConfig) -> str | None:
    """The URL of the table of labels, if there is one. Its relative names need one place to start from."""
    tables = [labels.table_url(config.labels, source) for source in config.sources]
    if len(tables) > 1 and any(tables):
        raise UsageError(
            "A table of labels needs a single place of images. "
            f"Received: {len(tables)} places, and the table {redact(next(filter(None, tables)))}"
        )
    return tables[0]


def _set_labels_from_table(connection: duckdb.DuckDBPyConnection, table: str, images: str) -> tuple[int, int]:
    """Set the labels of the listing from a table. Returns how many rows the table has, and how many match no file."""
    connection.execute(
        "CREATE TABLE named (number BIGINT, written VARCHAR, verbatim VARCHAR, uri VARCHAR, member VARCHAR, "
        "label VARCHAR)"
    )
    for batch in labels.read_table(table, images):
        insert(connection, "named", batch)
    num_rows, num_unmatched = _match_rows(connection)
    if num_unmatched:
        first, file = _first_unmatched(connection), one_row(connection, "SELECT arg_min(uri, row) FROM listing")[0]
        if num_unmatched == num_rows:
            raise UsageError(
                f"A table of labels must name listed files. Received: none of the {num_rows} rows of {table} names "
                f"one; first row: {first!r}, first file: {file}"
            )
        logger.warning(
            "%d of %d rows of %s name no listed file or have no label; the first of them: %r",
            *(num_unmatched, num_rows, table, first),
        )
    num, uri, label = one_row(
        connection,
        "SELECT count(*), min(uri), arg_min(label, uri) FROM matched WHERE list_contains(?, label) IS NOT TRUE",
        [list(CLASS_NAMES)],
    )
    if num:
        raise UsageError(
            f"Every label must be cat or dog. Received: {num} that are neither, the first: {label!r} of {uri}"
        )
    num, uri = one_row(
        connection,
        "SELECT count(*), min(uri) FROM (SELECT uri FROM matched GROUP BY uri HAVING min(label) <> max(label))",
    )
    if num:
        raise UsageError(f"A file must have one label. Received: {num} files with two in {table}, the first: {uri}")
    connection.execute(
        "UPDATE listing SET label = list_position(?, matched.label) - 1 FROM matched WHERE listing.uri = matched.uri",
        [list(CLASS_NAMES)],
    )
    return num_rows, num_unmatched


_MATCHES: Final = (
    ("verbatim", "uri"),
    ("uri", "composed"),
    ("uri", "composed_stem"),
    ("member", "member"),
    ("member", "member_stem"),
)
"""What of a row of the table of labels is compared with what of a file, the most certain first. A later comparison
counts only where a single file fits."""


def _match_rows(connection: duckdb.DuckDBPyConnection) -> tuple[int, int]:
    """Create the table `matched(number, uri, label)`. Returns the number of rows in `named`, and of those not matched.

    A row without a suffix, such as the `id` of Kaggle's tables, matches the file with that name and any suffix. A path
    within an archive matches the member, if the collection is a glob of archives.
    """
    connection.execute(
        r"""
        CREATE TABLE names AS
        SELECT uri, composed, member,
            regexp_replace(composed, '\.[^./:]+(::|$)', '\1') AS composed_stem,
            regexp_replace(member, '\.[^./]+$', '') AS member_stem
        FROM (
            SELECT DISTINCT uri, nfc_normalize(uri) AS composed,
                CASE WHEN regexp_matches(uri, '^(zip|tar)://.*::')
                    THEN nfc_normalize(regexp_extract(uri, '^(?:zip|tar)://(.*?)::(?:(?:zip|tar)://|[^:]*$)', 1))
                END AS member
            FROM listing
        )
        """
    )
    connection.execute("CREATE TABLE matched (number BIGINT, uri VARCHAR, label VARCHAR)")
    for of_row, of_file in _MATCHES:
        connection.execute(
            f"""
            INSERT INTO matched
            SELECT number, files.uri, label
            FROM named JOIN (
                SELECT {of_file} AS key, min(uri) AS uri FROM names WHERE {of_file} IS NOT NULL
                GROUP BY {of_file} HAVING count(*) = 1
            ) files ON named.{of_row} = files.key
            WHERE number NOT IN (SELECT number FROM matched)
            """
        )
    (num_rows,) = one_row(connection, "SELECT count(*) FROM named")
    (num_matched,) = one_row(connection, "SELECT count(*) FROM matched")
    return num_rows, num_rows - num_matched


def _first_unmatched(connection: duckdb.DuckDBPyConnection) -> str | None:
    (written,) = one_row(
        connection,
        "SELECT first(written ORDER BY number) FROM named WHERE number NOT IN (SELECT number FROM matched)",
    )
    return None if written is None else str(written)


_SNIFF_FILES: Final = 64
"""Unlabelled files that are looked into together."""


def _check_labels(connection: duckdb.DuckDBPyConnection) -> None:
    """Check that every image has a label, and every class an image. Fill the table `others`."""
    (num_files,) = one_row(connection, "SELECT count(*) FROM listing")
    connection.execute("CREATE TABLE others (row BIGINT, reason VARCHAR, message VARCHAR)")
    unlabelled = connection.cursor()
    num_unlabelled = sum(
        not is_other_name(uri)
        for batch in stream(connection, "SELECT uri FROM listing WHERE label IS NULL")
        for uri in batch["uri"].to_pylist()
    )
    unlabelled.execute("SELECT row, uri, num_bytes FROM listing WHERE label IS NULL ORDER BY row")
    while files := unlabelled.fetchmany(_SNIFF_FILES):
        others = list(_others(files))
        if images := [uri for (_, uri, _), other in zip(files, others, strict=True) if other is None]:
            raise UsageError(
                "Every image needs a label: a folder named cat or dog, a file name like cat.123.jpg, or a row in a "
                f"table given with --labels. Received: {num_unlabelled} of {num_files} files without one, the first: "
                f"{images[0]}"
            )
        rows = [
            {"row": row, "reason": other[0], "message": other[1]}
            for (row, _, _), other in zip(files, others, strict=True)
            if other is not None
        ]
        insert(connection, "others", pa.Table.from_pylist(rows))
        num_unlabelled -= sum(not is_other_name(uri) for _, uri, _ in files)
    for index, name in enumerate(CLASS_NAMES):
        if one_row(connection, "SELECT count(*) FROM listing WHERE label = ?", [index]) == (0,):
            raise UsageError(f"Every class must have images. Received: none labelled {name} among {num_files} files")


def _others(files: list[tuple[int, str, int]]) -> Iterator[tuple[str, str] | None]:
    """For each unlabelled file (row, uri, size) the reason and the message of its rejection; None for an image."""
    unsure = [(uri, num_bytes) for _, uri, num_bytes in files if not is_other_name(uri)]
    contents = storage.read_sources([uri for uri, _ in unsure], [num_bytes for _, num_bytes in unsure])
    for _, uri, _ in files:
        if is_other_name(uri):
            yield "unsupported_format", "neither labelled nor an image by its name"
            continue
        content = next(contents)
        if isinstance(content, ImageError):
            yield content.code, f"not labelled; {content}"
        elif looks_like_image(content):
            yield None
        else:
            yield "unsupported_format", "neither labelled nor an image by its first bytes"


def _set_given_splits(connection: duckdb.DuckDBPyConnection, config: PrepareConfig) -> dict[str, int]:
    """Fill the table `given` from the names of folders, if they are to decide, and say what was found.

    Only folders below the one that all files share count: what lies above says where the collection is. The folders
    decide if some of them name `val` or `test`, and other files are left to train with.
    """
    connection.execute("CREATE TABLE given (row BIGINT, split VARCHAR)")
    if config.split == "random":
        return {}
    connection.execute(
        r"""
        CREATE TABLE folders AS SELECT DISTINCT regexp_replace(uri, '[^/]*(::|$)', '\1') AS folder
        FROM listing WHERE label IS NOT NULL
        """
    )
    shared: list[str] | None = None
    for batch in stream(connection, "SELECT folder FROM folders"):
        for folder in batch["folder"].to_pylist():
            parts = labels.folders(folder)
            num_shared = len(parts) if shared is None else 0
            for ours, theirs in zip(parts, shared or (), strict=False):
                if ours != theirs:
                    break
                num_shared += 1
            shared = parts[:num_shared]
    connection.execute("CREATE TABLE named_splits (folder VARCHAR, split VARCHAR)")
    for batch in stream(connection, "SELECT folder FROM folders"):
        folders = batch["folder"].to_pylist()
        splits = [named_split(labels.folders(folder)[len(shared or ()) :]) for folder in folders]
        insert(
            connection,
            "named_splits",
            pa.table({"folder": pa.array(folders, pa.string()), "split": pa.array(splits, pa.string())}),
        )
    joined = (
        r"listing JOIN named_splits ON named_splits.folder = regexp_replace(uri, '[^/]*(::|$)', '\1') "
        "WHERE label IS NOT NULL"
    )
    found = Counter[str | None](dict(connection.execute(f"SELECT split, count(*) FROM {joined} GROUP BY 1").fetchall()))
    num_held_out = sum(found[split] for split in HELD_OUT)
    if not num_held_out or num_held_out == found.total():
        if config.split == "folders":
            raise UsageError(
                "--split=folders needs files in folders named val or test, and others to train with. Received: "
                + ", ".join(f"{found[split]} files in {split}" for split in SPLITS)
                + f", {found[None]} elsewhere"
            )
        return {}
    connection.execute(
        f"INSERT INTO given SELECT row, split FROM {joined} AND list_contains(?, split)", [list(HELD_OUT)]
    )
    given = {split: found[split] for split in SPLITS if found[split]}
    drawn = [split for split in ("val", "test") if not found[split]]
    logger.info(
        "The folders decide the split: %s. %d files in no such folder count as train%s. (--split random splits anew.)",
        ", ".join(f"{num} {split}" for split, num in given.items()),
        found[None],
        f"; {drawn[0]} is drawn from train" if drawn else "",
    )
    return given


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
