"""`catdog.storage.reading`: images, and what catdog writes itself, on each kind of storage and from a web server."""

import contextlib
import email.utils
import http.server
import json
import os
import threading
from collections.abc import Generator, Iterator
from pathlib import Path

import fsspec
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from storage_case import fill, image_error, write_manifest

from catdog import storage
from catdog.errors import ImageError
from catdog.storage import reading

pytest_plugins = ["s3_server", "storage_case"]


def test_reads_many_in_order(root: str) -> None:
    files = {f"{i:03}.jpg": b"%d" % i for i in range(200)}
    fill(root, files)
    listed = list(storage.list_images(root))
    uris = [*(file.uri for file in listed), f"{root}/missing.jpg"]
    read = list(storage.read_sources(uris, [*(file.num_bytes for file in listed), None]))
    assert read[:-1] == list(files.values())
    assert isinstance(read[-1], ImageError)
    assert read[-1].code == "not_found"
    assert len(list(storage.read_sources(uris[:3]))) == 3
    half = storage.read_sources(uris)
    assert isinstance(half, Generator)
    assert next(half) == b"0"
    half.close()


class Reads:
    """Counts the reads that `read_sources` has begun, and waits for them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.num_begun = 0
        self._changed = threading.Condition()
        self._read_source = reading.read_source
        monkeypatch.setattr(reading, "read_source", self._read)

    def _read(self, uri: str, expected_bytes: int | None = None, version: str | None = None) -> bytes:
        with self._changed:
            self.num_begun += 1
            self._changed.notify_all()
        return self._read_source(uri, expected_bytes, version)

    def wait_for(self, num_begun: int) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self.num_begun >= num_begun, timeout=60)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Reads:
    return Reads(monkeypatch)


@pytest.fixture
def memory() -> Iterator[str]:
    yield "memory://ahead"
    fsspec.filesystem("memory").store.clear()


def test_no_more_than_32_mib_are_read_ahead(reads: Reads, memory: str) -> None:
    file_bytes = 4 * 2**20
    num_files = 20
    fill(memory, {f"{i:02}.jpg": bytes([i]) * file_bytes for i in range(num_files)})
    files = list(storage.list_images(memory))
    consumer = storage.read_sources([file.uri for file in files], [file.num_bytes for file in files])
    for num_taken, data in enumerate(consumer, start=1):
        assert data == bytes([num_taken - 1]) * file_bytes
        # Eight files are 32 MiB: the one that the consumer holds now, and seven more.
        expected = min(num_taken + 7, num_files)
        reads.wait_for(expected)
        assert reads.num_begun == expected


@pytest.mark.parametrize(
    ("expected_bytes", "num_ahead"),
    [(1, 64), (2**20, 32), (None, 32), (0, 32), (32 * 2**20, 1), (100 * 2**20, 1)],
)
def test_how_many_files_are_read_ahead(reads: Reads, memory: str, expected_bytes: int | None, num_ahead: int) -> None:
    num_files = 100
    fill(memory, {f"{i:02}.jpg": b"x" for i in range(num_files)})
    uris = [file.uri for file in storage.list_images(memory)]
    for num_taken, data in enumerate(storage.read_sources(uris, [expected_bytes] * num_files), start=1):
        assert data == b"x"
        expected = min(num_taken + num_ahead - 1, num_files)
        reads.wait_for(expected)
        assert reads.num_begun == expected


def test_a_large_file_waits_for_the_small_ones_before_it(reads: Reads, memory: str) -> None:
    fill(memory, {f"{i}.jpg": b"x" for i in range(4)})
    uris = [file.uri for file in storage.list_images(memory)]
    num_begun = []
    for _ in storage.read_sources(uris, [1, 1, 100 * 2**20, 1]):
        reads.wait_for(2)
        num_begun.append(reads.num_begun)
    assert num_begun == [2, 2, 3, 4]


def test_a_file_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "x.jpg").open("wb") as file:
        file.truncate(storage.MAX_BYTES + 1)
    error = image_error(str(tmp_path / "x.jpg"))
    assert (error.code, str(error)) == ("too_large", "134217729 bytes is more than 134217728 bytes")
    with pytest.raises(ImageError, match=r"more than"):
        storage.read_source("s3://nowhere/x.jpg", storage.MAX_BYTES + 1)


def test_empty_files(root: str) -> None:
    storage.publish_bytes(f"{root}/a.jpg", b"")
    assert image_error(f"{root}/a.jpg").code == "empty_file"


def test_unreadable_files(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(b"x")
    path.chmod(0)
    with contextlib.suppress(PermissionError):
        path.read_bytes()
        pytest.skip("this user may read everything")
    assert image_error(str(path)).code == "permission_denied"


def test_what_catdog_writes_is_read_back(root: str, tmp_path: Path) -> None:
    table = pa.table({"a": [1, 2, 3], "b": ["x", "y", None]})
    storage.publish_parquet(f"{root}/x=1/t.parquet", table)
    assert storage.read_parquet(f"{root}/x=1/t.parquet").equals(table)
    assert storage.read_parquet(f"{root}/x=1/t.parquet", ["b"]).column_names == ["b"]
    storage.publish_json(f"{root}/r.json", {"b": [1], "a": "ä"})
    assert storage.read_json(f"{root}/r.json") == {"b": [1], "a": "ä"}
    assert storage.read_text(f"{root}/r.json") == json.dumps({"b": [1], "a": "ä"}, indent=2) + "\n"
    (tmp_path / "model").write_bytes(b"m" * 1000)
    storage.publish_file(f"{root}/model.keras", str(tmp_path / "model"))
    assert storage.read_bytes(f"{root}/model.keras") == b"m" * 1000
    with storage.open_read(f"{root}/model.keras") as file:
        file.seek(990)
        assert file.read() == b"m" * 10
    for read in (storage.read_bytes, storage.read_json, storage.read_text, storage.read_parquet):
        with pytest.raises(FileNotFoundError):
            read(f"{root}/missing")


@given(data=st.binary(max_size=3000), cuts=st.lists(st.integers(0, 3100), max_size=5))
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_make_the_round_trip(root: str, data: bytes, cuts: list[int]) -> None:
    url = f"{root}/x.bin"
    storage.publish_bytes(url, data)
    assert storage.read_bytes(url) == data
    with storage.open_read(url) as file:
        for cut in cuts:
            file.seek(cut)
            assert file.read(100) == data[cut : cut + 100]


@pytest.mark.slow
def test_a_web_server(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"from the web")
    busy: list[int] = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args: object) -> None:
            super().__init__(*args, directory=str(tmp_path))  # type: ignore[arg-type]

        def do_GET(self) -> None:
            if "denied" in self.path:
                self.send_error(403)
            elif "busy" in self.path and busy:
                self.send_error(busy.pop())
            else:
                super().do_GET()

        do_HEAD = do_GET  # noqa: N815

        def log_message(self, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        host = f"http://127.0.0.1:{server.server_address[1]}"
        try:
            busy += [503, 500, 429]
            assert storage.read_source(f"{host}/a.jpg?busy") == b"from the web"
            assert busy == []
            (file,) = storage.list_images(f"{host}/a.jpg")
            changed = email.utils.formatdate((tmp_path / "a.jpg").stat().st_mtime, usegmt=True)
            assert file.version == f"12-{changed}"  # this server gives no ETag
            (tmp_path / "a.jpg").write_bytes(b"from the WEB")
            os.utime(tmp_path / "a.jpg", (0, 0))
            (file,) = storage.list_images(f"{host}/a.jpg")
            assert file.version == "12-Thu, 01 Jan 1970 00:00:00 GMT"
            (tmp_path / "a.jpg").write_bytes(b"from the web")
            uris = [f"{host}/a.jpg", f"{host}/missing.jpg", f"{host}/denied.jpg"]
            read = list(storage.read_sources(uris, [12, 12, 12]))
            assert [data if isinstance(data, bytes) else data.code for data in read] == [
                b"from the web",
                "not_found",
                "permission_denied",
            ]
            write_manifest(str(tmp_path / "m.parquet"), [*uris])
            files = list(storage.list_images(str(tmp_path / "m.parquet")))
            assert [file.num_bytes for file in files] == [12, 0, 0]
        finally:
            server.shutdown()
            thread.join()
