import dataclasses
import errno
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from catdog.errors import ClaimLostError, StorageError, TrainingError
from catdog.training import checkpoint
from catdog.training.checkpoint import Checkpoint


def state_after(step: int) -> Checkpoint:
    rng = np.random.default_rng(step)
    arrays: dict[str, list[npt.NDArray[Any]]] = {
        "model": [rng.normal(size=(3, 4)).astype(np.float32), np.arange(step), np.array([1, 2], np.uint32)],
        "optimizer": [np.asarray(step, np.int64)] + [rng.normal(size=2) for _ in range(11)],
        "average": [rng.normal(size=(3, 4))],
    }
    history = [{"epoch": float(done + 1), "val_loss": 1 / (done + 1)} for done in range(step // 100)]
    return Checkpoint(
        step=step, history=history, sums={"loss": step / 3, "correct": 7.0}, precision="bfloat16", arrays=arrays
    )


def assert_same(one: Checkpoint | None, other: Checkpoint) -> None:
    assert one is not None
    assert (one.step, one.history, one.sums, one.precision) == (other.step, other.history, other.sums, other.precision)
    assert one.arrays.keys() == other.arrays.keys()
    for name, arrays in other.arrays.items():
        for found, expected in zip(one.arrays[name], arrays, strict=True):
            np.testing.assert_array_equal(found, expected)
            assert found.dtype == expected.dtype


@pytest.fixture
def output(tmp_path: Path) -> str:
    for step in (90, 100, 250):
        checkpoint.save(str(tmp_path), state_after(step))
    return str(tmp_path)


def files(output: str) -> list[Path]:
    return sorted((Path(output) / checkpoint.DIRECTORY).iterdir())


def test_the_newest_is_loaded_as_it_was_saved(output: str) -> None:
    assert_same(checkpoint.load_latest(output), state_after(250))
    assert_same(checkpoint.load(output, 100), state_after(100))
    assert checkpoint.latest_step(output) == 250


def test_older_ones_are_pruned(output: str) -> None:
    assert [path.name[:13] for path in files(output)] == ["step-00000100", "step-00000250"]
    with pytest.raises(TrainingError, match=r"^every worker must find the checkpoint .* Received: no step 90$"):
        checkpoint.load(output, 90)


@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: data[:-9] + b"x" + data[-8:]])
def test_a_damaged_one_falls_back_to_the_one_before(output: str, damage: Any) -> None:
    newest = files(output)[-1]
    newest.write_bytes(damage(newest.read_bytes()))
    assert_same(checkpoint.load_latest(output), state_after(100))
    # It does not count as one of those that are kept, nor as what was reached.
    checkpoint.save(output, state_after(150))
    assert [path.name[:13] for path in files(output)] == ["step-00000100", "step-00000150"]
    assert checkpoint.latest_step(output) == 150


@pytest.mark.parametrize("kept", [[100, 250], [250]])
def test_if_all_are_damaged_a_training_does_not_begin_anew_by_itself(output: str, kept: list[int]) -> None:
    for path in files(output):
        if int(path.name[5:13]) in kept:
            path.write_bytes(path.read_bytes()[:-9])
        else:
            path.unlink()
    steps = ", ".join(str(step) for step in reversed(kept))
    rule = r"^a training goes on from a checkpoint that is whole; delete .*/_checkpoints to begin anew\. "
    with pytest.raises(TrainingError, match=rule + f"Received: only damaged checkpoints, of step {steps}$"):
        checkpoint.load_latest(output)
    checkpoint.delete_all(output)
    assert checkpoint.load_latest(output) is None


def test_a_claim_that_is_gone_is_lost(tmp_path: Path) -> None:
    (tmp_path / "claim").touch()
    checkpoint.check_claim(str(tmp_path / "claim"))
    with pytest.raises(ClaimLostError, match=r"^a training must hold the claim .* Received: .*/other is gone$"):
        checkpoint.check_claim(str(tmp_path / "other"))


def test_another_one_of_the_same_step_replaces_it(output: str) -> None:
    again = dataclasses.replace(state_after(250), sums={"loss": 0.5})
    checkpoint.save(output, again)
    assert [path.name[:13] for path in files(output)] == ["step-00000100", "step-00000250"]
    assert_same(checkpoint.load_latest(output), again)


KILLED_WRITER = """if True:
    import os, signal, sys
    from catdog.training import checkpoint
    os.fsync = lambda descriptor: os.kill(os.getpid(), signal.SIGKILL)
    checkpoint.save(sys.argv[1], checkpoint.Checkpoint(step=300, history=[], sums={}, precision=None, arrays={}))
"""


def test_what_killed_writers_leave_is_removed(output: str) -> None:
    before = files(output)
    mine = Path(output) / ".notes.tmp"
    mine.touch()
    killed = subprocess.run([sys.executable, "-c", KILLED_WRITER, output])
    assert killed.returncode == -signal.SIGKILL
    (left,) = set(files(output)) - set(before)
    assert left.name.startswith(".step-00000300-")
    checkpoint.delete_temporaries(output)
    assert files(output) == before
    assert mine.exists()


def test_one_that_cannot_be_written_leaves_the_others(output: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before = files(output)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(StorageError, match=r"step-00000300-\w{16}\.npz.*: No space left on device$"):
            checkpoint.save(output, state_after(300))
    assert files(output) == before
    assert_same(checkpoint.load_latest(output), state_after(250))


def test_names_sort_by_step_however_many_digits(tmp_path: Path) -> None:
    for step in (99_999_999, 100_000_000):
        checkpoint.save(str(tmp_path), Checkpoint(step=step, history=[], sums={}, precision=None, arrays={}))
    assert checkpoint.latest_step(str(tmp_path)) == 100_000_000


def test_one_that_an_earlier_version_saved_says_no_precision(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    meta = np.frombuffer(json.dumps({"step": 7, "history": [], "sums": {"loss": 1.5}}).encode(), np.uint8)
    np.savez(buffer, allow_pickle=False, meta=meta, **{"model-0000": np.arange(3)})
    digest = hashlib.sha256(buffer.getvalue()).hexdigest()[:16]
    (tmp_path / checkpoint.DIRECTORY).mkdir()
    (tmp_path / checkpoint.DIRECTORY / f"step-00000007-{digest}.npz").write_bytes(buffer.getvalue())
    arrays = {"model": [np.arange(3)]}
    assert_same(
        checkpoint.load_latest(str(tmp_path)),
        Checkpoint(step=7, history=[], sums={"loss": 1.5}, precision=None, arrays=arrays),
    )


def test_without_any_training_starts_afresh(tmp_path: Path) -> None:
    assert checkpoint.load_latest(str(tmp_path)) is None
    assert checkpoint.latest_step(str(tmp_path)) == -1


def test_a_finished_training_leaves_none(output: str) -> None:
    checkpoint.delete_all(output)
    assert checkpoint.load_latest(output) is None
    checkpoint.delete_all(output)
