"""The collection that a dataset is made of: its files, their labels, and the splits that they came with."""

import logging
import shlex
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Final

import duckdb
import pyarrow as pa

from catdog import storage
from catdog.config import PrepareConfig
from catdog.dataset import folders, label_tables, sidecars
from catdog.dataset.catalog import BATCH_ROWS, LISTING_SCHEMA, create, insert, one_row, stream
from catdog.dataset.folders import FOLDER
from catdog.dataset.labels import Classes
from catdog.dataset.split import HELD_OUT
from catdog.errors import ImageError, UsageError
from catdog.schema import CLASS_NAMES, SPLITS
from catdog.storage import patterns
from catdog.storage.manifests import Columns
from catdog.storage.names import is_other_name, looks_like_image
from catdog.storage.patterns import Chosen
from catdog.storage.sifting import NOT_AN_IMAGE
from catdog.storage.urls import split_member

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Collection:
    """What is to be said of a collection besides its files."""

    label_rows: int | None
    """Number of rows of the tables of labels or splits; None if there is no table."""

    unmatched_label_rows: int | None
    """How many of these rows name no listed file, or lack a label."""

    given: dict[str, int]
    """Split → number of labelled files that a table or their folders give to it. Empty if neither decides."""


def list_collection(connection: duckdb.DuckDBPyConnection, config: PrepareConfig) -> Collection:
    """Fill the catalogue with the files of a collection, their labels, and the splits that they came with.

    Raises:
        UsageError: an image has no label, two labels or an unknown one, or a class has no images.
    """
    classes = Classes(config.other_names)
    tables = label_tables.find(config)
    has_labels = tables is not None and tables.has_labels and tables.has_all_labels
    create(connection, "listing", LISTING_SCHEMA)
    connection.execute("CREATE TABLE row_splits (row BIGINT, split VARCHAR)")
    takes_prefix = config.labels in ("auto", "prefix") and not has_labels
    files = enumerate(_list_sources(config))
    while batch := list(islice(files, BATCH_ROWS)):
        rows = [
            (row, file.uri, file.version, file.num_bytes, classes.by_prefix(file.uri) if takes_prefix else None)
            for row, file in batch
        ]
        columns = dict(zip(LISTING_SCHEMA.names, zip(*rows, strict=True), strict=True))
        insert(connection, "listing", pa.table(columns, schema=LISTING_SCHEMA))
    folders.create(connection, classes)
    if config.labels in ("auto", "folder") and not has_labels:
        connection.execute(
            "UPDATE listing SET label = folders.label "
            f"FROM folders WHERE folder = {FOLDER} AND folders.label IS NOT NULL"
        )
    num_rows, num_useless = (None, None) if tables is None else label_tables.match(connection, tables, classes)
    if config.labels == "auto" and not has_labels:
        sidecars.set_labels(connection, classes)
    _check_labels(connection, config)
    return Collection(label_rows=num_rows, unmatched_label_rows=num_useless, given=_set_given(connection, config))


def _list_sources(config: PrepareConfig) -> Iterator[storage.SourceFile]:
    chosen = Chosen(include=config.include, exclude=config.exclude)
    columns = Columns(uri=config.uri_column)
    num_listed = num_left_out = 0
    for source in config.sources:
        listing = storage.list_images(source, exclude=config.output, chosen=chosen, columns=columns)
        for file in listing:
            num_listed += 1
            yield file
        num_left_out += listing.num_left_out
    if num_left_out and not num_listed:
        raise UsageError(
            "--include and --exclude must leave some files to prepare. "
            f"Received: none of the {num_left_out} files and archives in --images. (Globs need quotes.)"
        )


_SNIFF_FILES: Final = 64
"""Unlabelled files that are looked into together."""


def _check_labels(connection: duckdb.DuckDBPyConnection, config: PrepareConfig) -> None:
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
                "table given with --labels; --class-names gives other names, and --exclude leaves files out"
                f"{_way_out(connection, config, images[0])}. "
                f"Received: {num_unlabelled} of {num_files} files without one, the first: {images[0]}"
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
            raise UsageError(
                f"Every class must have images. Received: none labelled {name} among {num_files} files"
                + _first_other(connection)
            )


def _first_other(connection: duckdb.DuckDBPyConnection) -> str:
    """In an error, how many files have no label because they cannot be images."""
    (num, uri, message) = one_row(
        connection, "SELECT count(*), arg_min(uri, row), arg_min(message, row) FROM others JOIN listing USING (row)"
    )
    return f"; {num} have no label, the first: {uri}: {message}" if num else ""


def _way_out(connection: duckdb.DuckDBPyConnection, config: PrepareConfig, uri: str) -> str:
    """In an error, the flag that leaves out the outermost folder of a file that holds no labelled file, if any does."""
    base = next((found for source in config.sources if (found := _base(source)) and _below(uri, found)), None)
    if base is None:
        return ""
    labelled: set[str] = set()
    for batch in stream(connection, f"SELECT DISTINCT {FOLDER} AS folder FROM listing WHERE label IS NOT NULL"):
        for folder in batch["folder"].to_pylist():
            parts = [part for part in _below(folder, base).split("/") if part]
            labelled.update("/".join(parts[: depth + 1]) for depth in range(len(parts)))
    parts = _below(uri, base).split("/")[:-1]
    folders_of_file = ("/".join(parts[: depth + 1]) for depth in range(len(parts)))
    outermost_one = next((folder for folder in folders_of_file if folder not in labelled), None) if labelled else None
    return "" if outermost_one is None else f" (--exclude {shlex.quote(outermost_one + '/')})"


def _base(source: str) -> str:
    """The directory or the archive that a place of images is, or where a glob starts."""
    place = storage.absolute(source)
    is_glob = patterns.is_glob(place) and not storage.exists(place)
    return patterns.fixed(place).rpartition("/")[0] if is_glob else place


def _below(uri: str, base: str) -> str:
    """The path of a file, or of a folder, below a place of images, as --exclude has it; "" if it is not there."""
    inner: list[str] = []
    while uri != base and (chained := split_member(uri)) is not None:
        inner.insert(0, chained[0])
        uri = chained[1]
    if uri != base and not uri.startswith(base.rstrip("/") + "/"):
        return ""
    outer = uri.removeprefix(base).strip("/")
    return "/".join([outer, *inner] if outer else inner)


def _others(files: list[tuple[int, str, int]]) -> Iterator[tuple[str, str] | None]:
    """For each unlabelled file (row, uri, size) the reason and the message of its rejection; None for an image."""
    unsure = [(uri, num_bytes) for _, uri, num_bytes in files if not is_other_name(uri)]
    contents = storage.read_sources([uri for uri, _ in unsure], [num_bytes for _, num_bytes in unsure])
    for _, uri, _ in files:
        if is_other_name(uri):
            yield NOT_AN_IMAGE, "neither labelled nor an image by its name"
            continue
        content = next(contents)
        if isinstance(content, ImageError):
            yield content.code, f"not labelled; {content}"
        elif looks_like_image(content):
            yield None
        else:
            yield NOT_AN_IMAGE, "neither labelled nor an image by its first bytes"


def _set_given(connection: duckdb.DuckDBPyConnection, config: PrepareConfig) -> dict[str, int]:
    """Fill the table `given` with the splits that the collection came with, if they are kept, and say what was found.

    Those in a table count, else those that folders name. They are kept if some are `val` or `test`, and other files are
    left to train with.
    """
    connection.execute("CREATE TABLE given (row BIGINT, split VARCHAR)")
    if config.split == "random" or config.test_fraction == 1:
        return {}
    (is_in_table,) = one_row(connection, "SELECT count(*) > 0 FROM row_splits")
    joined = (
        "listing LEFT JOIN row_splits USING (row) WHERE label IS NOT NULL"
        if is_in_table
        else f"listing JOIN folders ON folder = {FOLDER} WHERE listing.label IS NOT NULL"
    )
    found = Counter[str | None](dict(connection.execute(f"SELECT split, count(*) FROM {joined} GROUP BY 1").fetchall()))
    num_held_out = sum(found[split] for split in HELD_OUT)
    if not num_held_out or num_held_out == found.total():
        if config.split == "keep":
            raise UsageError(
                "--split=keep needs files that folders, or a column named split, give to val or test, and others to "
                "train with. (--test-fraction 1 makes a dataset to evaluate with alone.) Received: "
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
        "%s the split: %s. %d other files count as train%s. (--split random splits anew.)",
        "A column decides" if is_in_table else "The folders decide",
        ", ".join(f"{num} {split}" for split, num in given.items()),
        found[None],
        f"; {drawn[0]} is drawn from train" if drawn else "",
    )
    return given
