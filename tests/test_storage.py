"""Listing, reading and publishing: on this machine's disk, in memory, and on a real S3 server."""

import contextlib
import http.server
import io
import json
import os
import random
import socket
import struct
import sys
import threading
import time
import types
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from s3_server import S3Server

from catdog import storage
from catdog.errors import ImageError, OutputRefusedError, StorageError, UsageError
from catdog.storage import archives, filesystems, listing, publishing

pytest_plugins = ["s3_server"]

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


@pytest.fixture(params=["local", "memory", "s3"])
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
    for name, data in files.items():
        storage.publish_bytes(storage.join(root, name), data)


def names(url: str, root: str) -> list[str]:
    return [file.uri.removeprefix(root + "/") for file in storage.list_images(url)]


def make_zip(files: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def image_error(uri: str) -> ImageError:
    with pytest.raises(ImageError) as caught:
        storage.read_source(uri)
    return caught.value


# URLs


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


def test_redact() -> None:
    assert storage.redact("ftp://me:secret@host/a: no") == "ftp://***@host/a: no"
    assert storage.redact("https://h/a.jpg?X-Amz-Signature=secret&b=1") == "https://h/a.jpg?***"
    assert storage.redact("s3://bucket/what?.jpg and /a@b") == "s3://bucket/what?.jpg and /a@b"


# Listing


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


def test_an_error_is_told_while_a_client_is_being_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "aiohttp", types.ModuleType("aiohttp"))  # as far as another thread has come
    with pytest.raises(FileNotFoundError):
        filesystems.attempt(str(tmp_path), (tmp_path / "none").read_bytes)
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match=r"the storage failed: Directory not empty$"):
        filesystems.attempt(str(tmp_path), tmp_path.rmdir)


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
    scanned = []
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: scanned.append(str(path)) or scandir(path))
    assert names(f"{tmp_path}/*.jpg", str(tmp_path)) == ["a.jpg"]
    assert scanned == [str(tmp_path)]
    assert names(f"{tmp_path}/*/*.jpg", str(tmp_path)) == ["deep/b.jpg"]
    assert scanned[1:] == [str(tmp_path), str(tmp_path / "deep")]


def test_s3_listings_go_page_by_page(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listing, "_S3_PAGE", 10)
    root = s3.new_bucket()
    fs, path = fsspec.core.url_to_fs(root, skip_instance_cache=True)
    fs.pipe({f"{path}/many/{i:03}.jpg": b"x" for i in range(43)} | {f"{path}/other/a.jpg": b"x", f"{path}/many/": b""})
    listed = storage.list_images(f"{root}/many")
    assert [file.uri for file in listed] == [f"{root}/many/{i:03}.jpg" for i in range(43)]
    assert len(list(storage.list_images(root))) == 44
    assert len(list(storage.list_images(f"{root}/many/02*.jpg"))) == 10
    assert len(storage.list_names(f"{root}/many")) == 43


# Archives


def test_archives_are_read_in_place(root: str) -> None:
    url = f"{root}/train.zip"
    storage.publish_bytes(url, make_zip({"train/": b"", **FILES}, zipfile.ZIP_DEFLATED))
    files = list(storage.list_images(url))
    assert [file.uri for file in files] == [f"zip://{name}::{url}" for name in FILES if name in VISIBLE]
    cat = files[0]
    assert cat.version == f"{zlib.crc32(b'two'):08x}-3"
    assert storage.read_source(cat.uri, cat.num_bytes) == b"two"
    with fsspec.open(cat.uri) as opened:
        assert opened.read() == b"two"
    assert list(storage.list_images(cat.uri)) == [cat]
    assert list(storage.list_images(f"zip://b::{url}")) == [file for file in files if "zip://b/" in file.uri]
    assert image_error(f"zip://b/empty.jpg::{url}").code == "empty_file"
    assert image_error(f"zip://missing.jpg::{url}").code == "not_found"
    assert image_error(f"zip://missing.jpg::{root}/missing.zip").code == "not_found"


def test_a_glob_of_archives(root: str) -> None:
    for i in range(3):
        storage.publish_bytes(f"{root}/train-{i}.zip", make_zip({"a.jpg": b"x%d" % i}))
    storage.publish_bytes(f"{root}/train-3.jpg", b"y")
    assert [file.uri for file in storage.list_images(f"{root}/train-*")] == [
        f"zip://a.jpg::{root}/train-0.zip",
        f"zip://a.jpg::{root}/train-1.zip",
        f"zip://a.jpg::{root}/train-2.zip",
        f"{root}/train-3.jpg",
    ]
    assert len(list(storage.list_images(root))) == 4  # a directory's files are listed as they are
    assert names(root, root)[0] == "train-0.zip"


def test_a_replaced_archive_is_read_anew(root: str) -> None:
    url = f"{root}/train.zip"
    storage.publish_bytes(url, make_zip({"a.jpg": b"first"}))
    (before,) = storage.list_images(url)
    assert storage.read_source(before.uri) == b"first"
    storage.publish_bytes(url, make_zip({"longer/name/a.jpg": b"second!", "a.jpg": b"second"}))
    _, after = storage.list_images(url)
    assert after.uri == before.uri
    assert after.version != before.version
    assert storage.read_source(after.uri) == b"second"


def test_an_archive_replaced_while_it_is_read_is_opened_again(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filesystems, "_BLOCK_BYTES", 2**14)
    url = f"{s3.new_bucket()}/train.zip"
    noise = random.Random(0).randbytes(2**16)
    storage.publish_bytes(url, make_zip({"a.jpg": b"first", "noise": noise, "z.jpg": b"last"}))
    uris = [file.uri for file in storage.list_images(url)]
    storage.publish_bytes(url, make_zip({"a.jpg": b"second", "noise": noise[::-1], "z.jpg": b"other"}))
    assert storage.read_source(uris[1]) == noise[::-1]
    assert storage.read_source(uris[2]) == b"other"


def test_no_archive_is_a_usage_error(root: str) -> None:
    storage.publish_bytes(f"{root}/x.zip", b"\xff\xd8\xff not an archive")
    with pytest.raises(UsageError, match=r"A \.zip must be a readable archive: .*x\.zip"):
        storage.list_images(f"{root}/x.zip")
    assert image_error(f"zip://a.jpg::{root}/x.zip").code == "not_found"


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_damaged_member_is_one_bad_image(tmp_path: Path, compression: int) -> None:
    data = random.Random(1).randbytes(5000) + bytes(5000)
    archive = bytearray(make_zip({"good.jpg": b"good", "bad.jpg": data}, compression))
    at = archive.index(b"bad.jpg") + 2000
    archive[at : at + 8] = b"\xff" * 8
    (tmp_path / "x.zip").write_bytes(archive)
    good, bad = storage.list_images(str(tmp_path / "x.zip"))
    assert storage.read_source(good.uri) == b"good"
    error = image_error(bad.uri)
    assert error.code == "decode_failed"
    assert "damaged" in str(error)


def test_an_encrypted_or_odd_member_is_one_bad_image(tmp_path: Path) -> None:
    archive = make_zip({"a.jpg": b"aaaa"})

    def patched(offset_local: int, offset_central: int, value: int) -> bytes:
        data = bytearray(archive)
        data[offset_local : offset_local + 2] = struct.pack("<H", value)
        start = data.index(b"PK\x01\x02")
        data[start + offset_central : start + offset_central + 2] = struct.pack("<H", value)
        return bytes(data)

    (tmp_path / "encrypted.zip").write_bytes(patched(6, 8, 1))
    (tmp_path / "method.zip").write_bytes(patched(8, 10, 97))
    error = image_error(f"zip://a.jpg::{tmp_path}/encrypted.zip")
    assert (error.code, str(error)) == ("permission_denied", "the archive member is encrypted")
    assert image_error(f"zip://a.jpg::{tmp_path}/method.zip").code == "unsupported_format"


def test_a_member_that_is_too_large_is_not_unpacked(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w", zipfile.ZIP_DEFLATED) as archive, archive.open("a", "w") as member:
        for _ in range(storage.MAX_BYTES // 2**20 + 1):
            member.write(bytes(2**20))
    (file,) = storage.list_images(str(tmp_path / "x.zip"))
    assert image_error(file.uri).code == "too_large"


def test_archives_are_read_by_many_threads(root: str) -> None:
    files = {f"{i:03}.jpg": random.Random(i).randbytes(20_000) for i in range(300)}
    for i in range(3):
        storage.publish_bytes(f"{root}/{i}.zip", make_zip(files, zipfile.ZIP_DEFLATED))
    uris = [file.uri for file in storage.list_images(f"{root}/*.zip")]
    random.Random(0).shuffle(uris)
    found: dict[str, bytes | ImageError] = {}

    def read(part: list[str]) -> None:
        found.update(zip(part, storage.read_sources(part), strict=True))

    threads = [threading.Thread(target=read, args=(uris[i::8],)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {uri: files[uri.removeprefix("zip://").partition("::")[0]] for uri in uris}


def test_few_archives_stay_open(tmp_path: Path) -> None:
    for i in range(12):
        (tmp_path / f"{i}.zip").write_bytes(make_zip({"a.jpg": b"%d" % i}))
    files = list(storage.list_images(f"{tmp_path}/*.zip"))
    assert [storage.read_source(file.uri) for file in files] == [b"%d" % i for i in sorted(range(12), key=str)]
    assert len(archives._archives) <= archives._MAX_OPEN


def test_kaggles_archive(shared_data: Path) -> None:
    files = list(storage.list_images(str(shared_data / "dogs-vs-cats" / "train-*.zip")))
    assert len(files) == 20_000
    assert sum("train/cat." in file.uri for file in files) == 10_000
    for file in files[::4000]:
        data = storage.read_source(file.uri, file.num_bytes)
        assert data[:3] == b"\xff\xd8\xff"
        assert file.version == f"{zlib.crc32(data):08x}-{len(data)}"


# Manifests


def write_manifest(url: str, uris: list[str | None], **columns: list[object]) -> None:
    storage.publish_parquet(url, pa.table({"uri": pa.array(uris, pa.string()), **columns}))


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


# Reading


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
    assert next(half) == b"0"
    half.close()  # type: ignore[attr-defined]


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


# Publishing


def test_publishing_replaces_and_leaves_nothing_behind(root: str) -> None:
    for data in (b"one", b"two"):
        storage.publish_bytes(f"{root}/deep/er/a.bin", data)
        assert storage.read_bytes(f"{root}/deep/er/a.bin") == data
    fs, path = fsspec.core.url_to_fs(root)
    fs.invalidate_cache()
    assert [name.rpartition("/")[2] for name in fs.find(path)] == ["a.bin"]


def test_readers_see_all_or_nothing(tmp_path: Path) -> None:
    url = str(tmp_path / "a.bin")
    versions = [bytes([i]) * 300_000 for i in range(20)]
    storage.publish_bytes(url, versions[0])
    seen = set()
    done = threading.Event()

    def read() -> None:
        while not done.is_set():
            seen.add(storage.read_bytes(url))

    reader = threading.Thread(target=read)
    reader.start()
    for version in versions:
        storage.publish_bytes(url, version)
    done.set()
    reader.join()
    assert seen <= set(versions)


def test_a_full_disk_is_a_storage_error_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import resource
    import signal

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))  # writes beyond fail, as on a full disk
    try:
        with pytest.raises(StorageError, match=r"out/a\.bin"):
            storage.publish_bytes(str(tmp_path / "out" / "a.bin"), bytes(5000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert list((tmp_path / "out").iterdir()) == []


def test_dev_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not os.path.exists("/dev/full"):
        pytest.skip("needs /dev/full")
    opened = open
    monkeypatch.setattr("builtins.open", lambda path, mode="r": opened("/dev/full" if "x" in mode else path, "r+b"))
    with pytest.raises(StorageError, match=r"No space left on device"):
        storage.publish_bytes(str(tmp_path / "a.bin"), bytes(5000))


def test_what_cannot_be_written_is_a_storage_error(tmp_path: Path, s3: S3Server) -> None:
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(StorageError, match=r"file/a.bin"):
        storage.publish_bytes(str(tmp_path / "file" / "a.bin"), b"x")
    with pytest.raises(StorageError, match=r"s3://no-such-bucket-here/a.bin.*bucket does not exist"):
        storage.publish_bytes("s3://no-such-bucket-here/a.bin", b"x")


def test_filesystems_without_atomic_writes_rename(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publishing, "_OBJECT_STORES", set())
    fs = fsspec.filesystem("memory")
    try:
        storage.publish_bytes("memory://renamed/x/a.bin", b"data")
        storage.publish_bytes("memory://renamed/x/a.bin", b"data2")
        assert fs.find("/renamed") == ["/renamed/x/a.bin"]
        assert storage.read_bytes("memory://renamed/x/a.bin") == b"data2"
    finally:
        fs.store.clear()


def test_delete(root: str) -> None:
    fill(root)
    storage.delete(f"{root}/a.jpg")
    assert not storage.exists(f"{root}/a.jpg")
    storage.delete(f"{root}/b")
    assert not storage.exists(f"{root}/b")
    assert names(root, root) == ["notes.txt"]
    storage.delete(f"{root}/missing")


def test_foreign_outputs_are_refused(root: str) -> None:
    markers = ("_runs", "part-*.parquet")
    storage.refuse_foreign_output(root, markers)
    storage.publish_bytes(f"{root}/.part-1.parquet.tmp", b"left behind")
    storage.refuse_foreign_output(root, markers)
    storage.publish_bytes(f"{root}/thesis.doc", b"x")
    with pytest.raises(OutputRefusedError, match=r"--output must be empty, .* Received: --output=.*holds thesis\.doc"):
        storage.refuse_foreign_output(root, markers)
    storage.publish_bytes(f"{root}/part-1.parquet", b"x")
    storage.refuse_foreign_output(root, markers)


def test_a_file_is_no_output(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x")
    with pytest.raises(OutputRefusedError, match=r"--output must be a directory"):
        storage.refuse_foreign_output(str(tmp_path / "a"), ("a",))


# Failing storages


@pytest.fixture
def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def test_an_unreachable_storage_is_a_failure_within_seconds(
    s3: S3Server, closed_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{closed_port}")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not-to-be-seen")
    started = time.monotonic()
    calls = [
        lambda: storage.list_images("s3://bucket/a"),
        lambda: storage.read_source("s3://bucket/a.jpg", 10),
        lambda: list(storage.read_sources(["s3://bucket/a.jpg"] * 100, [10] * 100)),
        lambda: storage.read_source("zip://a.jpg::s3://bucket/a.zip"),
        lambda: storage.publish_bytes("s3://bucket/a.bin", b"x"),
        lambda: storage.list_names("s3://bucket/a"),
    ]
    errors: list[StorageError] = []

    def run(call: object) -> None:
        with pytest.raises(StorageError) as caught:
            call()  # type: ignore[operator]
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


class FlakyS3(http.server.BaseHTTPRequestHandler):
    """Answers what `answers` says, one answer per request, then 200."""

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

    do_PUT = do_GET  # noqa: N815

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def flaky(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[FlakyS3]]:
    monkeypatch.setattr(filesystems, "_PATIENCE_S", 600.0)  # however busy this machine is
    handler = type("Handler", (FlakyS3,), {"answers": [], "num_requests": 0})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_address[1]}")
        yield handler
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("answer", [(503, "SlowDown"), (500, "InternalError"), (502, "?"), (429, "TooManyRequests")])
def test_what_passes_is_retried(flaky: type[FlakyS3], answer: tuple[int, str]) -> None:
    flaky.answers = [answer] * 3
    assert storage.read_source("s3://bucket/a.jpg", 11) == b"image bytes"
    assert flaky.num_requests == 4


def test_a_connection_cut_in_the_middle_is_retried(flaky: type[FlakyS3]) -> None:
    flaky.answers = [(200, "cut")]
    assert storage.read_source("s3://bucket/a.jpg", 11) == b"image bytes"
    assert flaky.num_requests == 2


def test_what_does_not_pass_is_not_retried(flaky: type[FlakyS3]) -> None:
    for answer, code in [
        ((404, "NoSuchKey"), "not_found"),
        ((403, "AccessDenied"), "permission_denied"),
        ((403, "InvalidObjectState"), "permission_denied"),
    ]:
        flaky.answers = [answer]
        with pytest.raises(ImageError) as caught:
            storage.read_source("s3://bucket/a.jpg", 11)
        assert caught.value.code == code
    for answer in [(403, "ExpiredToken"), (403, "InvalidAccessKeyId"), (404, "NoSuchBucket"), (400, "InvalidRequest")]:
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


def test_missing_buckets_and_objects(s3: S3Server) -> None:
    with pytest.raises((UsageError, StorageError), match=r"s3://no-such-bucket-here"):
        storage.list_images("s3://no-such-bucket-here/a")
    with pytest.raises((UsageError, StorageError), match=r"s3://no-such-bucket-here"):
        storage.list_images("s3://no-such-bucket-here")
    bucket = s3.new_bucket()
    with pytest.raises(UsageError, match=rf"--images must exist. Received: --images={bucket}/a"):
        storage.list_images(f"{bucket}/a")
    with pytest.raises(UsageError, match=r"--images must hold at least one file"):
        storage.list_images(bucket)
    assert image_error(f"{bucket}/a.jpg").code == "not_found"
    assert image_error("s3://Not_a_Bucket!/a.jpg").code == "not_found"


def test_no_credentials(s3: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    with pytest.raises(StorageError, match=r"s3://bucket/a.*Unable to locate credentials"):
        storage.list_images("s3://bucket/a")


def test_a_web_server(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"from the web")

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args: object) -> None:
            super().__init__(*args, directory=str(tmp_path))  # type: ignore[arg-type]

        def do_GET(self) -> None:
            if "denied" in self.path:
                self.send_error(403)
            else:
                super().do_GET()

        do_HEAD = do_GET  # noqa: N815

        def log_message(self, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        host = f"http://127.0.0.1:{server.server_address[1]}"
        try:
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


def test_unreadable_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(b"x")
    path.chmod(0)
    with contextlib.suppress(PermissionError):
        path.read_bytes()
        pytest.skip("this user may read everything")
    assert image_error(str(path)).code == "permission_denied"


def test_retries_end_when_patience_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filesystems, "_PATIENCE_S", 0.0)
    calls = []

    def fail() -> None:
        calls.append(1)
        raise TimeoutError("timed out")

    with pytest.raises(StorageError, match=r"s3://b/x: the storage failed: timed out"):
        filesystems.attempt("s3://b/x", fail)
    assert len(calls) == 1
