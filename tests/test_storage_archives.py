"""`catdog.storage.archives`: zip archives, read in place on each kind of storage."""

import gc
import io
import random
import struct
import threading
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from s3_server import S3Server
from storage_case import FILES, VISIBLE, image_error, make_zip

from catdog import storage
from catdog.errors import ImageError, UsageError
from catdog.storage import archives, filesystems

pytest_plugins = ["s3_server", "storage_case"]


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
    assert list(storage.list_images(root)) == list(storage.list_images(f"{root}/train-*"))


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


@pytest.mark.slow
def test_an_archive_replaced_while_it_is_read_is_opened_again(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filesystems, "_BLOCK_BYTES", 2**14)
    url = f"{s3.new_bucket()}/train.zip"
    noise = random.Random(0).randbytes(2**16)
    storage.publish_bytes(url, make_zip({"a.jpg": b"first", "noise": noise, "z.jpg": b"last"}))
    uris = [file.uri for file in storage.list_images(url)]
    storage.publish_bytes(url, make_zip({"a.jpg": b"second", "noise": noise[::-1], "z.jpg": b"other"}))
    assert storage.read_source(uris[0]) == b"second"
    storage.publish_bytes(url, make_zip({"z.jpg": b"short"}))
    assert storage.read_source(uris[2]) == b"short"
    storage.publish_bytes(url, make_zip({"a.jpg": b"second", "noise": noise[::-1], "z.jpg": b"other"}))
    assert storage.read_source(uris[1]) == noise[::-1]
    assert storage.read_source(uris[2]) == b"other"


def test_a_member_of_a_replaced_archive_is_found(ranges: "Ranges") -> None:
    url = "memory://z/x.zip"
    storage.publish_bytes(url, make_zip({"a.jpg": b"first"}))
    assert storage.read_source(f"zip://a.jpg::{url}") == b"first"
    storage.publish_bytes(url, make_zip({"long/b.jpg": b"second", "a.jpg": b"third"}))
    assert storage.read_source(f"zip://long/b.jpg::{url}") == b"second"
    assert storage.read_source(f"zip://a.jpg::{url}") == b"third"


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


def test_a_damaged_member_does_not_keep_its_archive_open(tmp_path: Path) -> None:
    path = tmp_path / "x.zip"
    archive = bytearray(make_zip({"bad.jpg": bytes(range(200)) * 50}, zipfile.ZIP_DEFLATED))
    at = archive.index(b"bad.jpg") + 20
    archive[at : at + 8] = b"\xff" * 8
    path.write_bytes(archive)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert image_error(f"zip://bad.jpg::{path}").code == "decode_failed"
        archives.forget(str(path))
        gc.collect()
    assert [str(warning.message) for warning in caught] == []


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


def test_members_whose_names_begin_with_a_dot_and_a_slash(root: str) -> None:
    files = {
        "./photos/cat.1.jpg": b"1",
        "photos/cat.2.jpg": b"2",
        "./photos/./../photos/cat.3.jpg": b"3",
        "../cat.4.jpg": b"4",
        "./.hidden/cat.5.jpg": b"5",
        "./photos/.cat.6.jpg": b"6",
    }
    url = f"{root}/x.zip"
    storage.publish_bytes(url, make_zip(files))
    listed = list(storage.list_images(url))
    assert [file.uri for file in listed] == [f"zip://{name}::{url}" for name in list(files)[:4]]
    assert list(storage.read_sources([file.uri for file in listed])) == [b"1", b"2", b"3", b"4"]
    assert list(storage.list_images(f"zip://photos::{url}")) == listed[:3]
    assert list(storage.list_images(f"zip://./photos/::{url}")) == listed[:3]
    assert list(storage.list_images(f"zip://photos/cat.1.jpg::{url}")) == listed[:1]


def twice(*members: tuple[str, bytes]) -> bytes:
    """An archive that names members more than once."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, data in members:
            archive.writestr(name, data)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "members",
    [
        [("a.jpg", b"first"), ("a.jpg", b"last!")],
        [("x/a.jpg", b"1"), ("x/b.jpg", b"2"), ("x/a.jpg", b"33"), ("x/a.jpg", b"")],
        [("./a.jpg", b"1"), ("a.jpg", b"2"), ("./a.jpg", b"3")],
    ],
)
def test_every_member_of_a_name_is_listed_and_read(root: str, members: list[tuple[str, bytes]]) -> None:
    url = f"{root}/x.zip"
    storage.publish_bytes(url, twice(*members))
    files = list(storage.list_images(url))
    assert [(file.uri, file.version) for file in files] == [
        (f"zip://{name}::{url}", f"{zlib.crc32(data):08x}-{len(data)}") for name, data in members
    ]
    uris, sizes, versions = zip(*((file.uri, file.num_bytes, file.version) for file in files), strict=True)
    read = list(storage.read_sources(uris, sizes, versions))
    assert [data if isinstance(data, bytes) else b"" for data in read] == [data for _, data in members]
    last = dict(members)
    for name, data in members:
        if last[name]:
            assert storage.read_source(f"zip://{name}::{url}") == last[name]
            assert storage.read_source(f"zip://{name}::{url}", None, "no such version") == last[name]
        if data:
            assert storage.read_source(f"zip://{name}::{url}", version=f"{zlib.crc32(data):08x}-{len(data)}") == data


class Ranges:
    """Counts what is fetched from the archives in `memory://`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.num_bytes: list[int] = []
        self.barrier: threading.Barrier | None = None
        kind = type(fsspec.filesystem("memory"))
        cat_file = kind.cat_file

        def counted(fs: object, path: str, start: int | None = None, end: int | None = None) -> bytes:
            data: bytes = cat_file(fs, path, start, end)
            if start is not None:
                self.num_bytes.append(len(data))
                if self.barrier is not None:
                    self.barrier.wait(30)
            return data

        monkeypatch.setattr(kind, "cat_file", counted)


@pytest.fixture
def ranges(monkeypatch: pytest.MonkeyPatch) -> Iterator[Ranges]:
    archives.forget("memory://z/x.zip")  # another test may have read one of this name
    yield Ranges(monkeypatch)
    fsspec.filesystem("memory").store.clear()


def test_a_remote_archive_is_fetched_once_whatever_the_order(ranges: Ranges) -> None:
    files = {f"{i:03}.jpg": random.Random(i).randbytes(3000) for i in range(200)}
    names = list(files)
    random.Random(0).shuffle(names)
    archive = make_zip({name: files[name] for name in names}, zipfile.ZIP_DEFLATED)
    storage.publish_bytes("memory://z/x.zip", archive)
    uris = [file.uri for file in storage.list_images("memory://z/x.zip")]
    assert uris == [f"zip://{name}::memory://z/x.zip" for name in names]  # as they lie there
    assert list(storage.read_sources(sorted(uris))) == list(files.values())
    assert len(ranges.num_bytes) == 200
    assert sum(ranges.num_bytes) < 1.2 * len(archive)


def test_threads_do_not_wait_for_each_other_while_they_fetch(ranges: Ranges) -> None:
    storage.publish_bytes("memory://z/x.zip", make_zip({f"{i}.jpg": b"%d" % i for i in range(8)}))
    uris = [file.uri for file in storage.list_images("memory://z/x.zip")]
    ranges.barrier = threading.Barrier(8)  # each request ends only when eight are under way
    assert list(storage.read_sources(uris)) == [b"%d" % i for i in range(8)]


def test_a_member_with_a_long_header(ranges: Ranges) -> None:
    info = zipfile.ZipInfo("a.jpg")
    info.extra = struct.pack("<HH", 0xCAFE, 5000) + bytes(5000)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(info, b"data" * 100)
        archive.infolist()[0].extra = b""  # in the directory
    storage.publish_bytes("memory://z/x.zip", buffer.getvalue())
    assert storage.read_source("zip://a.jpg::memory://z/x.zip") == b"data" * 100
    assert len(ranges.num_bytes) == 2


@pytest.mark.parametrize("what", ["header", "data", "end"])
def test_a_damaged_remote_member_is_one_bad_image(ranges: Ranges, what: str) -> None:
    archive = bytearray(make_zip({"good.jpg": b"good", "bad.jpg": bytes(range(250)) * 9}, zipfile.ZIP_STORED))
    at = {"header": archive.rindex(b"PK\x03\x04"), "data": archive.index(b"bad.jpg") + 99, "end": 0}[what]
    archive[at : at + (4 if at else 0)] = b"\xff" * (4 if at else 0)
    if not at:  # the directory says that the member is longer than the archive
        directory = archive.rindex(b"PK\x01\x02")
        archive[directory + 20 : directory + 24] = struct.pack("<I", 10**6)
    storage.publish_bytes("memory://z/x.zip", bytes(archive))
    assert storage.read_source("zip://good.jpg::memory://z/x.zip") == b"good"
    error = image_error("zip://bad.jpg::memory://z/x.zip")
    assert error.code == ("truncated" if what == "end" else "decode_failed")


def test_kaggles_archive(shared_data: Path) -> None:
    files = list(storage.list_images(str(shared_data / "dogs-vs-cats" / "train-*.zip")))
    assert len(files) == 20_000
    assert sum("train/cat." in file.uri for file in files) == 10_000
    for file in files[::4000]:
        data = storage.read_source(file.uri, file.num_bytes)
        assert data[:3] == b"\xff\xd8\xff"
        assert file.version == f"{zlib.crc32(data):08x}-{len(data)}"
