"""S3 Inventory: the list of a bucket's objects that S3 itself writes, once a day or a week.

Its `manifest.json` names data files, without header, in CSV (compressed), Parquet or ORC. They lie in the bucket that
`manifest.json` names, wherever it is read from itself. A row is an object: it has the version and the size that a
listing of the bucket would give, so that no request is made for it.
"""

import contextlib
import json
import urllib.parse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from catdog.errors import UsageError
from catdog.provenance import redact
from catdog.storage import tables
from catdog.storage.filesystems import SourceFile
from catdog.storage.names import is_hidden
from catdog.storage.reading import read_bytes
from catdog.storage.walking import Skip

NAME: Final = "manifest.json"
_MAX_BYTES: Final = 2**26

OLD_VERSION: Final = "old_version"
"""The reason for which a row is skipped that is no object of today: an earlier version, or the mark of a deletion."""

_WANTED: Final = ("bucket", "key", "size", "etag", "islatest", "isdeletemarker")
"""Columns, without underscores and in lower case: CSV's are called `ETag` and `IsLatest`, those of the others `e_tag`
and `is_latest`."""

_ARN: Final = "arn:aws:s3:::"


@dataclass(frozen=True, kw_only=True)
class Inventory:
    """What a `manifest.json` says."""

    bucket: str
    """The bucket that is listed."""

    kind: str
    """The format of the data files: `csv`, `parquet` or `orc`."""

    files: Sequence[str]
    """The URLs of the data files."""

    names: Sequence[str]
    """The columns of data files in CSV."""


def find(url: str) -> Inventory | None:
    """The inventory that a file describes; None if it is another file.

    Raises:
        UsageError: it is one, but not of a kind that is known.
        FileNotFoundError, StorageError: as `open_read`.
    """
    if url.rpartition("/")[2] != NAME:
        return None
    data = read_bytes(url)
    try:
        found = json.loads(data) if len(data) <= _MAX_BYTES else None
    except ValueError:
        return None
    if not (isinstance(found, dict) and {"sourceBucket", "fileFormat", "fileSchema", "files"} <= found.keys()):
        return None
    kind = str(found["fileFormat"]).lower()
    if kind not in _READERS:
        raise UsageError(f"An S3 Inventory must be in CSV, Parquet or ORC. Received: {redact(url)} with {kind}")
    bucket = str(found.get("destinationBucket", found["sourceBucket"])).removeprefix(_ARN)
    return Inventory(
        bucket=str(found["sourceBucket"]),
        kind=kind,
        files=[f"s3://{bucket}/{file['key']}" for file in found["files"]],
        names=[name.strip() for name in found["fileSchema"].split(",")] if kind == "csv" else [],
    )


def list_objects(inventory: Inventory, look_up: Callable[[str], SourceFile | None], skip: Skip) -> Iterator[SourceFile]:
    """The objects of an inventory, in its order. Hidden names and folders are left out, as in a listing of the bucket.

    Args:
        inventory: what `find` has found.
        look_up: finds an object whose row has no ETag.
        skip: is told of the rows that are no objects of today.

    Raises:
        UsageError: a data file is not what the inventory says, or lacks the columns of buckets and keys.
        FileNotFoundError, StorageError: as `open_read`.
    """
    for url in inventory.files:
        with contextlib.ExitStack() as stack, tables.explaining(url, inventory.kind):
            for row in _READERS[inventory.kind](inventory, url, stack):
                key = str(row["key"])
                uri = f"s3://{row['bucket']}/{key}"
                if _is(row.get("islatest"), False) or _is(row.get("isdeletemarker"), True):
                    skip(OLD_VERSION, uri)
                elif not key.endswith("/") and not is_hidden(key):
                    etag = str(row.get("etag") or "").strip('"')
                    found = SourceFile(uri, etag, int(row.get("size") or 0)) if etag else look_up(uri)
                    yield found or SourceFile(uri, "", 0)


def _is(value: Any, expected: bool) -> bool:
    """Whether a value, which CSV has as text, is this one. An empty one is none."""
    return str(value).lower() == str(expected).lower()


def _read_csv(inventory: Inventory, url: str, stack: contextlib.ExitStack) -> Iterator[dict[str, Any]]:
    import pyarrow as pa
    import pyarrow.csv

    columns = {each: str(inventory.names.index(name)) for each, name in _columns(inventory.names, url).items()}
    places = list(columns.values())
    lines = tables.open_lines(url, stack)
    if not lines.peek(1):
        return  # of a bucket, or a prefix, that was empty
    reader = pyarrow.csv.open_csv(
        lines,
        read_options=pyarrow.csv.ReadOptions(
            column_names=[str(place) for place in range(len(inventory.names))], use_threads=False
        ),
        parse_options=pyarrow.csv.ParseOptions(newlines_in_values=True),
        convert_options=pyarrow.csv.ConvertOptions(
            include_columns=places, column_types=dict.fromkeys(places, pa.string())
        ),
    )
    for row in _dicts(reader, columns):
        # A space is a plus, or %20; a plus is %2B.
        yield {**row, "key": urllib.parse.unquote_plus(row["key"], errors="surrogateescape")}


def _read_parquet(_: Inventory, url: str, stack: contextlib.ExitStack) -> Iterator[dict[str, Any]]:
    parquet = tables.open_parquet(url, stack)
    columns = _columns(parquet.schema_arrow.names, url)
    yield from _dicts(parquet.iter_batches(tables.BATCH_ROWS, columns=list(columns.values())), columns)


def _read_orc(_: Inventory, url: str, stack: contextlib.ExitStack) -> Iterator[dict[str, Any]]:
    import pyarrow.orc

    file = pyarrow.orc.ORCFile(tables.open_file(url, stack))
    columns = _columns(file.schema.names, url)
    stripes = (file.read_stripe(number, list(columns.values())) for number in range(file.nstripes))
    yield from _dicts(stripes, columns)


def _columns(names: Sequence[str], url: str) -> dict[str, str]:
    """Which columns are wanted, by what they are called in `_WANTED`."""
    known = {name.replace("_", "").lower(): name for name in names}
    found: dict[str, str] = {wanted: known[wanted] for wanted in _WANTED if wanted in known}
    if not {"bucket", "key"} <= found.keys():
        raise UsageError(
            f"An S3 Inventory must have the columns Bucket and Key. Received: {redact(url)} with {', '.join(names)}"
        )
    return found


def _dicts(batches: Iterator[Any], columns: dict[str, str]) -> Iterator[dict[str, Any]]:
    for batch in batches:
        for start in range(0, batch.num_rows, tables.BATCH_ROWS):
            part = batch.slice(start, tables.BATCH_ROWS)
            values = (part.column(name).to_pylist() for name in columns.values())
            yield from (dict(zip(columns, row, strict=True)) for row in zip(*values, strict=True))


_READERS: Final[dict[str, Callable[[Inventory, str, contextlib.ExitStack], Iterator[dict[str, Any]]]]] = {
    "csv": _read_csv,
    "parquet": _read_parquet,
    "orc": _read_orc,
}
"""What reads the rows of a data file."""
