"""`catdog.storage.filesystems`: what is tried again, for how long, and which error comes out."""

import datetime
import importlib
import socket
import sys
import threading
import time
import types
from collections.abc import Callable
from pathlib import Path

import pytest
from storage_case import FlakyS3

from catdog import storage
from catdog.errors import ImageError, StorageError
from catdog.storage import filesystems, outages, s3_objects

pytest_plugins = ["s3_server", "storage_case"]


def test_an_error_is_told_while_a_client_is_being_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "aiohttp", types.ModuleType("aiohttp"))  # as far as another thread has come
    with pytest.raises(FileNotFoundError):
        filesystems.attempt(str(tmp_path), (tmp_path / "none").read_bytes)
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match=r"the storage failed: Directory not empty$"):
        filesystems.attempt(str(tmp_path), tmp_path.rmdir)


@pytest.mark.parametrize(
    ("module", "name"),
    sorted({*filesystems._CLIENT_ERRORS, *filesystems._PASSING_CLIENT_ERRORS, *filesystems._UNREACHABLE_ERRORS}),
)
def test_the_errors_of_clients_are_where_they_were(module: str, name: str) -> None:
    if module.startswith(("gcsfs", "google", "azure")):
        pytest.importorskip(module, reason=f"{module} is not installed")
    package = importlib.import_module(module.partition(".")[0])
    version = getattr(package, "__version__", "")
    says = f"{package.__name__} {version} moved {module}.{name}: mend catdog/storage/filesystems.py"
    error = getattr(importlib.import_module(module), name, None)
    assert isinstance(error, type), says
    assert issubclass(error, Exception), says


def test_retries_end_when_patience_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(outages.PATIENCE_VARIABLE, "0")
    calls: list[int] = []

    def fail() -> None:
        calls.append(1)
        raise TimeoutError("timed out")

    with pytest.raises(StorageError, match=r"s3://b/x: the storage failed for 0 s: timed out"):
        filesystems.attempt("s3://b/x", fail)
    assert len(calls) == 1


def test_no_credentials(no_s3_server: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    with pytest.raises(StorageError, match=r"s3://bucket/a.*Unable to locate credentials"):
        storage.list_images("s3://bucket/a")


@pytest.fixture
def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.mark.slow
def test_an_unreachable_storage_is_a_failure_within_seconds(
    no_s3_server: None, closed_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{closed_port}")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not-to-be-seen")
    started = time.monotonic()
    calls: list[Callable[[], object]] = [
        lambda: storage.list_images("s3://bucket/a"),
        lambda: storage.read_source("s3://bucket/a.jpg", 10),
        lambda: list(storage.read_sources(["s3://bucket/a.jpg"] * 100, [10] * 100)),
        lambda: storage.read_source("zip://a.jpg::s3://bucket/a.zip"),
        lambda: storage.publish_bytes("s3://bucket/a.bin", b"x"),
        lambda: storage.list_names("s3://bucket/a"),
    ]
    errors: list[StorageError] = []

    def run(call: Callable[[], object]) -> None:
        with pytest.raises(StorageError) as caught:
            call()
        errors.append(caught.value)

    threads = [threading.Thread(target=run, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(errors) == len(calls)
    for error in errors:
        assert "s3://bucket/a" in str(error)
        assert f"127.0.0.1:{closed_port}" in str(error)
        assert "not-to-be-seen" not in str(error)
    assert 2 < time.monotonic() - started < 60  # six seconds, where nothing else runs


@pytest.mark.slow
@pytest.mark.parametrize("answer", [(503, "SlowDown"), (500, "InternalError"), (502, "?"), (429, "TooManyRequests")])
def test_what_passes_is_retried(flaky: type[FlakyS3], answer: tuple[int, str]) -> None:
    flaky.answers = [answer] * 3
    assert storage.read_source("s3://bucket/a.jpg", 11) == b"image bytes"
    assert flaky.num_requests == 4


@pytest.mark.slow
def test_a_connection_cut_in_the_middle_is_retried(flaky: type[FlakyS3]) -> None:
    flaky.answers = [(200, "cut")]
    assert storage.read_source("s3://bucket/a.jpg", 11) == b"image bytes"
    assert flaky.num_requests == 2


@pytest.mark.slow
def test_what_does_not_pass_is_not_retried(flaky: type[FlakyS3], monkeypatch: pytest.MonkeyPatch) -> None:
    """By s3fs. What obstore is denied, s3fs is asked for once: see tests/test_storage_s3_objects.py."""
    monkeypatch.setattr(s3_objects, "_is_installed", lambda: False)
    flaky.answers = [(403, "ExpiredToken")]  # keys that never worked
    with pytest.raises(StorageError, match=r"s3://bucket/a.jpg"):
        storage.read_source("s3://bucket/a.jpg", 11)
    for answer, code in [
        ((404, "NoSuchKey"), "not_found"),
        ((403, "AccessDenied"), "permission_denied"),
        ((403, "InvalidObjectState"), "permission_denied"),
    ]:
        flaky.answers = [answer]
        with pytest.raises(ImageError) as caught:
            storage.read_source("s3://bucket/a.jpg", 11)
        assert caught.value.code == code
    for answer in [(403, "InvalidAccessKeyId"), (404, "NoSuchBucket"), (400, "InvalidRequest")]:
        flaky.answers = [answer]
        with pytest.raises(StorageError, match=r"s3://bucket/a.jpg"):
            storage.read_source("s3://bucket/a.jpg", 11)
    assert flaky.num_requests == 7
    flaky.answers = [(403, "AccessDenied")] * 3
    with pytest.raises(StorageError, match=r"s3://bucket/a.json: permission denied"):
        storage.read_bytes("s3://bucket/a.json")
    flaky.answers = [(403, "AccessDenied")] * 3
    with pytest.raises(StorageError, match=r"s3://bucket/out.bin cannot be written"):
        storage.publish_bytes("s3://bucket/out.bin", b"x")


@pytest.mark.parametrize(
    ("info", "version"),
    [
        ({"size": 5, "ETag": '"abc"'}, "abc"),
        ({"size": None, "ETag": 'W/"abc"'}, 'W/"abc'),
        ({"size": 5, "Content-MD5": "x=="}, "x=="),
        ({"size": 5, "Last-Modified": "Thu, 01 Jan 1970 00:00:00 GMT"}, "5-Thu, 01 Jan 1970 00:00:00 GMT"),
        ({"size": None, "Last-Modified": "then"}, "-then"),
        ({"Size": 7, "LastModified": datetime.datetime.fromtimestamp(2, datetime.UTC)}, "7-2000000000"),
        ({"size": 5, "mtime": 1.5}, "5-1500000000"),
        ({"size": 5}, ""),
        ({"size": None}, ""),
        ({"ETag": "", "mtime": None}, ""),
    ],
)
def test_a_version_is_evidence_of_sameness_or_empty(info: dict[str, object], version: str) -> None:
    assert filesystems.version_of(info) == version
