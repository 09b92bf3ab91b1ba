"""What `prepare` takes as its input, and who may write its output: labels, given splits, claims. Without Ray."""

import contextlib
import json
import logging
import os
import unicodedata
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_dataset import encoded, picture

from catdog import storage
from catdog.config import PrepareConfig
from catdog.dataset import catalog, check, outcome, prepare, split
from catdog.dataset.collection import Collection, list_collection
from catdog.errors import DatasetError, OutputClaimedError, UsageError
from catdog.schema import CLASS_NAMES, DATASET_SCHEMA, REJECTS_SCHEMA, SPLITS
from catdog.storage.names import looks_like_image

SplitRule = Literal["auto", "keep", "random"]


@contextlib.contextmanager
def listed(
    images: Path | str, labels: Path | str = "auto", split: SplitRule = "auto"
) -> Iterator[tuple[duckdb.DuckDBPyConnection, Collection]]:
    config = PrepareConfig(images=str(images), output="/nowhere/out", labels=str(labels), split=split)
    with catalog.open_catalog() as connection:
        yield connection, list_collection(connection, config)


def labelled(images: Path | str, table: Path | str) -> dict[str, str]:
    """File name → class, as the catalogue has it."""
    with listed(images, table) as (connection, _):
        rows = connection.execute("SELECT uri, label FROM listing WHERE label IS NOT NULL").fetchall()
    return {uri.split("::")[0].rpartition("/")[2]: CLASS_NAMES[label] for uri, label in rows}


def write(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def photos(root: Path, *names: str) -> Path:
    for number, name in enumerate(names):
        write(root / name, encoded(picture(number)))
    return root


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("convert.py", b"import sys\n"),
        ("LICENSE", b"MIT License\n"),
        ("look.ipynb", b'{"cells": []}'),
        ("truth.mat", b"MATLAB 5.0 MAT-file, Platform: GLNXA64"),
        ("labels.npy", b"\x93NUMPY\x01\x00"),
        ("Makefile", b"all:\n"),
        ("clip.mp4", b"\0\0\0\x18ftypmp42\0\0\0\0"),
        ("nothing", b""),
    ],
)
def test_what_is_no_image_is_a_reject(tmp_path: Path, name: str, data: bytes) -> None:
    """Fault 25."""
    root = photos(tmp_path / "pets", "cats/1.jpg", "dogs/2.jpg")
    write(root / name, data)
    write(root / "README.md", b"# Pets")
    with listed(root) as (connection, _):
        connection.execute(
            "CREATE TABLE fates AS SELECT row, NULL::VARCHAR AS reason, NULL::VARCHAR AS message FROM listing "
            "WHERE label IS NOT NULL"
        )
        rejects = {row["uri"]: row for row in outcome.rejects(connection).to_pylist()}
    assert rejects.keys() == {f"{root}/{name}", f"{root}/README.md"}
    assert rejects[f"{root}/README.md"]["message"] == "neither labelled nor an image by its name"
    found = rejects[f"{root}/{name}"]
    if data:
        assert found["reason"] == "not_an_image"
        assert found["message"] == "neither labelled nor an image by its first bytes"
    else:
        assert found["reason"] == "empty_file"


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM"])
def test_an_image_without_a_label_is_an_error_whatever_its_name(tmp_path: Path, kind: str) -> None:
    root = photos(tmp_path / "pets", "cats/1.jpg", "dogs/2.jpg")
    write(root / "tool.py", b"import sys\n")
    write(root / "z-unknown", encoded(picture(3), kind))
    with (
        pytest.raises(UsageError, match=r"Every image needs a label.*Received: 2 of 4 files.*/z-unknown$"),
        listed(root),
    ):
        pass


def test_formats_that_catdog_does_not_read_are_images(tmp_path: Path) -> None:
    for begin in (b"\0\0\0\x18ftypheic", b"II*\0\x10\0\0\0CR\x02", b"8BPS\0\1"):
        assert looks_like_image(begin)
    for begin in (b"BMW is a brand", b"PDF", b"%PDF-1.7", b"P4ssword", b"RIFF....AVI "):
        assert not looks_like_image(begin)


@pytest.mark.parametrize("spelling", ["./{}", "cats/../{}", "cats//../{}", " {} "])
def test_spellings_of_a_path_in_a_table(tmp_path: Path, spelling: str) -> None:
    """Fault 26."""
    root = photos(tmp_path / "pets", "cats/1.jpg", "2.jpg")
    rows = [spelling.format("cats/1.jpg") + ",cat", spelling.format("2.jpg") + ",dog"]
    table = write(tmp_path / "t.csv", "\n".join(["uri,label", *rows]).encode())
    assert labelled(root, table) == {"1.jpg": "cat", "2.jpg": "dog"}


def test_backslashes_of_windows_and_names_without_suffix(tmp_path: Path) -> None:
    root = photos(tmp_path / "pets", "a/cat.1.jpg", "a/2.JPEG", "b/2.JPEG", "c/x.jpg", "c/x.png")
    rows = ["a\\cat.1.jpg,cat", ".\\a\\2,dog", "b/2,cat", "c/x.jpg,cat", "c\\x.png,dog"]
    table = write(tmp_path / "t.csv", "\n".join(["uri,label", *rows]).encode())
    with listed(root, table) as (connection, collection):
        found = dict(connection.execute("SELECT uri, label FROM listing").fetchall())
    names = ["a/cat.1.jpg", "a/2.JPEG", "b/2.JPEG", "c/x.jpg", "c/x.png"]
    assert found == {f"{root}/{name}": label for name, label in zip(names, (0, 1, 0, 0, 1), strict=True)}
    assert (collection.label_rows, collection.unmatched_label_rows) == (5, 0)


def test_a_name_without_suffix_that_fits_two_files_fits_none(tmp_path: Path) -> None:
    root = photos(tmp_path / "pets", "x.jpg", "x.png", "y.png")
    table = write(tmp_path / "t.csv", b"uri,label\nx,cat\nx.jpg,cat\nx.png,dog\ny,dog\n")
    with listed(root, table) as (_, collection):
        assert (collection.label_rows, collection.unmatched_label_rows) == (4, 1)


@pytest.mark.parametrize(("in_table", "on_disk"), [("NFC", "NFD"), ("NFD", "NFC"), ("NFD", "NFD")])
def test_accents_composed_or_not(
    tmp_path: Path, in_table: Literal["NFC", "NFD"], on_disk: Literal["NFC", "NFD"]
) -> None:
    names = ["Zoë.jpg", "été/Müller.jpg"]
    root = photos(tmp_path / "pets", *(unicodedata.normalize(on_disk, name) for name in names))
    rows = [unicodedata.normalize(in_table, f"{name},{label}") for name, label in zip(names, CLASS_NAMES, strict=True)]
    table = write(tmp_path / "t.csv", "\n".join(["uri,label", *rows]).encode())
    assert sorted(labelled(root, table).values()) == ["cat", "dog"]


def test_numbers_as_ids_in_parquet_and_in_an_archive(tmp_path: Path) -> None:
    root = photos(tmp_path / "pets", "1.jpg", "2.jpg")
    with zipfile.ZipFile(tmp_path / "pets.zip", "w") as archive:
        for name in ("1.jpg", "2.jpg"):
            archive.write(root / name, name)
    table = tmp_path / "t.parquet"
    pq.write_table(pa.table({"uri": [1, 2], "label": ["cat", "dog"]}), table)
    for images in (root, tmp_path / "pets.zip", f"{tmp_path}/*.zip"):
        assert labelled(images, table) == {"1.jpg": "cat", "2.jpg": "dog"}


def test_an_unused_column_whose_type_changes_late(tmp_path: Path) -> None:
    root = photos(tmp_path / "pets", "1.jpg", "2.jpg")
    filler = "".join(f"gone{number}.jpg,5,cat,2020-01-01\n" for number in range(60_000))
    for last in ("n/a", "2020-13-45", "1.5e"):
        table = write(
            tmp_path / "t.csv",
            f"uri,age,label,seen\n1.jpg,3,cat,2020-01-01\n{filler}2.jpg,{last},dog,{last}\n".encode(),
        )
        assert labelled(root, table) == {"1.jpg": "cat", "2.jpg": "dog"}


def test_rows_that_name_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = photos(tmp_path / "pets", "1.jpg", "2.jpg")
    table = write(tmp_path / "t.csv", b"uri,label\n1.jpg,cat\ngone.jpg,dog\n2.jpg,dog\nalso-gone.jpg,bird\n")
    with caplog.at_level(logging.WARNING), listed(root, table) as (_, collection):
        assert (collection.label_rows, collection.unmatched_label_rows) == (4, 2)
    assert (
        f"2 of 4 rows of {table} name no listed file or have no label; the first of them, row 2 of {table}: 'gone.jpg'"
        in caplog.text
    )
    table.write_bytes(b"uri,label\n" + b"".join(b"C:\\old\\%d-.jpg,cat\n" % number for number in range(40)))
    with (
        pytest.raises(
            UsageError,
            match=r"none of the 40 rows of \S+ names one; first row: 'C:\S+0-.jpg', first file: \S+/pets/1.jpg$",
        ),
        listed(root, table),
    ):
        pass


@pytest.mark.parametrize("name", ["run[1]", "a*b", "what?"])
def test_a_directory_with_brackets_in_its_name(tmp_path: Path, name: str) -> None:
    """Fault 27."""
    root = photos(tmp_path / name / "deep", "1.jpg", "2.jpg")
    table = write(tmp_path / name / "t.csv", b"uri,label\n1.jpg,cat\n2.jpg,dog\n")
    assert labelled(root, table) == {"1.jpg": "cat", "2.jpg": "dog"}
    manifest = root / "m.parquet"
    pq.write_table(pa.table({"uri": ["1.jpg", "2.jpg"], "label": ["cat", "dog"]}), manifest)
    assert labelled(manifest, "auto") == {"1.jpg": "cat", "2.jpg": "dog"}


@pytest.mark.parametrize(
    ("folders", "found"),
    [
        (("train", "validation", "test"), ["train", "val", "test"]),
        (("Training", "valid", "testing"), ["train", "val", "test"]),
        (("training_set", "val", "test_set"), ["train", "val", "test"]),
        (("trainvalid", "values", "contest"), [None] * 3),
    ],
)
def test_names_of_splits(folders: tuple[str, ...], found: list[str | None]) -> None:
    assert [split.named_split(["x", folder, "cats"]) for folder in folders] == found


def given(images: Path | str, rule: SplitRule = "auto") -> tuple[dict[str, int], dict[str, str]]:
    """What the collection says of its splits, and the split of each file that is held out."""
    with listed(images, split=rule) as (connection, collection):
        rows = connection.execute("SELECT uri, split FROM given JOIN listing USING (row)").fetchall()
    return collection.given, {uri.split("::")[0].rpartition("/")[2]: name for uri, name in rows}


NAMES = ("train/cats/1.jpg", "train/dogs/2.jpg", "validation/cats/3.jpg", "validation/dogs/4.jpg", "test/cats/5.jpg")


def test_a_split_that_the_folders_name_is_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Fault 15."""
    # What lies above the collection says nothing.
    root = photos(tmp_path / "test" / "pets", *NAMES, "cats/6.jpg")
    with caplog.at_level(logging.INFO):
        assert given(root) == ({"train": 2, "val": 2, "test": 1}, {"3.jpg": "val", "4.jpg": "val", "5.jpg": "test"})
    assert "The folders decide the split: 2 train, 2 val, 1 test. 1 other files count as train" in caplog.text
    assert given(root, "random") == ({}, {})
    assert given(root, "keep") == given(root)
    assert given(root / "validation") == given(root / "cats/..//train") == ({}, {})


def test_splits_in_archives_and_of_archives(tmp_path: Path) -> None:
    root = photos(tmp_path / "pets", *NAMES)
    with zipfile.ZipFile(tmp_path / "whole.zip", "w") as archive:
        for name in NAMES:
            archive.write(root / name, name)
    assert given(tmp_path / "whole.zip") == given(root)
    for part in ("train", "validation", "test"):
        with zipfile.ZipFile(tmp_path / f"z-{part}.zip", "w") as archive:
            for name in NAMES:
                if name.startswith(part):
                    archive.write(root / name, name)
    assert given(f"{tmp_path}/z-*.zip") == given(root)


def test_only_one_held_out_split_or_none_to_train_with(tmp_path: Path) -> None:
    both = photos(tmp_path / "both", *NAMES[:4])
    assert given(both)[0] == {"train": 2, "val": 2}
    photos(tmp_path / "held", "val/cats/1.jpg", "test/dogs/2.jpg")
    assert given(tmp_path / "held") == ({}, {})
    with pytest.raises(
        UsageError, match=r"--split=keep needs .*Received: 0 files in train, 1 files in val, 1 files in test"
    ):
        given(tmp_path / "held", "keep")
    kaggle = photos(tmp_path / "kaggle", "train/cat.1.jpg", "train/dog.2.jpg")
    assert given(kaggle) == ({}, {})


def test_another_run_at_work_is_refused_and_nothing_is_touched(tmp_path: Path) -> None:
    """Fault 11."""
    root = photos(tmp_path / "pets", "cats/1.jpg", "dogs/2.jpg")
    output = tmp_path / "out"
    with storage.claimed(str(output), "prepare"):
        before = sorted(os.listdir(output))
        with pytest.raises(OutputClaimedError, match="must not be in use by another run"):
            prepare(PrepareConfig(images=str(root), output=str(output)))
        assert sorted(os.listdir(output)) == before
    assert not output.exists()


@pytest.mark.parametrize("output", ["{pets}", "{pets}/out", "{pets}/cats/../out", "{link}/out"])
def test_an_output_within_the_images_is_refused(tmp_path: Path, output: str) -> None:
    root = photos(tmp_path / "pets", "cats/1.jpg", "dogs/2.jpg")
    (tmp_path / "link").symlink_to(root)
    before = sorted(path.name for path in root.rglob("*"))
    for images in (root, "/", f"{tmp_path}/pets/**"):
        place = output.format(pets=root, link=tmp_path / "link")
        with pytest.raises(UsageError, match=r"--output must (not lie inside --images|be empty)"):
            prepare(PrepareConfig(images=str(images), output=place))
    assert sorted(path.name for path in root.rglob("*")) == before


def test_what_was_written_is_read_back(tmp_path: Path) -> None:
    rows = [
        {"image_id": str(i), "uri": f"/{i}", "label": i % 2, "image": b"x", "width": 1, "height": 1} for i in range(3)
    ]
    table = pa.Table.from_pylist(rows, schema=DATASET_SCHEMA)
    storage.publish_parquet(str(tmp_path / "train/part-00000.parquet"), table)
    parts = {"train": {"part-00000.parquet": 3}, "val": {}, "test": {}}
    counts = {name: dict.fromkeys(CLASS_NAMES, 0) for name in SPLITS} | {"train": {"cat": 2, "dog": 1}}
    check.check_shards(str(tmp_path), parts, counts)
    with pytest.raises(DatasetError, match=r"must hold the images that were kept, \{'cat': 1, 'dog': 2\}"):
        check.check_shards(str(tmp_path), parts, {**counts, "train": {"cat": 1, "dog": 2}})
    with pytest.raises(DatasetError, match="must have as many rows"):
        check.check_shards(str(tmp_path), {**parts, "train": {"part-00000.parquet": 2}}, counts)
    with pytest.raises(DatasetError, match=r"part-00001.parquet is missing"):
        check.check_shards(str(tmp_path), {**parts, "val": {"part-00001.parquet": 2}}, counts)
    storage.publish_parquet(str(tmp_path / "test/part-00009.parquet"), table)
    with pytest.raises(DatasetError, match=r"part-00009.parquet is one too many"):
        check.check_shards(str(tmp_path), parts, counts)

    rejects = pa.Table.from_pylist([{"uri": "/x", "reason": "truncated", "message": "y"}], schema=REJECTS_SCHEMA)
    storage.publish_parquet(str(tmp_path / "rejects.parquet"), rejects)
    check.check_rejects(str(tmp_path / "rejects.parquet"), rejects)
    with pytest.raises(DatasetError, match=r"must hold the 0 files that were rejected. Received: 1 rows"):
        check.check_rejects(str(tmp_path / "rejects.parquet"), rejects.slice(1))

    info = {
        "format": "catdog-dataset",
        "format_version": 1,
        "class_names": ["cat", "dog"],
        "counts": counts,
        "parts": parts,
        "mean": [1, 2, 3],
        "std": [4, 5, 6],
        "digest": "d",
        "config": {"seed": 0},
    }
    (tmp_path / "dataset.json").write_text(json.dumps(info))
    check.check_info(str(tmp_path), info)
    with pytest.raises(DatasetError, match=r"must be that of this run. Received: .* with other config$"):
        check.check_info(str(tmp_path), {**info, "config": {"seed": 1}})
