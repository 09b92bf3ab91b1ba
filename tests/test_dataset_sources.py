"""What `prepare` takes as photographs: several places, filters, archives in archives, WebDataset. Without Ray."""

import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from storage_case import fill, make_zip
from test_storage_tars import JPEG, PACKERS, make_tar

from catdog.config import PrepareConfig
from catdog.dataset import catalog, labels
from catdog.dataset.collection import list_collection
from catdog.errors import UsageError


def listed(*images: str, **fields: Any) -> dict[str, int | None]:
    """The listed files, with the index of their class."""
    config = PrepareConfig(images=images, output="/nowhere/out", **fields)
    with catalog.open_catalog() as connection:
        list_collection(connection, config)
        return dict(connection.execute("SELECT uri, label FROM listing ORDER BY row").fetchall())


def test_several_places(tmp_path: Path) -> None:
    fill(str(tmp_path), {"a/cat.1.jpg": JPEG, "b/dogs/1.jpg": JPEG, "c.jpg": JPEG})
    assert listed(f"{tmp_path}/a", f"{tmp_path}/b") == {f"{tmp_path}/a/cat.1.jpg": 0, f"{tmp_path}/b/dogs/1.jpg": 1}
    assert PrepareConfig(images=("a",), output="o").images == "a"  # as in the datasets of one place


def test_a_table_of_labels_for_several_places(tmp_path: Path) -> None:
    fill(str(tmp_path), {"a/1.jpg": JPEG, "b/x/2.jpg": JPEG, "b/3.jpg": JPEG, "a/3.jpg": JPEG})
    pq.write_table(pa.table({"uri": ["1.jpg", "x/2.jpg", "3.jpg"], "label": ["dog", "cat", "cat"]}), tmp_path / "l.pq")
    places, table = (f"{tmp_path}/a", f"{tmp_path}/b"), f"{tmp_path}/l.pq"
    assert listed(*places, labels=table, exclude=("3.jpg",)) == {f"{tmp_path}/a/1.jpg": 1, f"{tmp_path}/b/x/2.jpg": 0}
    with pytest.raises(UsageError, match=r"Every image needs a label: .*2 of 4 files without one.*/a/3\.jpg$"):
        listed(*places, labels=table)  # which of the two is meant?


def test_several_manifests_and_a_folder(tmp_path: Path) -> None:
    fill(str(tmp_path), {"a/1.jpg": JPEG, "a/dog.2.jpg": JPEG, "b/3.jpg": JPEG, "c/dogs/4.jpg": JPEG})
    (tmp_path / "a/train.csv").write_text("file,label\n1.jpg,cat\ndog.2.jpg,cat\n")
    (tmp_path / "b/val.csv").write_text("file,class\n3.jpg,dog\n")
    manifests = f"{tmp_path}/a/train.csv", f"{tmp_path}/b/val.csv"
    found = {f"{tmp_path}/a/1.jpg": 0, f"{tmp_path}/a/dog.2.jpg": 0, f"{tmp_path}/b/3.jpg": 1}
    assert listed(*manifests) == found
    assert listed(*manifests, f"{tmp_path}/c") == {**found, f"{tmp_path}/c/dogs/4.jpg": 1}


def test_include_and_exclude(tmp_path: Path) -> None:
    names = ["cats/1.JPG", "cats/1.png", "cats/raw/2.jpg", "dogs/3.jpg", "dogs/3.tiff"]
    fill(str(tmp_path), dict.fromkeys(names, JPEG))
    found = listed(str(tmp_path), include=("*.{jpg,png}",), exclude=("cats/raw/",))
    assert list(found) == [f"{tmp_path}/{name}" for name in ("cats/1.JPG", "cats/1.png", "dogs/3.jpg")]


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_kaggles_archive_as_it_is_downloaded(tmp_path: Path, compression: int) -> None:
    train = {f"train/{name}.{number}.jpg": JPEG for number in range(3) for name in ("cat", "dog")}
    inner = {"train.zip": make_zip(train), "test1.zip": make_zip({"test1/1.jpg": JPEG}), "sampleSubmission.csv": b"id"}
    path = tmp_path / "dogs-vs-cats.zip"
    path.write_bytes(make_zip(inner, compression))
    found = listed(str(path), exclude=("test1.zip",))
    assert Counter(found.values()) == {0: 3, 1: 3, None: 1}
    assert found[f"zip://train/dog.2.jpg::zip://train.zip::{path}"] == 1
    with pytest.raises(UsageError, match=r"Every image needs a label: .*zip://test1/1\.jpg::zip://test1\.zip"):
        listed(str(path))


@pytest.mark.parametrize("suffix", ["tar", "tar.gz", "tar.zst"])
def test_a_webdataset_brings_its_labels(tmp_path: Path, suffix: str) -> None:
    files = {
        "000.jpg": JPEG,
        "000.cls": b"1",
        "001.cls": b"0\n",
        "001.jpg": JPEG + b"1",
        "002.jpg": JPEG + b"2",
        "002.json": b'{"label": "Dogs"}',
        "cat.3.jpg": JPEG,
        "cat.3.cls": b"1",
    }
    (tmp_path / f"shard.{suffix}").write_bytes(PACKERS[suffix](make_tar(files)))
    found = {uri[6:].partition("::")[0]: label for uri, label in listed(str(tmp_path)).items()}
    images = {name: label for name, label in found.items() if name.endswith(".jpg")}
    # What a folder or a file is named for comes first.
    assert images == {"000.jpg": 1, "001.jpg": 0, "002.jpg": 1, "cat.3.jpg": 0}
    with pytest.raises(UsageError, match="Every image needs a label"):
        listed(str(tmp_path), labels="prefix")


def test_a_label_of_another_class_is_no_label(tmp_path: Path) -> None:
    files = {"0.jpg": JPEG, "0.cls": b"0", "1.jpg": JPEG, "1.cls": b"7"}
    (tmp_path / "shard.tar").write_bytes(make_tar(files))
    with pytest.raises(UsageError, match=r"Every image needs a label: .*tar://1\.jpg::"):
        listed(str(tmp_path))


@pytest.mark.parametrize("suffix", ["zip", "tar", "tgz"])
def test_a_table_names_the_members_of_an_archive(tmp_path: Path, suffix: str) -> None:
    files = {"x/1.jpg": JPEG, "x/2.jpg": JPEG + b"2", "x/3.jpg": JPEG}
    data = make_zip(files) if suffix == "zip" else PACKERS[suffix](make_tar(files))
    (tmp_path / f"photos.{suffix}").write_bytes(data)
    table = str(tmp_path / "labels.csv")
    Path(table).write_text("uri,label\nx/1.jpg,cat\nx\\2.jpg,dog\nx/3,dog\n")
    for images in (f"{tmp_path}/photos.{suffix}", f"{tmp_path}/*.{suffix}"):
        assert list(listed(images, labels=table).values()) == [0, 1, 1]


@pytest.mark.parametrize(
    ("uri", "folders"),
    [
        ("/data/train/cats/", ["data", "train", "cats"]),
        ("s3://b/x/1.jpg", ["s3:", "b", "x"]),
        ("zip://cats/::/data/train.zip", ["data", "train", "cats"]),
        ("zip://::/data/train.zip", ["data", "train"]),
        ("tar://cats/1.jpg::/data/val.tar.gz", ["data", "val", "cats"]),
        ("zip://train/::zip://in/train.zip::/data/x.zip", ["data", "x", "in", "train", "train"]),
    ],
)
def test_folders(uri: str, folders: list[str]) -> None:
    assert labels.folders(uri) == folders
