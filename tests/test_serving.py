"""`catdog.serving`: a photograph gets over HTTP what it gets from `predict`, and bad input one clear answer."""

import io
import json
import math
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from conftest import SHARED
from inference_case import encoded_drawings
from PIL import Image
from serving_case import Running, running
from test_documentation import README, codes, table

from catdog.config import EngineName, PredictConfig
from catdog.inference import predict
from catdog.schema import ERROR_CODES
from catdog.serving import problems

pytestmark = pytest.mark.slow

DRAWINGS = encoded_drawings(9)


@pytest.fixture(scope="module")
def served(model: str) -> Iterator[Running]:
    with running(model, max_files=20, max_file_mib=1, max_request_mib=4) as started:
        yield started


def rows_of_predict(directory: Path, model: str, pictures: dict[str, bytes], engine: EngineName) -> dict[str, Any]:
    """What the bulk job says of these files, by their names."""
    (directory / "pictures").mkdir()
    for name, data in pictures.items():
        (directory / "pictures" / name).write_bytes(data)
    config = PredictConfig(
        images=str(directory / "pictures"),
        output=str(directory / "output"),
        model=model,
        executor="inline",
        engine=engine,
        max_failed_fraction=1,
    )
    predict(config)
    rows = pq.read_table(directory / "output", columns=None).to_pylist()
    return {Path(row["uri"]).name: row for row in rows}


def pictures_of(shared: Path) -> dict[str, bytes]:
    """Drawings; and where they are, photographs, and files that are odd."""
    pictures = {f"drawing-{number}.jpg": data for number, data in enumerate(DRAWINGS)}
    pictures |= {"cut.jpg": DRAWINGS[0][:1000], "empty.jpg": b"", "letter.jpg": b"Dear cat,"}
    for name, every in (("originals.zip", 25), ("odd.zip", 12)):
        if (shared / name).is_file():
            with zipfile.ZipFile(shared / name) as opened:
                members = [member for member in opened.namelist() if not member.endswith("/")][::every]
                pictures |= {f"{name}-{number}.jpg": opened.read(member) for number, member in enumerate(members)}
    return pictures


COMMON = (
    "label", "prob_dog", "confidence", "needs_review", "review_reason", "status", "error_code", "error_message",
    "remark", "width", "height", "num_bytes", "image_id",
)  # fmt: skip


@pytest.mark.parametrize("engine", ["openvino-float", "tensorflow"])
def test_a_photograph_gets_what_predict_says(engine: EngineName, model: str, tmp_path: Path) -> None:
    """Every field that both have, to the last bit, alone and among others."""
    pictures = pictures_of(SHARED / "data")
    expected = rows_of_predict(tmp_path, model, pictures, engine)
    with running(model, engine=engine, max_files=1000) as served:
        files = [("files", (name, data)) for name, data in pictures.items()]
        together = served.client.post("/v1/predict", files=files).raise_for_status().json()
        rows = {row["name"]: row for row in together["predictions"]}
        alone = {name: served.client.post("/v1/predict", content=data) for name, data in pictures.items()}
    assert list(rows) == list(pictures)
    num_labels = 0
    for name, row in rows.items():
        assert {key: row[key] for key in COMMON} == {key: expected[name][key] for key in COMMON}
        answer = alone[name].json()
        if row["status"] == "ok":
            num_labels += 1
            assert answer["predictions"] == [row | {"name": None}]
        else:
            assert (answer["code"], answer["detail"]) == (row["error_code"], row["error_message"])
            assert alone[name].status_code == answer["status"] == problems.IMAGE_STATUSES[row["error_code"]]
    assert num_labels >= len(DRAWINGS)
    assert together["model_id"] == next(iter(expected.values()))["model_id"]


def picture(*, size: tuple[int, int] = (64, 48), kind: str = "JPEG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, "teal").save(buffer, kind, **options)
    return buffer.getvalue()


def test_it_says_how_a_picture_was_read(served: Running) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    (row,) = served.client.post("/v1/predict", content=picture(exif=exif)).json()["predictions"]
    assert (row["width"], row["height"], row["orientation"], row["format"]) == (48, 64, 6, "JPEG")
    assert row["read_as"] == "64 × 48, turned upright by EXIF orientation 6, scaled to 48 × 48"
    (row,) = served.client.post("/v1/predict", content=picture(kind="PNG")).json()["predictions"]
    assert row["read_as"] == "64 × 48, scaled to 48 × 48"
    assert (row["orientation"], row["format"]) == (1, "PNG")


def test_a_form_keeps_order_and_names_whatever_its_fields(served: Running) -> None:
    files: list[tuple[str, Any]] = [
        ("files", ("ein Hund.jpg", DRAWINGS[1], "image/jpeg")),
        ("x", ("letter.txt", b"Dear cat,", "image/jpeg")),
        ("file", ("katze-ä.jpg", DRAWINGS[2], "text/plain")),
        ("files", ("again.jpg", DRAWINGS[1])),
    ]
    answer = served.client.post("/v1/predict", files=files).raise_for_status().json()
    rows = answer["predictions"]
    assert [row["name"] for row in rows] == ["ein Hund.jpg", "letter.txt", "katze-ä.jpg", "again.jpg"]
    assert [row["error_code"] for row in rows] == [None, "unsupported_format", None, None]
    assert rows[0]["prob_dog"] == rows[3]["prob_dog"]
    assert math.isclose(rows[0]["confidence"], max(rows[0]["prob_dog"], 1 - rows[0]["prob_dog"]), rel_tol=1e-6)


def refused(answer: Any, status: int, code: str) -> str:
    """Check that an answer is a problem with a status and a code. Returns its detail."""
    assert answer.headers["content-type"] == problems.MEDIA_TYPE
    found = answer.json()
    assert (answer.status_code, found["status"], found["code"]) == (status, status, code)
    assert found["request_id"] == answer.headers["x-request-id"]
    assert found["type"] == f"urn:catdog:problem:{code}"
    assert not any(part in answer.text for part in ("catdog/", ".py", "/tmp", "/home", "Traceback"))
    return str(found["detail"])


def test_every_error_code_of_an_image_has_a_status() -> None:
    of_reading = {"not_found", "permission_denied", "unreachable", "decoder_died"}
    assert set(problems.IMAGE_STATUSES) == set(ERROR_CODES) - of_reading


@pytest.mark.parametrize("content_type", ["image/jpeg", "application/octet-stream", "text/plain", None])
def test_bytes_decide_and_not_the_content_type(served: Running, content_type: str | None) -> None:
    headers = {} if content_type is None else {"Content-Type": content_type}
    assert served.client.post("/v1/predict", content=DRAWINGS[0], headers=headers).status_code == 200
    answer = served.client.post("/v1/predict", content=b"%PDF-1.7 a letter", headers=headers)
    refused(answer, 415, "unsupported_format")


def test_what_is_no_usable_image_is_refused(served: Running) -> None:
    refused(served.client.post("/v1/predict", content=b""), 400, "empty_file")
    refused(served.client.post("/v1/predict", content=DRAWINGS[0][:1000]), 422, "truncated")
    refused(served.client.post("/v1/predict", files={"files": ("a.jpg", b"")}), 400, "empty_file")
    bomb = bytearray(picture(kind="PNG"))
    bomb[16:24] = (60_000).to_bytes(4) * 2  # the size that its header tells
    bomb[29:33] = zlib.crc32(bomb[12:29]).to_bytes(4)
    assert "pixels" in refused(served.client.post("/v1/predict", content=bytes(bomb)), 413, "too_large")


def test_limits(served: Running) -> None:
    large = bytes(2**20 + 1)
    assert "1048576 bytes" in refused(served.client.post("/v1/predict", content=large), 413, "too_large")
    refused(served.client.post("/v1/predict", content=iter([large])), 413, "too_large")  # of unknown length
    files = [("files", ("large.jpg", large)), ("files", ("good.jpg", DRAWINGS[0]))]
    rows = served.client.post("/v1/predict", files=files).raise_for_status().json()["predictions"]
    assert [row["error_code"] for row in rows] == ["too_large", None]
    assert rows[0]["num_bytes"] == len(large)
    many = [("files", (f"{number}.jpg", DRAWINGS[0][:100])) for number in range(1000)]
    assert "at most 20 files" in refused(served.client.post("/v1/predict", files=many), 413, "too_many_files")
    heavy = [("files", ("large.jpg", large))] * 5
    refused(served.client.post("/v1/predict", files=heavy), 413, "request_too_large")
    packed = served.client.post("/v1/predict", content=DRAWINGS[0], headers={"Content-Encoding": "gzip"})
    refused(packed, 415, "unsupported_encoding")
    assert served.service._num_held_bytes == served.service._num_waiting == 0


@pytest.mark.parametrize(
    ("content_type", "body"),
    [
        ("multipart/form-data", b""),
        ("multipart/form-data; boundary=x", b""),
        ("multipart/form-data; boundary=x", b"no boundary at all"),
        ("multipart/form-data; boundary=x", b"--x--\r\n"),
        ("multipart/form-data; boundary=x", b"--x\r\nContent-Disposition: form-data; name=a\r\n\r\ncut short"),
        ("multipart/form-data; boundary=x", b"--x\r\n" + b"a" * 100_000),
        ("multipart/form-data; boundary=" + "x" * 300, b"--x--"),
    ],
)
def test_a_form_that_is_none_is_refused(served: Running, content_type: str, body: bytes) -> None:
    answer = served.client.post("/v1/predict", content=body, headers={"Content-Type": content_type})
    refused(answer, 400, "bad_request")


def test_the_model_and_its_limits(served: Running, model: str) -> None:
    card = json.loads(Path(model, "bundle.json").read_text())
    found = served.client.get("/v1/model").json()
    assert found["input_size"] == card["image_size"] == 48
    assert found["classes"] == ["cat", "dog"]
    assert found["engine"].startswith("openvino ")
    assert found["review_threshold"] == card["review_threshold"]
    assert found["limits"] == {
        "max_files": 20,
        "max_bytes": 2**20,
        "max_pixels": 89_478_485,
        "max_request_bytes": 2**22,
    }


def test_what_is_not_there(served: Running) -> None:
    refused(served.client.get("/nothing"), 404, "no_such_route")
    answer = served.client.get("/v1/predict")
    refused(answer, 405, "method_not_allowed")
    assert answer.headers["allow"] == "POST"
    for name in ("..%2Fapp.py", "%2e%2e/app.py", "app.py", "nothing.js"):
        assert served.client.get(f"/static/{name}").status_code == 404


def test_the_answers_have_the_headers_of_security(served: Running) -> None:
    for answer in (served.client.get("/v1/model"), served.client.get("/nothing")):
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["content-security-policy"].startswith("default-src 'none'")
        assert answer.headers["cache-control"] == "no-store"
        assert "server" not in answer.headers
    named = served.client.get("/v1/model", headers={"X-Request-ID": "my-id.7"})
    assert named.headers["x-request-id"] == "my-id.7"
    forged = served.client.get("/v1/model", headers={"X-Request-ID": "a b"})
    assert forged.headers["x-request-id"] != "a b"


def test_the_description_names_every_route_and_has_an_example(served: Running) -> None:
    found = served.client.get("/openapi.json").json()
    assert {"/v1/predict", "/v1/explain", "/v1/model", "/v2/models/catdog/infer", "/metrics"} <= set(found["paths"])
    answer = found["paths"]["/v1/predict"]["post"]["responses"]["200"]["content"]["application/json"]
    examples = {name: example["value"] for name, example in answer["examples"].items()}
    assert examples["catdog"]["predictions"][0]["label"] == examples["huggingface"][0]["label"] == "dog"
    properties = found["components"]["schemas"]["Prediction"]["properties"]
    assert set(examples["catdog"]["predictions"][0]) < set(properties)  # which leaves out what is null
    assert served.client.get("/docs").status_code == 404  # FastAPI's page loads scripts from elsewhere


def test_the_readme_lists_every_route(served: Running) -> None:
    rows = table(README, "route")
    listed = {route for row in rows for route in codes(row[0])}
    described = served.client.get("/openapi.json").json()["paths"]
    routes = {f"{method.upper()} {path}" for path, methods in described.items() for method in methods}
    assert listed == routes | {"GET /openapi.json"}


def test_metrics_count(served: Running) -> None:
    def value(name: str) -> float:
        lines = served.client.get("/metrics").text.splitlines()
        return next((float(line.rpartition(" ")[2]) for line in lines if line.startswith(f"{name} ")), 0.0)

    names = [
        'catdog_image_errors_total{code="unsupported_format"}',
        'catdog_requests_total{route="/v1/predict",status="200"}',
        'catdog_request_seconds_count{route="/v1/predict"}',
    ]
    before = [value(name) for name in names]
    served.client.post("/v1/predict", files=[("a", DRAWINGS[0]), ("a", b"x")]).raise_for_status()
    assert [value(name) for name in names] == [count + 1 for count in before]
    assert value("catdog_queue_images") == value("catdog_held_bytes") == 0
    assert value("catdog_batch_images_count") > 0
    (row,) = served.client.post("/v1/predict", content=DRAWINGS[0]).json()["predictions"]
    assert value(f'catdog_images_total{{label="{row["label"]}"}}') > 0
