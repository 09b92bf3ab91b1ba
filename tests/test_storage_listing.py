"""`catdog.storage.listing`: directories, globs and manifests, on each kind of storage."""

import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

import fsspec
import fsspec.utils
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from s3_server import S3Server
from storage_case import VISIBLE, fill, image_error, make_zip, names, write_manifest

from catdog import storage
from catdog.errors import StorageError, UsageError

pytest_plugins = ["s3_server", "storage_case"]


def test_lists_directories_recursively_without_hidden_names(root: str) -> None:
    fill(root)
    assert names(root, root) == VISIBLE
    assert names(root + "/", root) == VISIBLE
    assert names(f"{root}/b", root) == ["b/c/dog.1.jpg", "b/cat.2.jpg", "b/empty.jpg"]
    assert {file.num_bytes for file in storage.list_images(root)} == {3, 6, 0, 12}


def test_lists_globs(root: str) -> None:
    fill(root)
    assert names(f"{root}/*.jpg", root) == ["a.jpg"]
    assert names(f"{root}/**/*.jpg", root) == ["a.jpg", "b/c/dog.1.jpg", "b/cat.2.jpg", "b/empty.jpg"]
    assert names(f"{root}/*/cat.?.jpg", root) == ["b/cat.2.jpg"]
    assert names(f"{root}/b/[ce]*.jpg", root) == ["b/cat.2.jpg", "b/empty.jpg"]


def test_glob_translate_is_where_it_was() -> None:
    says = (
        f"fsspec {fsspec.__version__} moved glob_translate, which it does not document: mend catdog/storage/listing.py"
    )
    translate = getattr(fsspec.utils, "glob_translate", None)
    assert translate is not None, says
    assert re.match(translate("s3://b/**/[ab]?.j*"), "s3://b/x/y/a1.jpg"), says
    assert not re.match(translate("s3://b/*.jpg"), "s3://b/x/a.jpg"), says


def test_a_name_with_glob_characters_is_taken_as_it_is(root: str) -> None:
    fill(root, {"[1]/a*.jpg": b"x", "1/ab.jpg": b"y"})
    assert names(f"{root}/[1]", root) == ["[1]/a*.jpg"]
    assert names(f"{root}/[1]/a*.jpg", root) == ["[1]/a*.jpg"]
    assert storage.read_source(f"{root}/[1]/a*.jpg") == b"x"


def test_lists_one_file(root: str) -> None:
    fill(root)
    (file,) = storage.list_images(f"{root}/b/cat.2.jpg")
    assert file.uri == f"{root}/b/cat.2.jpg"
    assert file.num_bytes == 3
    assert file in list(storage.list_images(root))


def test_the_version_tells_contents_apart(root: str) -> None:
    url = f"{root}/a.jpg"
    storage.publish_bytes(url, b"one")
    (before,) = storage.list_images(root)
    assert list(storage.list_images(root)) == [before]
    time.sleep(0.02)
    storage.publish_bytes(url, b"two")
    (after,) = storage.list_images(root)
    assert after.version != before.version != ""


def test_listings_are_never_stale(root: str) -> None:
    fill(root, {"a.jpg": b"1"})
    assert names(root, root) == ["a.jpg"]
    assert storage.list_names(root) == ["a.jpg"]
    # Written and removed behind our back, as another machine would.
    fs, path = fsspec.core.url_to_fs(root, skip_instance_cache=True)
    fs.pipe_file(f"{path}/b.jpg", b"2")
    fs.rm_file(f"{path}/a.jpg")
    assert names(root, root) == ["b.jpg"]
    assert storage.list_names(root) == ["b.jpg"]
    assert storage.exists(f"{root}/b.jpg")
    assert not storage.exists(f"{root}/a.jpg")


@pytest.mark.parametrize("what", ["", "/missing.jpg", "/*.gif", "/missing/*", "/x.zip", "/**x/*", "/a::b"])
def test_nothing_to_list_is_a_usage_error(root: str, what: str) -> None:
    fill(root, {".hidden": b"x"})
    with pytest.raises(UsageError, match=r"Received: "):
        storage.list_images(root + what)


def test_unknown_protocols_are_a_usage_error() -> None:
    with pytest.raises(UsageError, match=r"Protocol not known: nope.*Received: nope://x"):
        storage.list_images("nope://x")
    with pytest.raises(UsageError, match=r"A glob must name its bucket. Received: s3://buck"):
        storage.list_images("s3://buck*/x")
    assert image_error("nope://x/a.jpg").code == "not_found"


def test_names_directly_under_a_directory(root: str) -> None:
    fill(root)
    assert storage.list_names(root) == ["__MACOSX", "a.jpg", "b", "notes.txt"]
    assert storage.list_names(f"{root}/b", ".jpg") == ["cat.2.jpg", "empty.jpg"]
    assert storage.list_names(f"{root}/missing") == []
    assert storage.list_names(f"{root}/a.jpg") == []
    assert storage.exists(root)
    assert storage.exists(f"{root}/b/c/dog.1.jpg")
    assert not storage.exists(f"{root}/b/c/dog")


def test_odd_local_files(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    images = tmp_path / "images"
    (images / "sub").mkdir(parents=True)
    (images / "sub" / "a.jpg").write_bytes(b"a")
    os.symlink(images, images / "sub" / "loop")
    os.symlink(tmp_path / "elsewhere", images / "linked")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "b.jpg").write_bytes(b"b")
    os.symlink("nowhere", images / "broken.jpg")
    os.mkfifo(images / "pipe.jpg")
    Path(os.fsdecode(os.fsencode(images) + b"/caf\xe9.jpg")).write_bytes(b"c")
    files = list(storage.list_images(str(images)))
    assert [file.uri.removeprefix(f"{images}/") for file in files] == [
        "broken.jpg",
        r"caf\xe9.jpg",
        "linked/b.jpg",
        "sub/a.jpg",
    ]
    assert "leads back to a directory above it" in caplog.text
    assert "pipe.jpg is not a regular file" in caplog.text
    pa.array([file.uri for file in files])  # all are UTF-8
    assert files[0].version == ""
    assert image_error(files[0].uri).code == "not_found"
    assert image_error(files[1].uri).code == "not_found"
    assert image_error(str(images / "pipe.jpg")).code == "not_found"
    assert image_error(str(images)).code == "not_found"
    assert image_error(f"{files[3].uri}/x").code == "not_found"
    assert image_error("/" + "x" * 5000).code == "not_found"
    assert image_error("/a\0b").code == "not_found"


def test_a_glob_without_double_star_does_not_walk_deeper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "a.jpg").write_bytes(b"a")
    (tmp_path / "deep" / "b.jpg").write_bytes(b"b")
    scanned: list[str] = []
    scandir = os.scandir

    def counted(path: str) -> "Iterator[os.DirEntry[str]]":
        scanned.append(path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", counted)
    assert names(f"{tmp_path}/*.jpg", str(tmp_path)) == ["a.jpg"]
    assert scanned == [str(tmp_path)]
    assert names(f"{tmp_path}/*/*.jpg", str(tmp_path)) == ["deep/b.jpg"]
    assert scanned[1:] == [str(tmp_path), str(tmp_path / "deep")]


@pytest.mark.slow
def test_missing_buckets_and_objects(s3: S3Server) -> None:
    with pytest.raises(StorageError, match=r"s3://no-such-bucket-here/a: the storage failed: The specified bucket"):
        storage.list_images("s3://no-such-bucket-here/a")
    with pytest.raises(UsageError, match=r"--images must exist. Received: --images=s3://no-such-bucket-here"):
        storage.list_images("s3://no-such-bucket-here")
    bucket = s3.new_bucket()
    with pytest.raises(UsageError, match=rf"--images must exist. Received: --images={bucket}/a"):
        storage.list_images(f"{bucket}/a")
    with pytest.raises(UsageError, match=r"--images must hold at least one file"):
        storage.list_images(bucket)
    assert image_error(f"{bucket}/a.jpg").code == "not_found"
    assert image_error("s3://Not_a_Bucket!/a.jpg").code == "not_found"


def test_manifests(root: str) -> None:
    fill(root)
    storage.publish_bytes(f"{root}/x.zip", make_zip({"m/a.jpg": b"in the zip"}))
    manifest = f"{root}/lists/manifest.parquet"
    uris = [
        f"{root}/b/cat.2.jpg",
        f"{root}/missing.jpg",
        f"zip://m/a.jpg::{root}/x.zip",
        f"zip://m/b.jpg::{root}/x.zip",
        f"zip://m/a.jpg::{root}/y.zip",
        "near.jpg",
        "zip://m/c.jpg::near.zip",
        f"{root}/b/cat.2.jpg",
        "nope://x",
    ]
    write_manifest(manifest, uris, label=["cat"] * len(uris))
    storage.publish_bytes(f"{root}/lists/near.jpg", b"near")
    storage.publish_bytes(f"{root}/lists/near.zip", make_zip({"m/c.jpg": b"near zip"}))
    files = list(storage.list_images(manifest))
    resolved = [*uris[:5], f"{root}/lists/near.jpg", f"zip://m/c.jpg::{root}/lists/near.zip", *uris[7:]]
    assert [file.uri for file in files] == resolved
    assert [bool(file.version) for file in files] == [True, False, True, False, False, True, True, True, False]
    assert [file.num_bytes for file in files] == [3, 0, 10, 0, 0, 4, 8, 3, 0]
    read = storage.read_sources(resolved)
    assert [data if isinstance(data, bytes) else data.code for data in read] == [
        b"two",
        "not_found",
        b"in the zip",
        "not_found",
        "not_found",
        b"near",
        b"near zip",
        b"two",
        "not_found",
    ]


def test_long_manifests_stream(tmp_path: Path) -> None:
    table = pa.table({"uri": [f"{i % 3}.jpg" for i in range(5000)]})
    pq.write_table(table, tmp_path / "m.parquet", row_group_size=700)
    files = list(storage.list_images(str(tmp_path / "m.parquet")))
    assert [file.uri for file in files] == [str(tmp_path / f"{i % 3}.jpg") for i in range(5000)]


def test_bad_manifests_are_usage_errors(root: str) -> None:
    storage.publish_bytes(f"{root}/text.parquet", b"not Parquet at all")
    with pytest.raises(UsageError, match=r"A manifest must be a Parquet file: .*text\.parquet"):
        storage.list_images(f"{root}/text.parquet")
    storage.publish_parquet(f"{root}/path.parquet", pa.table({"path": ["a"], "label": ["cat"]}))
    with pytest.raises(UsageError, match=r"must have a column named uri\. Received: .* with the columns path, label"):
        storage.list_images(f"{root}/path.parquet")
    write_manifest(f"{root}/null.parquet", [None])
    with pytest.raises(UsageError, match=r"Each uri of a manifest must be text. Received: None"):
        storage.list_images(f"{root}/null.parquet")
