"""Serving in this process, without Ray: uvicorn, the application, and the threads that label."""

import asyncio
import contextlib
import logging
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Final

import uvicorn

from catdog.bundle import Bundle
from catdog.config import ServeConfig
from catdog.errors import UsageError
from catdog.serving.app import create_app
from catdog.serving.connections import Connection
from catdog.serving.record import ServeRecord
from catdog.serving.service import Service

logger = logging.getLogger(__name__)

_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)
_BACKLOG: Final = 2048

after_starting: Callable[[], object] = bool
"""Is called when the service is about to answer. The command line sets it."""


def run(config: ServeConfig, model: Bundle, token: str | None) -> ServeRecord:
    """Serve until the process is told to end.

    Raises:
        UsageError: the port is taken.
    """
    started = time.monotonic()
    with listening(config.host, config.port) as listener:
        service = Service(config, model)
        server = Server(service, token)
        url = url_of(listener)
        logger.info(
            "Serving %s (model %s, %s) at %s",
            model.card.get("arch", "a model"),
            model.model_id[:12],
            service.model.description["engine"],
            url,
        )
        after_starting()
        server.run(sockets=[listener])
    return ServeRecord(
        url=url,
        executor="inline",
        model_id=service.model.bundle.model_id,
        num_requests=service.num_begun,
        labels=service.metrics.counts(service.metrics.images),
        errors=service.metrics.counts(service.metrics.errors),
        num_cut_off=server.num_cut_off,
        duration_s=round(time.monotonic() - started, 1),
    )


@contextlib.contextmanager
def listening(host: str, port: int) -> Iterator[socket.socket]:
    """A socket that listens.

    Raises:
        UsageError: it cannot.
    """
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.create_server((host, port), family=family, backlog=_BACKLOG)
    except OSError as error:
        raise UsageError(
            f"--host and --port must be an address of this machine and a free port. Received: {host}, {port}: "
            f"{error.strerror}"
        ) from error
    with listener:
        yield listener


def url_of(listener: socket.socket) -> str:
    """Where a browser finds what listens."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Server(uvicorn.Server):
    """uvicorn, which ends by answering what is under way.

    At the first signal, new requests are refused, and those under way go on for `--drain-s`; at the second, they are
    cut off.
    """

    def __init__(self, service: Service, token: str | None) -> None:
        config = uvicorn.Config(
            create_app(service, token=token),
            http=Connection,
            ws="none",
            lifespan="on",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_graceful_shutdown=1,  # what is under way has ended, or had its time
        )
        super().__init__(config)
        self._service = service
        self._draining: asyncio.Task[None] | None = None
        self.num_cut_off = 0

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Have the signals begin the end. In another thread than the main one, nobody sends any."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        loop = asyncio.get_running_loop()
        previous = {each: signal.getsignal(each) for each in _SIGNALS}
        for each in _SIGNALS:
            loop.add_signal_handler(each, self.end)
        try:
            yield
        finally:
            for each, handler in previous.items():
                loop.remove_signal_handler(each)
                signal.signal(each, handler)

    def end(self) -> None:
        """Refuse new requests, answer those under way, and end. Called again: end at once."""
        if self._draining is not None:
            self.num_cut_off = self._service.num_requests
            self.should_exit = self.force_exit = True
            return
        logger.info("Ending: %d requests are under way", self._service.num_requests)
        self._draining = asyncio.get_running_loop().create_task(self._drain())

    async def _drain(self) -> None:
        await self._service.drain()
        if not self.should_exit:
            self.num_cut_off = self._service.num_requests
            self.should_exit = True
