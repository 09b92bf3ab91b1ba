"""Intake: the body of a request, as it arrives, to encoded images, within the limits.

A file is handed on as soon as its last byte is there, while the rest of the request is still on its way. Nothing is
written to disk. What a client says of a file's type is not believed: its bytes decide.
"""

import asyncio
import collections
import contextlib
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import Request

from catdog.errors import ImageError
from catdog.serving.problems import ProblemError
from catdog.serving.service import Limits, RequestUnderWay

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks

MIN_BYTES_PER_S: Final = 16_000
"""Slowest client that is waited for, on average, after the time that it may stay silent."""

EMPTY: Final = ImageError("empty_file", "the file is empty")
"""As the bulk job has it, which does not open an empty file."""

_MAX_NAME_CHARS: Final = 1024


@dataclass(frozen=True, slots=True)
class Upload:
    """A file of a request."""

    name: str | None
    """What the client calls it."""

    content: bytes | ImageError
    num_bytes: int
    """Size of the file."""

    num_held_bytes: int
    """Bytes that the request holds for it: none of a file that is too large."""


class Body:
    """The body of a request, as it arrives."""

    def __init__(self, request: Request, under_way: RequestUnderWay) -> None:
        self._request = request
        self._under_way = under_way
        self._limits = under_way.service.limits
        self.content_type = request.headers.get("content-type", "")
        """The header, which may have parameters."""

    @property
    def media_type(self) -> str:
        """The content type without its parameters, in lower case."""
        return self.media_type_of(self._request)

    @staticmethod
    def media_type_of(request: Request) -> str:
        """The same, of a request."""
        return request.headers.get("content-type", "").partition(";")[0].strip().lower()

    async def uploads(self) -> AsyncIterator[Upload]:
        """The files: the parts of a multipart body, or else the body itself.

        Raises:
            ProblemError: the request breaks a limit, or cannot be understood.
        """
        if self.media_type == "multipart/form-data":
            async for upload in self._parts():
                yield upload
        else:
            yield await self._whole()

    async def read(self, max_bytes: int) -> bytes:
        """All of it, of which the request holds as many bytes.

        Raises:
            ProblemError: as `uploads`.
        """
        parts: list[bytes] = []
        async for chunk in self._chunks(max_bytes):
            self._under_way.hold(len(chunk))
            parts.append(chunk)
        return b"".join(parts)

    async def _whole(self) -> Upload:
        """The body as one image."""
        num_bytes = self._declared_length()
        if num_bytes > self._limits.max_bytes:
            raise _too_large_image(num_bytes, self._limits)
        with _as_image_error(self._limits):
            data = await self.read(self._limits.max_bytes)
        return Upload(None, data or EMPTY, len(data), len(data))

    async def _parts(self) -> AsyncIterator[Upload]:
        _, options = parse_options_header(self.content_type)
        boundary = options.get(b"boundary")
        if not boundary:
            raise ProblemError("bad_request", "multipart/form-data must name its boundary")
        form = _Form(self._limits, self._under_way)
        try:
            parser = MultipartParser(boundary, form.callbacks())
            async for chunk in self._chunks(self._limits.max_request_bytes):
                parser.write(chunk)
                while form.uploads:
                    yield form.uploads.popleft()
        except FormParserError as error:
            raise ProblemError("bad_request", f"the body must be multipart/form-data: {error}") from error
        if not form.is_complete:
            raise ProblemError("bad_request", "the body must end with the boundary that Content-Type names")
        if not form.num_files:
            raise ProblemError("bad_request", "the request must have at least one file")

    def _declared_length(self) -> int:
        """What `Content-Length` says; 0 if it says nothing."""
        length = self._request.headers.get("content-length", "")
        return int(length) if length.isascii() and length.isdigit() else 0

    async def _chunks(self, max_bytes: int) -> AsyncIterator[bytes]:
        if self._request.headers.get("content-encoding", "identity").lower() not in ("", "identity"):
            raise ProblemError("unsupported_encoding", "send the body as it is, without Content-Encoding")
        if self._declared_length() > max_bytes:
            raise _too_large_request(max_bytes)
        stream = self._request.stream().__aiter__()
        num_bytes, waited_s = 0, 0.0
        while True:
            # Time in which nobody reads, because too many images wait, is not the client's.
            deadline_s = self._limits.timeout_s + num_bytes / MIN_BYTES_PER_S - waited_s
            started = time.monotonic()
            try:
                async with asyncio.timeout(deadline_s):
                    chunk = await anext(stream, None)
            except TimeoutError as error:
                raise ProblemError(
                    "timeout",
                    f"a request must arrive within {self._limits.timeout_s:g} s, and {MIN_BYTES_PER_S} bytes/s",
                    {"Connection": "close"},
                ) from error
            waited_s += time.monotonic() - started
            if chunk is None:
                return
            num_bytes += len(chunk)
            if num_bytes > max_bytes:
                raise _too_large_request(max_bytes)
            if chunk:
                yield chunk


@contextlib.contextmanager
def _as_image_error(limits: Limits) -> Iterator[None]:
    """Say of a request that it is too large what is said of its image."""
    try:
        yield
    except ProblemError as problem:
        if problem.code != "request_too_large":
            raise
        raise _too_large_image(None, limits) from problem


def too_large(limits: Limits, num_bytes: int | None = None) -> ImageError:
    """The error of a file that has too many bytes."""
    received = "" if num_bytes is None else f": {num_bytes}"
    return ImageError("too_large", f"more than {limits.max_bytes} bytes{received}")


def _too_large_image(num_bytes: int | None, limits: Limits) -> ProblemError:
    return ProblemError("too_large", str(too_large(limits, num_bytes)), {"Connection": "close"})


def _too_large_request(max_bytes: int) -> ProblemError:
    return ProblemError("request_too_large", f"a request must have at most {max_bytes} bytes", {"Connection": "close"})


@dataclass
class _Form:
    """What the parser of a multipart body reports: the files so far."""

    limits: Limits
    under_way: RequestUnderWay
    uploads: collections.deque[Upload] = field(default_factory=collections.deque)
    """Files that are complete and not yet taken."""

    num_files: int = 0
    is_complete: bool = False
    _field: bytearray = field(default_factory=bytearray)
    _value: bytearray = field(default_factory=bytearray)
    _name: str | None = None
    _data: list[bytes] = field(default_factory=list)
    _num_bytes: int = 0
    _num_held_bytes: int = 0

    def callbacks(self) -> "MultipartCallbacks":
        """What to call, by the names that `python_multipart` has."""
        return {
            "on_part_begin": self._begin,
            "on_header_begin": self._begin_header,
            "on_header_field": lambda data, start, end: self._field.extend(data[start:end]),
            "on_header_value": lambda data, start, end: self._value.extend(data[start:end]),
            "on_header_end": self._end_header,
            "on_part_data": self._take,
            "on_part_end": self._end,
            "on_end": self._complete,
        }

    def _begin(self) -> None:
        self.num_files += 1
        if self.num_files > self.limits.max_files:
            raise ProblemError(
                "too_many_files", f"a request must have at most {self.limits.max_files} files", {"Connection": "close"}
            )
        self._name, self._data, self._num_bytes, self._num_held_bytes = None, [], 0, 0

    def _begin_header(self) -> None:
        self._field.clear()
        self._value.clear()

    def _end_header(self) -> None:
        if self._field.lower() == b"content-disposition":
            _, options = parse_options_header(bytes(self._value))
            name = options.get(b"filename")
            self._name = None if name is None else _text(name)[:_MAX_NAME_CHARS]

    def _take(self, data: bytes, start: int, end: int) -> None:
        self._num_bytes += end - start
        if self._num_bytes > self.limits.max_bytes:
            self._let_go()
            return
        self.under_way.hold(end - start)
        self._num_held_bytes += end - start
        self._data.append(data[start:end])

    def _let_go(self) -> None:
        self.under_way.hold(-self._num_held_bytes)
        self._data, self._num_held_bytes = [], 0

    def _end(self) -> None:
        is_too_large = self._num_bytes > self.limits.max_bytes
        content = too_large(self.limits, self._num_bytes) if is_too_large else b"".join(self._data) or EMPTY
        self.uploads.append(Upload(self._name, content, self._num_bytes, self._num_held_bytes))
        self._data = []

    def _complete(self) -> None:
        self.is_complete = True


def _text(name: bytes) -> str:
    try:
        return name.decode()
    except UnicodeDecodeError:
        return name.decode("latin-1")
