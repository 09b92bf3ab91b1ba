"""`catdog.storage.archives`: tar archives, compressed or not, archives in archives, and those that cannot be read."""

import bz2
import gzip
import io
import lzma
import random
import tarfile
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import IO

import fsspec
import pyarrow as pa
import pytest
from s3_server import S3Server
from storage_case import fill, image_error, make_zip, write_manifest

from catdog import storage
from catdog.errors import ImageError, UsageError
from catdog.storage import archives, filesystems
from catdog.storage.archives import interface, tars, webdataset
from catdog.storage.archives.interface import FilePlace

pytest_plugins = ["s3_server", "storage_case"]

JPEG = b"\xff\xd8\xff\xe0"


def make_tar(files: dict[str, bytes], kind: int = tarfile.GNU_FORMAT) -> bytes:
    """The bytes of a tar archive."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=kind) as archive:
        for number, (name, data) in enumerate(files.items()):
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(data), 1_700_000_000 + number
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def zstandard(data: bytes) -> bytes:
    """The data as two frames of zstd, as parallel compressors write it."""
    half, codec = len(data) // 2, pa.Codec("zstd")
    return b"".join(codec.compress(part, asbytes=True) for part in (data[:half], data[half:]))


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "tar": bytes,
    "tar.gz": gzip.compress,
    "tgz": gzip.compress,
    "tar.zst": zstandard,
    "tar.bz2": bz2.compress,
    "tar.xz": lzma.compress,
}

PHOTOS = {f"b/{number:02}.jpg": JPEG + random.Random(number).randbytes(3000 * number) for number in range(20, 0, -1)}
"""Their order in an archive is not that of their names."""


@pytest.mark.parametrize("suffix", PACKERS)
def test_tars_are_read_in_place(root: str, suffix: str) -> None:
    url = f"{root}/photos.{suffix}"
    storage.publish_bytes(url, PACKERS[suffix](make_tar({**PHOTOS, ".hidden.jpg": b"x", "notes.txt": b"text"})))
    files = list(storage.list_images(url, skip_others=True))
    assert [file.uri for file in files] == [f"tar://{name}::{url}" for name in PHOTOS]
    assert [file.num_bytes for file in files] == [len(data) for data in PHOTOS.values()]
    assert sorted(file.version for file in files) == [file.version for file in files]
    uris, sizes, versions = zip(*((file.uri, file.num_bytes, file.version) for file in files), strict=True)
    assert list(storage.read_sources(uris, sizes, versions)) == list(PHOTOS.values())
    assert storage.read_source(uris[3]) == PHOTOS["b/17.jpg"]
    assert list(storage.list_images(uris[3])) == [files[3]]
    assert list(storage.list_images(f"tar://b::{url}")) == files
    assert list(storage.list_images(f"{root}/*.{suffix}", skip_others=True)) == files
    assert list(storage.list_images(root, skip_others=True)) == files
    assert image_error(f"tar://missing.jpg::{url}").code == "not_found"
    write_manifest(f"{root}/m.parquet", [uris[5], uris[0]])
    assert list(storage.list_images(f"{root}/m.parquet")) == [files[5], files[0]]
    if suffix in ("tar", "tar.gz", "tar.bz2", "tar.xz"):  # fsspec finds no other compression by itself
        with fsspec.open(uris[0]) as opened:
            assert opened.read() == PHOTOS["b/20.jpg"]


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_and_odd_names_in_each_kind_of_tar(tmp_path: Path, kind: int) -> None:
    files = {"/".join(["folder"] * 20) + "/cat.jpg": b"1", "café ::.jpg": b"22", "./dog.jpg": b"333", "cat.jpg": b""}
    (tmp_path / "x.tar").write_bytes(make_tar(files, kind))
    listed = list(storage.list_images(str(tmp_path / "x.tar")))
    assert [file.uri for file in listed] == [f"tar://{name}::{tmp_path}/x.tar" for name in files]
    for file, data in zip(listed[:3], files.values(), strict=False):
        assert storage.read_source(file.uri, file.num_bytes, file.version) == data
        assert storage.read_source(file.uri) == data
    assert image_error(listed[3].uri).code == "empty_file"


def test_links_in_a_tar_are_skipped_and_counted(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, kind in [("d", tarfile.DIRTYPE), ("a.jpg", tarfile.REGTYPE), ("b.jpg", tarfile.SYMTYPE)]:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "a.jpg" if kind == tarfile.SYMTYPE else ""
            archive.addfile(info)
    (tmp_path / "x.tar").write_bytes(buffer.getvalue())
    listing = storage.list_images(str(tmp_path / "x.tar"))
    assert [file.uri for file in listing] == [f"tar://a.jpg::{tmp_path}/x.tar"]
    assert listing.skipped == {"not_a_file": 1}


def test_a_plain_tar_is_read_in_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    url = "memory://tars/x.tar"
    storage.publish_bytes(url, make_tar(PHOTOS))
    files = list(storage.list_images(url))
    archives.forget(url)
    fetched: list[int] = []
    opened: list[str] = []
    fetch = FilePlace.fetch

    def counted(place: FilePlace, start: int, stop: int) -> bytes:
        fetched.append(stop - start)
        return fetch(place, start, stop)

    monkeypatch.setattr(FilePlace, "fetch", counted)
    monkeypatch.setattr(FilePlace, "open", lambda place: opened.append("opened"))
    for file in files[::5]:
        storage.read_source(file.uri, file.num_bytes, file.version)
    # The first one finds out whether it is compressed. A version says where a member lies, so nobody looks for it.
    assert fetched == [512, *(512 + file.num_bytes for file in files[::5])]
    assert opened == []


@pytest.mark.parametrize("suffix", ["tar.gz", "tar.zst"])
def test_a_compressed_tar_is_passed_through_once(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / f"x.{suffix}"
    path.write_bytes(PACKERS[suffix](make_tar(PHOTOS)))
    files = list(storage.list_images(str(path)))
    passes: list[int] = []
    unpacked = tars.CompressedTarReader.unpacked

    def counted(reader: tars.CompressedTarReader, file: IO[bytes]) -> IO[bytes]:
        passes.append(1)
        return unpacked(reader, file)

    monkeypatch.setattr(tars.CompressedTarReader, "unpacked", counted)
    found: dict[str, bytes | ImageError] = {}

    def read(part: list[storage.SourceFile]) -> None:
        uris, sizes, versions = ([getattr(file, name) for file in part] for name in ("uri", "num_bytes", "version"))
        found.update(zip(uris, storage.read_sources(uris, sizes, versions), strict=True))

    stretches = [files[start : start + 3] for start in range(0, len(files), 3)]
    threads = [threading.Thread(target=read, args=(stretch,)) for stretch in reversed(stretches)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[file.uri] for file in files] == list(PHOTOS.values())
    assert len(passes) == 1
    read(files[:1])  # what has been read is passed for good
    assert len(passes) == 2


def test_what_is_passed_is_kept_within_bounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tars, "_PASSED_BYTES", 100_000)
    path = tmp_path / "x.tgz"
    path.write_bytes(gzip.compress(make_tar(PHOTOS)))
    files = list(storage.list_images(str(path)))
    for file in [files[-1], *files]:
        assert storage.read_source(file.uri, file.num_bytes, file.version) == PHOTOS[file.uri[6:14]]
    ((reader),) = [reader for key, reader in archives._archives.items() if key[0] == str(path)]
    assert isinstance(reader, tars.CompressedTarReader)
    assert reader._passed_bytes <= 100_000
    assert len(reader._passes) <= 2


def test_a_tar_that_is_replaced(root: str) -> None:
    url = f"{root}/x.tar"
    storage.publish_bytes(url, make_tar({"a.jpg": b"first", "b.jpg": b"second"}))
    before = list(storage.list_images(url))
    storage.publish_bytes(url, make_tar({"new.jpg": b"x" * 5000, "a.jpg": b"first", "b.jpg": b"other"}))
    after = list(storage.list_images(url))
    assert {file.version for file in before}.isdisjoint(file.version for file in after)
    with pytest.raises(ImageError, match="not where it was listed"):
        storage.read_source(before[1].uri, before[1].num_bytes, before[1].version)
    assert storage.read_source(after[2].uri, after[2].num_bytes, after[2].version) == b"other"


KAGGLE = {f"train/cat.{number}.jpg": JPEG + b"%d" % number for number in range(3)}
TEST = {f"test1/{number}.jpg": JPEG + b"test" for number in range(2)}


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_zip_of_zips(root: str, compression: int) -> None:
    url = f"{root}/dogs-vs-cats.zip"
    inner = {"train.zip": make_zip(KAGGLE), "test1.zip": make_zip(TEST), "sampleSubmission.csv": b"id,label"}
    storage.publish_bytes(url, make_zip(inner, compression))
    listing = storage.list_images(url, skip_others=True)
    files = list(listing)
    expected = [f"zip://{name}::zip://train.zip::{url}" for name in KAGGLE]
    expected += [f"zip://{name}::zip://test1.zip::{url}" for name in TEST]
    assert [file.uri for file in files] == expected
    assert listing.skipped == {"not_an_image": 1}
    uris, sizes, versions = zip(*((file.uri, file.num_bytes, file.version) for file in files), strict=True)
    assert list(storage.read_sources(uris, sizes, versions)) == [*KAGGLE.values(), *TEST.values()]
    assert list(storage.list_images(f"zip://train.zip::{url}")) == files[:3]
    assert list(storage.list_images(uris[1])) == [files[1]]
    assert storage.absolute(uris[0]) == uris[0]
    assert list(storage.list_images(root, skip_others=True)) == files
    write_manifest(f"{root}/m.parquet", [uris[4]])
    assert list(storage.list_images(f"{root}/m.parquet")) == [files[4]]
    with fsspec.open(uris[0]) as opened:
        assert opened.read() == KAGGLE["train/cat.0.jpg"]


@pytest.mark.parametrize("outer", ["zip", "tar", "tgz"])
@pytest.mark.parametrize("inner", ["zip", "tar", "tar.gz"])
def test_archives_in_archives(root: str, outer: str, inner: str) -> None:
    def pack(suffix: str, files: dict[str, bytes]) -> bytes:
        return make_zip(files) if suffix == "zip" else PACKERS[suffix](make_tar(files))

    storage.publish_bytes(f"{root}/x.{outer}", pack(outer, {"sub/in." + inner: pack(inner, KAGGLE), "b.jpg": b"b"}))
    files = list(storage.list_images(f"{root}/x.{outer}"))
    assert len(files) == 4
    read = [storage.read_source(file.uri, file.num_bytes, file.version) for file in files]
    assert read == [*KAGGLE.values(), b"b"]


def test_an_archive_that_holds_itself_ends(tmp_path: Path) -> None:
    data = make_zip({"a.jpg": b"a"})
    for _ in range(5):
        data = make_zip({"a.jpg": b"a", "again.zip": data})
    (tmp_path / "x.zip").write_bytes(data)
    files = list(storage.list_images(str(tmp_path / "x.zip")))
    assert len(files) == archives.MAX_DEPTH + 1
    assert "at most 3 archives may lie in each other" in str(image_error(files[-1].uri))


def test_a_large_compressed_archive_in_an_archive_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interface, "MAX_INNER_BYTES", 100)
    for compression, is_listed in ((zipfile.ZIP_STORED, True), (zipfile.ZIP_DEFLATED, False)):
        path = tmp_path / f"{compression}.zip"
        path.write_bytes(make_zip({"train.zip": make_zip(KAGGLE), "a.jpg": b"a"}, compression))
        files = list(storage.list_images(str(path)))
        assert len(files) == (4 if is_listed else 2)
    error = image_error(f"zip://train.zip::{path}")
    assert error.code == "decode_failed"
    assert "a compressed archive in an archive must have at most 100 bytes, and this one has " in str(error)
    with pytest.raises(UsageError, match=r"A \.zip must be a readable archive: a compressed archive in an archive"):
        storage.list_images(f"zip://train.zip::{path}")


def test_a_directory_with_archives_keeps_its_files(root: str) -> None:
    fill(root, {"a.jpg": b"a", "sub/b.jpg": b"b"})
    storage.publish_bytes(f"{root}/sub/train.zip", make_zip({"c.jpg": b"c"}))
    storage.publish_bytes(f"{root}/z.tar", make_tar({"d.jpg": b"d"}))
    assert [file.uri.replace(root, "") for file in storage.list_images(root)] == [
        "/a.jpg",
        "/sub/b.jpg",
        "zip://c.jpg::/sub/train.zip",
        "tar://d.jpg::/z.tar",
    ]


def encrypted(files: dict[str, bytes]) -> bytes:
    """An archive whose members say that they are encrypted."""
    data = bytearray(make_zip(files))
    for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        at = -1
        while (at := data.find(signature, at + 1)) >= 0:
            data[at + offset] |= 1
    return bytes(data)


BROKEN: dict[str, tuple[bytes, str]] = {
    "no.zip": (b"no archive at all", "decode_failed"),
    "cut.zip": (make_zip(PHOTOS)[:-400], "decode_failed"),
    "secret.zip": (encrypted(KAGGLE), "permission_denied"),
    "empty.tar": (b"", "decode_failed"),
    "no.tar": (b"no archive at all" * 100, "decode_failed"),
    "no.tar.gz": (b"\x1f\x8bno archive at all", "decode_failed"),
    "no.tar.zst": (b"\x28\xb5\x2f\xfdno archive at all", "decode_failed"),
    "none.tgz": (gzip.compress(b"no archive"), "decode_failed"),
}
CUT: dict[str, bytes] = {
    "cut.tar": make_tar(PHOTOS)[:200_000],
    "even.tar": make_tar({"a.jpg": bytes(512), "b.jpg": bytes(512)})[: 4 * 512],
    "cut.tar.gz": gzip.compress(make_tar(PHOTOS))[:550_000],
    "cut.tar.zst": zstandard(make_tar(PHOTOS))[:550_000],
    "sum.tgz": gzip.compress(make_tar(PHOTOS))[:-8] + bytes(8),
    "header.tar": make_tar({"a.jpg": bytes(512), "b.jpg": b"b"})[:1100] + b"??????" + bytes(5000),
}


@pytest.mark.parametrize("name", [*BROKEN, *CUT])
def test_an_archive_that_is_named_must_be_readable(root: str, name: str) -> None:
    url = f"{root}/{name}"
    storage.publish_bytes(url, BROKEN[name][0] if name in BROKEN else CUT[name])
    with pytest.raises(UsageError, match=rf"A \.\w+ must be a readable archive: .*Received: .*{name}"):
        list(storage.list_images(url))


@pytest.mark.parametrize("name", [*BROKEN, *CUT])
def test_one_of_many_that_cannot_be_read_is_one_error(root: str, name: str) -> None:
    fill(root, {"a.jpg": b"a", "z/b.jpg": b"b"})
    storage.publish_bytes(f"{root}/m/{name}", BROKEN[name][0] if name in BROKEN else CUT[name])
    files = [file.uri.replace(f"{root}/", "") for file in storage.list_images(root, skip_others=True)]
    assert [files[0], *files[-2:]] == ["a.jpg", f"m/{name}", "z/b.jpg"]
    assert (len(files) > 3) == (name in CUT)  # those that could be read before the damage
    error = image_error(f"{root}/m/{name}")
    assert error.code == (BROKEN[name][1] if name in BROKEN else "decode_failed")
    assert name in str(error) or error.code == "permission_denied"


def test_an_archive_that_a_manifest_names_is_no_image(root: str) -> None:
    storage.publish_bytes(f"{root}/x.zip", make_zip(KAGGLE))
    write_manifest(f"{root}/m.parquet", ["x.zip"])
    (file,) = storage.list_images(f"{root}/m.parquet")
    error = image_error(file.uri)
    assert (error.code, str(error)) == ("unsupported_format", "an archive is no image")


def test_labels_of_a_webdataset(root: str) -> None:
    url = f"{root}/shard-000.tar"
    files = {
        "0/17.jpg": JPEG,
        "0/17.cls": b"1\n",
        "0/17.txt": b"a dog on a lawn",
        "0/18.cls": b"0",
        "0/18.seg.png": b"mask",
        "0/18.jpg": JPEG,
        "0/19.json": b'{"width": 3, "label": "Cats"}',
        "0/19.webp": JPEG,
        "0/20.jpg": JPEG,
        "1/17.jpg": JPEG,
        "1/17.json": b"not JSON",
        "1/17.txt": b"dog",
    }
    storage.publish_bytes(url, make_tar(files))
    found = [(file.uri.partition("::")[0].removeprefix("tar://"), label) for file, label in webdataset.labels(url)]
    assert found == [
        ("0/17.jpg", "1"),
        ("0/18.seg.png", "0"),
        ("0/18.jpg", "0"),
        ("0/19.webp", "Cats"),
        ("1/17.jpg", "dog"),
    ]
    assert {file for file, _ in webdataset.labels(url)} <= set(storage.list_images(url))


@pytest.mark.slow
def test_a_remote_archive_is_streamed(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filesystems, "_BLOCK_BYTES", 2**14)
    bucket = s3.new_bucket()
    for suffix in ("tar", "tar.gz", "tar.zst"):
        storage.publish_bytes(f"{bucket}/x.{suffix}", PACKERS[suffix](make_tar(PHOTOS)))
    storage.publish_bytes(f"{bucket}/k.zip", make_zip({"train.zip": make_zip(PHOTOS)}))
    files = list(storage.list_images(bucket))
    assert len(files) == 4 * len(PHOTOS)
    uris, sizes, versions = zip(*((file.uri, file.num_bytes, file.version) for file in files), strict=True)
    assert list(storage.read_sources(uris, sizes, versions)) == list(PHOTOS.values()) * 4
