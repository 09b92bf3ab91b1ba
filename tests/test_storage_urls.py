"""`catdog.storage.urls`: URLs as text."""

from pathlib import Path

import pytest

from catdog import storage


def test_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert storage.absolute("x/../a.jpg") == str(tmp_path / "a.jpg")
    assert storage.absolute(f"file://{tmp_path}/a.jpg") == str(tmp_path / "a.jpg")
    assert storage.absolute("~/a") == str(Path.home() / "a")
    assert storage.absolute("s3://bucket/a/") == "s3://bucket/a"
    assert storage.absolute("s3://bucket/a/", keep_slash=True) == "s3://bucket/a/"
    assert storage.absolute("s3://bucket/a", keep_slash=True) == "s3://bucket/a"
    assert storage.absolute("S3://Bucket/A") == "s3://Bucket/A"
    assert storage.absolute("s3n://bucket/a") == "s3://bucket/a"
    assert storage.absolute("file:/x/y") == storage.absolute("file://localhost/x//y/") == "/x/y"
    assert storage.absolute("memory://") == "memory://"
    assert storage.absolute("zip://a.jpg::x.zip") == f"zip://a.jpg::{tmp_path}/x.zip"
    assert storage.absolute("zip://a.jpg::s3://b/x.zip") == "zip://a.jpg::s3://b/x.zip"


def test_join() -> None:
    assert storage.join("/a/", "b", "c.json") == "/a/b/c.json"
    assert storage.join("s3://b", "c") == "s3://b/c"
    assert storage.join("memory://", "c") == "memory://c"


@pytest.mark.parametrize(
    ("inner", "outer", "is_inside"),
    [
        ("s3://b/photos/out", "s3://b/photos", True),
        ("s3a://b/photos/out/", "s3n://b/photos/", True),
        ("s3://b/photos", "s3://b", True),
        ("s3://b/photos", "s3://b/photos/", True),
        ("s3://b/photos-2", "s3://b/photos", False),
        ("s3://b/photos", "s3://b/photos/out", False),
        ("gcs://b/x/y", "gs://b/x", True),
        ("memory://b/x", "s3://b", False),
        ("/photos/out", "/photos", True),
        ("file:///photos/./out", "/photos/x/..", True),
        ("/photos2", "/photos", False),
        ("/x", "/", True),
        ("/photos/out", "s3://photos", False),
        ("zip://a/b::/photos/x.zip", "/photos", True),
    ],
)
def test_is_inside(inner: str, outer: str, is_inside: bool) -> None:
    assert storage.is_inside(inner, outer) == is_inside


def test_is_inside_by_what_links_lead_to(tmp_path: Path) -> None:
    (tmp_path / "photos" / "out").mkdir(parents=True)
    (tmp_path / "link").symlink_to("photos")
    (tmp_path / "away").symlink_to("/")
    assert storage.is_inside(f"{tmp_path}/link/out", f"{tmp_path}/photos")
    assert storage.is_inside(f"{tmp_path}/photos/out/new", f"{tmp_path}/link")
    assert not storage.is_inside(f"{tmp_path}/link/../photos2", f"{tmp_path}/photos")
    assert storage.is_inside(f"{tmp_path}/photos", f"{tmp_path}/away")


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("s3a://b/x", "s3://b"),
        ("s3://b", "s3://b"),
        ("https://me:secret@Example.org:8080/a.jpg", "https://example.org:8080"),
        ("HTTP://h?x=1", "http://h"),
        ("abfs://container@account.net/x", "abfs://container@account.net"),
        ("zip://a.jpg::gs://b/x.zip", "gs://b"),
        ("zip://a.jpg::/x.zip", ""),
        ("relative/x", ""),
        ("file:///x", ""),
        ("file:/x", ""),
    ],
)
def test_the_storage_of_a_url(url: str, name: str) -> None:
    assert storage.storage_of(url) == name
