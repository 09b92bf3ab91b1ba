"""Tables in files: CSV, TSV, lines of text or of JSON, and Parquet; compressed or not. Batches of rows stream.

A format is a function that opens a file of it. A table of lines of text has one column, `uri`.
"""

import contextlib
import csv
import io
import itertools
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import IO, Any, Final, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from catdog.errors import UsageError
from catdog.provenance import redact
from catdog.storage.filesystems import describe
from catdog.storage.reading import open_read

BATCH_ROWS: Final = 1024
"""Largest number of rows of a batch."""

_NAME: Final = re.compile(
    r"[^/]\.(?:(?P<csv>csv)|(?P<tsv>tsv|tab)|(?P<text>txt)|(?P<json>jsonl|ndjson|json)|(?P<parquet>parquet|parq|pq))"
    r"(?:\.(?P<compression>gz|zst|bz2))?$",
    re.IGNORECASE,
)
_COMPRESSIONS: Final = {"gz": "gzip", "zst": "zstd", "bz2": "bz2"}
"""Suffix → pyarrow's name."""

_BOM: Final = b"\xef\xbb\xbf"
_HEADER_BYTES: Final = 2**20
"""Length of the longest header of a CSV file."""

_READ_BYTES: Final = 2**20


class Embedded(NamedTuple):
    """The value of a column of images, in a row that holds the image itself."""

    num_bytes: int
    """About the size of the image: the average of the rows that lie beside it."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """An open table.

    Attributes:
        url: the file.
        names: the names of its columns.
        images: those of the columns that hold images.
        classes: column → the names of the classes whose numbers it holds, as Hugging Face's Parquet files say.
    """

    url: str
    names: Sequence[str]
    batches: Callable[[Sequence[str]], Iterator[list[tuple[Any, ...]]]]
    """The rows, in batches, each with the values of these columns."""

    images: frozenset[str] = frozenset()
    classes: dict[str, list[str]] = field(default_factory=dict)


def format_of(url: str) -> str | None:
    """`csv`, `tsv`, `text`, `json` or `parquet`, as the name of a file says; None if it is that of no table.

    >>> format_of("s3://bucket/lists/part-0.csv.gz"), format_of("/photos/cat.jpg")
    ('csv', None)
    """
    found = _NAME.search(url)
    return None if found is None else next(name for name in _OPENERS if found[name])


def stem_of(name: str) -> str:
    """The name of a table without its suffixes; any other name as it is."""
    found = _NAME.search(name)
    return name if found is None else name[: found.start() + 1]


@contextlib.contextmanager
def open_table(url: str) -> Iterator[Table]:
    """Open a table for the length of a `with` block.

    Raises:
        UsageError: the file is not what its name says. Reading its rows raises it too.
        FileNotFoundError: there is no such file.
        StorageError: the storage failed. Reading its rows raises it too.
    """
    kind = format_of(url)
    if kind is None:
        raise UsageError(
            "A table must be a .csv, .tsv, .txt, .jsonl, .ndjson, .json or .parquet file, compressed (.gz, .zst, .bz2) "
            f"or not. Received: {redact(url)}"
        )
    with _explaining(url), contextlib.ExitStack() as stack:
        yield _OPENERS[kind](url, stack)


def open_parquet(url: str, stack: contextlib.ExitStack) -> pq.ParquetFile:
    """Open a Parquet file, which `stack` closes."""
    file = _open_file(url, stack)
    if isinstance(file, pa.NativeFile):  # compressed as a whole: Parquet is not read from its beginning to its end
        import tempfile

        whole = tempfile.TemporaryFile(prefix="catdog-table-")  # noqa: SIM115 - `stack` closes it
        stack.callback(whole.close)
        while data := file.read(_READ_BYTES):
            whole.write(data)
        file = whole
    # Without a buffer, the whole column of a row group is read at once: the images of hundreds of rows.
    return pq.ParquetFile(file, buffer_size=_READ_BYTES)


@contextlib.contextmanager
def _explaining(url: str) -> Iterator[None]:
    kind = format_of(url)
    try:
        yield
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, UnicodeDecodeError) as error:
        words = f"not {kind} in UTF-8" if isinstance(error, UnicodeDecodeError) else describe(error)
        raise UsageError(f"A table must be what its name says: {words}. Received: {redact(url)}") from error
    except OSError as error:
        if error.errno is not None:
            raise
        raise UsageError(f"A table must be whole: {describe(error)}. Received: {redact(url)}") from error


def _open_file(url: str, stack: contextlib.ExitStack) -> Any:
    """A binary file, decompressed."""
    file = stack.enter_context(open_read(url))
    found = _NAME.search(url)
    if found is None or not found["compression"]:
        return file
    return stack.enter_context(pa.CompressedInputStream(file, _COMPRESSIONS[found["compression"].lower()]))


def _open_lines(url: str, stack: contextlib.ExitStack) -> IO[bytes]:
    return stack.enter_context(io.BufferedReader(_open_file(url, stack), _READ_BYTES))


def _in_batches(rows: Iterator[tuple[Any, ...]]) -> Iterator[list[tuple[Any, ...]]]:
    while batch := list(itertools.islice(rows, BATCH_ROWS)):
        yield batch


def _open_text(url: str, stack: contextlib.ExitStack) -> Table:
    def batches(names: Sequence[str]) -> Iterator[list[tuple[Any, ...]]]:
        # A path of a name that is not UTF-8 is one nevertheless: `find` writes it so.
        decoded = io.TextIOWrapper(_open_lines(url, stack), "utf-8-sig", errors="surrogateescape", newline="\n")
        file = stack.enter_context(decoded)
        lines = (line.removesuffix("\n").removesuffix("\r") for line in file)
        return _in_batches((line,) * len(names) for line in lines if line.strip())

    return Table(url=url, names=["uri"], batches=batches)


def _open_json(url: str, stack: contextlib.ExitStack) -> Table:
    def objects() -> Iterator[dict[str, Any]]:
        number = 0
        for line in _open_lines(url, stack):
            text = line.removeprefix(_BOM) if number == 0 else line
            if not text.strip():
                continue
            number += 1
            try:
                found = json.loads(text)
            except ValueError as error:
                found = error
            if not isinstance(found, dict):
                raise UsageError(
                    f"A table of JSON lines must have one object a line. Received: {redact(url)}, whose row {number} "
                    f"is {text[:60].decode(errors='replace').strip()!r}"
                )
            yield found

    rows = objects()
    first = list(itertools.islice(rows, BATCH_ROWS))

    def batches(names: Sequence[str]) -> Iterator[list[tuple[Any, ...]]]:
        return _in_batches(tuple(map(row.get, names)) for row in itertools.chain(first, rows))

    return Table(url=url, names=list(dict.fromkeys(itertools.chain(*first))), batches=batches)


def _open_csv(url: str, stack: contextlib.ExitStack, *, delimiter: str = ",") -> Table:
    with contextlib.ExitStack() as head, _explaining(url):
        header = _open_lines(url, head).readline(_HEADER_BYTES).removeprefix(_BOM).decode().strip("\r\n")
    if delimiter == "," and "," not in header:  # as Excel writes them where the comma is that of decimals
        delimiter = next((other for other in (";", "\t") if other in header), delimiter)
    names = [name.strip() for name in next(csv.reader([header], delimiter=delimiter), [])]

    def batches(wanted: Sequence[str]) -> Iterator[list[tuple[Any, ...]]]:
        import pyarrow.csv

        # The other columns are not converted: what they hold must not matter.
        places = [str(names.index(name)) for name in wanted]
        reader = pyarrow.csv.open_csv(
            _open_file(url, stack),
            read_options=pyarrow.csv.ReadOptions(
                column_names=[str(place) for place in range(len(names))], skip_rows=1, use_threads=False
            ),
            parse_options=pyarrow.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
            convert_options=pyarrow.csv.ConvertOptions(
                include_columns=places, column_types=dict.fromkeys(places, pa.string())
            ),
        )
        return _rows_of(reader, places)

    return Table(url=url, names=names, batches=batches)


def _rows_of(batches: Iterator[pa.RecordBatch], names: Sequence[str]) -> Iterator[list[tuple[Any, ...]]]:
    for batch in batches:
        for start in range(0, batch.num_rows, BATCH_ROWS):
            part = batch.slice(start, BATCH_ROWS)
            yield list(zip(*(part[name].to_pylist() for name in names), strict=True))


def _open_parquet_table(url: str, stack: contextlib.ExitStack) -> Table:
    parquet = open_parquet(url, stack)
    schema = parquet.schema_arrow
    images = frozenset(field.name for field in schema if _holds_images(field.type))

    def batches(wanted: Sequence[str]) -> Iterator[list[tuple[Any, ...]]]:
        if images.isdisjoint(wanted):
            return _rows_of(parquet.iter_batches(BATCH_ROWS, columns=list(wanted)), wanted)
        return _rows_with_images(parquet, wanted, images)

    return Table(url=url, names=schema.names, batches=batches, images=images, classes=_classes(schema))


def _holds_images(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        names = [field.name for field in kind]
        return "bytes" in names and _holds_images(kind.field("bytes").type)
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def image_column(schema: pa.Schema, name: str) -> str:
    """The path, in a Parquet file, of the bytes of a column of images."""
    return f"{name}.bytes" if pa.types.is_struct(schema.field(name).type) else name


def _rows_with_images(
    parquet: pq.ParquetFile, wanted: Sequence[str], images: frozenset[str]
) -> Iterator[list[tuple[Any, ...]]]:
    """Rows whose images are not read, but stand as `Embedded`, or as the path of an image that lies elsewhere."""
    for group in range(parquet.num_row_groups):
        columns = [_image_values(parquet, group, name) if name in images else None for name in wanted]
        others = [name for name in wanted if name not in images]
        rows = (
            itertools.chain.from_iterable(_rows_of(parquet.iter_batches(BATCH_ROWS, [group], others), others))
            if others
            else itertools.repeat(())
        )
        num_rows = parquet.metadata.row_group(group).num_rows

        def joined(row: tuple[Any, ...], columns: Sequence[Iterator[Any] | None] = columns) -> tuple[Any, ...]:
            values = iter(row)
            return tuple(next(values) if column is None else next(column) for column in columns)

        yield from _in_batches(map(joined, itertools.islice(rows, num_rows)))


def _image_values(parquet: pq.ParquetFile, group: int, name: str) -> Iterator[Any]:
    column = image_column(parquet.schema_arrow, name)
    metadata = parquet.metadata.row_group(group)
    chunks = (metadata.column(index) for index in range(metadata.num_columns))
    chunk = next(chunk for chunk in chunks if chunk.path_in_schema == column)
    embedded = Embedded(chunk.total_uncompressed_size // max(metadata.num_rows, 1))
    statistics = chunk.statistics
    num_null = statistics.null_count if statistics is not None and statistics.has_null_count else None
    if num_null == 0:
        return itertools.repeat(embedded, metadata.num_rows)
    return _mixed_values(parquet, group, name, embedded)


def _mixed_values(parquet: pq.ParquetFile, group: int, name: str, embedded: Embedded) -> Iterator[Any]:
    for batch in parquet.iter_batches(16, [group], [name]):
        column = batch.column(0)
        if not pa.types.is_struct(column.type):
            yield from (embedded if is_there else None for is_there in column.is_valid().to_pylist())
            continue
        is_there = column.field("bytes").is_valid().to_pylist()
        has_path = column.type.get_field_index("path") >= 0
        paths = column.field("path").to_pylist() if has_path else [None] * len(column)
        yield from (embedded if there else path for there, path in zip(is_there, paths, strict=True))


def _classes(schema: pa.Schema) -> dict[str, list[str]]:
    """Column → names of its classes, from what Hugging Face's `datasets` writes into a Parquet file."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {
            name: [str(each) for each in feature["names"]]
            for name, feature in features.items()
            if isinstance(feature, dict) and feature.get("_type") == "ClassLabel"
        }
    except (KeyError, ValueError, TypeError):
        return {}


_OPENERS: Final[dict[str, Callable[[str, contextlib.ExitStack], Table]]] = {
    "csv": _open_csv,
    "tsv": partial(_open_csv, delimiter="\t"),
    "text": _open_text,
    "json": _open_json,
    "parquet": _open_parquet_table,
}
