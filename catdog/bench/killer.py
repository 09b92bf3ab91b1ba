"""Kills the workers of a training, at moments of many kinds, and counts what that costs."""

from __future__ import annotations

import itertools
import logging
import math
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np

from catdog.bench.background import Background
from catdog.bench.watched import Board
from catdog.config import BenchChaosConfig

logger = logging.getLogger(__name__)

POLL_S: Final = 0.001

Moment = Literal["in a step", "saving", "starting"]
DURATIONS_S: Final[dict[Moment, float]] = {"in a step": 0.05, "saving": 0.1, "starting": 5.0}
"""How long each moment lasts, about: a few steps; the saving of a checkpoint of `resnet`; what a worker takes from its
first sign of life to its first step. The kill comes at a random instant of that time."""

MOMENTS: Final[tuple[Moment, ...]] = ("in a step", "saving", "in a step", "starting", "in a step")
"""When workers are killed, in turns: in a step that is drawn at random; while the chief saves a checkpoint; before the
group that was started after the last kill gets to its first step. No two kills of the last kind follow one another: so
many restarts without a checkpoint in between would end the training."""


@dataclass(frozen=True)
class Kill:
    """A worker that was killed."""

    rank: int
    step: int
    """Steps that it had done; -1 if it had taken none since it started."""

    moment: Moment


@dataclass(frozen=True)
class Target:
    """When to kill whom."""

    moment: Moment
    step: int
    """Not before so many steps are done."""

    rank: int


class Killer(Background):
    """Kills workers, in a thread, for the length of a `with` block, and counts what that costs."""

    def __init__(self, board: Board, config: BenchChaosConfig, num_steps: int) -> None:
        super().__init__()
        self._board = board
        self._rng = np.random.default_rng((config.seed, config.num_kills))
        self._targets = list(self._draw(config.num_kills, config.num_workers, num_steps))
        self.kills: list[Kill] = []
        self.num_restarts = 0
        self.lost_steps: list[int] = []
        """Steps that were done again, for every group that took over from another group."""

        self._chief = 0
        """The process that is worker 0 of the present group; 0 before there is a group."""

        self._has_begun = False
        """Whether that group is ready for its first step, or beyond it."""

        self._reached = 0
        """Steps done by the last group that was ready for one."""

        self._dead: set[int] = set()
        """The processes of all groups that have lost a worker."""

    def _draw(self, num_kills: int, num_workers: int, num_steps: int) -> Iterator[Target]:
        stretch = num_steps / num_kills
        for index, moment in zip(range(num_kills), itertools.cycle(MOMENTS), strict=False):
            step = int((index + self._rng.uniform(0, 1)) * stretch)
            yield Target(moment, step, 0 if moment == "saving" else int(self._rng.integers(num_workers)))

    def _run(self) -> None:
        for target in self._targets:
            while self._wait(target) and not self._kill(target):
                pass
        while not self._done.wait(POLL_S):
            self._look()

    def _kill(self, target: Target) -> bool:
        """Kill a worker, unless it has ended by itself."""
        rank, record = target.rank, self._board[target.rank]
        moment: Moment = (
            "saving" if rank == 0 and record["is_saving"] else "in a step" if self._has_begun else "starting"
        )
        kill = Kill(rank, int(record["step"]), moment)
        pid = int(record["pid"])
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            self._dead.add(pid)
            return False
        self._dead |= set(self._board["pid"].tolist())
        self.kills.append(kill)
        logger.info("Killed worker %d at step %d, %s", kill.rank, kill.step, kill.moment)
        return True

    def _wait(self, target: Target) -> bool:
        """Wait until it is time; False where the training has ended before."""
        record = self._board[target.rank]
        delay_s = float(self._rng.uniform(0, DURATIONS_S[target.moment]))
        due_at = math.inf
        while not self._done.wait(POLL_S):
            self._look()
            if not record["pid"] or self._dead & {self._chief, int(record["pid"])}:
                due_at = math.inf  # the next group is not there yet
            elif self._is_time(target):
                due_at = min(due_at, time.monotonic() + delay_s)
            if time.monotonic() >= due_at or (target.moment == "starting" and self._has_begun and due_at < math.inf):
                return True
        return False

    def _is_time(self, target: Target) -> bool:
        """Whether the present group has come to the moment."""
        if target.moment == "starting":
            return True
        record = self._board[target.rank]
        return bool(
            self._has_begun and record["step"] >= target.step and (target.moment == "in a step" or record["is_saving"])
        )

    def _look(self) -> None:
        """Take note of a new group, and of how far it is."""
        chief = self._board[0]
        if chief["pid"] != self._chief:
            self.num_restarts += self._chief != 0
            self._chief, self._has_begun = int(chief["pid"]), False
        if not self._has_begun and chief["restored"] >= 0:
            self._has_begun = True
            restored = int(chief["restored"])
            if self.num_restarts:
                self.lost_steps.append(self._reached - restored)
            self._reached = restored
        if self._has_begun:  # the maximum: a group that starts clears the records of the one before
            self._reached = max(self._reached, int(self._board["step"].max()))
