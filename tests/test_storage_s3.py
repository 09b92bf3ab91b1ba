"""`catdog.storage.s3`: what it uses of s3fs is where it was, and does what it did.

The tests that are not slow ask no server. They fail when a new version of s3fs has moved a name, and say which.
"""

import errno
import inspect
from typing import Any

import fsspec
import fsspec.core
import pytest
import s3fs
import s3fs.errors
from s3_server import S3Server
from storage_case import FlakyS3

from catdog import storage
from catdog.storage import s3 as storage_s3

pytest_plugins = ["s3_server", "storage_case"]


@pytest.mark.slow
def test_s3_listings_go_page_by_page(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage_s3, "_PAGE_OBJECTS", 10)
    root = s3.new_bucket()
    fs, path = fsspec.core.url_to_fs(root, skip_instance_cache=True)
    fs.pipe({f"{path}/many/{i:03}.jpg": b"x" for i in range(43)} | {f"{path}/other/a.jpg": b"x", f"{path}/many/": b""})
    listed = storage.list_images(f"{root}/many")
    assert [file.uri for file in listed] == [f"{root}/many/{i:03}.jpg" for i in range(43)]
    assert len(list(storage.list_images(root))) == 44
    assert len(list(storage.list_images(f"{root}/many/02*.jpg"))) == 10
    assert len(storage.list_names(f"{root}/many")) == 43


def moved(name: str) -> str:
    """What a test says when s3fs has moved a name."""
    return f"s3fs {s3fs.__version__} moved {name}: mend catdog/storage/s3.py"


def filesystem() -> Any:
    fs, _ = storage_s3.url_to_fs("s3://bucket/a", 1)
    return fs


def test_call_s3_is_where_it_was() -> None:
    call_s3 = getattr(filesystem(), "call_s3", None)
    assert call_s3 is not None, moved("call_s3")
    try:
        inspect.signature(call_s3).bind("list_objects_v2", Bucket="bucket", Prefix="a")
    except TypeError as error:
        pytest.fail(f"{moved('the arguments of call_s3')} ({error})")


def test_retries_is_where_it_was() -> None:
    assert isinstance(getattr(s3fs.S3FileSystem, "retries", None), int), moved("retries")
    assert filesystem().retries == 1


def test_cat_file_takes_max_concurrency_as_it_did() -> None:
    parameters = inspect.signature(filesystem().cat_file).parameters
    assert "max_concurrency" in parameters, moved("the argument max_concurrency of cat_file")


class ClientError(Exception):
    """As botocore reports what S3 answers."""

    def __init__(self, code: str) -> None:
        super().__init__(f"An error occurred ({code})")
        self.response = {"Error": {"Code": code, "Message": "m"}}


@pytest.mark.parametrize(
    ("code", "kind", "is_about_one_object"),
    [
        ("NoSuchKey", FileNotFoundError, True),
        ("404", FileNotFoundError, True),
        ("NoSuchBucket", FileNotFoundError, False),
        ("AccessDenied", PermissionError, True),
        ("403", PermissionError, True),
        ("ExpiredToken", PermissionError, False),
    ],
)
def test_the_answer_of_s3_is_the_cause_of_the_error(code: str, kind: type[OSError], is_about_one_object: bool) -> None:
    error = s3fs.errors.translate_boto_error(ClientError(code))
    assert type(error) is kind, moved(f"the error for {code}")
    assert storage_s3.is_about_one_object(error) == is_about_one_object, moved("S3's answer, the cause of an error")


@pytest.mark.parametrize("code", ["InternalError", "SlowDown", "ServiceUnavailable", "500", "502", "no such code"])
def test_errors_that_can_pass_have_the_numbers_they_had(code: str) -> None:
    error = s3fs.errors.translate_boto_error(ClientError(code))
    assert error.errno in storage_s3.PASSING_ERRNOS, moved(f"the error number for {code}")


@pytest.mark.parametrize("url", ["s3://b", "s3://b/a.jpg", "s3a://b/x/y.jpg", "s3://b/a/", "s3://"])
def test_a_path_is_what_fsspec_makes_of_a_url(url: str, no_s3_server: None) -> None:
    assert storage_s3.is_s3_url(url)
    fs, path = storage_s3.url_to_fs(url, 1)
    assert storage_s3.is_s3(fs)
    assert path == fsspec.core.url_to_fs(url)[1]


def test_what_is_not_s3() -> None:
    assert not storage_s3.is_s3_url("memory://b/s3")
    assert not storage_s3.is_s3_url("/s3/a")
    assert not storage_s3.is_s3(fsspec.filesystem("memory"))


def test_new_settings_make_a_new_filesystem(no_s3_server: None, monkeypatch: pytest.MonkeyPatch) -> None:
    first = filesystem()
    assert filesystem() is first
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    assert filesystem() is not first


@pytest.mark.slow
def test_a_request_is_tried_once(flaky: type[FlakyS3]) -> None:
    flaky.answers = [(503, "SlowDown")] * 2
    fs = filesystem()
    with pytest.raises(OSError, match="m") as caught:
        storage_s3.list_page(fs, "s3://bucket/a", None, flat=True)
    assert caught.value.errno == errno.EBUSY
    with pytest.raises(OSError, match="m") as caught:
        storage_s3.read(fs, "bucket/a")
    assert caught.value.errno == errno.EBUSY
    assert flaky.num_requests == 2, moved("retries")


@pytest.mark.slow
def test_a_file_is_read_in_one_request(flaky: type[FlakyS3]) -> None:
    assert storage_s3.read(filesystem(), "bucket/a.jpg") == b"image bytes"
    assert flaky.num_requests == 1, moved("the argument max_concurrency of cat_file")
