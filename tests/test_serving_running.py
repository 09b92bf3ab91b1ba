"""How the service runs: full queues, slow clients, tokens, another model, and the end."""

import concurrent.futures
import io
import json
import os
import shutil
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from inference_case import encoded_drawings, save_model
from PIL import Image
from serving_case import Running, process, running

from catdog import cli
from catdog.config import ServeConfig
from catdog.errors import UsageError
from catdog.serving import connections, service
from catdog.serving.token import read_token

pytestmark = pytest.mark.slow

DRAWINGS = encoded_drawings(4)


def until(holds: Callable[[], bool]) -> None:
    """Wait for something that must come."""
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.01)


def noise(size: tuple[int, int]) -> bytes:
    """A picture that takes long to decode."""
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def connected(url: str) -> socket.socket:
    host, port = url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=60)


def begun(url: str, body: bytes, num_bytes: int) -> socket.socket:
    """A connection on which a request for a body of so many bytes has come as far as `body`."""
    opened = connected(url)
    head = f"POST /v1/predict HTTP/1.1\r\nHost: x\r\nContent-Length: {num_bytes}\r\n\r\n"
    opened.sendall(head.encode() + body)
    return opened


def answer_of(opened: socket.socket) -> tuple[int, dict[str, Any]]:
    """The status and the body of an answer after which the connection is idle or closed."""
    data = b""
    while b"\r\n\r\n" not in data:
        more = opened.recv(65536)
        assert more, f"the connection was closed after {data!r}"
        data += more
    head, _, body = data.partition(b"\r\n\r\n")
    (length,) = (int(line.split(b":")[1]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length"))
    while len(body) < length:
        body += opened.recv(65536)
    return int(head.split()[1]), json.loads(body)


def is_closed(opened: socket.socket) -> bool:
    try:
        while opened.recv(65536):
            pass
    except ConnectionResetError:
        pass
    return True


# Queues.


def test_a_full_queue_refuses_and_says_when_to_come_again(model: str) -> None:
    """Nobody who comes again as told goes without an answer."""
    slow = noise((1400, 1000))
    with running(model, max_queue=2) as served:
        refusals = []

        def ask(_number: int) -> int:
            with httpx.Client(base_url=served.url, timeout=60, trust_env=False) as client:
                while (answer := client.post("/v1/predict", content=slow)).status_code == 429:
                    refusals.append(answer)
                    time.sleep(0.1)
                return answer.status_code

        with concurrent.futures.ThreadPoolExecutor(16) as pool:
            assert list(pool.map(ask, range(16))) == [200] * 16
        assert refusals
        assert {(each.json()["code"], each.headers["retry-after"]) for each in refusals} == {("busy", "1")}
        assert served.service._num_waiting == served.service._num_held_bytes == 0


def test_bytes_in_memory_are_bounded(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "MAX_HELD_BYTES", 2**20)
    with running(model) as served:
        first = begun(served.url, bytes(700_000), 800_000)
        until(lambda: served.service._num_held_bytes == 700_000)
        refused = served.client.post("/v1/predict", content=bytes(700_000))
        assert (refused.status_code, refused.json()["code"]) == (429, "busy")
        first.sendall(bytes(100_000))
        assert answer_of(first)[1]["code"] == "unsupported_format"
        first.close()
        assert served.client.post("/v1/predict", content=bytes(700_000)).status_code == 415
        assert served.service._num_held_bytes == 0


def test_a_client_that_goes_away_leaves_nothing(model: str) -> None:
    with running(model) as served:
        for body in (b"", bytes(100_000)):
            opened = begun(served.url, body, 200_000)
            until(lambda: served.service.num_requests == 1)
            opened.close()
            until(lambda: served.service.num_requests == 0)
        assert served.service._num_held_bytes == 0
        assert served.client.post("/v1/predict", content=DRAWINGS[0]).status_code == 200


# Slow clients.


def test_slow_clients_are_not_waited_for(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "HEAD_TIMEOUT_S", 0.3)
    with running(model, timeout_s=0.3) as served:
        for head in (b"", b"POST /v1/predict HTTP/1.1\r\nHost: x\r\nX-Slow: "):
            with connected(served.url) as opened:
                opened.sendall(head)
                assert is_closed(opened)
        for body in (b"", bytes(1000)):
            with begun(served.url, body, 5000) as opened:
                status, problem = answer_of(opened)
            assert (status, problem["code"]) == (408, "timeout")
        (row,) = served.client.post("/v1/predict", content=DRAWINGS[0]).json()["predictions"]  # twice on one connection
        assert served.client.post("/v1/predict", content=DRAWINGS[0]).json()["predictions"] == [row]


def test_a_head_without_end_is_cut_off(model: str) -> None:
    with running(model) as served:
        with connected(served.url) as opened, pytest.raises(ConnectionError):
            opened.sendall(b"GET / HTTP/1.1\r\nX-Long: " + b"a" * 2**27)
        assert served.client.get("/v1/model").status_code == 200


# Tokens.


def test_a_token_guards_what_costs(model: str) -> None:
    with running(model, token="open-sesame") as served:

        def ask(path: str, **options: Any) -> int:
            method = "POST" if path.endswith(("predict", "infer", "explain")) else "GET"
            return served.client.request(method, path, **options).status_code

        guarded = [
            "/v1/predict",
            "/v1/explain",
            "/v1/model",
            "/v2/models/catdog",
            "/v2/models/catdog/infer",
            "/metrics",
        ]
        for path in guarded:
            assert ask(path) == 401
            for wrong in ("Bearer open-sesam", "Basic open-sesame", "open-sesame", "Bearer ä"):
                assert ask(path, headers={"Authorization": wrong.encode()}) == 401
            assert ask(path, headers={"Authorization": "Bearer open-sesame"}) != 401
        for path in ("/", "/v2/health/live", "/v2/health/ready", "/openapi.json"):
            assert ask(path) == 200
        refused = served.client.get("/v1/model")
        assert (refused.json()["code"], refused.headers["www-authenticate"]) == ("unauthorized", "Bearer")
        right = {"Authorization": "bearer open-sesame"}
        assert served.client.post("/v1/predict", content=DRAWINGS[0], headers=right).status_code == 200


def test_where_the_token_is_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CATDOG_TOKEN", raising=False)
    assert read_token(ServeConfig()) is None
    monkeypatch.setenv("CATDOG_TOKEN", "of-the-environment")
    assert read_token(ServeConfig()) == "of-the-environment"
    (tmp_path / "token").write_text("of-the-file\n")
    assert read_token(ServeConfig(token_file=str(tmp_path / "token"))) == "of-the-file"
    for wrong in ("", "two words", "naïve"):
        monkeypatch.setenv("CATDOG_TOKEN", wrong)
        with pytest.raises(UsageError, match=r"^CATDOG_TOKEN must hold a token"):
            read_token(ServeConfig())


# The page.


def test_the_page_and_its_files(model: str) -> None:
    with running(model) as served:
        page = served.client.get("/")
        assert page.headers["content-type"] == "text/html; charset=utf-8"
        assert "default-src 'self'" in page.headers["content-security-policy"]
        assert page.headers["cache-control"] == "no-cache"
        for name, media_type in (
            ("style.css", "text/css; charset=utf-8"),
            ("script.js", "text/javascript; charset=utf-8"),
        ):
            file = served.client.get(f"/static/{name}")
            assert (file.status_code, file.headers["content-type"]) == (200, media_type)
            again = served.client.get(f"/static/{name}", headers={"If-None-Match": file.headers["etag"]})
            assert (again.status_code, again.content) == (304, b"")
            assert served.client.get(f"/static/{name}", headers={"If-None-Match": '"x"'}).status_code == 200


# Another model.


def put_in_place(model: str, place: Path) -> None:
    """Put a model where another one is, as `catdog train` does: the card last."""
    files = [path for path in Path(model).rglob("*") if path.is_file() and path.name != "bundle.json"]
    for path in (*files, Path(model, "bundle.json")):
        target = place / path.relative_to(model)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, f"{target}.new")
        os.replace(f"{target}.new", target)


def test_another_model_takes_its_place_and_no_request_is_dropped(model: str, tmp_path: Path) -> None:
    other = save_model(str(tmp_path / "other"), seed=1)
    place = tmp_path / "place"
    put_in_place(model, place)
    with running(str(place), reload_s=0.05) as served:
        answers: list[httpx.Response] = []
        is_over = threading.Event()

        def ask(number: int) -> None:
            with httpx.Client(base_url=served.url, timeout=60, trust_env=False) as client:
                while not is_over.is_set():
                    files = [("files", (f"{index}.jpg", data)) for index, data in enumerate(DRAWINGS)]
                    answers.append(client.post("/v1/predict", files=files))

        old = served.service.model
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            asking = [pool.submit(ask, number) for number in range(4)]
            try:
                until(lambda: len(answers) > 20)
                put_in_place(other, place)
                until(lambda: served.service.model is not old)
                num_before = len(answers)
                until(lambda: len(answers) > num_before + 20)
                new = served.service.model
                (place / "bundle.json").write_text("{}")
                failed = served.service.metrics.reloads.labels("failed")
                until(lambda: failed._value.get() > 0)
                until(lambda: len(answers) > num_before + 40)
            finally:
                is_over.set()
            for each in asking:
                each.result()
        assert {answer.status_code for answer in answers} == {200}
        found = {json.dumps(answer.json(), sort_keys=True) for answer in answers}
        assert len(found) == 2  # all rows of an answer are of one model, and each model says the same each time
        assert {json.loads(each)["model_id"] for each in found} == {old.bundle.model_id, new.bundle.model_id}
        assert served.service.model is new
        until(lambda: not any(thread.is_alive() for thread in old.batcher._threads))


# The end.


def test_it_answers_what_is_under_way_and_ends(model: str, tmp_path: Path) -> None:
    drawing = DRAWINGS[0]
    with process(tmp_path, "--model", model) as served:
        under_way = begun(served.url, drawing[:1000], len(drawing))
        with httpx.Client(base_url=served.url, timeout=60, trust_env=False) as client:
            until(lambda: "catdog_held_bytes 1000.0" in client.get("/metrics").text)
            os.kill(served.process.pid, signal.SIGTERM)
            until(lambda: client.get("/v2/health/ready").status_code == 503)
            refused = client.post("/v1/predict", content=drawing)
            assert (refused.status_code, refused.json()["code"]) == (503, "draining")
            assert refused.headers["retry-after"] == "1"
            assert client.get("/v2/health/live").status_code == 200
        assert served.process.poll() is None
        under_way.sendall(drawing[1000:])
        status, document = answer_of(under_way)
        under_way.close()
        assert (status, document["predictions"][0]["status"]) == (200, "ok")
        output, _ = served.process.communicate(timeout=60)
        assert served.process.returncode == 0
        assert output.startswith("Served 1 image in 1 request in ")


def test_it_says_what_was_cut_off(model: str, tmp_path: Path) -> None:
    with process(tmp_path, "--model", model, "--drain-s", "0.1", "--json") as served:
        opened = begun(served.url, b"x", 1000)
        with httpx.Client(base_url=served.url, trust_env=False) as client:
            until(lambda: "catdog_held_bytes 1.0" in client.get("/metrics").text)
        os.kill(served.process.pid, signal.SIGINT)
        output, _ = served.process.communicate(timeout=60)
        opened.close()
        record = json.loads(output)
        assert (served.process.returncode, record["num_cut_off"], record["url"]) == (1, 1, served.url)
        assert "every request must end within --drain-s. Received: 1 request that did not" in served.log.read_text()


def test_a_port_that_is_taken(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert cli.main(["serve", "--model", model, "--port", str(port)]) == 2
    assert f"a free port. Received: 127.0.0.1, {port}: Address already in use" in capsys.readouterr().err


def test_what_was_served_is_counted(model: str) -> None:
    with running(model) as served:
        served.client.post("/v1/predict", files=[("f", DRAWINGS[0]), ("f", b"x"), ("f", b"")]).raise_for_status()
        counts = served.service.metrics.counts
        assert counts(served.service.metrics.errors) == {"unsupported_format": 1, "empty_file": 1}
        assert sum(counts(served.service.metrics.images).values()) == 1


def test_a_thousand_requests_at_once(model: str) -> None:
    """More than there are threads or places in a batch: each gets its own answer."""
    with running(model, max_queue=2000) as served:
        expected = [ask_one(served, drawing) for drawing in DRAWINGS]

        def ask(number: int) -> bool:
            return bool(ask_one(served, DRAWINGS[number % len(DRAWINGS)]) == expected[number % len(DRAWINGS)])

        with concurrent.futures.ThreadPoolExecutor(64) as pool:
            assert all(pool.map(ask, range(1000)))


def ask_one(served: Running, data: bytes) -> Any:
    return served.client.post("/v1/predict", content=data).raise_for_status().json()
