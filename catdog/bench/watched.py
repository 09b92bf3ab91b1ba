"""A training that tells other processes of this machine, step by step, how far it is and who its workers are.

The workers write into a file that is mapped into everyone's memory. Each of them has a record of its own there.
"""

from __future__ import annotations

import os
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from catdog.training.observers import Observer, WorkerInfo

RECORD: Final = np.dtype(
    [
        ("pid", np.int64),  # a worker that starts writes it last: from then on the record is that worker's
        ("restored", np.int64),  # steps done when it was ready to begin, -1 before
        ("step", np.int64),  # steps done, -1 before its first step
        ("is_saving", np.int64),  # 1 while it saves a checkpoint
    ]
)
Board = npt.NDArray[Any]
"""`RECORD`s by rank."""


def create(path: str, num_workers: int) -> Board:
    """The board of a group of workers, none of which has started."""
    board: Board = np.memmap(path, RECORD, "w+", shape=(num_workers,))
    board[:] = (0, -1, -1, 0)
    return board


class Reporter(Observer):
    """Keeps a worker's record on the board up to date."""

    def __init__(self, path: str, worker: WorkerInfo) -> None:
        board: Board = np.memmap(path, RECORD, "r+")
        self._record = board[worker.rank]
        self._record["restored"], self._record["step"], self._record["is_saving"] = -1, -1, 0
        self._record["pid"] = os.getpid()

    def started(self, step: int) -> None:
        """Write where the worker begins."""
        self._record["restored"] = step

    def stepped(self, step: int) -> None:
        """Write how far the worker is."""
        self._record["step"] = step

    def saving(self, step: int) -> None:
        """Write that the worker saves."""
        del step
        self._record["is_saving"] = 1

    def saved(self, step: int) -> None:
        """Write that the worker has saved."""
        del step
        self._record["is_saving"] = 0
