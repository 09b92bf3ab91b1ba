"""What a client is told when it gets no label: RFC 9457, "Problem Details for HTTP APIs".

A problem has a code that programs may branch on. An image that cannot be used has the code that its row would have in
the output of `catdog predict` (`catdog.schema.ERROR_CODES`); the other codes are those of `REQUEST_PROBLEMS`.
"""

import json
from collections.abc import Mapping
from typing import Any, Final

from catdog.errors import CatdogError

MEDIA_TYPE: Final = "application/problem+json"

IMAGE_STATUSES: Final = {
    "empty_file": 400,
    "unsupported_format": 415,
    "truncated": 422,
    "too_large": 413,
    "decode_failed": 422,
}
"""Code of an image that cannot be used → status of a request for this image alone."""

REQUEST_PROBLEMS: Final = {
    "bad_request": (400, "The request cannot be understood"),
    "unauthorized": (401, "The request needs the token of this service"),
    "no_such_route": (404, "There is nothing at this path"),
    "method_not_allowed": (405, "This path has no such method"),
    "timeout": (408, "The request came too slowly"),
    "too_many_files": (413, "The request has too many files"),
    "request_too_large": (413, "The request is too large"),
    "unsupported_encoding": (415, "The request must not be compressed"),
    "busy": (429, "Too many images are waiting"),
    "internal_error": (500, "The service has failed"),
    "draining": (503, "The service is about to end"),
}
"""Code of a request that cannot be answered → its status and title."""


class ProblemError(CatdogError):
    """A request that cannot be answered.

    Attributes:
        code: one of `IMAGE_STATUSES` or `REQUEST_PROBLEMS`.
        status: the HTTP status.
        headers: headers of the answer.
    """

    def __init__(self, code: str, detail: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(detail)
        self.code = code
        if code in REQUEST_PROBLEMS:
            self.status, self.title = REQUEST_PROBLEMS[code]
        else:
            self.status, self.title = IMAGE_STATUSES.get(code, 422), "The image cannot be labelled"
        self.headers = dict(headers or {})

    def document(self, request_id: str) -> dict[str, Any]:
        """The members of the problem, as RFC 9457 names them, with more.

        `error` is the member in which clients of Hugging Face and of Triton look for what is wrong.

        Example:
            >>> ProblemError("empty_file", "the file is empty").document("7")["status"]
            400
        """
        return {
            "type": f"urn:catdog:problem:{self.code}",
            "title": self.title,
            "status": self.status,
            "detail": str(self),
            "code": self.code,
            "request_id": request_id,
            "error": str(self),
        }

    def body(self, request_id: str) -> bytes:
        """The document as JSON."""
        return json.dumps(self.document(request_id)).encode()


def busy(detail: str) -> ProblemError:
    """Status 429, with the time after which a client may try again."""
    return ProblemError("busy", detail, {"Retry-After": "1"})


def draining() -> ProblemError:
    """Status 503, on a connection that ends with it."""
    return ProblemError("draining", "ask another replica, or again", {"Retry-After": "1", "Connection": "close"})
