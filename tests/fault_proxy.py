"""A proxy in front of the S3 test server, which does harm on the way as a test tells it to.

A test module says `pytest_plugins = ["s3_server", "fault_proxy"]` and takes the fixture `proxy`; its tests are marked
`slow`. (PYTEST_DONT_REWRITE: no asserts here, and test modules import this module before pytest does.)
"""

import http.client
import http.server
import random
import socket
import struct
import threading
import time
from collections.abc import Iterator
from typing import Final, Literal, get_args

import pytest
from s3_server import S3Server

from catdog.storage import outages

Fault = Literal["reset", "503", "500", "slow", "truncated", "lost", "expired", "skew", "late"]
"""What may happen to a request.

- `reset`: the connection is reset before the request is read.
- `503`, `500`, `expired`, `skew`: S3 answers SlowDown, InternalError, ExpiredToken, RequestTimeTooSkewed, and does
  nothing.
- `slow`: the answer comes late.
- `truncated`: the answer's body ends in the middle.
- `lost`: the work is done, and the connection is reset in place of the answer.
- `late`: the work is done, and the answer comes after `LATE_S`. A client whose time-out is shorter has gone by then.
"""

FAULTS: Final[tuple[Fault, ...]] = tuple(fault for fault in get_args(Fault) if fault != "late")
"""Those that take no longer than a test wants."""

LATE_S: Final = 3.0

_ANSWERS: Final = {
    "503": (503, "SlowDown"),
    "500": (500, "InternalError"),
    "expired": (403, "ExpiredToken"),
    "skew": (403, "RequestTimeTooSkewed"),
}

_SLOW_S: Final = 0.3


class FaultProxy:
    """The proxy.

    Attributes:
        num_requests: how many requests have come.
        most_in_flight: the most requests that were under way at one time since `count_anew`.
        pace_s: the least time between two requests that are passed on. With it, a job of many requests takes as long as
            a test wants.
    """

    def __init__(self, upstream: str) -> None:
        host, _, port = upstream.removeprefix("http://").partition(":")
        self.upstream = (host, int(port))
        self.num_requests = 0
        self.most_in_flight = 0
        self.pace_s = 0.0
        self._free_at = 0.0
        self._num_in_flight = 0
        self._lock = threading.Lock()
        self._awaited = ""
        self._num_awaited = 0
        self._came = threading.Event()
        self._fault: Fault | None = None
        self._left = 0
        self._every = 1
        self._chance = 1.0
        self._random = random.Random(0)
        proxy = self

        class Handler(_Handler):
            def do(self) -> None:
                proxy.serve(self)

            do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = do  # noqa: N815

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()
        self._is_up = True

    @property
    def endpoint(self) -> str:
        """`http://127.0.0.1:<port>`."""
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def inject(self, fault: Fault | None, *, times: int = 1, every: int = 1, chance: float = 1.0) -> None:
        """Let this happen to every so many requests, from the next one on, until it has happened so many times.

        With a `chance` below 1 it happens to each of those at random. Otherwise, of two requests that a client always
        sends one after the other, the same one might be hit for ever.
        """
        with self._lock:
            self._fault, self._left, self._every, self._chance, self.num_requests = fault, times, every, chance, 0

    def expect(self, text: str, times: int = 1) -> threading.Event:
        """An event that is set when so many requests with this text in their `METHOD /path` have come."""
        with self._lock:
            self._awaited, self._num_awaited, self._came = text, times, threading.Event()
            return self._came

    def count_anew(self) -> None:
        """Forget how many requests were under way at one time."""
        self.most_in_flight = 0

    def go_down(self) -> None:
        """Listen no more."""
        if self._is_up:
            self._is_up = False
            self._server.shutdown()
            self._server.server_close()
            self._thread.join()

    def serve(self, handler: "_Handler") -> None:
        """Pass one request on, or do harm to it."""
        with self._lock:
            is_hit = self._fault is not None and self._left > 0 and self.num_requests % self._every == 0
            is_hit = is_hit and self._random.random() < self._chance
            fault = self._fault if is_hit and self._is_up else None if self._is_up else "reset"
            self._left -= is_hit
            self.num_requests += 1
            self._num_awaited -= self._awaited in f"{handler.command} {handler.path}"
            if self._num_awaited == 0:
                self._came.set()
            self._num_in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self._num_in_flight)
        try:
            self._serve(handler, fault)
        finally:
            with self._lock:
                self._num_in_flight -= 1

    def _serve(self, handler: "_Handler", fault: Fault | None) -> None:
        if fault == "reset":
            handler.reset()
            return
        body = handler.rfile.read(int(handler.headers.get("Content-Length") or 0))
        if fault in _ANSWERS:
            status, code = _ANSWERS[fault]
            text = f"<Error><Code>{code}</Code><Message>injected: {code}</Message></Error>".encode()
            handler.answer(status, [("Content-Type", "application/xml")], text, len(text))
            return
        if fault == "slow":
            time.sleep(_SLOW_S)
        self._keep_pace()
        upstream = http.client.HTTPConnection(*self.upstream, timeout=60)
        try:
            upstream.putrequest(handler.command, handler.path, skip_host=True, skip_accept_encoding=True)
            for name, value in handler.headers.items():
                if name.lower() not in ("connection", "expect"):
                    upstream.putheader(name, value)
            upstream.endheaders(body)
            answer = upstream.getresponse()
            data = answer.read()
        finally:
            upstream.close()
        if fault == "late":
            time.sleep(LATE_S)
        if fault == "lost":
            handler.reset()
            return
        length = int(answer.headers.get("Content-Length") or len(data))
        kept = [
            (name, value)
            for name, value in answer.headers.items()
            if name.lower() not in ("connection", "transfer-encoding", "content-length")
        ]
        if fault == "truncated":
            handler.close_connection = True
            data = data[: len(data) // 2]
        handler.answer(answer.status, kept, data, length)

    def _keep_pace(self) -> None:
        with self._lock:
            now = time.monotonic()
            wait_s = max(0.0, self._free_at - now)
            self._free_at = now + wait_s + self.pace_s
        time.sleep(wait_s)


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def answer(self, status: int, headers: list[tuple[str, str]], data: bytes, length: int) -> None:
        self.send_response_only(status)
        for name, value in headers:
            self.send_header(name, value)
        self.send_header("Content-Length", str(length))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def reset(self) -> None:
        """End the connection with a TCP reset."""
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()

    def handle(self) -> None:
        try:
            super().handle()
        except (OSError, ValueError):  # the connection is gone, by our hand or the client's
            self.close_connection = True

    def finish(self) -> None:
        try:
            super().finish()
        except (OSError, ValueError):
            self.close_connection = True

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def proxy(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """The proxy. The environment variables of this process name its endpoint."""
    outages.forget_all()
    made = FaultProxy(s3.endpoint)
    monkeypatch.setenv("AWS_ENDPOINT_URL", made.endpoint)
    yield made
    made.go_down()
