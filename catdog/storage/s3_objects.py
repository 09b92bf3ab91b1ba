"""Reading objects of S3 with obstore, which takes a tenth of the CPU time that s3fs takes and does not hold the GIL.

s3fs remains the reference. It says where a bucket is, how its name is written, and with which keys a request is signed:
before a bucket is read, and once a minute, s3fs prepares a request that is not sent, and obstore is set up to send the
same. What obstore cannot do, s3fs does: `read` is told how. That is whenever

- obstore is not installed, or cannot name the key;
- obstore fails in a way that `_translated` cannot tell for certain as the error that s3fs would have raised. If s3fs
  then gives the object, three times in a row, the bucket is left to s3fs.

obstore has threads of its own, which do not live on in a forked process. There, s3fs reads.
"""

import logging
import os
import re
import threading
import time
import urllib.parse
import uuid
from collections.abc import Callable, Collection
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

logger = logging.getLogger(__name__)

_GOOD_FOR_S: Final = 60.0
"""After this time s3fs is asked again. It renews keys at least ten minutes before they expire."""

_MOST_DOUBTS: Final = 3
"""Failures in a row after which s3fs gave the object, and the bucket is left to s3fs."""

_MOST_BUCKETS: Final = 32
"""Buckets whose connections are kept."""

_NO_TIMEOUT: Final = timedelta(days=1)
"""For a whole request. s3fs limits only how long a connection may be silent, because a large object takes long."""

_AUTHORIZATION: Final = re.compile(r"AWS4-HMAC-SHA256 Credential=[^/]+/\d+/([^/]+)/s3/aws4_request, ")
"""Of a signed request: the region."""

_NOBODY: Final = "http://127.0.0.1:9"
_EVERYBODY: Final = "*,0.0.0.0/0,::/0"
"""A proxy, and hosts that are not asked through it. Without both, obstore would take a proxy from the environment."""

_DETAILS: Final = "\n\nDebug source:\n"
"""What obstore writes between the words of an error and its structure, in which line breaks of foreign text are \\n."""

_STATUS: Final = re.compile(r'\n +inner: Status \{\n +status: (\d{3}),\n +body: (?:None|Some\(\n +"(.*)",\n +\)),\n')
_KIND: Final = re.compile(r"\bHttpError \{\n +kind: (\w+),\n")
_ESCAPED: Final = re.compile(r"\\(?:u\{([0-9a-f]+)\}|(.))")
_ESCAPES: Final = {"n": "\n", "r": "\r", "t": "\t", "0": "\0"}


class _DoubtError(Exception):
    """obstore failed, and it is not certain what s3fs would say."""


@dataclass(frozen=True, slots=True)
class _Plan:
    """How s3fs would ask for an object of a bucket.

    Attributes:
        url: of the bucket, without a slash at its end. It holds the bucket's name in its host or in its path.
        region: for which the request is signed; "" if it is not signed.
        key, secret, token: what signs it.
    """

    url: str
    region: str = ""
    key: str = ""
    secret: str = ""
    token: str | None = None


class _Bucket:
    """A bucket that obstore reads. Thread-safe."""

    def __init__(self, fs: Any, name: str) -> None:
        self.fs = fs
        self._name = name
        self._lock = threading.Lock()
        self._plan: _Plan | None = None
        self._store: Any = None
        self._good_until = 0.0
        self._num_doubts = 0

    def store(self) -> Any:
        """obstore's client; None if s3fs is to read."""
        if time.monotonic() < self._good_until:
            return self._store
        with self._lock:
            if time.monotonic() >= self._good_until:
                self._set_up()
            return self._store

    def _set_up(self) -> None:
        if self._num_doubts >= _MOST_DOUBTS:
            logger.info("obstore cannot read s3://%s as it should; s3fs reads it", self._name)
            self._store, self._good_until = None, float("inf")
            return
        try:
            plan = _plan(self.fs, self._name)
            if plan != self._plan or self._store is None:
                self._store = _store(plan, self.fs)
            self._plan = plan
        except Exception as error:  # whatever it is, s3fs meets it too, and says it
            logger.debug("s3fs reads %s: %s", self._name, error)
            self._plan = self._store = None
        self._good_until = time.monotonic() + _GOOD_FOR_S

    def renew(self) -> None:
        """Ask s3fs before the next object."""
        with self._lock:
            self._good_until = 0.0

    def trust(self) -> None:
        """obstore has read an object."""
        self._num_doubts = 0

    def doubt(self, store: Any) -> None:
        """s3fs has read what `store` could not. Perhaps s3fs has learnt that the bucket lies in another region."""
        with self._lock:
            if store is self._store:  # what failed together counts once
                self._num_doubts += 1
                self._plan = self._store = None
                self._good_until = 0.0


_lock = threading.Lock()
_buckets: dict[tuple[int, str], _Bucket] = {}
"""By the identity of the filesystem, which the bucket keeps alive, and by name."""
_home: list[int] = []
"""The process that obstore's threads are in."""


def read(
    fs: Any,
    path: str,
    span: tuple[int, int] | None,
    with_s3fs: Callable[[], bytes],
    *,
    certain_codes: Collection[str],
) -> bytes:
    """An object, or a range of it. Errors as `with_s3fs` would raise them. Thread-safe.

    Args:
        fs: s3fs's filesystem.
        path: bucket and key, as s3fs takes them.
        span: the first byte, and the one after the last.
        with_s3fs: reads the same with s3fs.
        certain_codes: S3's error codes that mean the same whoever asks.
    """
    name, _, key = path.partition("/")
    bucket = _bucket(fs, name) if _can_be_named(key) and (span is None or 0 <= span[0] < span[1]) else None
    store = None if bucket is None else bucket.store()
    if bucket is None or store is None:
        return with_s3fs()
    try:
        data = _get(store, key, span, certain_codes)
    except _DoubtError as error:
        logger.debug("s3fs is asked for %s: %s", path, error)
    except PermissionError:  # perhaps the keys have expired
        bucket.renew()
        raise
    else:
        bucket.trust()
        return data
    data = with_s3fs()
    bucket.doubt(store)
    return data


def _can_be_named(key: str) -> bool:
    """Whether obstore may get this key. It drops slashes at both ends. Other keys that it cannot name, it refuses."""
    return key.strip("/") == key != ""


def _bucket(fs: Any, name: str) -> _Bucket | None:
    """What reads this bucket; None in a process where obstore cannot."""
    if _home and _home[0] != os.getpid():  # before the lock, which a thread may have held when the process was forked
        return None
    with _lock:
        if not _is_installed():
            return None
        bucket = _buckets.pop((id(fs), name), None) or _Bucket(fs, name)
        _buckets[id(fs), name] = bucket
        if len(_buckets) > _MOST_BUCKETS:
            del _buckets[next(iter(_buckets))]  # the one that was not read for longest
        return bucket


def _is_installed() -> bool:
    """Whether obstore is there. From here on, its threads are in this process."""
    try:
        import obstore  # noqa: F401
    except ImportError:  # there is no wheel for this platform
        return False
    if not _home:
        _home.append(os.getpid())
    return True


def _plan(fs: Any, bucket: str) -> _Plan:
    """Have s3fs prepare a request, and take from it where it would go and who would sign it."""
    from fsspec.asyn import sync

    marker = uuid.uuid4().hex
    request, credentials = sync(fs.loop, _prepared, fs, bucket, marker)
    url = request.url.removesuffix(f"/{marker}")
    if fs.anon and "Authorization" not in request.headers:
        return _Plan(url)
    authorization = request.headers["Authorization"]
    signed = _AUTHORIZATION.match(authorization.decode() if isinstance(authorization, bytes) else authorization)
    if signed is None or "X-Amz-S3session-Token" in request.headers:  # S3 Express has keys for each bucket
        raise ValueError("requests for this bucket are signed in another way")
    return _Plan(url, signed[1], credentials.access_key, credentials.secret_key, credentials.token)


async def _prepared(fs: Any, bucket: str, key: str) -> tuple[Any, Any]:
    """The signed request for a key, which is not sent, and the credentials that have signed it."""
    seen: list[Any] = []

    def stop(request: Any, **_: Any) -> None:
        if request.url.endswith(f"/{key}"):
            seen.append(request)
            raise InterruptedError("this request is not sent")

    client = await fs.set_session()
    client.meta.events.register("before-send.s3.GetObject", stop, unique_id=key)
    try:
        await client.get_object(Bucket=bucket, Key=key)
    except InterruptedError:
        pass
    finally:
        client.meta.events.unregister("before-send.s3.GetObject", unique_id=key)
    if fs.anon:
        return seen[0], None
    credentials = await fs.session.get_credentials()
    return seen[0], await credentials.get_frozen_credentials()


def _store(plan: _Plan, fs: Any) -> Any:
    """obstore's client. What it would take from the environment is given to it, so that only s3fs decides."""
    from obstore.store import S3Store

    limits = fs.s3.meta.config
    options: dict[str, Any] = {
        "allow_http": True,
        "allow_invalid_certificates": False,
        "connect_timeout": timedelta(seconds=limits.connect_timeout),
        "read_timeout": timedelta(seconds=limits.read_timeout),
        "timeout": _NO_TIMEOUT,
        "http1_only": True,
    }
    if plan.url.startswith("https:"):
        options["root_certificate"] = Path(_certificates(fs.session)).read_bytes()
    credential = {
        "access_key_id": plan.key,
        "secret_access_key": plan.secret,
        "token": plan.token,
        "expires_at": None,  # `_GOOD_FOR_S` sees to it
    }
    config: dict[str, Any] = {
        "endpoint": plan.url,
        "aws_endpoint_url_s3": plan.url,
        "virtual_hosted_style_request": True,  # the URL names the bucket
        "region": plan.region or "us-east-1",
        "skip_signature": not plan.region,
        "request_payer": False,
        "s3_express": False,
    }
    return S3Store(
        "bucket",
        config=config,  # type: ignore[arg-type]
        client_options=options | _proxy(plan.url),  # type: ignore[arg-type]
        retry_config={"max_retries": 0, "retry_timeout": _NO_TIMEOUT},
        credential_provider=lambda: credential,  # type: ignore[arg-type]
    )


def _certificates(session: Any) -> str:
    """The file of the certificates that s3fs trusts."""
    from botocore.httpsession import where

    return str(session.get_config_variable("ca_bundle") or os.environ.get("REQUESTS_CA_BUNDLE") or where())


def _proxy(url: str) -> dict[str, str]:
    """The proxy that s3fs would ask for this URL."""
    from botocore.utils import get_environ_proxies

    proxy = get_environ_proxies(url).get(urllib.parse.urlsplit(url).scheme)
    if proxy is None:
        return {"proxy_url": _NOBODY, "proxy_excludes": _EVERYBODY}
    proxy = proxy if "://" in proxy else f"http://{proxy}"
    if not proxy.startswith("http://"):
        raise ValueError("the proxy is not one of HTTP")
    return {"proxy_url": proxy}


def _get(store: Any, key: str, span: tuple[int, int] | None, certain_codes: Collection[str]) -> bytes:
    from obstore.exceptions import BaseError

    try:
        if span is None:
            return bytes(store.get(key).bytes())
        return bytes(store.get_range(key, start=span[0], end=span[1]))
    except (BaseError, OSError, ValueError) as error:  # ValueError: a key that obstore cannot name
        known = _translated(str(error), f"{store.config['endpoint']}/{urllib.parse.quote(key)}", certain_codes)
        if known is None:
            raise _DoubtError(str(error).partition(_DETAILS)[0]) from error
    raise known


def _translated(text: str, url: str, certain_codes: Collection[str]) -> Exception | None:
    """The error that s3fs would have raised; None if that is not certain.

    A denial is never certain: obstore may have followed a redirection to a host for which it does not sign.
    """
    details = text.rpartition(_DETAILS)[2]
    if (status := _STATUS.search(details)) is not None:
        return _answer(int(status[1]), _unescaped(status[2] or ""), certain_codes)
    if (kind := _KIND.search(details)) is None:
        return None
    return _cut(kind[1], details, url)


def _answer(status: int, body: str, certain_codes: Collection[str]) -> Exception | None:
    """As s3fs raises an error that S3 has answered."""
    import http.client
    from xml.etree import ElementTree

    from botocore.exceptions import ClientError
    from s3fs.errors import translate_boto_error

    code, message = str(status), http.client.responses.get(status, "")
    try:
        root = ElementTree.fromstring(body)
    except ElementTree.ParseError:  # not S3's, but that of a proxy on the way
        pass
    else:
        code, message = root.findtext("Code", ""), root.findtext("Message", "")
    if not code or not (status >= 500 or status == 429 or code in certain_codes):
        return None
    metadata = {"HTTPStatusCode": status, "MaxAttemptsReached": True, "RetryAttempts": 0}
    answer = {"Error": {"Code": code, "Message": message}, "ResponseMetadata": metadata}
    error: Exception = translate_boto_error(ClientError(answer, "GetObject"))
    return error


def _cut(kind: str, details: str, url: str) -> Exception | None:
    """As s3fs raises that a connection fell silent, was reset, or was closed too soon."""
    from botocore.exceptions import (
        ConnectionClosedError,
        ConnectTimeoutError,
        EndpointConnectionError,
        ReadTimeoutError,
    )

    error: Exception | None = None
    has_begun = "RetryError" not in details  # the body has
    if "Connect," in details:  # if nobody answers, who is to blame: the network, the name, the certificate, the proxy?
        error = ConnectTimeoutError(endpoint_url=url, error="timed out") if kind == "Timeout" else None
    elif kind == "Timeout":
        error = ReadTimeoutError(endpoint_url=url, error="timed out")
    elif (has_begun and kind == "Interrupted") or "IncompleteMessage" in details:
        error = ConnectionClosedError(endpoint_url=url)
    elif "kind: ConnectionReset," in details or "kind: BrokenPipe," in details:
        error = EndpointConnectionError(endpoint_url=url)
    return error


def _unescaped(text: str) -> str:
    """Undo what Rust's debug format does to a text."""
    return _ESCAPED.sub(lambda found: chr(int(found[1], 16)) if found[1] else _ESCAPES.get(found[2], found[2]), text)
