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
    assert storage.absolute("memory://") == "memory://"
    assert storage.absolute("zip://a.jpg::x.zip") == f"zip://a.jpg::{tmp_path}/x.zip"
    assert storage.absolute("zip://a.jpg::s3://b/x.zip") == "zip://a.jpg::s3://b/x.zip"


def test_join() -> None:
    assert storage.join("/a/", "b", "c.json") == "/a/b/c.json"
    assert storage.join("s3://b", "c") == "s3://b/c"
    assert storage.join("memory://", "c") == "memory://c"
