"""The fsspec filesystem of a URL, and what catdog does when a storage fails."""

import errno
import io
import itertools
import logging
import os
import socket
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import IO, Any, Final, TypeVar

import fsspec.core

from catdog.errors import StorageError, UsageError
from catdog.provenance import redact
from catdog.storage import outages, s3
from catdog.storage.urls import is_local, local_path
from catdog.storage.versions import version_of as version_of
from catdog.storage.versions import version_of_status as version_of_status

logger = logging.getLogger(__name__)

T = TypeVar("T")

_BLOCK_BYTES: Final = 4 * 2**20
_BLOCKS_PER_HANDLE: Final = 8
"""A remote file that is read in pieces (an archive, a Parquet file) is fetched in blocks; the last 32 MiB are kept."""

_CLIENT_ERRORS: Final = (
    ("botocore.exceptions", "BotoCoreError"),
    ("botocore.parsers", "ResponseParserError"),
    ("aiohttp", "ClientError"),
    ("gcsfs.retry", "HttpError"),
    ("google.auth.exceptions", "GoogleAuthError"),
    ("azure.core.exceptions", "AzureError"),
)
"""(module, name) of the base classes of what storage clients raise, besides OSError. `_loaded` finds the classes."""

_PASSING_CLIENT_ERRORS: Final = (
    ("botocore.exceptions", "ConnectionError"),
    ("botocore.exceptions", "HTTPClientError"),
    ("botocore.exceptions", "CredentialRetrievalError"),
    ("botocore.parsers", "ResponseParserError"),
    ("aiohttp", "ClientError"),
    ("google.auth.exceptions", "TransportError"),
    ("azure.core.exceptions", "ServiceRequestError"),
    ("azure.core.exceptions", "ServiceResponseError"),
    ("requests.exceptions", "RequestException"),
)
"""(module, name) of those client errors that can pass."""

_UNREACHABLE_ERRORS: Final = (
    ("botocore.exceptions", "EndpointConnectionError"),
    ("botocore.exceptions", "ConnectTimeoutError"),
    ("aiohttp", "ClientConnectorError"),
)
"""(module, name) of those client errors that say that nobody listens."""

_PASSING_STATUSES: Final = {408, 425, 429}
"""HTTP statuses below 500 of errors that can pass."""

_PASSING_ERRNOS: Final = s3.PASSING_ERRNOS | {
    errno.EAGAIN,
    errno.EBUSY,
    errno.EIO,
    errno.EHOSTUNREACH,
    errno.ENETUNREACH,
    errno.ESTALE,
}
"""Errors that can pass: those of S3, and those of a network file system."""

OBJECT_STORES: Final = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "memory"}
"""Schemes of the storages where a written file appears whole or not at all.

Elsewhere a file is written under a temporary name and renamed.
"""

_ONE_FILE: Final = FileNotFoundError | NotADirectoryError | IsADirectoryError | PermissionError


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A file as it was when it was listed.

    Attributes:
        uri: absolute local path, or URL with its scheme; of an archive member `zip://member::archive-uri`, of a row of
            a table `row://column/number::table-uri` (`catdog.storage.embedded`). A local path that is not UTF-8 is
            `file:///caf%E9.jpg`; `os.fsdecode(urllib.parse.unquote_to_bytes(...))` of what follows `file://` is the
            path.
        version: ETag, or "size-mtime_ns"; of an archive member "crc32hex-size", of a row that of the table; "" if there
            is no evidence by which to tell whether the file is the same later: the storage gives neither ETag nor time,
            or there was no file.
        num_bytes: size; of an archive member the decompressed size; 0 if the storage does not tell.
    """

    uri: str
    version: str
    num_bytes: int


def filesystem(url: str, *, fresh: bool = False) -> tuple[Any, str]:
    """The fsspec filesystem of a URL that is not local, and the path in that filesystem. Thread-safe.

    Args:
        url: as `absolute` returns it.
        fresh: forget the listings that the filesystem remembers.

    Raises:
        UsageError: fsspec knows no such protocol, or the protocol's package is not installed.
    """
    try:
        fs, path = s3.url_to_fs(url, outages.MAX_CONNECTIONS) if s3.is_s3_url(url) else fsspec.core.url_to_fs(url)
    except (ValueError, ImportError) as error:
        raise UsageError(f"A URL must be one that fsspec opens: {describe(error)}. Received: {redact(url)}") from error
    if fresh:
        fs.invalidate_cache()
    return fs, path


def attempt(url: str, action: Callable[[], T], *, patience_s: float | None = None) -> T:
    """Call `action` and return its result. While it fails with an error that can pass, wait and call it again.

    `catdog.storage.outages` says for how long.

    Args:
        url: what the action is about.
        action: what to do. Where it asks the storage, it may be called by many threads at once.
        patience_s: give up after so many seconds, if that is sooner.

    Raises:
        FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError: the error is about this one file.
        StorageError: the storage failed in any other way.
    """
    patience = min(outages.patience_s(), outages.patience_s() if patience_s is None else patience_s)
    storage = outages.known(url)
    started = time.monotonic()
    for num_tries in itertools.count():
        try:
            with storage.slot(started) as begun:
                if begun is None:
                    raise StorageError(f"{redact(url)}: the storage failed: {storage.failure or 'nobody waits for it'}")
                result = action()
        except _failures() as error:
            if (about_one_file := _about_one_file(error)) is not None:
                storage.succeeded()
                raise about_one_file from error
            failure = error
        else:
            storage.succeeded()
            return result
        words = describe(failure) + s3.advice(failure)
        is_unreachable = isinstance(failure, (ConnectionRefusedError, socket.gaierror, *_loaded(_UNREACHABLE_ERRORS)))
        can_pass = is_unreachable or _can_pass(failure) or (storage.has_succeeded and s3.is_out_of_date(failure))
        if not can_pass or begun is None:
            storage.answered()
            raise StorageError(f"{redact(url)}: the storage failed: {words}") from failure
        storage.failed(url, words, begun, is_unreachable=is_unreachable)
        if num_tries == 0 and storage.name:
            logger.info("%s: %s; trying again", redact(url), words)
        storage.pause(num_tries, started, patience)
        tried_s = storage.tried_s(started, patience, is_unreachable=is_unreachable)
        if tried_s is not None:
            raise StorageError(f"{redact(url)}: the storage failed for {tried_s:.0f} s: {words}") from failure
    raise AssertionError("the loop above has no end")


def require(url: str, action: Callable[[], T]) -> T:
    """As `attempt`, for a file that the whole job needs: if it is denied, that is a `StorageError` too."""
    try:
        return attempt(url, action)
    except PermissionError as error:
        raise StorageError(f"{redact(url)}: permission denied: {describe(error)}") from error


def describe(error: BaseException) -> str:
    """An error's own words in one line, without secrets."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return redact(" ".join(text.split())) or type(error).__name__


def _failures() -> tuple[type[Exception], ...]:
    return OSError, *_loaded(_CLIENT_ERRORS)


def _loaded(names: tuple[tuple[str, str], ...]) -> tuple[type[Exception], ...]:
    """The classes of these names whose modules are imported: what is not imported raises nothing."""
    # A module that another thread is importing at this moment may lack the name.
    found = (getattr(sys.modules.get(module), name, None) for module, name in names)
    return tuple(error for error in found if error is not None)


def _about_one_file(error: Exception) -> OSError | None:
    """`error` as a Python error about one file; None if it is about the storage."""
    if isinstance(error, _ONE_FILE):
        return error if s3.is_about_one_object(error) else None
    if getattr(error, "errno", None) == errno.ENAMETOOLONG or type(error).__name__ == "ParamValidationError":
        return FileNotFoundError(errno.ENOENT, describe(error))
    if type(error) is OSError and str(error).startswith("Forbidden: "):  # of gcsfs
        return PermissionError(errno.EACCES, describe(error))
    match _status_of(error):
        case 401 | 403 as status:
            return PermissionError(errno.EACCES, f"HTTP status {status}")
        case 400 | 404 | 405 | 406 | 410 | 414 | 451 as status:
            return FileNotFoundError(errno.ENOENT, f"HTTP status {status}")
    return None


def _status_of(error: Exception) -> int | None:
    """The HTTP status that an error of a web server, of gcsfs or of adlfs tells; None if it tells none."""
    found = (getattr(error, name, None) for name in ("status", "status_code", "code"))
    return next((status for status in found if isinstance(status, int) and status), None)


def _can_pass(error: Exception) -> bool:
    if (says := s3.can_pass(error)) is not None:
        return says
    if status := _status_of(error):
        return status >= 500 or status in _PASSING_STATUSES
    if isinstance(error, (TimeoutError, ConnectionError, *_loaded(_PASSING_CLIENT_ERRORS))):
        return True
    return isinstance(error, OSError) and error.errno in _PASSING_ERRNOS


def info(url: str, *, fresh: bool = False) -> Mapping[str, Any]:
    """fsspec's description of a remote file or directory: its type, its size, and more that depends on the storage."""
    fs, path = filesystem(url, fresh=fresh)
    try:
        found: Mapping[str, Any] = _explaining_denials(fs, path, lambda: fs.info(path))
    except FileNotFoundError as error:
        # fsspec says so of a web server, whatever was the matter.
        if not s3.is_s3(fs) and isinstance(error.__cause__, _loaded(_CLIENT_ERRORS)):
            raise error.__cause__ from None
        raise
    return found


def _explaining_denials(fs: Any, path: str, ask: Callable[[], T]) -> T:
    """Call `ask`, which asks for a file's description. If S3 denies it, find out whether it denies the file."""
    try:
        return ask()
    except PermissionError:
        if not s3.is_s3(fs) or s3.is_denied(fs, path):
            raise
    try:
        return ask()  # our keys may have been renewed meanwhile
    except PermissionError as error:
        raise OSError(errno.EAGAIN, "S3 denies a description of what it gives") from error


def open_handle(url: str) -> IO[bytes]:
    """A seekable binary file. A remote file is fetched in blocks as it is read. For one thread at a time."""
    if is_local(url):
        return open(local_path(url), "rb")
    fs, path = filesystem(url)
    if "memory" in fs.protocol:  # its `open` gives every caller the same file object
        return io.BytesIO(fs.cat_file(path))
    cache_options = {"maxblocks": _BLOCKS_PER_HANDLE}

    def open_it() -> IO[bytes]:
        handle: IO[bytes] = fs.open(
            path, "rb", block_size=_BLOCK_BYTES, cache_type="blockcache", cache_options=cache_options
        )
        return handle

    return _explaining_denials(fs, path, open_it)


class WrappedFile(io.RawIOBase):
    """A seekable file that reads another one, and closes it."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file

    def readable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """It is."""
        return True

    def close(self) -> None:
        """Close the other file, too."""
        self._file.close()
        super().close()


class RetryingFile(WrappedFile):
    """A remote file. A read that fails is tried again."""

    def __init__(self, url: str, file: IO[bytes]) -> None:
        super().__init__(file)
        self._url = url

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer, or a part of it."""

        def read() -> bytes:
            self._file.seek(start)
            return self._file.read(len(buffer))

        start = self._file.tell()
        data = require(self._url, read)
        buffer[: len(data)] = data
        return len(data)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Go to a position."""
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        """The position."""
        return self._file.tell()
