"""The class of a listed image, from its folder, its file name, or a table of labels."""

import os
import posixpath
import re
import unicodedata
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import PurePosixPath
from typing import Any, Final

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from catdog import storage
from catdog.errors import UsageError
from catdog.schema import CLASS_NAMES
from catdog.storage.names import archive_scheme, without_archive_suffix
from catdog.storage.urls import member_uri, split_member

RULES: Final = ("auto", "folder", "prefix")
"""The values of `--labels` that are not a table."""

TABLE_SCHEMA: Final = pa.schema(
    [
        ("number", pa.int64()),
        ("written", pa.string()),
        ("verbatim", pa.string()),
        ("uri", pa.string()),
        ("member", pa.string()),
        ("label", pa.string()),
    ]
)
"""A row of a table of labels: its number, from 1; its `uri` as it is written; that as the listing would have it,
verbatim and normalised; the path that it has within an archive, null for an absolute `uri`; and its label. What is
missing is null."""

_COLUMNS: Final = ("uri", "label")

_PREFIX: Final = re.compile(r"[A-Za-z]+")


def class_index(name: str) -> int | None:
    """Index into `CLASS_NAMES` of a class that is named `cat`, `Cats`, `DOG`, ...; None for any other name."""
    singular = name.strip().lower().removesuffix("s")
    return CLASS_NAMES.index(singular) if singular in CLASS_NAMES else None


def _path(uri: str) -> PurePosixPath:
    """The path within the archive or storage: `train/cat.1.jpg` for `zip://train/cat.1.jpg::s3://bucket/train.zip`."""
    return PurePosixPath(uri.split("::", 1)[0].split("://", 1)[-1])


def folders(uri: str) -> list[str]:
    """The names of the folders above a file, or of a folder's URL that ends in a slash, the outermost first.

    An archive counts as a folder, without its suffix.
    """
    places: list[str] = []
    while (chained := split_member(uri)) is not None:
        places.insert(0, chained[0])
        uri = chained[1]
    found: list[str] = []
    for place in [uri, *places]:
        if found:
            found[-1] = without_archive_suffix(found[-1])
        found += [part for part in place.split("/") if part]
    is_folder = (places[-1] if places else uri).endswith("/") or places[-1:] == [""]
    return found if is_folder else found[:-1]


def by_folder(uri: str) -> int | None:
    """Index of the class that the parent folder is named after, or None."""
    return class_index(_path(uri).parent.name)


def by_prefix(uri: str) -> int | None:
    """Index of the class that the file name begins with, as in `cat.123.jpg` and `dog_7.png`, or None."""
    letters = _PREFIX.match(_path(uri).name)
    return class_index(letters.group()) if letters else None


def by_rule(rule: str, uri: str) -> int | None:
    """Index of the class that one of `RULES` gives, or None."""
    index = by_folder(uri) if rule in ("auto", "folder") else None
    if index is None and rule in ("auto", "prefix"):
        index = by_prefix(uri)
    return index


def table_url(labels: str, images: str) -> str | None:
    """The URL of the table that holds the labels; None if they follow from the names of files or folders.

    It is `labels`, unless that is one of `RULES`. With `auto`, it is the manifest `images` if that has a column
    `label`.

    Raises:
        UsageError: `labels` is neither a rule nor the name of a table.
    """
    if labels not in RULES:
        if not labels.lower().endswith((".csv", ".parquet")):
            raise UsageError(
                f"--labels must be auto, folder, prefix, or a .csv or .parquet file. Received: --labels={labels}"
            )
        return labels
    if labels == "auto" and images.lower().endswith(".parquet") and storage.exists(images):
        with storage.open_read(images) as file:
            if "label" in pq.read_schema(file).names:
                return images
    return None


def read_table(url: str, images: str) -> Iterator[pa.Table]:
    """The rows of a table of labels, in batches of `TABLE_SCHEMA`.

    A relative `uri` is taken as relative to `images` if that is a directory or an archive, or to the directory of
    `images` if that is a manifest or a glob. Backslashes become slashes, `./` and `//` go, and accents are composed
    (NFC), as they are in most names.

    Raises:
        UsageError: the table does not exist, cannot be read, or lacks a column.
    """
    if not storage.exists(url):
        raise UsageError(f"A table of labels must exist. Received: --labels={url}")
    place = _placing(images)
    numbers = count(1)
    with storage.open_read(url) as file:
        for batch in _csv_batches(file) if url.lower().endswith(".csv") else _parquet_batches(file):
            names = batch.schema.names
            if not set(_COLUMNS) <= set(names):
                raise UsageError(f"A table of labels must have the columns uri and label. Received: {url} with {names}")
            pairs = zip(*(batch[name].to_pylist() for name in _COLUMNS), strict=True)
            rows = [{"number": next(numbers), **_row(uri, label, place)} for uri, label in pairs]
            yield pa.Table.from_pylist(rows, schema=TABLE_SCHEMA)


def _row(uri: object, label: object, place: Callable[[str], str]) -> dict[str, str | None]:
    """The columns of `TABLE_SCHEMA` for a row of a table, without its number."""
    if uri is None or label is None:
        return {"written": None if uri is None else str(uri)}
    written = str(uri)
    tidy = unicodedata.normalize("NFC", written.strip())
    is_url = "://" in tidy
    if not is_url:
        tidy = posixpath.normpath(tidy.replace("\\", "/")) if tidy else tidy
    is_relative = not is_url and not tidy.startswith("/")
    return {
        "written": written,
        "verbatim": place(written),
        "uri": place(tidy),
        "member": tidy if is_relative else None,
        "label": _class_name(label),
    }


def _placing(images: str) -> Callable[[str], str]:
    """The function that turns a `uri` of a table of labels into the one that the listing of `images` has."""
    root = storage.absolute(images)
    is_glob = not storage.exists(root)
    scheme = None if is_glob else archive_scheme(root)
    if is_glob:
        directory = re.split(r"[*?\[]", root)[0].rpartition("/")[0]
    elif root.lower().endswith(".parquet"):
        directory = root.rpartition("/")[0]
    else:
        directory = root

    def place(uri: str) -> str:
        if "://" in uri or os.path.isabs(uri):
            return storage.absolute(uri)
        return storage.join(directory, uri) if scheme is None else member_uri(uri, root, scheme)

    return place


def _class_name(label: object) -> str:
    """`cat` or `dog` for any of their spellings; any other label as it is."""
    index = class_index(str(label))
    return str(label) if index is None else CLASS_NAMES[index]


def _csv_batches(file: Any) -> Iterator[pa.RecordBatch]:
    try:
        names = pa.csv.open_csv(file).schema.names
        if not set(_COLUMNS) <= set(names):
            yield pa.RecordBatch.from_pylist([], schema=pa.schema([(name, pa.string()) for name in names]))
            return
        file.seek(0)
        # The other columns are not converted: what they hold must not matter.
        as_text = pa.csv.ConvertOptions(
            include_columns=list(_COLUMNS), column_types=dict.fromkeys(_COLUMNS, pa.string())
        )
        yield from pa.csv.open_csv(file, convert_options=as_text)
    except pa.ArrowInvalid as error:
        raise UsageError(f"A table of labels must be readable as CSV. Received: {error}") from error


def _parquet_batches(file: Any) -> Iterator[pa.RecordBatch]:
    try:
        parquet = pq.ParquetFile(file)
    except pa.ArrowInvalid as error:
        raise UsageError(f"A table of labels must be readable as Parquet. Received: {error}") from error
    names = [name for name in parquet.schema_arrow.names if name in _COLUMNS]
    yield from parquet.iter_batches(columns=names)
