"""Images that are values in a Parquet file, as Hugging Face's data sets have them.

`row://image/000000017::s3://bucket/train.parquet` names the value of the column `image` in row 17 of a table, counted
from 1. The same URL names a row of any table that holds no image and names none: reading it says so.
"""

import bisect
import collections
import contextlib
import itertools
import os
import re
import threading
import urllib.parse
import weakref
from collections.abc import Callable, Iterator
from typing import Final, TypeVar

import pyarrow as pa

from catdog.errors import ImageError, UsageError
from catdog.storage import tables
from catdog.storage.filesystems import attempt, describe, info, version_of, version_of_status
from catdog.storage.urls import is_local, local_path

T = TypeVar("T")

_ROW: Final = re.compile(r"row://([^/:]*)/(\d+)::(.*)", re.DOTALL)

_BATCH_ROWS: Final = 16
"""Rows whose images are decompressed together."""

_KEPT_BYTES: Final = 32 * 2**20
"""Images that stay in memory for each open table, because several threads read rows that lie beside each other."""

_MAX_OPEN: Final = 4
"""Tables that a process keeps open at most."""


def row_uri(column: str, number: int, table: str) -> str:
    """The URL of a row, counted from 1. Sorted by their URLs, the rows of a table come in their order.

    >>> row_uri("image", 17, "/data/train.parquet")
    'row://image/000000017::/data/train.parquet'
    """
    return f"row://{urllib.parse.quote(column, safe='')}/{number:09d}::{table}"


def split_row(uri: str) -> tuple[str, int, str] | None:
    """(column, number, table) of the URL of a row; None for any other URL."""
    found = _ROW.fullmatch(uri)
    return None if found is None else (urllib.parse.unquote(found[1]), int(found[2]), found[3])


def version_of_table(url: str) -> str:
    """The version of a table, which is that of its rows. Errors as those of `open`, for a local file."""
    if is_local(url):
        return version_of_status(os.stat(local_path(url)))
    return version_of(info(url, fresh=True))


def read_row(uri: str, version: str | None = None, *, patience_s: float | None = None) -> bytes:
    """The bytes of the image in a row. Thread-safe.

    Args:
        uri: the URL of the row.
        version: the table's version when it was listed.
        patience_s: as for `attempt`.

    Raises:
        ImageError: not_found: the row holds no image, or the table is no longer the one that was listed.
        FileNotFoundError, PermissionError, StorageError: as `attempt`.
    """
    found = split_row(uri)
    if found is None or tables.format_of(found[2]) != "parquet":
        raise ImageError("not_found", "the row names no file")
    column, number, url = found
    opened = _open(url, column, patience_s)
    if version and version != opened.version:
        raise ImageError("not_found", "the table has changed since it was listed")
    try:
        return _attempt(url, lambda: opened.image(number), patience_s)
    except (UsageError, pa.ArrowInvalid) as error:
        raise ImageError("decode_failed", f"the table is damaged: {describe(error)}") from error


def _attempt(url: str, action: Callable[[], T], patience_s: float | None) -> T:
    """As `attempt` for a local table; a remote one is a `RetryingFile`, which tries again each read by itself.

    Whoever reads a remote table waits for its lock, and pyarrow reads it on other threads: if this call took a place
    among the requests in flight meanwhile, none might be left for them.
    """
    return attempt(url, action, patience_s=patience_s) if is_local(url) else action()


class _Images:
    """A column of images of one table. Threads share it, and read one after the other.

    Rows that follow each other are read once. To go back within a row group means to read it from its beginning.
    """

    def __init__(self, url: str, column: str, version: str) -> None:
        self.version = version
        self._lock = threading.Lock()
        closing = contextlib.ExitStack()
        weakref.finalize(self, closing.close)
        self._parquet = tables.open_parquet(url, closing)
        self._column = column
        if column not in self._parquet.schema_arrow.names:
            raise ImageError("not_found", f"the table has no column {column}")
        metadata = self._parquet.metadata
        sizes = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
        self._starts = [0, *itertools.accumulate(sizes)]
        self._kept: collections.OrderedDict[int, list[bytes | None]] = collections.OrderedDict()
        self._kept_bytes = 0
        self._reading: Iterator[tuple[int, list[bytes | None]]] = iter(())
        self._next = self._end = 0

    def image(self, number: int) -> bytes:
        """The image in a row, counted from 1."""
        row = number - 1
        if not 0 <= row < self._starts[-1]:
            raise ImageError("not_found", "the table has no such row")
        start = self._starts[bisect.bisect_right(self._starts, row) - 1]
        first = row - (row - start) % _BATCH_ROWS
        with self._lock:
            if first not in self._kept:
                self._read_to(first)
            image: bytes | None = self._kept[first][row - first]
        if image is None:
            raise ImageError("not_found", "the row names no file")
        return image

    def _read_to(self, first: int) -> None:
        """Read on to the batch that begins with this row."""
        if not self._next <= first < self._end:
            group = bisect.bisect_right(self._starts, first) - 1
            self._next, self._end = self._starts[group], self._starts[group + 1]
            self._reading = self._batches(group)
        for start, images in self._reading:
            self._next = start + len(images)
            self._keep(start, images)
            if start == first:
                return
        raise ImageError("decode_failed", "the table is damaged: a row group is shorter than the file says")

    def _keep(self, start: int, images: list[bytes | None]) -> None:
        self._kept[start] = images
        self._kept_bytes += sum(len(image or b"") for image in images)
        while self._kept_bytes > _KEPT_BYTES and len(self._kept) > 1:
            _, dropped = self._kept.popitem(last=False)
            self._kept_bytes -= sum(len(image or b"") for image in dropped)

    def _batches(self, group: int) -> Iterator[tuple[int, list[bytes | None]]]:
        path = tables.image_column(self._parquet.schema_arrow, self._column)
        start = self._starts[group]
        for batch in self._parquet.iter_batches(_BATCH_ROWS, [group], [path], use_threads=False):
            column = batch.column(0)
            images = (column.field("bytes") if pa.types.is_struct(column.type) else column).to_pylist()
            yield start, images
            start += len(images)


_open_tables: collections.OrderedDict[tuple[str, str, str, int], _Images] = collections.OrderedDict()
_lock: Final = threading.Lock()


def _open(url: str, column: str, patience_s: float | None = None) -> _Images:
    """An open table. A local one that has changed is opened anew; a remote one is looked at when it is opened."""

    def version() -> str:
        return attempt(url, lambda: version_of_table(url), patience_s=patience_s)

    with _lock:
        pid = os.getpid()
        kept = next((key for key in _open_tables if (key[0], key[1], key[3]) == (url, column, pid)), None)
        if kept is None or (is_local(url) and kept[2] != version()):
            key = (url, column, version(), pid)
            _open_tables[key] = _attempt(url, lambda: _Images(url, column, key[2]), patience_s)
            if kept is not None:
                del _open_tables[kept]
            while len(_open_tables) > _MAX_OPEN:
                _open_tables.popitem(last=False)  # what it opened is closed when its last reader lets go of it
            kept = key
        _open_tables.move_to_end(kept)
        return _open_tables[kept]
