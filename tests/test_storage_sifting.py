"""`--include`, `--exclude`, and what is skipped because it is no image: globs, names and first bytes."""

from pathlib import Path
from typing import Any

import pytest
from storage_case import fill, make_zip, write_manifest

from catdog import storage
from catdog.errors import UsageError
from catdog.storage import filesystems, names, patterns
from catdog.storage.archives.interface import FilePlace
from catdog.storage.patterns import Chosen

pytest_plugins = ["s3_server", "storage_case"]

JPEG = b"\xff\xd8\xff\xe0 a photograph"
FILM = b"\0\0\0\x18ftypmp42"

CAMERA = {
    "100CANON/IMG_1.JPG": JPEG,
    "100CANON/IMG_1.xmp": b"<x:xmpmeta>",
    "100CANON/IMG_2.jpeg": b"damaged",
    "100CANON/IMG_3.THM": JPEG,
    "100CANON/MVI_4.MP4": FILM,
    "100CANON/notes.v2": b"text",
    "100CANON/renamed.txt": JPEG,
    "Thumbs.db": b"\xd0\xcf\x11\xe0",
    "desktop.ini": b"[.ShellClassInfo]",
    "empty.log": b"",
}
"""What a camera, Windows and their owner leave in a folder."""

IMAGES = ["100CANON/IMG_1.JPG", "100CANON/IMG_2.jpeg", "100CANON/IMG_3.THM", "100CANON/renamed.txt"]
"""Those of `CAMERA` that are images by their name or by their first bytes."""


def sifted(url: str, base: str, **how: Any) -> tuple[list[str], dict[str, int], int]:
    """Names of the files that are listed, what was skipped, and how many files were left out."""
    listing = storage.list_images(url, **how)
    found = [file.uri.replace(base.rstrip("/") + "/", "") for file in listing]
    return found, dict(listing.skipped), listing.num_left_out


def test_what_is_no_image_is_skipped_and_counted(root: str, caplog: pytest.LogCaptureFixture) -> None:
    fill(root, CAMERA)
    caplog.set_level("INFO")
    assert sifted(root, root, skip_others=True) == (IMAGES, {"not_an_image": 6}, 0)
    assert "6 skipped, for the reason not_an_image, the first " in caplog.text
    assert sifted(f"{root}/**", root, skip_others=True) == (IMAGES, {"not_an_image": 6}, 0)
    assert len(list(storage.list_images(root))) == len(CAMERA)


@pytest.mark.parametrize("compression", [0, 8])
def test_in_an_archive_too(root: str, compression: int) -> None:
    url = f"{root}/x.zip"
    storage.publish_bytes(url, make_zip(CAMERA, compression))
    found, skipped, _ = sifted(url, root, skip_others=True)
    assert (found, skipped) == ([f"zip://{name}::x.zip" for name in IMAGES], {"not_an_image": 6})
    assert sifted(root, root, skip_others=True)[0] == found


def test_what_is_named_outright_is_listed(root: str) -> None:
    fill(root, CAMERA)
    storage.publish_bytes(f"{root}/x.zip", make_zip(CAMERA))
    named = f"{root}/Thumbs.db"
    assert sifted(named, root, skip_others=True) == (["Thumbs.db"], {}, 0)
    assert sifted(f"zip://Thumbs.db::{root}/x.zip", root, skip_others=True)[0] == ["zip://Thumbs.db::x.zip"]
    write_manifest(f"{root}/m.parquet", ["Thumbs.db", "missing.txt"])
    assert sifted(f"{root}/m.parquet", root, skip_others=True)[0] == ["Thumbs.db", "missing.txt"]


def test_a_folder_without_images_is_not_empty(root: str) -> None:
    fill(root, {"Thumbs.db": b"x"})
    assert sifted(root, root, skip_others=True) == ([], {"not_an_image": 1}, 0)


def test_only_what_is_suspect_is_looked_into(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(root, {f"{number}.jpg": b"x" for number in range(20)} | {"a.mp4": FILM, "0a3f": JPEG, "b.bin": JPEG})
    asked: list[tuple[int, int]] = []
    fetch = FilePlace.fetch

    def counted(place: FilePlace, start: int, stop: int) -> bytes:
        asked.append((start, stop))
        return fetch(place, start, stop)

    monkeypatch.setattr(FilePlace, "fetch", counted)
    found, skipped, _ = sifted(root, root, skip_others=True)
    assert (len(found), skipped) == (22, {"not_an_image": 1})
    # A name without a suffix is looked into only where that costs no request.
    assert asked == [(0, names.HEAD_BYTES)] * (3 if root.startswith("/") else 2)


def test_a_file_that_cannot_be_looked_into_is_listed(tmp_path: Path) -> None:
    (tmp_path / "gone.txt").symlink_to("nowhere")
    (tmp_path / "a.jpg").write_bytes(JPEG)
    assert sifted(str(tmp_path), str(tmp_path), skip_others=True)[0] == ["a.jpg", "gone.txt"]


def test_the_order_is_kept_where_many_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    root = "memory://many"
    fill(root, {f"{number:04}.{'bin' if number % 3 else 'jpg'}": JPEG for number in range(400)})
    try:
        assert sifted(root, root, skip_others=True)[0] == sifted(root, root)[0]
    finally:
        filesystems.filesystem(root)[0].store.clear()


TREE = {"cats/1.JPG": b"1", "cats/1.png": b"2", "cats/small/2.jpg": b"3", "dogs/3.tiff": b"4", "readme.txt": b"5"}


@pytest.mark.parametrize(
    ("include", "exclude", "found"),
    [
        (["*.jpg"], [], ["cats/1.JPG", "cats/small/2.jpg"]),
        (["*.{jpg,png}"], [], ["cats/1.JPG", "cats/1.png", "cats/small/2.jpg"]),
        (["cats/*"], [], ["cats/1.JPG", "cats/1.png"]),
        (["cats/"], [], ["cats/1.JPG", "cats/1.png", "cats/small/2.jpg"]),
        (["**/*.jpg"], ["**/small/*"], ["cats/1.JPG"]),
        (["*.jpg", "*.tiff"], ["cats/small/"], ["cats/1.JPG", "dogs/3.tiff"]),
        ([], ["*.{jpg,png}", "?eadme.*"], ["dogs/3.tiff"]),
        (["{cats,dogs}/[13].*"], [], ["cats/1.JPG", "cats/1.png", "dogs/3.tiff"]),
    ],
)
def test_include_and_exclude(root: str, include: list[str], exclude: list[str], found: list[str]) -> None:
    chosen = Chosen(include=include, exclude=exclude)
    fill(f"{root}/photos", TREE)
    assert sifted(f"{root}/photos", f"{root}/photos", chosen=chosen) == (found, {}, len(TREE) - len(found))
    storage.publish_bytes(f"{root}/x.zip", make_zip(TREE))
    in_archive, _, _ = sifted(f"{root}/x.zip", root, chosen=chosen)
    assert in_archive == [f"zip://{name}::x.zip" for name in found]


def test_patterns_see_an_archive_as_a_folder(root: str) -> None:
    for name in ("train.zip", "sub/test1.zip"):
        storage.publish_bytes(f"{root}/{name}", make_zip({"a.jpg": b"1", "d/b.jpg": b"2"}))

    def found(*include: str, exclude: tuple[str, ...] = ()) -> list[str]:
        return sorted(sifted(root, root, chosen=Chosen(include=include, exclude=exclude))[0])

    assert found("train.zip/**") == ["zip://a.jpg::train.zip", "zip://d/b.jpg::train.zip"]
    assert found("**/d/*") == ["zip://d/b.jpg::sub/test1.zip", "zip://d/b.jpg::train.zip"]
    assert found(exclude=("test1.zip", "d/", "**/d/")) == ["zip://a.jpg::train.zip"]
    listing = storage.list_images(f"zip://d::{root}/train.zip", chosen=Chosen(include=("b.jpg", "/b.jpg")))
    assert [file.uri for file in listing] == [f"zip://d/b.jpg::{root}/train.zip"]


def test_a_manifest_is_filtered_by_its_rows(root: str) -> None:
    fill(root, TREE)
    write_manifest(f"{root}/m.parquet", list(TREE))
    chosen = Chosen(include=("cats/*.jpg", "missing"))
    assert sifted(f"{root}/m.parquet", root, chosen=chosen)[0] == ["cats/1.JPG"]


def test_braces_and_case_in_the_glob_of_images(root: str) -> None:
    fill(root, TREE)

    def found(glob: str) -> list[str]:
        return sifted(f"{root}/{glob}", root)[0]

    assert found("**/*.{jpg,png}") == ["cats/1.JPG", "cats/1.png", "cats/small/2.jpg"]
    assert found("{cats,dogs}/*") == ["cats/1.JPG", "cats/1.png", "dogs/3.tiff"]
    assert found("{cats/small,dogs}/*.*") == ["cats/small/2.jpg", "dogs/3.tiff"]
    assert found("cats/1.{jpg,gif}") == ["cats/1.JPG"]
    storage.publish_bytes(f"{root}/{{a,b}}/1.jpg", b"x")
    assert found("{a,b}") == ["{a,b}/1.jpg"]


@pytest.mark.parametrize(
    ("pattern", "text", "matches"),
    [
        ("*.jpg", "a.JPG", True),
        ("IMG_*.jpg", "img_1.jpg", False),
        ("*.tar.gz", "x.tar.GZ", True),
        ("*.j[pP]g", "a.JPG", False),
        ("a.{b,c}.{jpg,png}", "a.c.png", True),
        ("{a,{b,c}}.jpg", "c.jpg", True),
        ("{a}.jpg", "{a}.jpg", True),
        ("scan.2024", "scan.2024", True),
    ],
)
def test_what_a_glob_matches(pattern: str, text: str, matches: bool) -> None:
    assert bool(patterns.matcher(pattern)(text)) == matches


def test_bad_globs_are_usage_errors() -> None:
    with pytest.raises(UsageError, match=r"A glob must be one that fsspec takes: .*Received: a/\*\*b/c"):
        Chosen(include=("a/**b/c",)).takes("x")
    with pytest.raises(UsageError, match=r"The braces of a glob must stand for at most 1000 globs\. Received: \{"):
        patterns.alternatives("{1,2,3,4,5,6,7,8,9,0}" * 4)


def test_allow_empty(root: str) -> None:
    fill(root, {"photos/.hidden": b"x", "photos/a.txt": b"x"})
    for place in ("photos/*.jpg", "gone/*.jpg", *([] if root.startswith("/") else ["gone", "gone/"])):
        with pytest.raises(UsageError, match=r"--images must "):
            storage.list_images(f"{root}/{place}")
        assert list(storage.list_images(f"{root}/{place}", allow_empty=True)) == []
    if root.startswith("/"):
        with pytest.raises(UsageError, match="--images must exist"):
            storage.list_images(f"{root}/gone", allow_empty=True)


@pytest.mark.parametrize(
    ("uri", "suffix", "scheme"),
    [
        ("/x/IMG.JPG", "jpg", None),
        ("/x/.jpg", "", None),
        ("/x.d/name", "", None),
        ("zip://a.png::/x.zip", "png", None),
        ("zip://in/train.ZIP::/x.zip", "zip", "zip"),
        ("s3://b/shard-000.tar.zst", "zst", "tar"),
        ("/x/a.tgz", "tgz", "tar"),
        ("/x/a.gz", "gz", None),
        ("/x/.zip", "", None),
    ],
)
def test_names(uri: str, suffix: str, scheme: str | None) -> None:
    assert (names.suffix_of(uri), names.archive_scheme(uri)) == (suffix, scheme)
