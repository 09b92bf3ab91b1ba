"""`catdog.storage.publishing`: a file appears whole or not at all, and an output that is not ours is refused."""

import os
import resource
import signal
import threading
from pathlib import Path

import fsspec
import pytest
from s3_server import S3Server
from storage_case import fill, names

from catdog import storage
from catdog.errors import OutputRefusedError, StorageError
from catdog.storage import publishing
from catdog.storage import s3 as storage_s3

pytest_plugins = ["s3_server", "storage_case"]


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


def test_a_full_disk_is_a_storage_error_and_leaves_nothing(tmp_path: Path) -> None:
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


def test_what_cannot_be_written_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(StorageError, match=r"file/a.bin"):
        storage.publish_bytes(str(tmp_path / "file" / "a.bin"), b"x")


@pytest.mark.slow
def test_what_cannot_be_written_to_s3_is_a_storage_error(s3: S3Server) -> None:
    with pytest.raises(StorageError, match=r"s3://no-such-bucket-here/a.bin.*bucket does not exist"):
        storage.publish_bytes("s3://no-such-bucket-here/a.bin", b"x")


def test_filesystems_without_atomic_writes_rename(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publishing, "OBJECT_STORES", set())
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


NAMES = ["run[1]", "run*", "run?", "ru[!m]1", "run[1-3] *"]
"""Names that are globs, too."""


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_no_glob(root: str, name: str) -> None:
    others = {"run1/a.bin": b"1", "run2/b/a.bin": b"2", "run1x": b"3", "run1 x/a": b"4"}
    fill(root, {**others, f"{name}/a.bin": b"mine", f"{name}/deep/{name}": b"mine, too", f"{name}/one": b"x"})
    storage.delete(f"{root}/{name}/one")
    assert storage.list_names(f"{root}/{name}") == ["a.bin", "deep"]
    storage.publish_bytes(f"{root}/{name}/.a.{'0' * 32}.tmp", b"left behind")
    storage.delete_temporaries(f"{root}/{name}")
    with storage.claimed(f"{root}/{name}", "train") as claim:
        assert storage.exists(claim.url)
    assert not storage.exists(claim.url)
    storage.refuse_foreign_output(f"{root}/{name}", ("deep",))
    assert storage.read_bytes(f"{root}/{name}/deep/{name}") == b"mine, too"
    assert names(f"{root}/{name}", root) == [f"{name}/a.bin", f"{name}/deep/{name}"]
    storage.delete(f"{root}/{name}/deep/{name}")
    storage.delete(f"{root}/{name}")
    assert not storage.exists(f"{root}/{name}")
    assert sorted(names(root, root)) == sorted(others)


@pytest.mark.parametrize("name", NAMES)
def test_renaming_takes_no_name_for_a_glob(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publishing, "OBJECT_STORES", set())
    fs = fsspec.filesystem("memory")
    try:
        fill("memory://renamed", {"run1/a.bin": b"other", f"{name}/a.bin": b"old", f"{name}/a.bin.tmp": b"another"})
        storage.publish_bytes(f"memory://renamed/{name}/a.bin", b"new")
        assert {path: fs.cat_file(path) for path in fs.find("/renamed")} == {
            "/renamed/run1/a.bin": b"other",
            f"/renamed/{name}/a.bin": b"new",
            f"/renamed/{name}/a.bin.tmp": b"another",
        }
    finally:
        fs.store.clear()


@pytest.mark.slow
def test_deleting_a_prefix_of_many_objects(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage_s3, "_PAGE_OBJECTS", 10)
    root = s3.new_bucket()
    fill(root, {f"out/{i}/a b.bin": b"x" for i in range(25)} | {"out": b"x", "outer/a": b"y", "out.json": b"y"})
    storage.delete(f"{root}/out")
    assert names(root, root) == ["out.json", "outer/a"]
    with pytest.raises(ValueError, match=r"a bucket is never deleted"):
        storage.delete(root)


def test_an_output_whose_name_is_not_utf_8(tmp_path: Path) -> None:
    path = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9")
    output = storage.absolute(path)
    assert output == f"file://{tmp_path}/caf%E9"
    with storage.claimed(output, "train"):
        storage.publish_bytes(storage.join(output, "100 %.bin"), b"data")
    assert storage.list_names(output) == os.listdir(path) == ["100 %.bin"]
    assert storage.read_bytes(f"{output}/100%20%25.bin") == b"data"
    storage.delete(output)
    assert os.listdir(tmp_path) == []
