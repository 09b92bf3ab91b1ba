"""Training checkpoints: each is one file, published atomically and verified when it is loaded.

`OUTPUT/_checkpoints/step-00001200-<digest>.npz` holds the state after 1,200 optimizer steps. Its name carries the
first 16 hex digits of its content's SHA-256: a file that was cut short or altered is passed over for the one before it.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import re
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from catdog import storage
from catdog.errors import ClaimLostError, TrainingError
from catdog.provenance import redact
from catdog.training.history import HistoryRow

logger = logging.getLogger(__name__)

DIRECTORY: Final = "_checkpoints"
NUM_KEPT: Final = 2
"""The newest, and the one before it in case the newest is damaged."""

CONFIG_NAME: Final = "train.json"
"""The configuration that an output's checkpoints belong to. It is written first, and makes the output a training's."""

_NAME: Final = re.compile(r"step-(\d{8,})-([0-9a-f]{16})\.npz")


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """The state of a training after a number of optimizer steps."""

    step: int
    """Steps done. With the configuration's seed they fix the position in the data, and every random choice to come."""

    history: list[HistoryRow]
    """A row for every epoch that is done."""

    sums: dict[str, float]
    """What all workers have added up in the epoch that is not done yet."""

    precision: str | None
    """The number format that the training computes in; None if a version of catdog saved it that did not say."""

    arrays: dict[str, list[npt.NDArray[Any]]]
    """Variables of the model, of the optimizer, and of the running average; with early stopping also the `best` running
    average."""


def save(output: str, checkpoint: Checkpoint) -> None:
    """Publish a checkpoint, then delete all others but the last ones before it: `NUM_KEPT` are left.

    A checkpoint of this step or a later one is deleted, too: it was damaged, or workers that are gone saved it.
    """
    named = {
        f"{group}-{index:04d}": array
        for group, arrays in checkpoint.arrays.items()
        for index, array in enumerate(arrays)
    }
    names = ("step", "history", "sums", "precision")
    meta = json.dumps({name: getattr(checkpoint, name) for name in names})
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, meta=np.frombuffer(meta.encode(), np.uint8), **named)
    data = buffer.getvalue()
    name = f"step-{checkpoint.step:08d}-{hashlib.sha256(data).hexdigest()[:16]}.npz"
    directory = storage.join(output, DIRECTORY)
    storage.publish_bytes(storage.join(directory, name), data)
    found = _names(output)
    kept = [name, *[before for step, before in found if step < checkpoint.step][: NUM_KEPT - 1]]
    for _, other in found:
        if other not in kept:
            storage.delete(storage.join(directory, other))


def check_claim(url: str) -> None:
    """Check that the run still holds its output, before anything is written there.

    Args:
        url: the file that is there as long as the claim is held.

    Raises:
        ClaimLostError: another run has taken over the output.
    """
    if not storage.exists(url):
        raise ClaimLostError(
            f"a training must hold the claim of its --output to its end. Received: {redact(url)} is gone"
        )


def load_latest(output: str) -> Checkpoint | None:
    """The newest checkpoint that is whole; None if there is none at all.

    Raises:
        TrainingError: there are some, and all of them are damaged. To begin anew is for a person to decide.
    """
    found = _names(output)
    for step, name in found:
        checkpoint = _load(storage.join(output, DIRECTORY, name))
        if checkpoint is not None:
            return checkpoint
        logger.warning("The checkpoint of step %d is damaged; looking for one before it", step)
    if not found:
        return None
    directory = redact(storage.join(output, DIRECTORY))
    steps = ", ".join(str(step) for step, _ in found)
    raise TrainingError(
        f"a training goes on from a checkpoint that is whole; delete {directory} to begin anew. "
        f"Received: only damaged checkpoints, of step {steps}"
    )


def latest_step(output: str) -> int:
    """The step that the name of the newest checkpoint says; -1 where there is none."""
    return max((step for step, _ in _names(output)), default=-1)


def load(output: str, step: int) -> Checkpoint:
    """The checkpoint of one step.

    Raises:
        TrainingError: it is gone or damaged.
    """
    for found, name in _names(output):
        if found == step and (checkpoint := _load(storage.join(output, DIRECTORY, name))) is not None:
            return checkpoint
    raise TrainingError(f"every worker must find the checkpoint that the first one chose. Received: no step {step}")


def delete_all(output: str) -> None:
    """Remove every checkpoint: the training is finished."""
    storage.delete(storage.join(output, DIRECTORY))


def delete_temporaries(output: str) -> None:
    """Remove what workers that were killed while writing left of their files."""
    for directory in (output, storage.join(output, DIRECTORY)):
        storage.delete_temporaries(directory)


def _names(output: str) -> list[tuple[int, str]]:
    """(step, file name), newest first."""
    matches = (_NAME.fullmatch(name) for name in storage.list_names(storage.join(output, DIRECTORY)))
    return sorted(((int(match[1]), match[0]) for match in matches if match), reverse=True)


def _load(url: str) -> Checkpoint | None:
    """The checkpoint, or None where the file is not what its name says."""
    data = storage.read_bytes(url)
    match = _NAME.fullmatch(url.rsplit("/", 1)[-1])
    if match is None or hashlib.sha256(data).hexdigest()[:16] != match[2]:
        return None
    arrays: dict[str, list[npt.NDArray[Any]]] = {}
    with np.load(io.BytesIO(data), allow_pickle=False) as archive:
        meta = json.loads(archive["meta"].tobytes())
        for name in sorted(archive.files):
            if name != "meta":
                arrays.setdefault(name.rsplit("-", 1)[0], []).append(archive[name])
    return Checkpoint(
        step=meta["step"],
        history=meta["history"],
        sums=meta["sums"],
        precision=meta.get("precision"),
        arrays=arrays,
    )
