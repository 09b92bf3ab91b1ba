"""Connections that do not wait for ever: a client must send the head of a request in time."""

import asyncio
from typing import Any, Final

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HEAD_TIMEOUT_S: Final = 10.0
"""Time from the opening of a connection, or from the first byte of a request, to the end of the request's head."""

MAX_HEAD_BYTES: Final = 64 * 2**10
"""Size of the largest head of a request. uvicorn with httptools has no limit of its own."""


class Connection(HttpToolsProtocol):
    """A connection of uvicorn's. How long it may be idle between requests, uvicorn knows itself."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._head_timer: asyncio.TimerHandle | None = None
        self._num_head_bytes: int | None = 0
        """Bytes of a head so far; None between the head and the next request."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for the first head."""
        super().connection_made(transport)
        self._wait_for_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait no more."""
        self._have_head()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Read on."""
        if self._num_head_bytes is not None:
            self._num_head_bytes += len(data)
        super().data_received(data)
        if (
            self._num_head_bytes is not None
            and self._num_head_bytes > MAX_HEAD_BYTES
            and not self.transport.is_closing()
        ):
            self.send_400_response("The head of the request is too large.")

    def on_message_begin(self) -> None:
        """Begin to wait for the end of a head."""
        super().on_message_begin()
        if self._head_timer is None:
            self._wait_for_head()

    def on_headers_complete(self) -> None:
        """Wait no more."""
        self._have_head()
        super().on_headers_complete()

    def _wait_for_head(self) -> None:
        self._num_head_bytes = 0
        self._head_timer = self.loop.call_later(HEAD_TIMEOUT_S, self._give_up)

    def _have_head(self) -> None:
        self._num_head_bytes = None
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _give_up(self) -> None:
        self._head_timer = None
        if not self.transport.is_closing():
            self.transport.close()
