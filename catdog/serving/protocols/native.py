"""catdog's own protocol: a request has one image as its body, or many as the parts of a form.

A request for one image that cannot be labelled is answered by a problem. In a request for many, an image that cannot be
labelled is a row with an error, as in the bulk job.
"""

from dataclasses import dataclass
from typing import Any, Final, Literal

from pydantic import BaseModel
from starlette.requests import Request

from catdog import provenance
from catdog.errors import ImageError
from catdog.schema import CLASS_NAMES
from catdog.serving.batching import Answer
from catdog.serving.intake import Body
from catdog.serving.problems import ProblemError
from catdog.serving.service import Explanation, RequestUnderWay, Service


class Prediction(BaseModel):
    """The result for one image."""

    name: str | None
    """Name of the file, if the client gave one."""

    status: Literal["ok", "error"]
    label: Literal["cat", "dog"] | None
    prob_dog: float | None
    """Calibrated probability of `dog`."""

    confidence: float | None
    """Probability of `label`."""

    needs_review: bool | None
    """Whether a person should look."""

    review_reason: Literal["damaged", "neither", "unsure"] | None
    """Why a person should look."""

    error_code: str | None
    error_message: str | None
    remark: str | None
    """What is wrong with a file that has a label all the same."""

    width: int | None
    """Of the upright picture, in pixels."""

    height: int | None
    num_bytes: int
    image_id: str | None
    """SHA-256 of the file."""

    format: str | None
    orientation: int | None
    """EXIF orientation by which the picture was turned upright, 1..8."""

    read_as: str | None
    """How the picture was read, in a sentence."""


class Predictions(BaseModel):
    """The results for the images of a request, in their order."""

    model_id: str
    predictions: list[Prediction]


EXAMPLE: Final = {
    "model_id": "9f1c...",
    "predictions": [
        {
            "name": "rex.jpg",
            "status": "ok",
            "label": "dog",
            "prob_dog": 0.9987654685974121,
            "confidence": 0.9987654685974121,
            "needs_review": False,
            "review_reason": None,
            "error_code": None,
            "error_message": None,
            "remark": None,
            "width": 3024,
            "height": 4032,
            "num_bytes": 2483911,
            "image_id": "5b1e...",
            "format": "JPEG",
            "orientation": 6,
            "read_as": "4032 × 3024, turned upright by EXIF orientation 6, scaled to 240 × 240",
        }
    ],
}

_BINARY: Final = {"schema": {"type": "string", "format": "binary"}}

IMAGE_BODY: Final = {"required": True, "content": {"image/*": _BINARY, "application/octet-stream": _BINARY}}
"""What OpenAPI says of the body of `POST /v1/explain`."""

REQUEST_BODY: Final = {
    "required": True,
    "content": {
        "image/*": _BINARY,
        "application/octet-stream": _BINARY,
        "application/json": {
            "schema": {
                "type": "object",
                "properties": {
                    "inputs": {"type": "string", "format": "byte"},
                    "parameters": {"type": "object", "properties": {"top_k": {"type": "integer", "minimum": 1}}},
                },
                "required": ["inputs"],
            },
        },
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "properties": {"files": {"type": "array", "items": {"type": "string", "format": "binary"}}},
                "required": ["files"],
            },
        },
    },
}
"""What OpenAPI says of the body of `POST /v1/predict`."""


@dataclass(frozen=True, slots=True)
class Result:
    """The answer for a file of a request."""

    name: str | None
    num_bytes: int
    answer: Answer


async def results(body: Body, under_way: RequestUnderWay) -> list[Result]:
    """Label all files of a request, while it arrives. Returns their results, in order."""
    pending = []
    async for upload in body.uploads():
        answer = await under_way.submit(upload.content, upload.num_held_bytes)
        pending.append((upload.name, upload.num_bytes, answer))
        del upload  # its content, which may be large
    return [Result(name, num_bytes, await answer) for name, num_bytes, answer in pending]


def refuse_single_error(found: list[Result]) -> None:
    """Raise the problem of the only image of a request, if it has one."""
    if len(found) == 1 and (code := found[0].answer.verdict.error_code) is not None:
        raise ProblemError(code, found[0].answer.verdict.error_message or code)


def document(found: list[Result], under_way: RequestUnderWay) -> dict[str, Any]:
    """The answer to a request, as `Predictions` describes it."""
    model = under_way.model.bundle
    return {"model_id": model.model_id, "predictions": [_row(each, model.image_size) for each in found]}


def _row(result: Result, size_px: int) -> dict[str, Any]:
    verdict, answer = result.answer.verdict, result.answer
    return {
        "name": result.name,
        "status": "ok" if verdict.error_code is None else "error",
        "label": verdict.label,
        "prob_dog": verdict.prob_dog,
        "confidence": verdict.confidence,
        "needs_review": verdict.needs_review,
        "review_reason": verdict.review_reason,
        "error_code": verdict.error_code,
        "error_message": verdict.error_message,
        "remark": verdict.remark,
        "width": verdict.width,
        "height": verdict.height,
        "num_bytes": result.num_bytes,
        "image_id": verdict.image_id,
        "format": answer.format,
        "orientation": answer.orientation,
        "read_as": read_as(answer, size_px),
    }


def read_as(answer: Answer, size_px: int) -> str | None:
    """How a picture was read, in a sentence; None if it was not."""
    width, height = answer.verdict.width, answer.verdict.height
    if width is None or height is None:
        return None
    orientation = answer.orientation or 1
    if orientation >= 5:  # the file has the picture on its side
        width, height = height, width
    turned = f", turned upright by EXIF orientation {orientation}" if orientation > 1 else ""
    return f"{width} × {height}{turned}, scaled to {size_px} × {size_px}"


async def answer(request: Request, under_way: RequestUnderWay) -> dict[str, Any]:
    """Answer `POST /v1/predict`."""
    found = await results(Body(request, under_way), under_way)
    refuse_single_error(found)
    return document(found, under_way)


async def explain(request: Request, under_way: RequestUnderWay) -> Explanation:
    """Answer `POST /v1/explain`."""
    uploads = [upload async for upload in Body(request, under_way).uploads()]
    if len(uploads) != 1:
        raise ProblemError("too_many_files", "a request for an explanation must have one file")
    content = uploads[0].content
    try:
        if isinstance(content, ImageError):
            raise content
        return await under_way.service.explain(content, under_way.model)
    except ImageError as error:
        raise ProblemError(error.code, provenance.one_line(error)) from error


def model_document(service: Service) -> dict[str, Any]:
    """Answer `GET /v1/model`."""
    limits = service.limits
    return {
        **service.model.description,
        "classes": list(CLASS_NAMES),
        "limits": {
            "max_files": limits.max_files,
            "max_bytes": limits.max_bytes,
            "max_pixels": limits.max_pixels,
            "max_request_bytes": limits.max_request_bytes,
        },
    }
