"""The HTTP application: the routes of all protocols, the page, and the description of the API.

It is the same with and without Ray. FastAPI makes the description; the bodies of requests are read by `intake`, for a
framework that reads them whole would have no limits.
"""

import contextlib
import hashlib
import json
from collections.abc import AsyncIterator
from enum import Enum
from pathlib import Path
from typing import Any, Final

from fastapi import FastAPI, Request, Response
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from catdog import __version__
from catdog.serving import middleware, problems
from catdog.serving.metrics import MEDIA_TYPE
from catdog.serving.middleware import Middleware
from catdog.serving.problems import ProblemError, draining
from catdog.serving.protocols import hugging_face, native, open_inference
from catdog.serving.service import Service

PAGE: Final = Path(__file__).parent / "page"

_MEDIA_TYPES: Final = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
}


_PREDICT_RESPONSES: Final[dict[int | str, dict[str, Any]]] = {
    200: {
        "description": "The results",
        "content": {
            "application/json": {
                "examples": {"catdog": {"value": native.EXAMPLE}, "huggingface": {"value": hugging_face.EXAMPLE}}
            }
        },
    }
}

SALIENCY_HEADER: Final = "X-Saliency-Method"


class ProblemDocument(BaseModel):
    """A request that got no label, as RFC 9457 describes it."""

    type: str
    title: str
    status: int
    detail: str
    code: str
    request_id: str
    error: str
    """The same as `detail`."""


class LimitsDocument(BaseModel):
    """What a request may have."""

    max_files: int
    max_bytes: int
    max_pixels: int
    max_request_bytes: int


class ModelDocument(BaseModel):
    """The model that labels."""

    model_id: str
    architecture: str | None
    input_size: int
    engine: str
    review_threshold: float
    classes: list[str]
    limits: LimitsDocument


def create_app(service: Service, *, token: str | None = None) -> FastAPI:
    """The application.

    Args:
        service: what labels. The application closes it at its end.
        token: what requests for labels must bring; None if everybody may ask.
    """

    @contextlib.asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        async with service.running():
            yield

    app = FastAPI(
        title="catdog",
        version=__version__,
        description="Tells cats from dogs in photographs.",
        docs_url=None,  # FastAPI's pages load scripts from elsewhere
        redoc_url=None,
        lifespan=lifespan,
        responses={"4XX": {"model": ProblemDocument, "content": {problems.MEDIA_TYPE: {}}}},
    )
    app.add_middleware(Middleware, metrics=service.metrics, token=token)
    app.add_exception_handler(ProblemError, _answer_problem)
    app.add_exception_handler(HTTPException, _answer_http_exception)
    _add_native(app, service)
    _add_open_inference(app, service)
    _add_metrics(app, service)
    _add_page(app)
    return app


def _add_native(app: FastAPI, service: Service) -> None:
    @app.post(
        "/v1/predict",
        response_model=native.Predictions | list[hugging_face.Score] | list[list[hugging_face.Score]],
        responses=_PREDICT_RESPONSES,
        summary="Label one or many images",
        openapi_extra={"requestBody": native.REQUEST_BODY},
    )
    async def predict(request: Request) -> Response:
        """Label the image that is the body of the request, or all files of a form, whatever the names of its fields.

        The file's bytes decide what it is, not its type or its name. A request for one image that cannot be labelled
        gets a problem. In a request for many, it is a row with an error.

        With `format=huggingface`, and for a JSON body as Hugging Face's clients send it, the answer is a list of
        `{"label", "score"}`.
        """
        is_hugging_face = hugging_face.is_asked_for(request)
        with service.request() as under_way:
            answer = hugging_face.answer if is_hugging_face else native.answer
            return _json(await answer(request, under_way))

    @app.post(
        "/v1/explain",
        response_class=Response,
        responses={200: {"description": "The picture", "content": {"image/png": {}}}},
        summary="Show which parts of an image speak for its label",
        openapi_extra={"requestBody": native.IMAGE_BODY},
    )
    async def explain(request: Request) -> Response:
        """Return the upright picture, at most 512 pixels wide and high, in which glows what speaks for its label.

        The header `X-Saliency-Method` is `class-activation-map`, or, for networks that have none, `occlusion`.
        """
        with service.request() as under_way:
            explanation = await native.explain(request, under_way)
        return Response(explanation.png, media_type="image/png", headers={SALIENCY_HEADER: explanation.method})

    @app.get("/v1/model", response_model=ModelDocument, summary="The model, and the limits of a request")
    async def model() -> Response:
        """Describe the model that the next request gets, and what a request may have."""
        return _json(native.model_document(service))


def _add_open_inference(app: FastAPI, service: Service) -> None:
    tags: list[str | Enum] = ["Open Inference Protocol v2"]

    @app.get("/v2", tags=tags, summary="The server")
    async def server() -> Response:
        """Describe the server."""
        return _json(open_inference.server_metadata())

    @app.get("/v2/health/live", tags=tags, summary="Whether the process lives")
    async def live() -> Response:
        """Say that the process lives."""
        return _json({"live": True})

    @app.get("/v2/health/ready", tags=tags, summary="Whether requests may be sent")
    @app.get("/v2/models/catdog/ready", tags=tags, summary="Whether requests may be sent", operation_id="model_ready")
    async def ready() -> Response:
        """Say that requests may be sent. Once the service is told to end, the status is 503."""
        if service.is_draining:
            raise draining()
        return _json({"ready": True})

    @app.get("/v2/models/catdog", tags=tags, summary="The model's inputs and outputs")
    async def metadata() -> Response:
        """Describe the tensors of the model."""
        return _json(open_inference.model_metadata(service))

    @app.post(
        "/v2/models/catdog/infer",
        tags=tags,
        summary="Label images",
        openapi_extra={"requestBody": open_inference.REQUEST_BODY},
    )
    async def infer(request: Request) -> Response:
        """Label the images of a tensor of `BYTES`: in base64, or as they are with Triton's binary extension."""
        with service.request() as under_way:
            return await open_inference.infer(request, under_way)


def _add_metrics(app: FastAPI, service: Service) -> None:
    @app.get("/metrics", response_class=Response, summary="Prometheus's metrics", responses={200: {"content": {}}})
    async def metrics() -> Response:
        """Requests, latency, images, errors, batches, and what waits."""
        return Response(service.metrics.text(), media_type=MEDIA_TYPE)


def _add_page(app: FastAPI) -> None:
    @app.get("/", include_in_schema=False)
    async def page(request: Request) -> Response:
        return _file("index.html", request)

    @app.get("/static/{name}", include_in_schema=False)
    async def static(name: str, request: Request) -> Response:
        return _file(name, request)


def _file(name: str, request: Request) -> Response:
    """A file of the page. A browser asks each time whether it has changed."""
    media_type = _MEDIA_TYPES.get(Path(name).suffix)
    if media_type is None or name not in {path.name for path in PAGE.glob("*")}:
        raise HTTPException(404)
    content = (PAGE / name).read_bytes()
    etag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
    headers = {"ETag": etag, "Cache-Control": "no-cache", "Content-Security-Policy": middleware.PAGE_POLICY}
    if etag in (each.strip().removeprefix("W/") for each in request.headers.get("if-none-match", "").split(",")):
        return Response(status_code=304, headers=headers)
    return Response(content, media_type=media_type, headers=headers)


def _json(document: Any) -> Response:
    """A response whose numbers are the model's, to the last bit."""
    return Response(json.dumps(document, ensure_ascii=False).encode(), media_type="application/json")


async def _answer_problem(request: Request, error: Exception) -> Response:
    if not isinstance(error, ProblemError):
        raise error
    body = error.body(request.state.request_id)
    return Response(body, error.status, {**error.headers, "Content-Type": problems.MEDIA_TYPE})


async def _answer_http_exception(request: Request, error: Exception) -> Response:
    """What the router refuses."""
    if not isinstance(error, HTTPException):
        raise error
    code = {404: "no_such_route", 405: "method_not_allowed"}.get(error.status_code, "bad_request")
    detail = f"{request.method} {request.url.path}"
    return await _answer_problem(request, ProblemError(code, detail, error.headers))
