"""The fsspec filesystem behind a URL, and what to do when it fails."""

import datetime
import errno
import functools
import io
import os
import random
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import IO, Any, Final, TypeVar

import fsspec
import fsspec.core

from catdog.errors import StorageError, UsageError
from catdog.storage.urls import is_local, redact

T = TypeVar("T")

MAX_CONNECTIONS: Final = 32
"""Requests in flight to remote storages, per process and task."""

_WAITS_S: Final = (0.2, 0.4, 0.8, 1.6, 3.2)
"""Pauses between attempts, before jitter: a storage that refuses is given up after some five seconds."""

_PATIENCE_S: Final = 20.0
"""No further attempt once this much time has passed: what times out is not tried six times."""

_BLOCK_BYTES: Final = 4 * 2**20
_BLOCKS_PER_HANDLE: Final = 8
"""A remote file that is read in pieces (an archive, a Parquet file) is fetched in blocks; the last 32 MiB are kept."""

_S3_SETTINGS: Final = (
    "AWS_ENDPOINT_URL",
    "AWS_ENDPOINT_URL_S3",
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AWS_PROFILE",
    "AWS_REGION",
    "AWS_DEFAULT_REGION",
)

_CLIENT_ERRORS: Final = (
    ("botocore.exceptions", "BotoCoreError"),
    ("botocore.parsers", "ResponseParserError"),
    ("aiohttp", "ClientError"),
)
"""Roots of what storage clients raise that is no OSError; looked up where the client is loaded."""

_PASSING_CLIENT_ERRORS: Final = (
    ("botocore.exceptions", "ConnectionError"),
    ("botocore.exceptions", "HTTPClientError"),
    ("botocore.exceptions", "CredentialRetrievalError"),
    ("botocore.parsers", "ResponseParserError"),
    ("aiohttp", "ClientError"),
)

_PASSING_ERRNOS: Final = {
    errno.EAGAIN,
    errno.EBUSY,
    errno.EIO,
    errno.EHOSTUNREACH,
    errno.ENETUNREACH,
    errno.ESTALE,
    getattr(errno, "EREMOTEIO", errno.EIO),
}
"""What can pass: of a network file system, or as s3fs reports 5xx (EREMOTEIO), throttling (EBUSY) and the unknown
(EIO)."""

_ONE_FILE: Final = FileNotFoundError | NotADirectoryError | IsADirectoryError | PermissionError

_ONE_FILE_CODES: Final = {"", "NoSuchKey", "NoSuchVersion", "404", "AccessDenied", "403", "InvalidObjectState"}
"""S3 error codes about one object. Others that s3fs reports as missing or denied are about the bucket or our keys."""


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A file as it was when it was listed.

    Attributes:
        uri: absolute local path, or URL with its scheme; of an archive member `zip://member::archive-uri`.
        version: ETag, or "size-mtime_ns"; of an archive member "crc32hex-size"; "" where there was no such file.
        num_bytes: size; of an archive member the decompressed size.
    """

    uri: str
    version: str
    num_bytes: int


def filesystem(url: str, *, fresh: bool = False) -> tuple[Any, str]:
    """The fsspec filesystem of a URL that is not local, and the path in it. Thread-safe.

    Args:
        url: as `absolute` returns it.
        fresh: forget the listings that the filesystem remembers.

    Raises:
        UsageError: fsspec knows no such protocol, or its package is not installed.
    """
    scheme = url.partition("://")[0]
    try:
        if scheme in ("s3", "s3a"):
            fs = _s3(tuple(map(os.environ.get, _S3_SETTINGS)), os.getpid())
            path = fs._strip_protocol(url)
        else:
            fs, path = fsspec.core.url_to_fs(url)
    except (ValueError, ImportError) as error:
        raise UsageError(f"A URL must be one that fsspec opens: {describe(error)}. Received: {redact(url)}") from error
    if fresh:
        fs.invalidate_cache()
    return fs, path


@functools.lru_cache(maxsize=8)
def _s3(_settings: tuple[str | None, ...], _pid: int) -> Any:
    """One S3 filesystem per process and environment. It remembers no listings and leaves retries to `attempt`."""
    fs = fsspec.filesystem(
        "s3",
        skip_instance_cache=True,
        use_listings_cache=False,
        config_kwargs={
            "connect_timeout": 5,
            "read_timeout": 15,
            "max_pool_connections": MAX_CONNECTIONS,
            "retries": {"mode": "standard", "total_max_attempts": 1},
        },
    )
    fs.retries = 1
    return fs


def is_s3(fs: Any) -> bool:
    """Whether this is s3fs, whose listings and reads need a hand."""
    return "s3" in fs.protocol


def attempt(url: str, action: Callable[[], T]) -> T:
    """What `action` returns, tried again with back-off where its failure can pass.

    Raises:
        FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError: about this one file.
        StorageError: anything else that a storage does wrong.
    """
    started = time.monotonic()
    for wait_s in (*_WAITS_S, None):
        try:
            return action()
        except _failures() as error:
            if (about_one_file := _about_one_file(error)) is not None:
                raise about_one_file from error
            if wait_s is None or not _can_pass(error) or time.monotonic() - started > _PATIENCE_S:
                raise StorageError(f"{redact(url)}: the storage failed: {describe(error)}") from error
        time.sleep(wait_s * random.uniform(0.5, 1.0))
    raise AssertionError("unreachable")


def require(url: str, action: Callable[[], T]) -> T:
    """As `attempt`, where the whole job needs the file: to be denied it is a `StorageError` too."""
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
    """Of those, what has been imported; a module that another thread is importing may not have them yet."""
    found = (getattr(sys.modules.get(module), name, None) for module, name in names)
    return tuple(error for error in found if error is not None)


def _about_one_file(error: Exception) -> OSError | None:
    """The error, where it is about a single file and not about its storage."""
    if isinstance(error, _ONE_FILE):
        response = getattr(error.__cause__, "response", None) or {}
        return error if response.get("Error", {}).get("Code", "") in _ONE_FILE_CODES else None
    if getattr(error, "errno", None) == errno.ENAMETOOLONG or type(error).__name__ == "ParamValidationError":
        return FileNotFoundError(errno.ENOENT, describe(error))
    match getattr(error, "status", None):  # of an HTTP server
        case 401 | 403 as status:
            return PermissionError(errno.EACCES, f"HTTP status {status}")
        case 400 | 404 | 405 | 406 | 410 | 414 | 451 as status:
            return FileNotFoundError(errno.ENOENT, f"HTTP status {status}")
    return None


def _can_pass(error: Exception) -> bool:
    if isinstance(error, (TimeoutError, ConnectionError, *_loaded(_PASSING_CLIENT_ERRORS))):
        return True
    return isinstance(error, OSError) and error.errno in _PASSING_ERRNOS


def version_of(info: Mapping[str, Any]) -> str:
    """A file's version from fsspec's description of it: its ETag, else size and time of change."""
    for key in ("ETag", "etag", "md5Hash"):
        if info.get(key):
            return str(info[key]).strip('"')
    for key in ("mtime", "LastModified", "last_modified", "updated", "modified", "created"):
        if changed := info.get(key):
            if isinstance(changed, datetime.datetime):
                changed = changed.timestamp()
            return f"{info['size']}-{int(changed * 1e9) if isinstance(changed, float) else changed}"
    return str(info["size"])


def open_handle(url: str) -> IO[bytes]:
    """A seekable binary file that is fetched in blocks as it is read; not for more than one thread at a time."""
    if is_local(url):
        return open(url, "rb")
    fs, path = filesystem(url)
    if "memory" in fs.protocol:  # hands out one and the same file object to all
        return io.BytesIO(fs.cat_file(path))
    cache_options = {"maxblocks": _BLOCKS_PER_HANDLE}
    handle: IO[bytes] = fs.open(
        path, "rb", block_size=_BLOCK_BYTES, cache_type="blockcache", cache_options=cache_options
    )
    return handle
