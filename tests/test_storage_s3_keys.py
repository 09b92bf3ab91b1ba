"""Objects of S3 whose keys are odd, and buckets that everybody may read."""

import http.server
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from s3_server import S3Server
from storage_case import FlakyS3, write_manifest

from catdog import storage
from catdog.errors import StorageError, UsageError
from catdog.storage import outages

pytest_plugins = ["s3_server", "storage_case"]

KEYS = ["a?versionId=1.jpg", "a.jpg?versionId=", "?versionId=x/b.jpg", "a b+c%20d.jpg", "a#b?c=d&e.jpg"]


@pytest.mark.slow
@pytest.mark.parametrize("key", KEYS)
def test_a_key_is_a_key(key: str, s3: S3Server) -> None:
    root = s3.new_bucket()
    url = f"{root}/p/{key}"
    storage.publish_bytes(f"{root}/p/a", b"another")
    storage.publish_bytes(url, b"data")
    (found,) = (file for file in storage.list_images(f"{root}/p") if file.uri == url)
    (named,) = storage.list_images(url)
    assert found == named
    assert found.num_bytes == 4
    assert storage.read_source(url) == b"data"
    assert storage.read_bytes(url) == b"data"
    assert storage.exists(url)
    with storage.open_read(url) as file:
        assert file.read() == b"data"
    write_manifest(f"{root}/list.parquet", [url])
    assert list(storage.list_images(f"{root}/list.parquet")) == [found]
    storage.delete(url)
    assert not storage.exists(url)
    assert storage.read_bytes(f"{root}/p/a") == b"another"


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["S3", "s3a", "S3A", "s3n", "S3N"])
def test_every_spelling_of_the_scheme(scheme: str, s3: S3Server) -> None:
    root = s3.new_bucket()
    storage.publish_bytes(f"{root}/p/a.jpg", b"data")
    url = f"{scheme}://{root.removeprefix('s3://')}"
    (file,) = storage.list_images(f"{url}/p")
    assert storage.read_source(file.uri) == b"data"
    write_manifest(f"{root}/list.parquet", [f"{url}/p/a.jpg"])
    (named,) = storage.list_images(f"{url}/list.parquet")
    assert storage.read_source(named.uri) == b"data"
    assert named.version == file.version != ""


class PublicS3(FlakyS3):
    """An S3 that answers only requests without a signature."""

    agents: list[str]

    def do_GET(self) -> None:  # noqa: N802
        self.agents.append(self.headers["User-Agent"].partition("/")[0])
        if "Authorization" in self.headers:
            type(self).answers = [(403, "InvalidAccessKeyId")]
        super().do_GET()

    do_HEAD = do_GET  # noqa: N815


@pytest.fixture
def public(no_s3_server: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[type[PublicS3]]:
    """The settings for a bucket that everybody may read, on a machine without keys."""
    outages.forget_all()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    handler = type("Handler", (PublicS3,), {"answers": [], "num_requests": 0, "agents": []})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_address[1]}")
        yield handler
        server.shutdown()
        thread.join()


@pytest.mark.slow
def test_a_bucket_that_everybody_may_read_needs_no_keys(
    public: type[PublicS3], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(StorageError, match=r"redentials \(give keys as for aws-cli, or AWS_NO_SIGN_REQUEST=true for a"):
        storage.read_bytes("s3://public/a.jpg")
    assert public.num_requests == 0
    monkeypatch.setenv("AWS_NO_SIGN_REQUEST", "true")
    assert storage.read_bytes("s3://public/a.jpg") == b"image bytes"
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "of another bucket")
    assert storage.read_bytes("s3://public/b.jpg") == b"image bytes"
    assert public.agents == ["object_store"] * 2


@pytest.mark.parametrize(("url", "package"), [("gs://bucket/a", "gcsfs"), ("abfs://container/a", "adlfs")])
def test_a_storage_whose_package_is_missing(url: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UsageError, match=rf"^A URL must be one that fsspec opens: .*{package}.*Received: {url}$"):
        storage.list_images(url)
