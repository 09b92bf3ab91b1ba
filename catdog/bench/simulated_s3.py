"""An S3 that holds millions of objects and no byte of them: their names follow from a formula.

`python -m catdog.bench.simulated_s3` serves it. It answers ListObjectsV2 (prefix, delimiter, start-after, tokens,
pages) and HeadBucket as S3 does, after a delay that stands for the network. It has no object to give.
"""

import asyncio
import base64
import bisect
import collections
import contextlib
import os
import re
import subprocess
import sys
import urllib.parse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final
from xml.sax.saxutils import escape

BUCKET: Final = "simulated"
PREFIX: Final = "photos"
"""Under which all objects lie."""

_PLAIN: Final = re.compile(r"[A-Za-z0-9/_.-]*")
"""Keys that are written as they are."""

_LAST: Final = "\U0010ffff"
_MASK: Final = 2**128 - 1
_MULTIPLIER: Final = 0x9E3779B97F4A7C15F39CC0605CEDC835
"""Spreads numbers over 128 bits: 2**128 divided by the golden ratio."""


def _flat(number: int, _: int) -> str:
    return f"{PREFIX}/img_{number:09d}.jpg"


def _hashed(number: int, num_objects: int) -> str:
    step = 2**64 // num_objects
    return f"{PREFIX}/{number * step + (number * _MULTIPLIER & _MASK) % step:016x}.jpg"


def _deep(number: int, _: int) -> str:
    """Days of 20,000 photographs; within a day, cameras of 100, 2,000, 7,900 and 10,000."""
    day, place = divmod(number, 20_000)
    camera = bisect.bisect_right((100, 2_100, 10_000), place)
    year, day = divmod(day, 336)
    return f"{PREFIX}/{2020 + year}/{day // 28 + 1:02d}/{day % 28 + 1:02d}/camera-{camera}/IMG_{place:05d}.JPG"


LAYOUTS: Final[dict[str, Callable[[int, int], str]]] = {"flat": _flat, "deep": _deep, "hashed": _hashed}
"""The key of the object of this number, of so many. The keys of greater numbers are greater."""


@dataclass(frozen=True)
class Objects(Sequence[str]):
    """The keys of a bucket, in order, made when they are asked for."""

    num_objects: int
    layout: str = "flat"

    def __len__(self) -> int:
        return self.num_objects

    def __getitem__(self, number):  # type: ignore[no-untyped-def]
        """The key of an object, or the keys of some."""
        key = LAYOUTS[self.layout]
        if isinstance(number, slice):
            return [key(each, self.num_objects) for each in range(*number.indices(self.num_objects))]
        if not 0 <= number < self.num_objects:
            raise IndexError(number)
        return key(number, self.num_objects)


def etag_of(number: int) -> str:
    """The ETag of an object, without quotation marks."""
    return f"{(number + 1) * _MULTIPLIER & _MASK:032x}"


def num_bytes_of(number: int) -> int:
    """The size of an object."""
    return 20_000 + number % 50_000


class Lister:
    """Answers ListObjectsV2 about a bucket with these keys, which are in order.

    Attributes:
        num_requests: how many pages it has given.
    """

    def __init__(self, keys: Sequence[str], name: str = BUCKET) -> None:
        self.num_requests = 0
        self._keys, self._name = keys, name

    def page(self, query: dict[str, str]) -> bytes:
        """One page, as XML."""
        self.num_requests += 1
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        after = query.get("start-after", "")
        if "continuation-token" in query:
            after = base64.urlsafe_b64decode(query["continuation-token"]).decode("utf-8", "surrogatepass")
        most = min(int(query.get("max-keys", "1000")), 1000)
        begin = max(bisect.bisect_left(self._keys, prefix), bisect.bisect_right(self._keys, after))
        end = bisect.bisect_left(self._keys, prefix + _LAST, begin)
        if delimiter:
            body, next_place, last = self._grouped(begin, end, most, prefix, delimiter)
        else:
            next_place = min(begin + most, end)
            keys = self._keys[begin:next_place]
            body, last = _contents(keys, begin), keys[-1] if keys else ""
        token = base64.urlsafe_b64encode(last.encode("utf-8", "surrogatepass")).decode()
        more = f"<NextContinuationToken>{token}</NextContinuationToken>" if next_place < end else ""
        return (
            '<?xml version="1.0" encoding="UTF-8"?>\n'
            '<ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
            f"<Name>{self._name}</Name><Prefix>{_quoted(prefix)}</Prefix><MaxKeys>{most}</MaxKeys>"
            f"<EncodingType>url</EncodingType><IsTruncated>{str(next_place < end).lower()}</IsTruncated>{more}"
            f"{body}</ListBucketResult>"
        ).encode()

    def _grouped(self, begin: int, end: int, most: int, prefix: str, delimiter: str) -> tuple[str, int, str]:
        """With a delimiter: the XML, where the next page begins, and after which key or group."""
        objects: list[str] = []
        groups: list[str] = []
        last = ""
        while begin < end and len(objects) + len(groups) < most:
            key = self._keys[begin]
            cut = key.find(delimiter, len(prefix))
            if cut < 0:
                objects.append(_contents([key], begin))
                last, begin = key, begin + 1
            else:
                group = key[: cut + len(delimiter)]
                groups.append(f"<CommonPrefixes><Prefix>{_quoted(group)}</Prefix></CommonPrefixes>")
                last = group + _LAST
                begin = bisect.bisect_left(self._keys, last, begin)
        return "".join(objects + groups), begin, last


def _quoted(key: str) -> str:
    """A key as S3 writes it where `encoding-type=url` is asked for."""
    return urllib.parse.quote(key, safe="/")


def _contents(keys: Sequence[str], begin: int) -> str:
    """The objects with these keys, the first of which has the number `begin`."""
    quoted = keys if _PLAIN.fullmatch("".join(keys)) else [_quoted(key) for key in keys]
    return "".join(
        f"<Contents><Key>{key}</Key><LastModified>2026-01-02T03:04:05.000Z</LastModified>"
        f"<ETag>&quot;{etag_of(number)}&quot;</ETag><Size>{num_bytes_of(number)}</Size>"
        "<StorageClass>STANDARD</StorageClass></Contents>"
        for number, key in enumerate(quoted, begin)
    )


Answer = Callable[[str, str, dict[str, str]], tuple[int, bytes]]
"""Gives the HTTP status and the body for a method, a path and a query."""


def answer_with(lister: Lister) -> Answer:
    """Answer as a store that holds one bucket."""

    def answer(method: str, path: str, query: dict[str, str]) -> tuple[int, bytes]:
        if query.get("list-type") == "2":
            return 200, lister.page(query)
        if method == "HEAD" and path.count("/") == 1:
            return 200, b""
        code = "NoSuchKey" if path.count("/") > 1 else "NotImplemented"
        return (404 if code == "NoSuchKey" else 501), _error(code)

    return answer


def _error(code: str) -> bytes:
    return f"<Error><Code>{escape(code)}</Code><Message>the simulated S3 has none</Message></Error>".encode()


class Server:
    """Serves answers over HTTP, each after a delay.

    Attributes:
        most_at_once: requests that waited for their answers at the same time.
    """

    def __init__(self, answer: Answer, delay_s: float) -> None:
        self.most_at_once = 0
        self._answer, self._delay_s = answer, delay_s
        self._at_once: collections.Counter[str] = collections.Counter()

    async def start(self, port: int = 0) -> asyncio.Server:
        """Begin to listen on a port of this machine; 0 for a free one."""
        return await asyncio.start_server(self._serve, "127.0.0.1", port)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
                method, target, _ = head.split(" ", 2)
                path, _, text = target.partition("?")
                query = dict(urllib.parse.parse_qsl(text, keep_blank_values=True, errors="surrogatepass"))
                self._at_once["all"] += 1
                self.most_at_once = max(self.most_at_once, self._at_once["all"])
                await asyncio.sleep(self._delay_s)
                status, body = self._answer(method, urllib.parse.unquote(path), query)
                self._at_once["all"] -= 1
                lines = f"HTTP/1.1 {status} .\r\nContent-Type: application/xml\r\nContent-Length: {len(body)}\r\n\r\n"
                writer.write(lines.encode() + (b"" if method == "HEAD" else body))
                await writer.drain()
        writer.close()


@contextlib.contextmanager
def serving(num_objects: int, layout: str, delay_s: float) -> Iterator[dict[str, str]]:
    """Run the server in a process of its own. Gives the environment variables by which catdog finds it."""
    command = [sys.executable, "-m", __name__, str(num_objects), layout, str(delay_s)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            port = process.stdout.readline().strip()
            if not port:
                raise RuntimeError("the simulated S3 did not start")
            yield {
                "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
                "AWS_ACCESS_KEY_ID": "simulated",
                "AWS_SECRET_ACCESS_KEY": "simulated",
                "AWS_DEFAULT_REGION": "us-east-1",
            }
        finally:
            process.terminate()


async def _run(num_objects: int, layout: str, delay_s: float) -> None:
    server = await Server(answer_with(Lister(Objects(num_objects, layout))), delay_s).start()
    sys.stdout.write(f"{server.sockets[0].getsockname()[1]}\n")
    sys.stdout.flush()
    async with server:
        await server.serve_forever()


def _main() -> None:
    num_objects, layout, delay_s = sys.argv[1:]
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(_run(int(num_objects), layout, float(delay_s)))
    os._exit(0)


if __name__ == "__main__":
    _main()
