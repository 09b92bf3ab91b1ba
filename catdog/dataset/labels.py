"""The class of a listed image, from its folder, its file name, or a table of labels."""

import re
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any, Final

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from catdog import storage
from catdog.errors import UsageError
from catdog.schema import CLASS_NAMES

RULES: Final = ("auto", "folder", "prefix")
"""The values of `--labels` that are not a table."""

TABLE_SCHEMA: Final = pa.schema([("uri", pa.string()), ("label", pa.string())])

_OTHER_SUFFIX: Final = re.compile(r"\.(csv|db|docx|html|ini|json|log|md|parquet|pdf|tsv|txt|xml|yml)", re.IGNORECASE)
_PREFIX: Final = re.compile(r"[A-Za-z]+")


def class_index(name: str) -> int | None:
    """Index into `CLASS_NAMES` of a class that is named `cat`, `Cats`, `DOG`, ...; None for any other name."""
    singular = name.strip().lower().removesuffix("s")
    return CLASS_NAMES.index(singular) if singular in CLASS_NAMES else None


def _path(uri: str) -> PurePosixPath:
    """The path within the archive or storage: `train/cat.1.jpg` for `zip://train/cat.1.jpg::s3://bucket/train.zip`."""
    return PurePosixPath(uri.split("::", 1)[0].split("://", 1)[-1])


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


def is_other_file(uri: str) -> bool:
    """Whether the file's name says that it is no image, but a read-me, say, or a licence beside the photographs."""
    return _OTHER_SUFFIX.fullmatch(_path(uri).suffix) is not None


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
    """The rows of a table of labels, in batches of `TABLE_SCHEMA`, each `uri` as the listing has it.

    A relative `uri` is taken as relative to `images` if that is a directory or an archive, or to the directory of
    `images` if that is a manifest or a glob.

    Raises:
        UsageError: the table does not exist, cannot be read, or lacks a column.
    """
    if not storage.exists(url):
        raise UsageError(f"A table of labels must exist. Received: --labels={url}")
    with storage.open_read(url) as file:
        for batch in _csv_batches(file) if url.lower().endswith(".csv") else _parquet_batches(file):
            names = batch.schema.names
            if not {"uri", "label"} <= set(names):
                raise UsageError(f"A table of labels must have the columns uri and label. Received: {url} with {names}")
            pairs = zip(batch["uri"].to_pylist(), batch["label"].to_pylist(), strict=True)
            rows = [
                {"uri": _listed_uri(uri, images), "label": _class_name(label)}
                for uri, label in pairs
                if uri is not None and label is not None
            ]
            yield pa.Table.from_pylist(rows, schema=TABLE_SCHEMA)


def _class_name(label: object) -> str:
    """`cat` or `dog` for any of their spellings; any other label as it is."""
    index = class_index(str(label))
    return str(label) if index is None else CLASS_NAMES[index]


def _csv_batches(file: Any) -> Iterator[pa.RecordBatch]:
    as_text = pa.csv.ConvertOptions(column_types={"uri": pa.string(), "label": pa.string()})
    try:
        yield from pa.csv.open_csv(file, convert_options=as_text)
    except pa.ArrowInvalid as error:
        raise UsageError(f"A table of labels must be readable as CSV. Received: {error}") from error


def _parquet_batches(file: Any) -> Iterator[pa.RecordBatch]:
    try:
        parquet = pq.ParquetFile(file)
    except pa.ArrowInvalid as error:
        raise UsageError(f"A table of labels must be readable as Parquet. Received: {error}") from error
    names = [name for name in parquet.schema_arrow.names if name in TABLE_SCHEMA.names]
    yield from parquet.iter_batches(columns=names)


def _listed_uri(uri: str, images: str) -> str:
    """A `uri` of a table of labels as the listing has it."""
    root = storage.absolute(images)
    if "://" in uri or uri.startswith("/"):
        return storage.absolute(uri)
    if root.lower().endswith(".zip"):
        return f"zip://{uri}::{root}"
    fixed = re.split(r"[*?\[]", root)[0]
    is_directory = fixed == root and not root.lower().endswith(".parquet")
    return storage.join(root if is_directory else fixed.rpartition("/")[0], uri)
