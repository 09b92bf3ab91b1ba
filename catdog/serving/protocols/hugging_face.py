"""Hugging Face's protocol for image classification, as its clients speak it to an inference endpoint.

They send an image as the body of the request, or, where they have parameters, `{"inputs": BASE64, "parameters":
{...}}`. The answer is a list of `{"label", "score"}`, the likeliest class first.
"""

import base64
import binascii
import json
from typing import Any, Final, Literal

from pydantic import BaseModel
from starlette.requests import Request

from catdog.errors import ImageError
from catdog.labelling import Verdict
from catdog.schema import CLASS_NAMES
from catdog.serving.batching import Answer
from catdog.serving.intake import EMPTY, Body, too_large
from catdog.serving.problems import ProblemError
from catdog.serving.protocols import native
from catdog.serving.service import RequestUnderWay

FORMAT_NAMES: Final = ("huggingface", "hf")
"""Values of the query's `format` that ask for this protocol's answer to an image."""

_MAX_ENVELOPE_BYTES: Final = 64 * 2**10
"""Of a request, besides the image."""

_FUNCTIONS: Final = (None, "sigmoid", "softmax")
"""Values of `function_to_apply`: with two classes, both give the calibrated probabilities."""

EXAMPLE: Final = [{"label": "dog", "score": 0.9987654685974121}, {"label": "cat", "score": 0.0012345314025878906}]


class Score(BaseModel):
    """The probability of a class."""

    label: Literal["cat", "dog"]
    score: float


def is_asked_for(request: Request) -> bool:
    """Whether the answer is to have this protocol's shape."""
    wanted = request.query_params.get("format")
    if wanted is not None and wanted not in (*FORMAT_NAMES, "catdog"):
        raise ProblemError("bad_request", f"format must be catdog or {' or '.join(FORMAT_NAMES)}")
    return wanted in FORMAT_NAMES or (wanted is None and _is_json(Body.media_type_of(request)))


def _is_json(media_type: str) -> bool:
    return media_type == "application/json"


async def answer(request: Request, under_way: RequestUnderWay) -> list[Any]:
    """Answer a request: with a list of scores, or, for a form with many files, with a list of such lists."""
    body = Body(request, under_way)
    if not _is_json(body.media_type):
        found = await native.results(body, under_way)
        scores = [_scores(each.answer, None) for each in found]
        return scores[0] if len(scores) == 1 else scores
    limit = under_way.service.limits.max_bytes
    data = await body.read(4 * -(-limit // 3) + _MAX_ENVELOPE_BYTES)
    image, top_k = _parsed(data)
    content: bytes | ImageError = image or EMPTY
    if len(image) > limit:
        content = too_large(under_way.service.limits, len(image))
    return _scores(await (await under_way.submit(content, len(data))), top_k)


def _parsed(data: bytes) -> tuple[bytes, int | None]:
    """The image, and the number of classes that are asked for."""
    try:
        document = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ProblemError("bad_request", "the body must be JSON, as its Content-Type says") from error
    inputs = document.get("inputs") if isinstance(document, dict) else None
    if not isinstance(inputs, str):
        raise ProblemError("bad_request", 'the body must be an object whose "inputs" is an image in base64')
    parameters = document.get("parameters") or {}
    if not isinstance(parameters, dict):
        raise ProblemError("bad_request", "parameters must be an object")
    top_k, function = parameters.get("top_k"), parameters.get("function_to_apply")
    if top_k is not None and (type(top_k) is not int or top_k < 1):
        raise ProblemError("bad_request", "top_k must be an integer of at least 1")
    if function not in _FUNCTIONS:
        raise ProblemError("bad_request", "function_to_apply must be sigmoid or softmax")
    return from_base64(inputs), top_k


def from_base64(text: str) -> bytes:
    """The bytes of a text in base64, which may be a `data:` URL.

    Raises:
        ProblemError: it is not base64.
    """
    encoded = text.partition(",")[2] if text.startswith("data:") else text
    try:
        return base64.b64decode("".join(encoded.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise ProblemError("bad_request", "an image in JSON must be base64") from error


def _scores(answer: Answer, top_k: int | None) -> list[dict[str, Any]]:
    verdict = answer.verdict
    if verdict.error_code is not None:
        raise ProblemError(verdict.error_code, verdict.error_message or verdict.error_code)
    scores = sorted(zip(_probabilities(verdict), CLASS_NAMES, strict=True), reverse=True)
    return [{"label": label, "score": score} for score, label in scores[:top_k]]


def _probabilities(verdict: Verdict) -> tuple[float, float]:
    """Of cat and of dog. The likelier one's is the confidence; the other's is what is left to 1."""
    prob_dog, confidence = verdict.prob_dog or 0.0, verdict.confidence or 0.0
    return (1 - prob_dog, prob_dog) if verdict.label == "dog" else (confidence, prob_dog)
