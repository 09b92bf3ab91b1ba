"""What every request passes: its id, its token, the headers of its answer, and the counters."""

import hmac
import logging
import re
import time
import uuid
from typing import Final

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from catdog.serving import problems
from catdog.serving.metrics import Metrics
from catdog.serving.problems import ProblemError

logger = logging.getLogger(__name__)

_SECURITY_HEADERS: Final = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}
_API_POLICY: Final = "default-src 'none'; frame-ancestors 'none'"
PAGE_POLICY: Final = (
    "default-src 'self'; img-src 'self' blob: data:; object-src 'none'; base-uri 'none'; form-action 'self'; "
    "frame-ancestors 'none'"
)
"""The page loads nothing from elsewhere. Its thumbnails are blobs."""

_REQUEST_ID: Final = re.compile(r"[\w.-]{1,64}", re.ASCII)

NEEDS_TOKEN: Final = ("/v1/", "/v2/models/", "/metrics")
"""Beginnings of the paths that need the token, if there is one. The page and its files, the API's description, and the
health of the service are for everybody."""

_DISCONNECTED: Final = 499
"""The status that is counted for a client that has gone, as nginx does."""


class Middleware:
    """The outermost ASGI application."""

    def __init__(self, app: ASGIApp, *, metrics: Metrics, token: str | None) -> None:
        self._app = app
        self._metrics = metrics
        self._token = token.encode() if token else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        request_id = headers.get("x-request-id", "")
        if not _REQUEST_ID.fullmatch(request_id):
            request_id = uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        answer = _Answer(send, request_id)
        started = time.perf_counter()
        try:
            if not self._is_allowed(scope["path"], headers):
                raise ProblemError(
                    "unauthorized", "send the header Authorization: Bearer TOKEN", {"WWW-Authenticate": "Bearer"}
                )
            await self._app(scope, receive, answer.send)
        except ProblemError as problem:
            await answer.send_problem(problem)
        except ClientDisconnect:
            answer.status = _DISCONNECTED
        except Exception:
            logger.exception("Request %s failed", request_id)
            if not answer.has_begun:
                await answer.send_problem(ProblemError("internal_error", "the log of the service says why"))
        finally:
            seconds = time.perf_counter() - started
            route = getattr(scope.get("route"), "path", "none")
            self._metrics.requests.labels(route, str(answer.status)).inc()
            self._metrics.latency.labels(route).observe(seconds)
            logger.debug(
                "%s %s %s %d in %.1f ms", request_id, scope["method"], scope["path"], answer.status, 1000 * seconds
            )

    def _is_allowed(self, path: str, headers: Headers) -> bool:
        if self._token is None or not path.startswith(NEEDS_TOKEN):
            return True
        scheme, _, given = headers.get("authorization", "").partition(" ")
        return scheme.lower() == "bearer" and hmac.compare_digest(given.strip().encode(), self._token)


class _Answer:
    """The answer to a request, on its way out."""

    def __init__(self, send: Send, request_id: str) -> None:
        self._send = send
        self._request_id = request_id
        self.status = 0
        self.has_begun = False

    async def send(self, message: Message) -> None:
        """Pass a message on, with the headers that every answer has."""
        if message["type"] == "http.response.start":
            self.has_begun = True
            self.status = message["status"]
            headers = MutableHeaders(scope=message)
            headers["X-Request-ID"] = self._request_id
            for name, value in _SECURITY_HEADERS.items():
                headers[name] = value
            headers.setdefault("Content-Security-Policy", _API_POLICY)
            headers.setdefault("Cache-Control", "no-store")
        await self._send(message)

    async def send_problem(self, problem: ProblemError) -> None:
        """Answer with a problem."""
        body = problem.body(self._request_id)
        headers = {"Content-Type": problems.MEDIA_TYPE, "Content-Length": str(len(body)), **problem.headers}
        raw = [(name.lower().encode(), value.encode("latin-1")) for name, value in headers.items()]
        await self.send({"type": "http.response.start", "status": problem.status, "headers": raw})
        await self.send({"type": "http.response.body", "body": body})
