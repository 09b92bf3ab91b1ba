"""Reading files: the images of a collection, and what catdog itself writes."""

import collections
import concurrent.futures
import contextlib
import errno
import io
import json
import os
import stat
from collections.abc import Iterator, Sequence
from typing import IO, Any, Final

import pyarrow as pa
import pyarrow.parquet as pq

from catdog.errors import ImageError, UsageError
from catdog.storage import s3
from catdog.storage.archives import read_member
from catdog.storage.filesystems import MAX_CONNECTIONS, attempt, describe, filesystem, open_handle, require
from catdog.storage.urls import absolute, is_local, split_member

MAX_BYTES: Final = 128 * 2**20
"""Size of the largest image file that is read."""

_AHEAD_FILES: Final = 2 * MAX_CONNECTIONS
_AHEAD_BYTES: Final = 32 * 2**20
"""What one call of `read_sources` reads ahead of its consumer at most, by the sizes that it is told.

One file is read ahead however large it is.
"""

_GUESSED_BYTES: Final = _AHEAD_BYTES // MAX_CONNECTIONS
"""What a file of unknown size counts as: 1 MiB, so that each connection has a file to read."""


def read_source(uri: str, expected_bytes: int | None = None) -> bytes:
    """The bytes of one image: a file or a member of an archive. Thread-safe.

    Args:
        uri: as in `SourceFile.uri`.
        expected_bytes: the file's size when it was listed. Without it, a remote storage is asked for the size first.

    Raises:
        ImageError: not_found, permission_denied, too_large or empty_file; for a member of an archive also truncated,
            unsupported_format or decode_failed.
        StorageError: the storage failed.
    """
    try:
        if expected_bytes is not None:
            _check_size(expected_bytes)
        if (chained := split_member(uri)) is not None:
            data = read_member(chained[1], chained[0], MAX_BYTES)
        elif is_local(uri):
            data = attempt(uri, lambda: _read_local(uri))
        else:
            data = attempt(uri, lambda: _read_remote(uri, expected_bytes))
    except PermissionError as error:
        raise ImageError("permission_denied", describe(error)) from error
    # A manifest may name something that is no file: that raises UsageError or ValueError.
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, UsageError, ValueError) as error:
        raise ImageError("not_found", describe(error)) from error
    if not data:
        raise ImageError("empty_file", "the file is empty")
    return data


def read_sources(
    uris: Sequence[str], expected_bytes: Sequence[int | None] | None = None
) -> Iterator[bytes | ImageError]:
    """The bytes of many images, in order. In the place of an image that cannot be read comes its `ImageError`.

    Remote files are fetched concurrently, ahead of the consumer: up to 64 files, and up to 32 MiB.

    Args:
        uris: as in `SourceFile.uri`.
        expected_bytes: the files' sizes when they were listed; None or 0 for an unknown size.

    Raises:
        StorageError: the storage failed.
    """
    sizes = [None] * len(uris) if expected_bytes is None else expected_bytes
    if all(is_local(uri.rpartition("::")[2]) for uri in uris):
        yield from map(_read_or_error, uris, sizes)
        return
    pending: collections.deque[concurrent.futures.Future[bytes | ImageError]] = collections.deque()
    pending_bytes: collections.deque[int] = collections.deque()
    pool = concurrent.futures.ThreadPoolExecutor(MAX_CONNECTIONS, thread_name_prefix="catdog-read")
    try:
        for uri, size in zip(uris, sizes, strict=True):
            num_bytes = size or _GUESSED_BYTES
            while pending and (len(pending) == _AHEAD_FILES or sum(pending_bytes) + num_bytes > _AHEAD_BYTES):
                pending_bytes.popleft()
                yield pending.popleft().result()
            pending.append(pool.submit(_read_or_error, uri, size))
            pending_bytes.append(num_bytes)
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _read_or_error(uri: str, expected_bytes: int | None) -> bytes | ImageError:
    try:
        return read_source(uri, expected_bytes)
    except ImageError as error:
        return error


def _read_local(path: str) -> bytes:
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):  # opening a named pipe would wait for a writer
        raise FileNotFoundError(errno.ENOENT, "not a regular file")
    _check_size(status.st_size)
    return _read_whole(path)


def _read_remote(uri: str, expected_bytes: int | None) -> bytes:
    if expected_bytes is None:
        fs, path = filesystem(uri)
        _check_size(fs.info(path)["size"] or 0)
    return _read_whole(uri)


def _read_whole(url: str) -> bytes:
    if is_local(url):
        with open(url, "rb") as file:
            return file.read()
    fs, path = filesystem(url)
    data: bytes = s3.read(fs, path) if s3.is_s3(fs) else fs.cat_file(path)
    return data


def _check_size(num_bytes: int) -> None:
    if num_bytes > MAX_BYTES:
        raise ImageError("too_large", f"{num_bytes} bytes is more than {MAX_BYTES} bytes")


class _RetryingFile(io.RawIOBase):
    """A remote file. A read that fails is tried again."""

    def __init__(self, url: str, file: IO[bytes]) -> None:
        self._url, self._file = url, file

    def readinto(self, buffer: Any) -> int:
        def read() -> bytes:
            self._file.seek(start)
            return self._file.read(len(buffer))

        start = self._file.tell()
        data = require(self._url, read)
        buffer[: len(data)] = data
        return len(data)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True


@contextlib.contextmanager
def open_read(url: str) -> Iterator[IO[bytes]]:
    """A seekable binary file. A remote file is fetched in blocks as it is read. For one thread at a time.

    Raises:
        FileNotFoundError: there is no such file.
        StorageError: the storage failed. Reading the file raises it too.
    """
    url = absolute(url)
    with require(url, lambda: open_handle(url)) as file:
        yield file if is_local(url) else _RetryingFile(url, file)  # type: ignore[misc]


def read_bytes(url: str) -> bytes:
    """A whole file. Errors as `open_read`."""
    url = absolute(url)
    return require(url, lambda: _read_whole(url))


def read_text(url: str) -> str:
    """A whole UTF-8 file. Errors as `open_read`."""
    return read_bytes(url).decode("utf-8")


def read_json(url: str) -> Any:
    """A JSON file. Errors as `open_read`, and `ValueError` if the file is not JSON."""
    return json.loads(read_bytes(url))


def read_parquet(url: str, columns: Sequence[str] | None = None) -> pa.Table:
    """A Parquet file, or some of its columns. Errors as `open_read`, and `pyarrow.ArrowInvalid` if it is no Parquet."""
    with open_read(url) as file:
        return pq.ParquetFile(file).read(columns=None if columns is None else list(columns))
