"""`catdog.dataset.strata`: every split gets images of every class, if there are enough groups of duplicates."""

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import duckdb
import pytest
from test_dataset_grouping import Files, name_with

from catdog.config import PrepareConfig
from catdog.dataset import outcome, scan, strata
from catdog.errors import DatasetError

NO_BANDS: Sequence[None] = [None] * len(scan.BAND_COLUMNS)
SIXTHS: dict[str, Any] = {"val_fraction": 0.3, "test_fraction": 0.3}


@pytest.fixture
def files() -> Iterator[Files]:
    with duckdb.connect() as connection:
        yield Files(connection)


def fill(
    files: Files, cats: Sequence[str], settled: dict[str, str] | None = None, given: str | None = None, **fields: Any
) -> tuple[list[str], int]:
    """The splits of cats that would get these splits alone, beside a dog in each split; and the number of moves."""
    number = 0
    for label, splits in ((0, cats), (1, ("train", "val", "test"))):
        for split in splits:
            name = name_with(split, number)
            number = int(name) + 1
            files.add(name.ljust(64, "0"), label, bytes(768), NO_BANDS, given)
    files.decide(settled={str(files.rows[0]["image_id"]): settled["first"]} if settled else None)
    config = PrepareConfig(images="x", output="y", **{**SIXTHS, **fields})
    num_moves = strata.fill(files.connection, config, {given} if given else set())
    rows = files.connection.execute(
        "SELECT split FROM fates JOIN listing USING (row) WHERE label = 0 ORDER BY row"
    ).fetchall()
    return [split for (split,) in rows], num_moves


@pytest.mark.parametrize(
    ("alone", "filled", "num_moves"),
    [
        (["train"] * 5, {"train": 3, "val": 1, "test": 1}, 2),
        (["train", "train", "val", "test"], {"train": 2, "val": 1, "test": 1}, 0),
        (["test"] * 3, {"train": 1, "val": 1, "test": 1}, 2),
        (["train", "val", "val"], {"train": 1, "val": 1, "test": 1}, 1),
        (["test", "test"], {"train": 1, "val": 1}, 2),
        (["train", "train"], {"train": 1, "val": 1}, 1),
        (["test"], {"train": 1}, 1),
        (["train"], {"train": 1}, 0),
    ],
)
def test_every_split_gets_what_matters_most(
    files: Files, alone: list[str], filled: dict[str, int], num_moves: int
) -> None:
    """Fault 39."""
    splits, moved = fill(files, alone)
    assert (Counter(splits), moved) == (filled, num_moves)


def test_only_splits_that_were_asked_for(files: Files) -> None:
    splits, _ = fill(files, ["train"] * 5, test_fraction=0)
    assert Counter(splits) == {"train": 4, "val": 1}


def test_nothing_moves_in_a_dataset_to_evaluate_with(files: Files) -> None:
    splits, num_moves = fill(files, ["test"] * 5, val_fraction=0, test_fraction=1)
    assert (Counter(splits), num_moves) == ({"test": 5}, 0)


def test_what_is_settled_stays(files: Files) -> None:
    splits, _ = fill(files, ["train", "train", "train"], settled={"first": "train"})
    assert splits[0] == "train"
    assert Counter(splits) == {"train": 1, "val": 1, "test": 1}


def test_what_is_given_stays(files: Files) -> None:
    splits, num_moves = fill(files, ["train"] * 4, given="val")
    assert (Counter(splits), num_moves) == ({"val": 4}, 0)


def test_duplicates_move_together(files: Files) -> None:
    bands = [0] * len(scan.BAND_COLUMNS)
    names = [name_with("train"), name_with("train", int(name_with("train")) + 1)]
    for name in names:
        files.add(name.ljust(64, "0"), 0, bytes(768), bands)
    files.add(name_with("train", int(names[1]) + 1).ljust(64, "0"), 0, bytes(768), NO_BANDS)
    files.decide()
    assert strata.fill(files.connection, PrepareConfig(images="x", output="y", **SIXTHS), set()) == 1
    splits = [split for (split,) in files.connection.execute("SELECT split FROM fates ORDER BY row").fetchall()]
    assert splits[0] == splits[1] != splits[2]
    assert set(splits) == {"train", "val"}


def test_the_choice_depends_on_the_seed_alone(files: Files) -> None:
    first, _ = fill(files, ["train"] * 20)
    with duckdb.connect() as connection:
        again, _ = fill(Files(connection), ["train"] * 20)
    with duckdb.connect() as connection:
        other, _ = fill(Files(connection), ["train"] * 20, seed=1)
    assert first == again != other


def test_a_split_without_a_class_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    """Fault 39."""
    config = PrepareConfig(images="x", output="y")
    counts = {"train": {"cat": 1, "dog": 1}, "val": {"cat": 0, "dog": 2}, "test": {"cat": 3, "dog": 0}}
    with caplog.at_level(logging.WARNING):
        outcome.check_counts(counts, config, ["test"])
    assert caplog.messages == [
        "The split val has no cat, and catdog train refuses this dataset: it calibrates and chooses its model on both "
        "classes. Bring more cats.",
        "The split test has no dog, and catdog evaluate can measure little on it. Bring more dogs, or say --split "
        "random.",
    ]
    nothing = {"cat": 0, "dog": 0}
    with pytest.raises(DatasetError, match=r"bring more cats, or .*\(--test-fraction 1\)\. Received: no cat in it"):
        outcome.check_counts({**counts, "train": nothing}, config)
    alone = PrepareConfig(images="x", output="y", test_fraction=1)
    outcome.check_counts({"train": nothing, "val": nothing, "test": {"cat": 1, "dog": 1}}, alone)
