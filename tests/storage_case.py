"""What the tests of storage share: an empty place on each kind of storage, files to put there, and an S3 that fails.

A test module says `pytest_plugins = ["s3_server", "storage_case"]` and takes the fixtures `root`, `flaky` and
`no_s3_server`. (PYTEST_DONT_REWRITE: no asserts here, and test modules import this module before pytest does.)
"""

import http.server
import io
import os
import threading
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import fsspec
import pyarrow as pa
import pytest
from s3_server import S3Server

from catdog import storage
from catdog.errors import ImageError
from catdog.storage import outages

FILES = {
    "b/cat.2.jpg": b"two",
    "a.jpg": b"one",
    "b/c/dog.1.jpg": b"three!",
    "notes.txt": b"not an image",
    ".hidden/x.jpg": b"x",
    "b/.cat.jpg": b"x",
    "__MACOSX/a.jpg": b"x",
    "b/empty.jpg": b"",
}
VISIBLE = ["a.jpg", "b/c/dog.1.jpg", "b/cat.2.jpg", "b/empty.jpg", "notes.txt"]
"""Those of `FILES` that a listing gives."""


@pytest.fixture(params=["local", "memory", pytest.param("s3", marks=pytest.mark.slow)])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """An empty place to write to, on each kind of storage."""
    if request.param == "local":
        yield str(tmp_path)
    elif request.param == "memory":
        yield "memory://test"
        fsspec.filesystem("memory").store.clear()
        fsspec.filesystem("memory").pseudo_dirs[:] = [""]
    else:
        server: S3Server = request.getfixturevalue("s3")
        yield server.new_bucket() + "/some prefix"


def fill(root: str, files: dict[str, bytes] = FILES) -> None:
    """Write files under a directory."""
    for name, data in files.items():
        storage.publish_bytes(storage.join(root, name), data)


def names(url: str, root: str) -> list[str]:
    """What `list_images` gives for `url`, as names under `root`."""
    return [file.uri.removeprefix(root + "/") for file in storage.list_images(url)]


def make_zip(files: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    """The bytes of a zip archive."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def image_error(uri: str) -> ImageError:
    """The error that reading this image raises."""
    with pytest.raises(ImageError) as caught:
        storage.read_source(uri)
    return caught.value


def write_manifest(url: str, uris: Sequence[str | None], **columns: list[str]) -> None:
    """Write a Parquet manifest."""
    storage.publish_parquet(url, pa.table({"uri": pa.array(uris, pa.string()), **columns}))


class FlakyS3(http.server.BaseHTTPRequestHandler):
    """An S3 that gives the `answers` (HTTP status, error code), one for each request, and then the status 200."""

    answers: list[tuple[int, str]]
    num_requests: int

    def do_GET(self) -> None:
        kind = type(self)
        kind.num_requests += 1
        status, code = kind.answers.pop(0) if kind.answers else (200, "")
        body = b"image bytes" if status == 200 else f"<Error><Code>{code}</Code><Message>m</Message></Error>".encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body) + (5 if code == "cut" else 0)))
        self.end_headers()
        self.wfile.write(body)

    do_HEAD = do_GET  # noqa: N815
    do_PUT = do_GET  # noqa: N815

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def no_s3_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings for S3 that name no endpoint. The test sets its own."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")


@pytest.fixture
def flaky(no_s3_server: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[FlakyS3]]:
    """The handler of a server that answers as the test tells it to; the settings for S3 name that server."""
    monkeypatch.delenv(outages.PATIENCE_VARIABLE, raising=False)
    outages.forget_all()
    handler = type("Handler", (FlakyS3,), {"answers": [], "num_requests": 0})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_address[1]}")
        yield handler
        server.shutdown()
        thread.join()
