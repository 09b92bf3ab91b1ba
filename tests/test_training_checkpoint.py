from pathlib import Path

import numpy as np
import pytest

from catdog.training import checkpoint
from catdog.training.checkpoint import Checkpoint


def state_after(epoch: int) -> Checkpoint:
    rng = np.random.default_rng(epoch)
    arrays = {
        "model": [rng.normal(size=(3, 4)).astype(np.float32), np.arange(epoch)],
        "optimizer": [np.asarray(epoch, np.int64)] + [rng.normal(size=2) for _ in range(11)],
        "best": [rng.normal(size=(3, 4))],
    }
    history = [{"epoch": float(done + 1), "val_loss": 1 / (done + 1)} for done in range(epoch)]
    return Checkpoint(epoch=epoch, history=history, arrays=arrays)


def assert_same(one: Checkpoint | None, other: Checkpoint) -> None:
    assert one is not None
    assert (one.epoch, one.history) == (other.epoch, other.history)
    assert one.arrays.keys() == other.arrays.keys()
    for name, arrays in other.arrays.items():
        for found, expected in zip(one.arrays[name], arrays, strict=True):
            np.testing.assert_array_equal(found, expected)
            assert found.dtype == expected.dtype


@pytest.fixture
def output(tmp_path: Path) -> str:
    for epoch in (1, 2, 3):
        checkpoint.save(str(tmp_path), state_after(epoch))
    return str(tmp_path)


def files(output: str) -> list[Path]:
    return sorted((Path(output) / checkpoint.DIRECTORY).iterdir())


def test_the_newest_is_loaded_as_it_was_saved(output: str) -> None:
    assert_same(checkpoint.load_latest(output), state_after(3))
    assert_same(checkpoint.load(output, 2), state_after(2))


def test_older_ones_are_pruned(output: str) -> None:
    assert [path.name[:10] for path in files(output)] == ["epoch-0002", "epoch-0003"]


@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: data[:-9] + b"x" + data[-8:]])
def test_a_damaged_one_falls_back_to_the_one_before(output: str, damage: object) -> None:
    newest = files(output)[-1]
    assert callable(damage)
    newest.write_bytes(damage(newest.read_bytes()))
    assert_same(checkpoint.load_latest(output), state_after(2))


def test_without_any_training_starts_afresh(tmp_path: Path) -> None:
    assert checkpoint.load_latest(str(tmp_path)) is None


def test_a_finished_training_leaves_none(output: str) -> None:
    checkpoint.delete_all(output)
    assert checkpoint.load_latest(output) is None
    checkpoint.delete_all(output)
