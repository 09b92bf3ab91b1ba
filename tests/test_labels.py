"""Labels and splits as people have them: names of classes, folders of any depth, tables, manifests. Without Ray."""

import contextlib
import json
import logging
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from storage_case import make_zip
from test_dataset import encoded, picture

from catdog.config import PrepareConfig
from catdog.dataset import catalog
from catdog.dataset.collection import Collection, list_collection
from catdog.dataset.labels import Classes
from catdog.dataset.split import named_split
from catdog.errors import UsageError

JPEG = encoded(picture(0))


@contextlib.contextmanager
def listed(images: Path | str, **fields: Any) -> Iterator[tuple[duckdb.DuckDBPyConnection, Collection]]:
    config = PrepareConfig(images=str(images), output="/nowhere/out", **fields)
    with catalog.open_catalog() as connection:
        yield connection, list_collection(connection, config)


def labels(images: Path | str, **fields: Any) -> dict[str, int | None]:
    """File → index of its class. The file's name is below the directory that all share."""
    with listed(images, **fields) as (connection, _):
        found = dict(connection.execute("SELECT uri, label FROM listing ORDER BY row").fetchall())
    root = str(images) + "/"
    return {uri.removeprefix(root): label for uri, label in found.items()}


def photos(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(JPEG)
    return root


def test_names_of_classes() -> None:
    """Fault 40."""
    classes = Classes({"kitten": 0, "n02123045": 0, "00-cat": 0, "Süße": 1})
    for name, index in (("kittens", 0), ("N02123045", 0), ("00-cat", 0), ("CAT", 0), ("dogs", 1), ("puppy", None)):
        assert classes.index(name) == index
    assert classes.index(unicodedata.normalize("NFD", "süße")) == 1
    prefixes = {
        "kitten_7.jpg": 0,
        "kittenish.jpg": None,
        "n02123045_1.JPEG": 0,
        "n021230451.jpg": None,
        "00-cat.1.jpg": 0,
        "dog.1.jpg": 1,
        "catalog.jpg": None,
    }
    assert {name: classes.by_prefix(f"/x/{name}") for name in prefixes} == prefixes
    assert Classes().by_prefix("zip://train/dogs_7.png::/cat/x.zip") == 1


@pytest.mark.parametrize(
    ("names", "of_labels"),
    [
        ((), {0: 0, "1": 1, 1.0: 1, "0.0": 0, 2: None, -1: None, None: None, "Dogs ": 1, "": None}),
        (("cat=1,kitten", "dog=0"), {0: 1, "1": 0, "kittens": 0, 2: None, "cat": 0}),
        (("cat=281,282", "dog=207"), {"281": 0, 282: 0, 207: 1, 0: None, 1: None}),
    ],
)
def test_labels_are_words_or_numbers(names: tuple[str, ...], of_labels: dict[object, int | None]) -> None:
    config = PrepareConfig(images="x", output="y", class_names=names)
    classes = Classes(config.other_names)
    for label, index in of_labels.items():
        assert classes.of_label(label) == index, label
    assert classes.of_label(True) is None


@pytest.mark.parametrize("names", ["kitten", "=kitten", "bird=crow", "cat=", "cat=a,,b"])
def test_class_names_that_are_refused(names: str) -> None:
    with pytest.raises(UsageError, match=r"^--class-names must be cat=NAME,... or dog=NAME,..."):
        PrepareConfig(images="x", output="y", class_names=(names,))
    with pytest.raises(UsageError, match=r"^--class-names must give a name to one class. Received: --class-names=x$"):
        PrepareConfig(images="x", output="y", class_names=("cat=x", "dog=y,x"))


def test_folders_of_any_depth(tmp_path: Path) -> None:
    """Fault 40."""
    root = photos(
        tmp_path / "dog" / "pets",  # what all files share says nothing
        *("cats/persian/1.jpg", "cats/2.jpg", "Dogs/big/dalmatian/3.jpg", "cats/dogs/4.jpg", "more/dog.5.jpg"),
    )
    expected = {
        "Dogs/big/dalmatian/3.jpg": 1,
        "cats/2.jpg": 0,
        "cats/dogs/4.jpg": 1,
        "cats/persian/1.jpg": 0,
        "more/dog.5.jpg": 1,
    }
    assert labels(root) == expected
    with pytest.raises(UsageError, match=r"1 of 5 files without one, the first: \S+/more/dog.5.jpg"):
        labels(root, labels="folder")
    with pytest.raises(UsageError, match=r"none labelled cat"):
        labels(photos(tmp_path / "cat" / "x", "1/dog.1.jpg", "2/dog.2.jpg"))


def test_folders_and_prefixes_of_other_words(tmp_path: Path) -> None:
    root = photos(tmp_path / "pets", "n02123045/deep/n1.jpg", "00-dog/2.jpg", "x/puppy.3.jpg")
    with pytest.raises(
        UsageError, match=r"--class-names gives other names, .* out. Received: 3 of 3 files without one"
    ):
        labels(root)
    names = ("cat=kitten,n02123045", "dog=puppy,00-dog")
    assert labels(root, class_names=names) == {"00-dog/2.jpg": 1, "n02123045/deep/n1.jpg": 0, "x/puppy.3.jpg": 1}


def write(path: Path, text: str) -> str:
    path.write_bytes(text.encode())
    return str(path)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("t.csv", "\ufefffilename,category\na/1.jpg,cat\nb/2.jpg,dog\n"),
        ("t.tsv", "path\tclass\na/1.jpg\t0\nb/2.jpg\t1\n"),
        ("t.jsonl", '{"file": "a/1.jpg", "label": 0}\n{"file": "b/2.jpg", "label": "Dogs"}\n'),
        ("t.csv", "Label;URI\nkitten;a\\1.jpg\nwolf;b\\2.jpg\n"),
    ],
)
def test_tables_of_other_forms(tmp_path: Path, name: str, text: str) -> None:
    root = photos(tmp_path / "pets", "a/1.jpg", "b/2.jpg")
    names = ("cat=kitten", "dog=wolf")
    found = {"a/1.jpg": 0, "b/2.jpg": 1}
    assert labels(root, labels=write(tmp_path / name, text), class_names=names) == found
    for folder in (tmp_path / "parts", tmp_path / "pets"):
        folder.mkdir(exist_ok=True)
        table = Path(write(folder / name, text))
        if folder.name == "pets":  # beside the photographs, a table is another file, and may be a manifest
            assert labels(root, labels=str(table), class_names=names) == {**found, name: None}
            with listed(table, class_names=names) as (connection, _):
                rows = connection.execute("SELECT uri, label FROM listing ORDER BY row").fetchall()
            assert rows == [(f"{root}/a/1.jpg", 0), (f"{root}/b/2.jpg", 1)]


def test_tables_in_a_directory_and_of_a_glob(tmp_path: Path) -> None:
    root = photos(tmp_path / "pets", "1.jpg", "2.jpg")
    (tmp_path / "lists").mkdir()
    for number, label in enumerate(("cat", "dog"), start=1):
        write(tmp_path / f"lists/part-{number}.csv", f"path,label\n{number}.jpg,{label}\n")
    for place in (tmp_path / "lists", f"{tmp_path}/lists/*.csv"):
        assert labels(root, labels=str(place)) == {"1.jpg": 0, "2.jpg": 1}


@pytest.mark.parametrize(
    "spelling",
    ["pets/{}", "C:\\Users\\me\\Pets\\{}", "d:/pets/{}", "file:{root}/{}", "file://{root}/./{}", "{root}/{}", "{}"],
)
def test_spellings_in_tables(tmp_path: Path, spelling: str) -> None:
    nfd = unicodedata.normalize("NFD", "Zoë 1.jpg")
    root = photos(tmp_path / "pets", f"a/{nfd}", "b/2.jpg")
    rows = [spelling.format(name, root=root) + f",{label}" for name, label in (("a/Zoë 1.jpg", 0), ("b/2.jpg", 1))]
    table = write(tmp_path / "t.csv", "\n".join(["path,label", *rows]))
    assert labels(root, labels=table) == {f"a/{nfd}": 0, "b/2.jpg": 1}


def test_a_drive_letter_leads_nowhere_else(tmp_path: Path) -> None:
    root = photos(tmp_path / "val", "1.jpg", "2.jpg")
    table = write(tmp_path / "t.csv", "path,label\nC:\\pets\\train\\1.jpg,cat\nC:\\pets\\val\\2.jpg,dog\n")
    with pytest.raises(UsageError, match=r"Every image needs a label.*1 of 2 files"):
        labels(root, labels=table)


@pytest.mark.parametrize("elsewhere", ["/home/me/", "C:\\Users\\me\\", "s3://bucket/me/", "/data/upload/x/../me/"])
def test_a_collection_that_was_moved(tmp_path: Path, elsewhere: str, caplog: pytest.LogCaptureFixture) -> None:
    root = photos(tmp_path / "pets", "a/1.jpg", "b/1.jpg", "2.png")
    names = [name.replace("/", "\\" if "\\" in elsewhere else "/") for name in ("a/1.jpg", "b/1", "2.png", "3.png")]
    rows = [f"{elsewhere}{name},{label}" for name, label in zip(names, (0, 1, 0, 1), strict=True)]
    table = write(tmp_path / "t.csv", "\n".join(["path,label", *rows]))
    assert labels(root, labels=table) == {"a/1.jpg": 0, "b/1.jpg": 1, "2.png": 0}
    assert "3 rows name files in " in caplog.text
    archive = tmp_path / "pets.zip"
    archive.write_bytes(make_zip(dict.fromkeys(["a/1.jpg", "b/1.jpg", "2.png"], JPEG)))
    assert sorted(map(str, labels(archive, labels=table).values())) == ["0", "0", "1"]


def test_a_bare_name_is_found_in_any_folder_if_only_one_has_it(tmp_path: Path) -> None:
    root = photos(tmp_path / "pets", "train/1.jpg", "train/2.jpg", "x/3.jpg", "y/3.jpg")
    table = write(tmp_path / "t.csv", "id,label\n1,0\n2.jpg,1\n3,1\n")
    with pytest.raises(UsageError, match=r"--exclude x/\).*2 of 4 files without one, the first: \S+/x/3.jpg"):
        labels(root, labels=table)
    assert labels(root, labels=table, exclude=("x/", "y/")) == {"train/1.jpg": 0, "train/2.jpg": 1}
    archive = tmp_path / "train.zip"
    archive.write_bytes(make_zip({"train/1.jpg": JPEG, "train/2.jpg": JPEG}))
    assert list(labels(archive, labels=table).values()) == [0, 1]


def test_the_first_row_that_does_not_fit_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = photos(tmp_path / "pets", "1.jpg", "2.jpg", "3.jpg")
    table = write(tmp_path / "t.csv", "path,label\n1.jpg,cat\n2.jpg,bird\n3.jpg,7\n")
    with pytest.raises(
        UsageError, match=rf"Received: 2 that are not, the first in row 2 of {table}: 'bird' of {root}/2.jpg$"
    ):
        labels(root, labels=table)
    write(tmp_path / "t.csv", "path,label\n1.jpg,cat\n,dog\n2.jpg,\n2.jpg,dog\n3.jpg,cat\n")
    with caplog.at_level(logging.WARNING), listed(root, labels=table) as (_, collection):
        assert (collection.label_rows, collection.unmatched_label_rows) == (5, 2)
    assert f"2 of 5 rows of {table} name no listed file or have no label; the first of them, row 2 of" in caplog.text
    with pytest.raises(UsageError, match=r"--label-column must name a column. Received: --label-column=kind"):
        labels(root, labels=table, label_column="kind")


def test_a_row_without_a_name_is_a_reject(tmp_path: Path) -> None:
    photos(tmp_path, "1.jpg", "2.jpg")
    table = write(tmp_path / "t.csv", "path,label\n1.jpg,cat\n,dog\n2.jpg,dog\n")
    with listed(table) as (connection, collection):
        rows = connection.execute("SELECT uri, label FROM listing ORDER BY row").fetchall()
    assert rows == [(f"{tmp_path}/1.jpg", 0), (f"row://path/000000002::{table}", 1), (f"{tmp_path}/2.jpg", 1)]
    assert collection.unmatched_label_rows == 0


def hugging_face(path: Path, **columns: list[Any]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    features = {"image": {"_type": "Image"}, "labels": {"_type": "ClassLabel", "names": ["dog", "cat"]}}
    num_rows = len(next(iter(columns.values())))
    table = pa.table({"image": [{"bytes": JPEG, "path": None}] * num_rows, **columns})
    pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})}), path)
    return str(path)


def test_hugging_faces_parquet(tmp_path: Path) -> None:
    data = tmp_path / "data"
    names = (
        "train-00000-of-00002",
        "train-00001-of-00002",
        "validation-00000-of-00001",
        "test-00000-of-00001-ab12cd34",
    )
    for name in names:
        hugging_face(data / f"{name}.parquet", labels=[0, 1, 1])
    with listed(data) as (connection, collection):
        rows = connection.execute("SELECT uri, label, split FROM listing LEFT JOIN given USING (row)").fetchall()
    assert collection.given == {"train": 6, "val": 3, "test": 3}
    assert len(rows) == 12
    assert {label for uri, label, _ in rows if uri.startswith("row://image/000000001::")} == {1}  # 0 is a dog here
    assert {split for uri, _, split in rows if "/validation-" in uri} == {"val"}
    with listed(f"{data}/train-*.parquet") as (_, collection):
        assert collection.given == {}


def test_splits_of_a_column(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = photos(tmp_path / "train", *(f"{number}.jpg" for number in range(6)))
    splits = ["train", "Validation", "test", "", "train", "train"]
    lines = [f"{number}.jpg,{number % 2},{split}" for number, split in enumerate(splits)]
    table = write(tmp_path / "t.csv", "\n".join(["path,label,split", *lines]))
    with caplog.at_level(logging.INFO), listed(root, labels=table) as (connection, collection):
        given = dict(connection.execute("SELECT uri, split FROM given JOIN listing USING (row)").fetchall())
        digest = catalog.listing_digest(connection)
    assert given == {f"{root}/1.jpg": "val", f"{root}/2.jpg": "test"}
    assert collection.given == {"train": 3, "val": 1, "test": 1}
    assert "A column decides the split: 3 train, 1 val, 1 test. 1 other files count as train" in caplog.text
    with listed(root, labels=table, split="random") as (connection, collection):
        assert collection.given == {}
        assert catalog.listing_digest(connection) != digest
    write(tmp_path / "t.csv", "\n".join(["path,label,fold", *lines]))
    with listed(root, labels=table, split_column="FOLD") as (_, collection):
        assert collection.given == {"train": 3, "val": 1, "test": 1}
    write(tmp_path / "t.csv", "\n".join(["path,label,split", *lines, "0.jpg,0,extra"]))
    with pytest.raises(UsageError, match=rf"must be train, .*the first in row 7 of {table}: 'extra'$"):
        labels(root, labels=table)
    assert labels(root, labels=table, split="random")


def test_the_splits_of_a_manifest_whose_labels_are_in_the_names(tmp_path: Path) -> None:
    photos(tmp_path, "cat.1.jpg", "dog.2.jpg", "cat.3.jpg")
    table = write(
        tmp_path / "t.jsonl",
        "\n".join(
            json.dumps({"file_name": name, "split": split})
            for name, split in (("cat.1.jpg", "train"), ("dog.2.jpg", None), ("cat.3.jpg", "test"))
        ),
    )
    with listed(table) as (connection, collection):
        assert connection.execute("SELECT label FROM listing ORDER BY row").fetchall() == [(0,), (1,), (0,)]
    assert collection.given == {"train": 1, "test": 1}


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train-00000-of-00002", "train"),
        ("test-00000-of-00001-ab12cd34ef567890", "test"),
        ("validation_0003", "val"),
        ("val.1", "val"),
        ("train-catalog", None),
        ("test-0a", None),
    ],
)
def test_names_of_shards(name: str, split: str | None) -> None:
    assert named_split([name]) == split


def test_a_dataset_to_evaluate_with_alone() -> None:
    config = PrepareConfig(images="x", output="y", test_fraction=1)
    assert config.val_fraction == 0
    for fields in ({"val_fraction": 0.5}, {"split": "keep"}):
        with pytest.raises(UsageError, match=r"Received: --(val-fraction=0\.5 --test-fraction=1|split=keep)"):
            PrepareConfig(images="x", output="y", test_fraction=1, **fields)
