"""S3: this module, `s3_objects`, which reads objects, and `s3_pages`, which reads listings, alone know s3fs.

Three things that these modules use are not in s3fs's documentation: `call_s3`, `retries`, and the argument
`max_concurrency` of `cat_file`. When a version of s3fs moves one of them, tests/test_storage_s3.py fails and names it.
"""

import errno
import functools
import os
from typing import Any, Final

import fsspec

from catdog.storage import s3_objects, s3_pages
from catdog.storage.s3_pages import Page as Page

_SCHEMES: Final = ("s3", "s3a")

_SETTINGS: Final = (
    "AWS_ENDPOINT_URL",
    "AWS_ENDPOINT_URL_S3",
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AWS_PROFILE",
    "AWS_REGION",
    "AWS_DEFAULT_REGION",
    "AWS_NO_SIGN_REQUEST",
)
"""Environment variables. When one of them changes, a new filesystem is made."""

_UNSIGNED: Final = "AWS_NO_SIGN_REQUEST"
"""The environment variable that says, as GDAL has it, that requests need no keys: `--no-sign-request` of aws-cli."""

_PAGE_OBJECTS: Final = 1000
"""Objects in one page of a listing. S3 gives no more."""

_ONE_OBJECT_CODES: Final = {"", "NoSuchKey", "NoSuchVersion", "404", "AccessDenied", "403", "InvalidObjectState"}
"""Error codes that S3 gives when it lacks or denies one object. Its other codes blame the bucket or our keys."""

_ALREADY_THERE_CODES: Final = {"PreconditionFailed", "412"}
_NO_CONDITIONS_CODES: Final = {"NotImplemented", "501"}

_PASSING_CODES: Final = {
    "RequestTimeout",
    "RequestTimeoutException",
    "SlowDown",
    "Throttling",
    "ThrottlingException",
    "TooManyRequests",
    "OperationAborted",
    "ConditionalRequestConflict",
}
"""Error codes that pass, whatever their HTTP status is. Of the other codes, those with status 408, 429 and 5xx pass."""

_OUT_OF_DATE_CODES: Final = {
    "ExpiredToken",
    "ExpiredTokenException",
    "RequestExpired",
    "TokenRefreshRequired",
    "RequestTimeTooSkewed",
}
"""Error codes that S3 gives to keys that have expired, and to a clock that is wrong."""

_CERTAIN_CODES: Final = {"NoSuchKey", "InvalidObjectState", "InvalidRange"} | _PASSING_CODES | _OUT_OF_DATE_CODES
"""Error codes that S3 gives for the same reason to whoever asks for an object with our keys."""

PASSING_ERRNOS: Final = {getattr(errno, "EREMOTEIO", errno.EIO), errno.EBUSY, errno.EIO}
"""Errors that can pass. s3fs turns HTTP status 5xx into EREMOTEIO, throttling into EBUSY, unknown codes into EIO."""


def is_s3_url(url: str) -> bool:
    """Whether a URL names something in S3."""
    return url.partition("://")[0] in _SCHEMES


def is_s3(fs: Any) -> bool:
    """Whether an fsspec filesystem is that of s3fs."""
    return "s3" in fs.protocol


def url_to_fs(url: str, max_connections: int) -> tuple[Any, str]:
    """The filesystem for a URL in S3, and the path in that filesystem.

    Args:
        url: as `absolute` returns it.
        max_connections: requests in flight at most.
    """
    settings = tuple(map(os.environ.get, _SETTINGS))
    return _filesystem(settings, os.getpid(), max_connections), url.partition("://")[2].rstrip("/")


@functools.lru_cache(maxsize=8)
def _filesystem(_settings: tuple[str | None, ...], _pid: int, max_connections: int) -> Any:
    """One filesystem per process and environment. It remembers no listings, and tries each request once."""
    fs = _class()(
        anon=os.environ.get(_UNSIGNED, "").lower() in ("1", "true", "yes", "on"),
        skip_instance_cache=True,
        use_listings_cache=False,
        config_kwargs={
            "connect_timeout": 5,
            "read_timeout": 15,
            "max_pool_connections": max_connections,
            "retries": {"mode": "standard", "total_max_attempts": 1},  # botocore's
        },
    )
    fs.retries = 1  # attempts, not repetitions; no argument sets it
    return fs


@functools.lru_cache(maxsize=1)
def _class() -> Any:
    """s3fs's filesystem, to which a key is a key."""
    base: Any = fsspec.get_filesystem_class("s3")

    class Filesystem(base):  # type: ignore[misc]
        def split_path(self, path: str) -> tuple[str, str, str | None]:
            """Bucket, key and version. s3fs takes `?versionId=` for no part of the key."""
            bucket, _, _ = super().split_path(path)
            return bucket, path.removeprefix("s3://").lstrip("/")[len(bucket) + 1 :], None

    return Filesystem


def advice(error: Exception) -> str:
    """What a user can do about an error, as the end of a sentence; "" if nothing is known."""
    if type(error).__name__ != "NoCredentialsError":
        return ""
    return f" (give keys as for aws-cli, or {_UNSIGNED}=true for a bucket that everybody may read)"


def list_page(fs: Any, prefix: str, token: str | None, *, flat: bool, after: str = "") -> Page:
    """One page of the objects whose URL starts with `prefix`.

    `fs.find` and `fs.ls` are documented, but hold the whole listing in memory. obstore lists with a tenth of the CPU
    time, but gives `photos` for the key `photos/`, and no page at all if a key has `//` in it.

    Args:
        fs: the filesystem.
        prefix: the start of a URL. If it ends with a slash, it names a folder.
        token: `next_token` of the page before; None for the first page.
        flat: skip the objects whose URL has a further slash after `prefix`.
        after: the first page begins with the first key that is greater.
    """
    bucket, _, key = prefix.partition("://")[2].partition("/")
    key_prefix = key.rstrip("/")
    if key_prefix and key.endswith("/"):
        key_prefix += "/"
    request = {"Bucket": bucket, "Prefix": key_prefix, "Delimiter": "/" if flat else "", "MaxKeys": _PAGE_OBJECTS}
    if token is not None:
        request["ContinuationToken"] = token
    elif after:
        request["StartAfter"] = after
    return s3_pages.ask(fs, request)


def lists_in_order(url: str) -> bool:
    """Whether a bucket lists its objects in the order of their keys. The directory buckets of S3 Express do not."""
    return not url.partition("://")[2].partition("/")[0].endswith("--x-s3")


def is_denied(fs: Any, path: str) -> bool:
    """Whether S3 denies an object or a bucket of which it has just denied a description.

    The answer to a question for a description has no body, and does not say why it denies: the object may be denied, or
    our keys may have expired.

    Raises:
        OSError: what S3 says about our keys.
    """
    try:
        if "/" in path:
            read_range(fs, path, 0, 1)
        else:
            list_page(fs, f"s3://{path}", None, flat=True)
    except FileNotFoundError:
        return False
    except PermissionError as error:
        if not is_about_one_object(error):
            raise
        return True
    except OSError as error:
        if not is_invalid_range(error):  # of an empty object
            raise
    return False


def read(fs: Any, path: str) -> bytes:
    """A whole object, in one request. Unless it may read one part at a time only, s3fs asks for the size first."""
    with_s3fs = functools.partial(fs.cat_file, path, max_concurrency=1)
    return s3_objects.read(fs, path, None, with_s3fs, certain_codes=_CERTAIN_CODES)


def read_range(fs: Any, path: str, start: int, stop: int) -> bytes:
    """Bytes `start` to `stop` of an object, in one request."""
    with_s3fs = functools.partial(fs.cat_file, path, start=start, end=stop, max_concurrency=1)
    return s3_objects.read(fs, path, (start, stop), with_s3fs, certain_codes=_CERTAIN_CODES)


def delete(fs: Any, url: str) -> None:
    """Remove the object with this URL, if there is one, and all objects under it. Nothing in the URL is a pattern.

    `fs.rm` is documented, but takes a name with brackets for a glob.
    """
    bucket, _, key = url.partition("://")[2].rstrip("/").partition("/")
    if not key:
        raise ValueError(f"a bucket is never deleted. Received: {url}")
    token = None
    while True:
        page = list_page(fs, url.rstrip("/") + "/", token, flat=False)
        if page.keys:
            keys = [{"Key": each} for each in page.keys]
            answer = fs.call_s3("delete_objects", Bucket=bucket, Delete={"Objects": keys, "Quiet": True})
            if errors := answer.get("Errors"):
                code, message = errors[0].get("Code"), errors[0].get("Message", "?")
                raise (
                    PermissionError(errno.EACCES, message) if code == "AccessDenied" else OSError(errno.EIO, message)
                )
        if (token := page.next_token) is None:
            break
    fs.call_s3("delete_object", Bucket=bucket, Key=key)


def create(fs: Any, path: str, data: bytes) -> bool:
    """Write an object unless there is one; whether it was written. A store that heeds no conditions always writes."""
    try:
        fs.pipe_file(path, data, mode="create")
    except FileExistsError:
        return False
    except OSError as error:
        code = _code_of(error)
        if code in _ALREADY_THERE_CODES:
            return False
        if code not in _NO_CONDITIONS_CODES:
            raise
        fs.pipe_file(path, data)
    return True


def is_about_one_object(error: OSError) -> bool:
    """Whether an error that says "missing" or "denied" is about one object, and not about its bucket or our keys.

    Also true of errors that do not come from S3. s3fs keeps S3's answer in the cause of the error that it raises.
    """
    return _code_of(error) in _ONE_OBJECT_CODES


def can_pass(error: Exception) -> bool | None:
    """Whether an answer of S3 that says "error" can be another one soon; None if the error does not come from S3."""
    response = getattr(error.__cause__, "response", None) or {}
    status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    code = _code_of(error)
    if code in _PASSING_CODES:
        return True
    if not isinstance(status, int):
        return None
    return code not in _NO_CONDITIONS_CODES and (status >= 500 or status in (408, 429))


def is_out_of_date(error: Exception) -> bool:
    """Whether S3 says that our keys have expired, or that our clock is wrong.

    If S3 took our requests before, somebody may be about to renew the keys, or to set the clock.
    """
    return _code_of(error) in _OUT_OF_DATE_CODES


def is_invalid_range(error: Exception) -> bool:
    """Whether S3 says that an object ends before the bytes that were asked for."""
    return _code_of(error) in ("InvalidRange", "416")


def _code_of(error: Exception) -> str:
    """S3's error code; empty where the error does not come from S3."""
    response = getattr(error.__cause__, "response", None) or {}
    return str(response.get("Error", {}).get("Code", ""))
