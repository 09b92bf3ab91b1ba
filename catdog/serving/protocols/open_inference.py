"""The Open Inference Protocol, version 2, which KServe, Triton and others speak.

A request has one tensor of encoded images: `BYTES`, shape [N]. In JSON each is text in base64; with Triton's extension
for binary tensors, each is preceded by its length. An image that cannot be labelled is answered by a problem if it is
the only one; among others, its `error_code` says why, its `label` is empty and its `prob_dog` NaN (null in JSON).
"""

import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from starlette.requests import Request
from starlette.responses import Response

from catdog import __version__
from catdog.errors import ImageError
from catdog.labelling import Verdict
from catdog.serving.intake import EMPTY, Body, too_large
from catdog.serving.problems import ProblemError
from catdog.serving.protocols.hugging_face import from_base64
from catdog.serving.service import RequestUnderWay, Service

MODEL_NAME: Final = "catdog"
LENGTH_HEADER: Final = "Inference-Header-Content-Length"
"""Triton's: number of bytes of the JSON in front of the binary tensors."""

_INPUT: Final = {"name": "image", "datatype": "BYTES", "shape": [-1]}


@dataclass(frozen=True)
class _Output:
    name: str
    datatype: str

    def values(self, verdicts: Sequence[Verdict]) -> list[Any]:
        """The values, as JSON has them."""
        found = [getattr(verdict, self.name) for verdict in verdicts]
        if self.datatype == "BYTES":
            return ["" if value is None else value for value in found]
        return [bool(value) for value in found] if self.datatype == "BOOL" else found

    def encoded(self, verdicts: Sequence[Verdict]) -> bytes:
        """The values, as Triton's extension has them."""
        values = self.values(verdicts)
        if self.datatype == "BYTES":
            return b"".join(struct.pack("<I", len(text)) + text for text in (value.encode() for value in values))
        if self.datatype == "BOOL":
            return bytes(values)
        return struct.pack(f"<{len(values)}f", *(float("nan") if value is None else value for value in values))


_OUTPUTS: Final = {
    name: _Output(name, datatype)
    for name, datatype in (
        ("label", "BYTES"),
        ("prob_dog", "FP32"),
        ("confidence", "FP32"),
        ("needs_review", "BOOL"),
        ("review_reason", "BYTES"),
        ("error_code", "BYTES"),
        ("error_message", "BYTES"),
    )
}

_EXAMPLE: Final = {
    "inputs": [{"name": "image", "datatype": "BYTES", "shape": [1], "data": ["/9j/4AAQSkZJRg..."]}],
    "outputs": [{"name": "label"}, {"name": "prob_dog"}],
}

_PARAMETERS: Final = {"type": "object", "properties": {"binary_data_size": {"type": "integer"}}}

REQUEST_BODY: Final = {
    "required": True,
    "content": {
        "application/json": {
            "schema": {
                "type": "object",
                "required": ["inputs"],
                "properties": {
                    "id": {"type": "string"},
                    "inputs": {
                        "type": "array",
                        "minItems": 1,
                        "maxItems": 1,
                        "items": {
                            "type": "object",
                            "required": ["name", "datatype", "shape"],
                            "properties": {
                                "name": {"type": "string"},
                                "datatype": {"const": "BYTES"},
                                "shape": {"type": "array", "items": {"type": "integer"}, "minItems": 1},
                                "data": {"type": "array", "items": {"type": "string", "format": "byte"}},
                                "parameters": _PARAMETERS,
                            },
                        },
                    },
                    "outputs": {
                        "type": "array",
                        "items": {
                            "type": "object",
                            "required": ["name"],
                            "properties": {"name": {"enum": list(_OUTPUTS)}},
                        },
                    },
                },
            },
            "example": _EXAMPLE,
        }
    },
}
"""What OpenAPI says of the body of `POST /v2/models/catdog/infer`."""


def server_metadata() -> dict[str, Any]:
    """Answer `GET /v2`."""
    return {"name": MODEL_NAME, "version": __version__, "extensions": ["binary_tensor_data"]}


def model_metadata(service: Service) -> dict[str, Any]:
    """Answer `GET /v2/models/catdog`."""
    return {
        "name": MODEL_NAME,
        "versions": [service.model.bundle.model_id],
        "platform": service.model.engine.name,
        "inputs": [_INPUT],
        "outputs": [{"name": each.name, "datatype": each.datatype, "shape": [-1]} for each in _OUTPUTS.values()],
    }


async def infer(request: Request, under_way: RequestUnderWay) -> Response:
    """Answer `POST /v2/models/catdog/infer`."""
    body = Body(request, under_way)
    data = await body.read(under_way.service.limits.max_request_bytes)
    header = request.headers.get(LENGTH_HEADER)
    if header is not None and not (header.isascii() and header.isdigit() and int(header) <= len(data)):
        raise _wrong(f"{LENGTH_HEADER} must be a number of bytes of the body")
    length = len(data) if header is None else int(header)
    document = _document(data[:length])
    images = _images(document, memoryview(data)[length:])
    limits = under_way.service.limits
    if len(images) > limits.max_files:
        raise ProblemError("too_many_files", f"a request must have at most {limits.max_files} images")
    contents = [too_large(limits, len(each)) if len(each) > limits.max_bytes else each or EMPTY for each in images]
    verdicts = await _verdicts(contents, under_way)
    if len(verdicts) == 1 and (code := verdicts[0].error_code) is not None:
        raise ProblemError(code, verdicts[0].error_message or code)
    return _response(document, verdicts, under_way.model.bundle.model_id)


async def _verdicts(contents: Sequence[bytes | ImageError], under_way: RequestUnderWay) -> list[Verdict]:
    answers = [await under_way.submit(content, 0) for content in contents]
    return [(await answer).verdict for answer in answers]


def _wrong(detail: str) -> ProblemError:
    return ProblemError("bad_request", detail)


def _document(data: bytes) -> dict[str, Any]:
    try:
        document = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise _wrong("the request must be JSON, and then binary tensors, if there are any") from error
    if not isinstance(document, dict):
        raise _wrong("the request must be a JSON object")
    for name in ("inputs", "outputs"):
        found = document.get(name, [])
        if not isinstance(found, list) or not all(isinstance(each, dict) for each in found):
            raise _wrong(f"{name} must be a list of objects")
        if not all(isinstance(_parameters(each), dict) for each in found):
            raise _wrong("parameters must be an object")
    if not isinstance(_parameters(document), dict):
        raise _wrong("parameters must be an object")
    if not isinstance(document.get("id", ""), str):
        raise _wrong("id must be a string")
    return document


def _parameters(owner: dict[str, Any]) -> Any:
    return owner.get("parameters") or {}


def _images(document: dict[str, Any], binary: memoryview) -> list[bytes]:
    """The encoded images of the only input."""
    inputs = document.get("inputs", [])
    if len(inputs) != 1 or inputs[0].get("datatype") != "BYTES":
        raise _wrong("inputs must be one tensor of the datatype BYTES: encoded images")
    (tensor,) = inputs
    size = _parameters(tensor).get("binary_data_size")
    if size is None:
        found = [from_base64(text) for text in _texts(tensor.get("data"))]
    elif type(size) is not int or size != len(binary):
        raise _wrong("binary_data_size must be the number of bytes that follow the JSON")
    else:
        found = _split(binary)
    shape = tensor.get("shape")
    if not isinstance(shape, list) or not shape or not all(type(side) is int and side >= 0 for side in shape):
        raise _wrong("shape must be a list of sides")
    num_images = 1
    for side in shape:
        num_images = min(num_images * side, 2**31)
    if num_images != len(found) or not found:
        raise _wrong(f"the tensor must have at least one image, and as many as its shape says: {len(found)} came")
    return found


def _texts(data: Any, depth: int = 0) -> list[str]:
    """The texts of a tensor, which may be nested."""
    if isinstance(data, str):
        return [data]
    if not isinstance(data, list) or depth > 4:
        raise _wrong("data must be a list of texts in base64")
    return [text for each in data for text in _texts(each, depth + 1)]


def _split(binary: memoryview) -> list[bytes]:
    """The elements of a binary tensor, each of which is preceded by its length."""
    found, start = [], 0
    while start < len(binary):
        if start + 4 > len(binary):
            raise _wrong("each element of a binary tensor must be preceded by its length in 4 bytes")
        (length,) = struct.unpack_from("<I", binary, start)
        start += 4
        if start + length > len(binary):
            raise _wrong("each element of a binary tensor must be as long as it says")
        found.append(bytes(binary[start : start + length]))
        start += length
    return found


def _response(document: dict[str, Any], verdicts: Sequence[Verdict], model_id: str) -> Response:
    wanted = document.get("outputs") or [{"name": name} for name in _OUTPUTS]
    is_binary = _parameters(document).get("binary_data_output") is True
    outputs, tensors = [], []
    for each in wanted:
        output = _OUTPUTS.get(each["name"]) if isinstance(each.get("name"), str) else None
        if output is None:
            raise _wrong(f"outputs must name some of {', '.join(_OUTPUTS)}")
        described: dict[str, Any] = {"name": output.name, "datatype": output.datatype, "shape": [len(verdicts)]}
        if _parameters(each).get("binary_data", is_binary) is True:
            tensors.append(output.encoded(verdicts))
            described["parameters"] = {"binary_data_size": len(tensors[-1])}
        else:
            described["data"] = output.values(verdicts)
        outputs.append(described)
    answer = {"model_name": MODEL_NAME, "model_version": model_id, "outputs": outputs}
    if "id" in document:
        answer["id"] = document["id"]
    encoded = json.dumps(answer).encode()
    if not tensors:
        return Response(encoded, media_type="application/json")
    headers = {LENGTH_HEADER: str(len(encoded))}
    return Response(encoded + b"".join(tensors), media_type="application/octet-stream", headers=headers)
