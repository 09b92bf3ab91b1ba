"""The protocols of others, and explanations: the same answers in other shapes."""

import base64
import io
import json
import struct
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import tritonclient.http as triton
from inference_case import encoded_drawings
from PIL import Image
from serving_case import Running, running
from tritonclient.utils import InferenceServerException

from catdog.engines import Outputs
from catdog.serving import saliency

pytestmark = pytest.mark.slow

DRAWINGS = encoded_drawings(6)


@pytest.fixture(scope="module")
def served(model: str) -> Iterator[Running]:
    with running(model, max_files=8, max_file_mib=1, max_request_mib=4) as started:
        yield started


def native(served: Running, data: bytes) -> dict[str, Any]:
    answer = served.client.post("/v1/predict", content=data).raise_for_status().json()
    (row,) = answer["predictions"]
    return dict(row)


# Hugging Face.


def test_scores_in_hugging_faces_shape(served: Running) -> None:
    for drawing in DRAWINGS:
        row = native(served, drawing)
        raw = served.client.post("/v1/predict?format=huggingface", content=drawing).raise_for_status().json()
        body = {"inputs": base64.b64encode(drawing).decode(), "parameters": {"top_k": 2}}
        assert served.client.post("/v1/predict", json=body).raise_for_status().json() == raw
        assert [set(each) for each in raw] == [{"label", "score"}] * 2
        scores = {each["label"]: each["score"] for each in raw}
        assert raw[0] == {"label": row["label"], "score": row["confidence"]}
        assert scores["dog"] == row["prob_dog"]
        assert scores["cat"] == pytest.approx(1 - row["prob_dog"])
    body = {"inputs": "data:image/jpeg;base64," + base64.b64encode(DRAWINGS[0]).decode(), "parameters": {"top_k": 1}}
    assert len(served.client.post("/v1/predict", json=body).json()) == 1


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"{", "bad_request"),
        (b"[]", "bad_request"),
        (b"[" * 100_000, "bad_request"),
        (b'{"inputs": 1}', "bad_request"),
        (b'{"inputs": "no base64!"}', "bad_request"),
        (b'{"inputs": "", "parameters": []}', "empty_file"),
        (b'{"inputs": "", "parameters": 1}', "bad_request"),
        (b'{"inputs": "", "parameters": {"top_k": 0}}', "bad_request"),
        (b'{"inputs": "", "parameters": {"function_to_apply": "none"}}', "bad_request"),
        (b'{"inputs": "YQ=="}', "unsupported_format"),
        (json.dumps({"inputs": "A" * (2**21)}).encode(), "request_too_large"),
        (json.dumps({"inputs": base64.b64encode(bytes(2**20 + 1)).decode()}).encode(), "too_large"),
    ],
)
def test_a_body_that_hugging_faces_clients_do_not_send(served: Running, body: bytes, code: str) -> None:
    answer = served.client.post("/v1/predict", content=body, headers={"Content-Type": "application/json"})
    assert (answer.json()["code"], answer.json()["error"]) == (code, answer.json()["detail"])
    assert 400 <= answer.status_code < 500


def test_a_format_that_is_none(served: Running) -> None:
    answer = served.client.post("/v1/predict?format=xml", content=DRAWINGS[0])
    assert (answer.status_code, answer.json()["code"]) == (400, "bad_request")


# Open Inference Protocol.


@pytest.fixture(scope="module")
def client(served: Running) -> Iterator[triton.InferenceServerClient]:
    with triton.InferenceServerClient(served.url.removeprefix("http://")) as opened:
        yield opened


def infer(client: triton.InferenceServerClient, images: list[bytes], *, is_binary: bool, **options: Any) -> Any:
    tensor = triton.InferInput("image", [len(images)], "BYTES")
    data = images if is_binary else [base64.b64encode(image) for image in images]
    tensor.set_data_from_numpy(np.array(data, dtype=np.object_), binary_data=is_binary)
    return client.infer("catdog", [tensor], **options)


def test_the_public_client_finds_the_model(client: triton.InferenceServerClient, served: Running) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("catdog")
    assert client.get_server_metadata()["name"] == "catdog"
    metadata = client.get_model_metadata("catdog")
    assert metadata["inputs"] == [{"name": "image", "datatype": "BYTES", "shape": [-1]}]
    assert metadata["versions"] == [served.service.model.bundle.model_id]


@pytest.mark.parametrize("is_binary", [True, False])
def test_the_public_client_gets_the_same_answers(
    client: triton.InferenceServerClient, served: Running, is_binary: bool
) -> None:
    rows = [native(served, drawing) for drawing in DRAWINGS]
    names = ["label", "prob_dog", "confidence", "needs_review", "review_reason", "error_code"]
    outputs = [triton.InferRequestedOutput(name, binary_data=is_binary) for name in names]
    result = infer(client, DRAWINGS, is_binary=is_binary, outputs=outputs, request_id="7")
    texts = [value.decode() if isinstance(value, bytes) else value for value in result.as_numpy("label")]
    assert texts == [row["label"] for row in rows]
    assert result.as_numpy("prob_dog").tolist() == [row["prob_dog"] for row in rows]  # to the last bit
    assert result.as_numpy("confidence").tolist() == [row["confidence"] for row in rows]
    assert result.as_numpy("needs_review").tolist() == [row["needs_review"] for row in rows]
    assert result.get_response()["id"] == "7"
    everything = infer(client, DRAWINGS[:1], is_binary=is_binary).get_response()
    assert {each["name"] for each in everything["outputs"]} == {*names, "error_message"}


@pytest.mark.parametrize("is_binary", [True, False])
def test_an_image_that_cannot_be_labelled(client: triton.InferenceServerClient, is_binary: bool) -> None:
    outputs = [triton.InferRequestedOutput(name, binary_data=is_binary) for name in ("prob_dog", "error_code")]
    result = infer(client, [DRAWINGS[0], b"Dear cat,"], is_binary=is_binary, outputs=outputs)
    prob_dog = result.as_numpy("prob_dog").astype(np.float32)
    assert np.isnan(prob_dog).tolist() == [False, True]
    codes = [value.decode() if isinstance(value, bytes) else value for value in result.as_numpy("error_code")]
    assert codes == ["", "unsupported_format"]
    with pytest.raises(InferenceServerException, match="not an image in one of these formats") as raised:
        infer(client, [b"Dear cat,"], is_binary=is_binary)
    assert raised.value.status() == "415"


def wrong_requests() -> list[tuple[str, dict[str, str], bytes]]:
    def tensor(**changes: Any) -> bytes:
        one = {"name": "image", "datatype": "BYTES", "shape": [1], "data": ["YQ=="]} | changes
        return json.dumps({"inputs": [one]}).encode()

    binary = {"parameters": {"binary_data_size": 6}, "data": None}
    length = "Inference-Header-Content-Length"
    packed = struct.pack("<I", 9) + b"ab"
    return [
        ("bad_request", {}, b"{"),
        ("bad_request", {}, b"7"),
        ("bad_request", {}, b"{}"),
        ("bad_request", {}, b'{"inputs": 7}'),
        ("bad_request", {}, b'{"inputs": [7]}'),
        ("bad_request", {}, b'{"inputs": [], "parameters": 7}'),
        ("bad_request", {}, b'{"inputs": [], "id": 7}'),
        ("bad_request", {}, tensor(datatype="FP32")),
        ("bad_request", {}, tensor(shape=[2])),
        ("bad_request", {}, tensor(shape=[2**40, 2**40])),
        ("bad_request", {}, tensor(shape="x")),
        ("bad_request", {}, tensor(data=[7])),
        ("bad_request", {}, tensor(data=["?"])),
        ("bad_request", {}, tensor(shape=[0], data=[])),
        ("bad_request", {}, json.dumps({**json.loads(tensor()), "outputs": [{"name": "purr"}]}).encode()),
        ("bad_request", {length: "x"}, tensor()),
        ("bad_request", {length: "999999"}, tensor()),
        ("bad_request", {length: str(len(tensor(**binary)))}, tensor(**binary) + packed),
        ("bad_request", {length: str(len(tensor(**binary)))}, tensor(**binary) + b"abc"),
        ("too_many_files", {}, tensor(shape=[9], data=["YQ=="] * 9)),
        ("unsupported_format", {}, tensor(shape=[1, 1], data=[["YQ=="]])),
        ("empty_file", {}, tensor(data=[""])),
        ("too_large", {}, tensor(data=[base64.b64encode(bytes(2**20 + 1)).decode()])),
    ]


@pytest.mark.parametrize(("code", "headers", "body"), wrong_requests())
def test_a_wrong_inference_request_is_refused(served: Running, code: str, headers: dict[str, str], body: bytes) -> None:
    answer = served.client.post("/v2/models/catdog/infer", content=body, headers=headers)
    if code == "bad_request":  # the wrong output is found when the image is labelled, which this one is not
        assert answer.json()["code"] in (code, "unsupported_format")
    else:
        assert answer.json()["code"] == code
    assert 400 <= answer.status_code < 500


def test_another_model_is_not_there(served: Running) -> None:
    assert served.client.get("/v2/models/cow").status_code == 404


# Explanations.


@pytest.mark.parametrize(("size", "expected"), [((640, 480), (512, 384)), ((30, 60), (30, 60))])
def test_an_explanation_is_the_upright_picture(
    served: Running, size: tuple[int, int], expected: tuple[int, int]
) -> None:
    buffer = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.effect_noise(size, 90).convert("RGB").save(buffer, "JPEG", exif=exif)
    answer = served.client.post("/v1/explain", content=buffer.getvalue()).raise_for_status()
    assert answer.headers["content-type"] == "image/png"
    assert answer.headers["x-saliency-method"] == "class-activation-map"
    with Image.open(io.BytesIO(answer.content)) as overlay:
        assert overlay.size == expected[::-1]
    form = served.client.post("/v1/explain", files={"files": ("a.jpg", buffer.getvalue())})
    assert form.content == answer.content


def test_what_cannot_be_explained(served: Running) -> None:
    assert served.client.post("/v1/explain", content=b"Dear cat,").json()["code"] == "unsupported_format"
    assert served.client.post("/v1/explain", content=b"").json()["code"] == "empty_file"
    two = [("files", DRAWINGS[0]), ("files", DRAWINGS[1])]
    assert served.client.post("/v1/explain", files=two).json()["code"] == "too_many_files"


def test_the_activation_map_adds_up_to_the_logit(served: Running) -> None:
    """The mean of the heat and the network's bias are the logit: the differences of two pictures are the same."""
    model = served.service.model
    shown = saliency.Saliency(model.bundle, model.engine)
    assert shown.method == "class-activation-map"
    seen = [model.batcher.labeller.look(drawing).image for drawing in DRAWINGS]
    pixels = [image.pixels_HWC for image in seen if image is not None]
    logits = model.engine.predict(np.stack(pixels)).logits_B
    means = np.array([shown.heat(each).mean() for each in pixels])
    np.testing.assert_allclose(means - means[0], logits - logits[0], atol=0.3 * float(np.ptp(logits)))
    assert np.corrcoef(means, logits)[0, 1] > 0.98


class Corner:
    """An engine that looks at the upper left corner alone."""

    name = "corner"
    arithmetic = "float32"

    def predict(self, images_BHWC: Any) -> Any:
        return Outputs(images_BHWC[:, :12, :12].mean(axis=(1, 2, 3)).astype(np.float32), None)


def test_occlusion_finds_what_matters() -> None:
    pixels = np.zeros((48, 48, 3), np.uint8)
    pixels[:12, :12] = 255
    heat = saliency._occlusion(Corner(), pixels)  # type: ignore[arg-type]
    assert heat.argmax() == 0
    assert heat[4:, 4:].max() <= 0 < heat[0, 0]
