"""`catdog serve --executor ray`: the same application in replicas of Ray Serve gives the same answers."""

import base64
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from inference_case import encoded_drawings
from serving_case import running

pytestmark = pytest.mark.slow

DRAWINGS = encoded_drawings(5)
TOKEN = "open-sesame"
START_S = 120.0


@pytest.fixture(scope="module")
def replicas(model: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[httpx.Client, Path]]:
    """Two replicas on an embedded Ray, which are told to end at the end of the module."""
    with socket.create_server(("127.0.0.1", 0)) as reserved:
        port = reserved.getsockname()[1]
    log = tmp_path_factory.mktemp("ray") / "serve.log"
    flags = ["--port", str(port), "--executor", "ray", "--num-replicas", "2", "--cpus-per-replica", "1"]
    flags += ["--max-files", "10", "--max-file-mib", "1", "--engine", "openvino-float", "--model", model]
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"} | {"CATDOG_TOKEN": TOKEN}
    with log.open("w") as stderr:
        started = subprocess.Popen(
            [sys.executable, "-m", "catdog", "serve", *flags],
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            env=environment,
        )
    try:
        deadline = time.monotonic() + START_S
        while "Serving model" not in log.read_text():
            assert started.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        headers = {"Authorization": f"Bearer {TOKEN}"}
        url = f"http://127.0.0.1:{port}"
        with httpx.Client(base_url=url, headers=headers, timeout=60, trust_env=False) as client:
            yield client, log
        os.kill(started.pid, signal.SIGTERM)
        output, _ = started.communicate(timeout=60)
        assert started.returncode == 0, log.read_text()
        assert output.startswith("Served for ")
    finally:
        started.kill()
        started.communicate()


def test_the_answers_are_those_of_one_process(replicas: tuple[httpx.Client, Path], model: str) -> None:
    client, _ = replicas
    files = [("files", (f"{number}.jpg", data)) for number, data in enumerate([*DRAWINGS, b"Dear cat,", b""])]
    single = [client.post("/v1/predict", content=drawing).raise_for_status().json() for drawing in DRAWINGS]
    together = client.post("/v1/predict", files=files).raise_for_status().json()
    with running(model, engine="openvino-float") as served:
        assert together == served.client.post("/v1/predict", files=files).json()
        assert single == [served.client.post("/v1/predict", content=drawing).json() for drawing in DRAWINGS]


def test_errors_limits_and_the_token_are_the_same(replicas: tuple[httpx.Client, Path]) -> None:
    client, _ = replicas
    for content, status, code in (
        (b"Dear cat,", 415, "unsupported_format"),
        (b"", 400, "empty_file"),
        (bytes(2**20 + 1), 413, "too_large"),
    ):
        answer = client.post("/v1/predict", content=content)
        assert (answer.status_code, answer.json()["code"]) == (status, code)
    many = [("files", b"x")] * 11
    assert client.post("/v1/predict", files=many).json()["code"] == "too_many_files"
    assert client.get("/v1/model", headers={"Authorization": "Bearer wrong"}).status_code == 401
    assert client.get("/v2/health/ready", headers={"Authorization": ""}).status_code == 200


def test_other_protocols_and_the_page_are_there(replicas: tuple[httpx.Client, Path]) -> None:
    client, _ = replicas
    assert client.get("/").headers["content-type"] == "text/html; charset=utf-8"
    assert client.get("/v1/model").json()["engine"].startswith("openvino ")
    image = base64.b64encode(DRAWINGS[0]).decode()
    tensor = {"name": "image", "datatype": "BYTES", "shape": [1], "data": [image]}
    answer = client.post("/v2/models/catdog/infer", content=json.dumps({"inputs": [tensor]})).raise_for_status()
    scores = client.post("/v1/predict", json={"inputs": image}).raise_for_status().json()
    outputs = {each["name"]: each["data"] for each in answer.json()["outputs"]}
    assert outputs["label"] == [scores[0]["label"]]
    assert client.post("/v1/explain", content=DRAWINGS[0]).headers["content-type"] == "image/png"
    assert "catdog_batch_images" in client.get("/metrics").text
