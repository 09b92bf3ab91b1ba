"""Tables in files: CSV, TSV, lines of text or of JSON, and Parquet; compressed or not. Batches of rows stream.

A format is a function that opens a file of it. A table of lines of text has one column, `uri`; but a `.txt` whose first
line has the header of a table, as Excel writes its "Unicode text", is that table. Text is UTF-8, or UTF-16 with the
mark that Windows writes at its beginning. A file of JSON may also be one array of objects, which is read into memory.
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

COLUMN_NAMES: Final = {
    "uri": ("uri", "path", "file", "file_name", "filename", "filepath", "image", "url"),
    "label": ("label", "labels", "class", "category"),
    "split": ("split",),
    "num_bytes": ("num_bytes", "size"),
    "version": ("version", "etag"),
}
"""What a column may be named, in upper or lower case, by what it holds."""

ID_NAMES: Final = ("image_path", "image_name", "image_id", "id")
"""What else a column of names may be named, if there is none of `COLUMN_NAMES`. Kaggle's tables have `id`."""

_BOM: Final = b"\xef\xbb\xbf"
_BOMS_16: Final = (b"\xff\xfe", b"\xfe\xff")
_HEADER_BYTES: Final = 2**20
"""Length of the longest header of a CSV file."""

_READ_BYTES: Final = 2**20

MAX_ARRAY_BYTES: Final = 64 * 2**20
"""Size of the largest JSON array that is read. In memory, its objects take some ten times as much."""


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

    is_empty: bool = False
    """Whether it has neither rows nor columns, as a file of JSON lines on a night without new images."""

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
    with explaining(url, kind), contextlib.ExitStack() as stack:
        yield _OPENERS[kind](url, stack)


def open_parquet(url: str, stack: contextlib.ExitStack) -> pq.ParquetFile:
    """Open a Parquet file, which `stack` closes."""
    file = open_file(url, stack)
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
def explaining(url: str, kind: str) -> Iterator[None]:
    """Turn the errors that reading a table raises, for what is in it, into `UsageError`."""
    try:
        yield
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, UnicodeDecodeError) as error:
        is_encoding = isinstance(error, UnicodeDecodeError) or "invalid UTF8" in str(error)
        words = f"not {kind} in UTF-8, as which it must be saved" if is_encoding else describe(error)
        raise UsageError(f"A table must be what its name says: {words}. Received: {redact(url)}") from error
    except OSError as error:
        if error.errno is not None:
            raise
        raise UsageError(f"A table must be whole: {describe(error)}. Received: {redact(url)}") from error


def open_file(url: str, stack: contextlib.ExitStack) -> Any:
    """A binary file, decompressed, which `stack` closes."""
    file = stack.enter_context(open_read(url))
    found = _NAME.search(url)
    if found is None or not found["compression"]:
        return file
    return stack.enter_context(pa.CompressedInputStream(file, _COMPRESSIONS[found["compression"].lower()]))


def open_lines(url: str, stack: contextlib.ExitStack) -> io.BufferedReader:
    """A file of lines of text, decompressed and in UTF-8, which `stack` closes."""
    file = stack.enter_context(io.BufferedReader(open_file(url, stack), _READ_BYTES))
    if not file.peek(2).startswith(_BOMS_16):
        return file
    decoded = pa.transcoding_input_stream(pa.PythonFile(file, "r"), "utf-16", "utf-8")
    return stack.enter_context(io.BufferedReader(decoded, _READ_BYTES))


def _first_line(url: str) -> str:
    with contextlib.ExitStack() as head, explaining(url, format_of(url) or ""):
        return open_lines(url, head).readline(_HEADER_BYTES).removeprefix(_BOM).decode().strip("\r\n")


def _in_batches(rows: Iterator[tuple[Any, ...]]) -> Iterator[list[tuple[Any, ...]]]:
    while batch := list(itertools.islice(rows, BATCH_ROWS)):
        yield batch


def _open_text(url: str, stack: contextlib.ExitStack) -> Table:
    try:
        header = _first_line(url)
    except UsageError:  # a path that is not UTF-8, say
        header = ""
    for delimiter in "\t;,":
        names = [name.strip().strip('"').casefold() for name in header.split(delimiter)]
        if len(names) > 1 and not {*COLUMN_NAMES["uri"], *ID_NAMES}.isdisjoint(names):
            return _open_csv(url, stack, delimiter=delimiter)

    def batches(names: Sequence[str]) -> Iterator[list[tuple[Any, ...]]]:
        # A path of a name that is not UTF-8 is one nevertheless: `find` writes it so.
        decoded = io.TextIOWrapper(open_lines(url, stack), "utf-8-sig", errors="surrogateescape", newline="\n")
        file = stack.enter_context(decoded)
        lines = (line.removesuffix("\n").removesuffix("\r") for line in file)
        return _in_batches((line,) * len(names) for line in lines if line.strip())

    return Table(url=url, names=["uri"], batches=batches)


def _open_json(url: str, stack: contextlib.ExitStack) -> Table:
    def objects() -> Iterator[dict[str, Any]]:
        number = 0
        lines = open_lines(url, stack)
        for line in lines:
            text = line.removeprefix(_BOM) if number == 0 else line
            if not text.strip():
                continue
            number += 1
            if number == 1 and text.lstrip().startswith(b"["):
                yield from _array(url, text, lines)
                return
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

    names = list(dict.fromkeys(itertools.chain(*first)))
    return Table(url=url, names=names, batches=batches, is_empty=not first)


def _array(url: str, first_line: bytes, lines: IO[bytes]) -> list[dict[str, Any]]:
    """The objects of a JSON array."""
    text = first_line + lines.read(MAX_ARRAY_BYTES + 1)
    if len(text) > MAX_ARRAY_BYTES:
        raise UsageError(
            f"A JSON array must have at most {MAX_ARRAY_BYTES} bytes; write one object a line instead, without the "
            f"brackets and commas around them. Received: {redact(url)}"
        )
    try:
        found = json.loads(text)
        number = next((number for number, each in enumerate(found, start=1) if not isinstance(each, dict)), None)
        words = None if number is None else f"row {number} is {str(found[number - 1])[:60]}"
    except ValueError as error:
        words = f"which is not JSON: {error}"
    if words is not None:
        raise UsageError(f"A JSON array must be one of objects. Received: {redact(url)}, {words}")
    return list(found)


def _open_csv(url: str, stack: contextlib.ExitStack, *, delimiter: str = ",") -> Table:
    header = _first_line(url)
    if delimiter == "," and "," not in header:  # as Excel writes them where the comma is that of decimals
        delimiter = next((other for other in (";", "\t") if other in header), delimiter)
    names = [name.strip() for name in next(csv.reader([header], delimiter=delimiter), [])]

    def batches(wanted: Sequence[str]) -> Iterator[list[tuple[Any, ...]]]:
        import pyarrow.csv

        # The other columns are not converted: what they hold must not matter.
        places = [str(names.index(name)) for name in wanted]
        reader = pyarrow.csv.open_csv(
            open_lines(url, stack),
            read_options=pyarrow.csv.ReadOptions(
                column_names=[str(place) for place in range(len(names))], skip_rows=1, use_threads=False
            ),
            parse_options=pyarrow.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
            convert_options=pyarrow.csv.ConvertOptions(
                include_columns=places, column_types=dict.fromkeys(places, pa.string())
            ),
        )
        return _rows_of(reader, places)

    return Table(url=url, names=names, batches=batches, is_empty=not names and _is_blank(url))


def _is_blank(url: str) -> bool:
    with contextlib.ExitStack() as stack, explaining(url, format_of(url) or ""):
        return all(not line.strip() for line in open_lines(url, stack))


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

    is_empty = not schema.names and not parquet.metadata.num_rows
    return Table(
        url=url, names=schema.names, batches=batches, is_empty=is_empty, images=images, classes=_classes(schema)
    )


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
