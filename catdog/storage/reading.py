"""Reading files: the images of a collection, and what catdog itself writes."""

import collections
import concurrent.futures
import contextlib
import errno
import functools
import itertools
import json
import os
import stat
import threading
from collections.abc import Collection, Iterator, Sequence
from typing import IO, Any, Final

import pyarrow as pa
import pyarrow.parquet as pq

from catdog.errors import ImageError, StorageError, UsageError
from catdog.provenance import redact
from catdog.storage import archives, outages, s3
from catdog.storage.filesystems import RetryingFile, attempt, describe, filesystem, info, open_handle, require
from catdog.storage.names import archive_scheme
from catdog.storage.outages import MAX_CONNECTIONS
from catdog.storage.urls import absolute, is_local, local_path, split_member, storage_of

MAX_BYTES: Final = 128 * 2**20
"""Size of the largest image file that is read."""

_AHEAD_FILES: Final = 2 * MAX_CONNECTIONS
_AHEAD_BYTES: Final = 32 * 2**20
"""What one call of `read_sources` reads ahead of its consumer at most, by the sizes that it is told.

One file is read ahead however large it is.
"""

_NUM_OTHERS: Final = 8
"""So many files beside one that cannot be read are looked at, to see whether they can be."""

_GUESSED_BYTES: Final = _AHEAD_BYTES // MAX_CONNECTIONS
"""What a file of unknown size counts as: 1 MiB, so that each connection has a file to read."""


def read_source(
    uri: str, expected_bytes: int | None = None, version: str | None = None, *, patience_s: float | None = None
) -> bytes:
    """The bytes of one image: a file or a member of an archive. Thread-safe.

    Args:
        uri: as in `SourceFile.uri`.
        expected_bytes: the file's size when it was listed. Without it, a remote storage is asked for the size first.
        version: as in `SourceFile.version`. If an archive has several members of this name, it says which one is meant;
            without it, that is the last one. Otherwise it has no effect.
        patience_s: for how many seconds a storage that fails is tried again, if that is shorter than usual.

    Raises:
        ImageError: not_found, permission_denied, too_large or empty_file; for a member of an archive also truncated,
            unsupported_format or decode_failed.
        StorageError: the storage failed.
    """
    try:
        if expected_bytes is not None:
            _check_size(expected_bytes)
        uri = absolute(uri) if uri.startswith("file:") else uri
        if archive_scheme(uri) is not None:
            raise archives.why_no_image(uri, patience_s=patience_s)
        if uri.startswith("row://"):
            from catdog.storage.embedded import read_row  # which needs `open_read`

            data = read_row(uri, version, patience_s=patience_s)
        elif (chained := split_member(uri)) is not None:
            data = archives.read_member(chained[1], chained[0], MAX_BYTES, version=version, patience_s=patience_s)
        elif is_local(uri):
            data = attempt(uri, lambda: _read_local(local_path(uri)))
        else:
            data = attempt(uri, lambda: _read_remote(uri, expected_bytes), patience_s=patience_s)
    except PermissionError as error:
        raise ImageError("permission_denied", describe(error)) from error
    # A manifest may name something that is no file: that raises UsageError or ValueError.
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, UsageError, ValueError) as error:
        raise ImageError("not_found", describe(error)) from error
    if not data:
        raise ImageError("empty_file", "the file is empty")
    return data


def read_sources(
    uris: Sequence[str],
    expected_bytes: Sequence[int | None] | None = None,
    versions: Sequence[str | None] | None = None,
    *,
    own: Collection[str] | None = None,
) -> Iterator[bytes | ImageError]:
    """The bytes of many images, in order. In the place of an image that cannot be read comes its `ImageError`.

    Remote files are fetched concurrently, ahead of the consumer: up to 64 files, and up to 32 MiB.

    Args:
        uris: as in `SourceFile.uri`.
        expected_bytes: the files' sizes when they were listed; None or 0 for an unknown size.
        versions: as in `SourceFile.version`; see `read_source`.
        own: what `storage_of` says of the job's own storages; None if every storage is the job's own. If another
            storage fails for 20 s, its images get the `ImageError` unreachable, and this process does not ask it again
            for five minutes. Images on this machine are always the job's own. One that fails alone, because the disk
            is damaged where it lies, is unreachable, too.

    Raises:
        StorageError: the job's own storage failed.
    """
    sizes = [None] * len(uris) if expected_bytes is None else expected_bytes
    told = [None] * len(uris) if versions is None else versions
    own = None if own is None else frozenset(own)
    if all(storage_of(uri) == "" for uri in uris):
        yield from map(functools.partial(_read_or_error, own=own), uris, sizes, told)
        return
    pending: collections.deque[concurrent.futures.Future[bytes | ImageError]] = collections.deque()
    pending_bytes: collections.deque[int] = collections.deque()
    stop = threading.Event()
    pool = concurrent.futures.ThreadPoolExecutor(MAX_CONNECTIONS, thread_name_prefix="catdog-read")

    def read(uri: str, size: int | None, version: str | None) -> bytes | ImageError:
        with outages.stoppable(stop):
            return _read_or_error(uri, size, version, own=own)

    try:
        for uri, size, version in zip(uris, sizes, told, strict=True):
            num_bytes = size or _GUESSED_BYTES
            while pending and (len(pending) == _AHEAD_FILES or sum(pending_bytes) + num_bytes > _AHEAD_BYTES):
                pending_bytes.popleft()
                yield pending.popleft().result()
            pending.append(pool.submit(read, uri, size, version))
            pending_bytes.append(num_bytes)
        while pending:
            yield pending.popleft().result()
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)


def _read_or_error(
    uri: str, expected_bytes: int | None, version: str | None, *, own: frozenset[str] | None
) -> bytes | ImageError:
    is_own = own is None or (name := storage_of(uri)) == "" or name in own
    try:
        if is_own:
            return read_source(uri, expected_bytes, version)
        storage = outages.known(uri)
        if storage.is_given_up:
            return ImageError("unreachable", f"{redact(storage.name)} was given up: it kept failing")
        return read_source(uri, expected_bytes, version, patience_s=outages.FOREIGN_PATIENCE_S)
    except ImageError as error:
        return error
    except StorageError as error:
        if is_own and not is_bad_alone(uri):
            raise
        return ImageError("unreachable", str(error))


def is_bad_alone(uri: str) -> bool:
    """Whether a file on this machine has failed while one beside it can be read, as on a disk with a bad sector.

    A network file system that is gone reads none of them.
    """
    if archive_scheme(uri) is not None or split_member(uri) is not None or not is_local(uri := absolute(uri)):
        return False
    path = local_path(uri)
    try:
        with os.scandir(os.path.dirname(path)) as entries:
            others = (entry.path for entry in entries if entry.path != path and entry.is_file(follow_symlinks=False))
            return any(map(_is_readable, itertools.islice(others, _NUM_OTHERS)))
    except OSError:
        return False


def _is_readable(path: str) -> bool:
    try:
        with open(path, "rb") as file:
            return bool(file.read(1))
    except OSError:
        return False


def _read_local(path: str) -> bytes:
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):  # opening a named pipe would wait for a writer
        raise FileNotFoundError(errno.ENOENT, "not a regular file")
    _check_size(status.st_size)
    return _read_whole(path)


def _read_remote(uri: str, expected_bytes: int | None) -> bytes:
    if expected_bytes is None:
        _check_size(info(uri)["size"] or 0)
    return _read_whole(uri)


def _read_whole(url: str) -> bytes:
    if is_local(url):
        with open(local_path(url), "rb") as file:
            return file.read()
    fs, path = filesystem(url)
    data: bytes = s3.read(fs, path) if s3.is_s3(fs) else fs.cat_file(path)
    return data


def _check_size(num_bytes: int) -> None:
    if num_bytes > MAX_BYTES:
        raise ImageError("too_large", f"{num_bytes} bytes is more than {MAX_BYTES} bytes")


@contextlib.contextmanager
def open_read(url: str) -> Iterator[IO[bytes]]:
    """A seekable binary file. A remote file is fetched in blocks as it is read. For one thread at a time.

    Raises:
        FileNotFoundError: there is no such file.
        StorageError: the storage failed. Reading the file raises it too.
    """
    url = absolute(url)
    with require(url, lambda: open_handle(url)) as file:
        yield file if is_local(url) else RetryingFile(url, file)  # type: ignore[misc]


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
