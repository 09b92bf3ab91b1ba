"""A training that tells other processes of this machine, step by step, how far it is and who its workers are.

The workers write into a file that is mapped into everyone's memory, a record each.
"""

from __future__ import annotations

import contextlib
import functools
import os
from typing import Any, Final
from unittest import mock

import numpy as np
import numpy.typing as npt

from catdog.config import TrainConfig
from catdog.training.checkpoint import Checkpoint
from catdog.training.feed import Share
from catdog.training.step import Learner

RECORD: Final = np.dtype(
    [
        ("pid", np.int64),  # written last by a worker that starts: it makes the record that worker's
        ("restored", np.int64),  # steps done when it began, -1 before its first one
        ("step", np.int64),  # steps done, -1 before its first one
        ("is_saving", np.int64),  # 1 while it saves a checkpoint
    ]
)
Board = npt.NDArray[Any]
"""`RECORD`s by rank."""


def create(path: str, num_workers: int) -> Board:
    """The board of a group of workers, of whom none has started."""
    board: Board = np.memmap(path, RECORD, "w+", shape=(num_workers,))
    board[:] = (0, -1, -1, 0)
    return board


def train_loop(path: str, settings: dict[str, Any]) -> None:
    """`loop.train_loop`, with what it does told on the board at `path`."""
    from catdog.training import checkpoint, loop

    board: Board = np.memmap(path, RECORD, "r+")
    save = checkpoint.save

    def watched_save(output: str, state: Checkpoint) -> None:
        board["is_saving"][0] = 1  # the first worker alone saves
        save(output, state)
        board["is_saving"][0] = 0

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(loop, "Learner", functools.partial(_WatchedLearner, board)))
        stack.enter_context(mock.patch.object(checkpoint, "save", watched_save))
        loop.train_loop(settings)


class _WatchedLearner(Learner):
    def __init__(self, board: Board, config: TrainConfig, share: Share, **arguments: Any) -> None:
        self._record = board[share.rank]
        self._record["restored"], self._record["step"], self._record["is_saving"] = -1, -1, 0
        self._record["pid"] = os.getpid()
        super().__init__(config, share, **arguments)

    def train_step(self, *batch: Any, step: int, **arguments: Any) -> Any:
        if self._record["restored"] < 0:
            self._record["restored"] = step
        sums = super().train_step(*batch, step=step, **arguments)
        self._record["step"] = step + 1
        return sums
