"""`catdog.storage.listing`: directories, globs and manifests, on each kind of storage."""

import json
import os
import re
import time
import urllib.parse
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
from catdog.storage import listing
from catdog.storage import s3 as storage_s3

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


def test_all_names_of_a_large_directory(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages of ten: of S3, several requests at once, of which some have no object, but folders alone."""
    monkeypatch.setattr(storage_s3, "_PAGE_OBJECTS", 10)
    folders = [f"_f{number:02}" for number in range(25)] + ["part-7 & é%2F", "zz"]
    files = {name: name.encode() for name in (".claim-1.json", ".claim-2.json", *(f"part-{n:03}" for n in range(99)))}
    fill(root, files | {f"{folder}/below": b"" for folder in folders})
    assert listing.list_all_names(root) == sorted([*files, *folders])
    assert listing.list_all_names(root, ".claim-") == [".claim-1.json", ".claim-2.json"]
    assert listing.list_all_names(root, "_f1") == folders[10:20]
    found = storage.list_files(root)
    assert found.keys() == {*files, *folders} - {".claim-1.json", ".claim-2.json"}
    assert {name for name, file in found.items() if not file.version} >= {*folders}
    assert {name: file.num_bytes for name, file in found.items() if name in files} == {
        name: 8 for name in found if name in files
    }
    assert all(file.uri == storage.join(storage.absolute(root), name) for name, file in found.items())
    again = storage.list_files(root)
    assert again == found
    storage.publish_bytes(f"{root}/part-050", b"replaced")
    assert {name for name, file in storage.list_files(root).items() if file != found[name]} == {"part-050"}


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
        f"file://{images}/caf%E9.jpg",
        "linked/b.jpg",
        "sub/a.jpg",
    ]
    assert "1 skipped, for the reason loop, the first " in caplog.text
    assert f"1 skipped, for the reason not_a_file, the first {images}/pipe.jpg" in caplog.text
    pa.array([file.uri for file in files])  # all are UTF-8
    assert files[0].version == ""
    assert image_error(files[0].uri).code == "not_found"
    assert storage.read_source(files[1].uri) == b"c"
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
    with pytest.raises(UsageError, match=r"A table must be what its name says: .*text\.parquet"):
        storage.list_images(f"{root}/text.parquet")
    storage.publish_parquet(f"{root}/id.parquet", pa.table({"key": ["a"], "label": ["cat"]}))
    with pytest.raises(UsageError, match=r"must have a column named uri, .* Received: .* with the columns key, label"):
        storage.list_images(f"{root}/id.parquet")


@pytest.fixture
def bucket(s3: S3Server) -> str:
    return s3.new_bucket()


def put(bucket: str, keys: dict[str, bytes]) -> None:
    """Write objects whose keys are taken as they are."""
    fs = fsspec.filesystem("s3", skip_instance_cache=True)
    for key, data in keys.items():
        fs.call_s3("put_object", Bucket=bucket.removeprefix("s3://"), Key=key, Body=data)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pets", "2026/pets.jpg", "pets.v1"])
def test_an_object_that_is_named_like_the_prefix(bucket: str, name: str) -> None:
    put(bucket, {name: b"object", f"{name}/0.jpg": b"0", f"{name}/x/1.jpg": b"1", f"{name}x/2.jpg": b"2"})
    below = [f"{name}/0.jpg", f"{name}/x/1.jpg"]
    assert names(f"{bucket}/{name}/", bucket) == below
    assert names(f"{bucket}/{name}", bucket) == [name, *below]
    assert storage.absolute(f"{bucket}/{name}/", keep_slash=True) == f"{bucket}/{name}/"
    uris = [file.uri for file in storage.list_images(f"{bucket}/{name}")]
    assert list(storage.read_sources(uris)) == [b"object", b"0", b"1"]


@pytest.mark.slow
def test_a_slash_at_the_end_is_a_prefix_and_no_object(bucket: str) -> None:
    put(bucket, {"pets": b"object", "a[1]/0.jpg": b"0"})
    with pytest.raises(UsageError, match=rf"--images must exist. Received: --images={bucket}/pets/"):
        storage.list_images(f"{bucket}/pets/")
    assert names(f"{bucket}/a[1]/", bucket) == ["a[1]/0.jpg"]
    assert names(f"{bucket}/", bucket) == ["a[1]/0.jpg", "pets"]
    assert names(bucket.replace("s3://", "S3N://") + "/pets", bucket) == ["pets"]


@pytest.mark.slow
def test_dots_in_the_keys_of_objects_hide_nothing(bucket: str) -> None:
    keys = {"p/./a.jpg": b"1", "p/../b.jpg": b"2", "p//c.jpg": b"3", "p/.hidden/d.jpg": b"4", "p/.e.jpg": b"5"}
    put(bucket, keys)
    files = list(storage.list_images(f"{bucket}/p"))
    assert sorted(file.uri for file in files) == sorted(f"{bucket}/{key}" for key in list(keys)[:3])
    read = dict(zip((file.uri for file in files), storage.read_sources([file.uri for file in files]), strict=True))
    assert read == {f"{bucket}/{key}": keys[key] for key in list(keys)[:3]}


def test_spellings_of_one_file_in_a_manifest(root: str) -> None:
    fill(root, {"d/x.jpg": b"x", "d/e/y.jpg": b"y", "z.jpg": b"z"})
    spellings = {
        "d/x.jpg": ["x.jpg", "./x.jpg", ".//x.jpg", "e/../x.jpg", "../d/x.jpg", "./e/.././x.jpg"],
        "d/e/y.jpg": ["e/y.jpg", "./e//y.jpg", "e/./y.jpg"],
        "z.jpg": ["../z.jpg", "./../z.jpg", "e/../../z.jpg"],
    }
    if not root.startswith(("s3:", "memory:")):
        spellings["z.jpg"] += [f"{root}//d/../z.jpg", f"file:{root}/z.jpg", f"file://{root}/./z.jpg"]
    write_manifest(f"{root}/d/m.parquet", [name for each in spellings.values() for name in each])
    by_manifest = list(storage.list_images(f"{root}/d/m.parquet"))
    assert [file.uri for file in by_manifest] == [f"{root}/{name}" for name, each in spellings.items() for _ in each]
    assert set(by_manifest) == {file for file in storage.list_images(root) if not file.uri.endswith("m.parquet")}


def test_archives_in_a_manifest_have_one_spelling(root: str) -> None:
    storage.publish_bytes(f"{root}/d/x.zip", make_zip({"a.jpg": b"a"}))
    write_manifest(
        f"{root}/m.parquet", ["zip://a.jpg::d/x.zip", "zip://a.jpg::./d//x.zip", f"zip://a.jpg::{root}/d/x.zip"]
    )
    (file,) = storage.list_images(f"{root}/d/x.zip")
    assert list(storage.list_images(f"{root}/m.parquet")) == [file] * 3


@pytest.mark.slow
def test_the_url_of_an_object_is_taken_as_it_is(bucket: str) -> None:
    put(bucket, {"d//x.jpg": b"two slashes", "d/x.jpg": b"one", "d/./x.jpg": b"dot"})
    uris = [f"{bucket}/d//x.jpg", f"{bucket}/d/x.jpg", f"{bucket}/d/./x.jpg"]
    write_manifest(f"{bucket}/m.parquet", uris)
    assert [file.uri for file in storage.list_images(f"{bucket}/m.parquet")] == uris
    assert list(storage.read_sources(uris)) == [b"two slashes", b"one", b"dot"]


def test_a_percent_sign_in_the_url_of_a_local_file(tmp_path: Path) -> None:
    for name in ("a b.jpg", "100%25.jpg", "caf\xe9.jpg"):
        (tmp_path / name).write_bytes(name.encode())
    root = f"file://{tmp_path}"
    write_manifest(f"{tmp_path}/m.parquet", [f"{root}/a%20b.jpg", f"{root}/100%25.jpg", f"{root}/caf%C3%A9.jpg"])
    assert [file.uri for file in storage.list_images(f"{tmp_path}/m.parquet")] == [
        f"{tmp_path}/a b.jpg",
        f"{tmp_path}/100%25.jpg",  # there is a file of this very name
        f"{tmp_path}/caf\xe9.jpg",
    ]


OUTPUT_INSIDE = r"--output must not lie inside --images\. Received: --images="


@pytest.mark.parametrize(
    "images",
    ["photos/**", "photos/*/*.parquet", "photos/**/part*", "photos/pred*/part-?.parquet", "photos/[p]redictions/*"],
)
def test_a_glob_that_reaches_into_the_output_is_refused(root: str, images: str) -> None:
    output = f"{root}/photos/predictions"
    fill(root, {"photos/a.jpg": b"a"})
    with pytest.raises(UsageError, match=OUTPUT_INSIDE):  # also when the output is still empty
        storage.list_images(f"{root}/{images}", exclude=output)
    storage.publish_bytes(f"{output}/part-1.parquet", b"x")
    with pytest.raises(UsageError, match=OUTPUT_INSIDE):
        storage.list_images(f"{root}/{images}", exclude=output + "/")


def test_a_collection_beside_its_output_is_listed(root: str) -> None:
    fill(
        root,
        {"photos/a.jpg": b"a", "photos/out/part-1.parquet": b"x", "photos/out.jpg": b"b", "photos/out2/c.jpg": b"c"},
    )
    output = f"{root}/photos/out"
    for glob in ("photos/*.jpg", "photos/**/*.jpg", "photos/out2", "photos/out.jpg"):
        assert list(storage.list_images(f"{root}/{glob}", exclude=output)) == list(
            storage.list_images(f"{root}/{glob}")
        )


def test_a_directory_that_holds_the_output_is_refused(root: str) -> None:
    fill(root, {"photos/a.jpg": b"a", "photos/deep/out/part-1.parquet": b"x"})
    with pytest.raises(UsageError, match=OUTPUT_INSIDE):
        list(storage.list_images(f"{root}/photos", exclude=f"{root}/photos/deep/out"))
    write_manifest(f"{root}/m.parquet", ["photos/a.jpg", "photos/deep/../deep/out/part-1.parquet"])
    with pytest.raises(UsageError, match=OUTPUT_INSIDE):
        list(storage.list_images(f"{root}/m.parquet", exclude=f"{root}/photos/deep/out"))


@pytest.mark.slow
def test_another_name_of_s3_does_not_hide_the_output(bucket: str) -> None:
    put(bucket, {"photos/a.jpg": b"a", "photos/out/part-1.parquet": b"x"})
    other = bucket.replace("s3://", "s3a://")
    for images, output in [(bucket, other), (other, bucket)]:
        with pytest.raises(UsageError, match=OUTPUT_INSIDE):
            list(storage.list_images(f"{images}/photos", exclude=f"{output}/photos/out"))


def test_a_symbolic_link_does_not_hide_the_output(tmp_path: Path) -> None:
    fill(str(tmp_path), {"photos/a.jpg": b"a", "out/deep/part-1.parquet": b"x"})
    output = str(tmp_path / "out")
    photos, linked = tmp_path / "photos", tmp_path / "linked"
    linked.symlink_to(tmp_path)
    assert len(list(storage.list_images(str(photos), exclude=output))) == 1
    for link, target in [("directory", "../out"), ("below", "../out/deep"), ("file", "../out/deep/part-1.parquet")]:
        (photos / link).symlink_to(target)
        with pytest.raises(UsageError, match=OUTPUT_INSIDE):
            list(storage.list_images(str(photos), exclude=output))
        with pytest.raises(UsageError, match=OUTPUT_INSIDE):
            list(storage.list_images(f"{photos}/**", exclude=str(linked / "out")))
        (photos / link).unlink()
    with pytest.raises(UsageError, match=OUTPUT_INSIDE):
        storage.list_images(f"{linked}/out/**", exclude=output)


def test_links_that_lead_nowhere_new_are_skipped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fill(str(tmp_path), {"a.jpg": b"a", "deep/b.jpg": b"b"})
    (tmp_path / "self").symlink_to("self")
    (tmp_path / "one").symlink_to("other")
    (tmp_path / "other").symlink_to("one")
    (tmp_path / "deep" / "above").symlink_to("..")
    for images in (str(tmp_path), f"{tmp_path}/**"):
        caplog.clear()
        listing = storage.list_images(images)
        assert [file.uri for file in listing] == [f"{tmp_path}/a.jpg", f"{tmp_path}/deep/b.jpg"]
        assert listing.skipped == {"loop": 4}
        assert len(caplog.records) == 1
        assert f"4 skipped, for the reason loop, the first {tmp_path}/deep/above" in caplog.text


@pytest.fixture
def locked(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Names of directories that may not be read. (The tests may run as root, whom no mode stops.)"""
    found: set[str] = set()
    scandir = os.scandir

    def refused(path: str) -> "Iterator[os.DirEntry[str]]":
        if os.path.basename(path) in found:
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refused)
    return found


def test_directories_that_may_not_be_read_are_skipped(
    tmp_path: Path, locked: set[str], caplog: pytest.LogCaptureFixture
) -> None:
    locked |= {"lost+found", "private"}
    fill(str(tmp_path), {"cats/a.jpg": b"a", "lost+found/x": b"x", "cats/private/y": b"y", "dogs/b.jpg": b"b"})
    listing = storage.list_images(str(tmp_path))
    assert listing.skipped == {}
    assert [file.uri for file in listing] == [f"{tmp_path}/cats/a.jpg", f"{tmp_path}/dogs/b.jpg"]
    assert listing.skipped == {"unreadable_directory": 2}
    assert len(caplog.records) == 1
    for glob in ("cats/*.jpg", "[cd]*/*.jpg", "*ts/*.jpg", "cats/a.jpg"):
        listing = storage.list_images(f"{tmp_path}/{glob}")
        assert next(listing).uri == f"{tmp_path}/cats/a.jpg"
        assert next(listing, None) is None or glob == "[cd]*/*.jpg"
        assert listing.skipped == {}  # the glob enters none of them
    locked.add("cats")
    with pytest.raises(StorageError, match=rf"{tmp_path}/cats: permission denied: Permission denied"):
        storage.list_images(f"{tmp_path}/cats")


@pytest.mark.parametrize("name", [b"caf\xe9.jpg", b"\xff\xfe/a.jpg", b"100 %/\xe9 [1] #?.jpg"])
def test_a_name_that_is_not_utf_8(tmp_path: Path, name: bytes) -> None:
    path = os.fsencode(tmp_path / "images") + b"/" + name
    os.makedirs(os.path.dirname(path))
    with open(path, "wb") as written:
        written.write(name)
    (file,) = storage.list_images(str(tmp_path / "images"))
    json.dumps(pa.array([file.uri]).to_pylist())  # it can be written anywhere
    file.uri.encode()
    assert os.fsencode(os.fsdecode(urllib.parse.unquote_to_bytes(file.uri.removeprefix("file://")))) == path
    assert storage.read_source(file.uri, file.num_bytes) == name
    assert list(storage.read_sources([file.uri])) == [name]
    assert storage.absolute(file.uri) == storage.absolute(os.fsdecode(path)) == file.uri
    assert list(storage.list_images(file.uri)) == list(storage.list_images(os.fsdecode(path))) == [file]
    assert list(storage.list_images(os.fsdecode(os.path.dirname(path)))) == [file]
    write_manifest(f"{tmp_path}/m.parquet", [file.uri])
    assert list(storage.list_images(f"{tmp_path}/m.parquet")) == [file]
    with pytest.raises(UsageError, match=OUTPUT_INSIDE):
        storage.list_images(str(tmp_path / "images"), exclude=str(tmp_path))


def test_an_archive_and_a_glob_whose_names_are_not_utf_8(tmp_path: Path) -> None:
    directory = os.fsdecode(os.fsencode(tmp_path) + b"/\xe9 x")
    os.mkdir(directory)
    Path(directory, "x.zip").write_bytes(make_zip({"a.jpg": b"zipped"}))
    Path(directory, "b.jpg").write_bytes(b"b")
    files = list(storage.list_images(f"{directory}/*"))
    assert [file.uri for file in files] == [
        f"file://{tmp_path}/%E9%20x/b.jpg",
        f"zip://a.jpg::file://{tmp_path}/%E9%20x/x.zip",
    ]
    assert list(storage.read_sources([file.uri for file in files])) == [b"b", b"zipped"]
    assert list(storage.list_images(f"{directory}/x.zip")) == files[1:]
