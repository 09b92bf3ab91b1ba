"""`catdog bench chaos`: a training whose workers are killed over and over must end where the undisturbed one ends.

The data's order, the augmentation and every other random choice are functions of the seed and the step, and with a
thread per worker sums are taken in the same order every time. So the weights must be the same, to the last bit.
"""

from __future__ import annotations

import functools
import itertools
import logging
import math
import os
import signal
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, Final, Literal

import numpy as np

from catdog import __version__, bundle, storage
from catdog.bench import watched
from catdog.config import BenchChaosConfig, TrainConfig, to_dict
from catdog.dataset import reading
from catdog.errors import TrainingError, UsageError
from catdog.ray_session import cluster_address, connect
from catdog.training import train
from catdog.training.trainer import resolve

logger = logging.getLogger(__name__)

RECORD_NAME: Final = "chaos.json"
"""Written first, and again, with the record, at the end: it marks a directory as this command's."""

PARTS: Final = ("undisturbed", "disturbed")

INTERVALS_PER_KILL: Final = 2.5
"""Each kill falls somewhere in a stretch of its own: so many times the steps between two checkpoints, or more."""

POLL_S: Final = 0.001

_LIBRARIES: Final = ("keras", "numpy", "ray", "tensorflow")

Moment = Literal["in a step", "saving", "starting"]
DURATIONS_S: Final[dict[Moment, float]] = {"in a step": 0.05, "saving": 0.1, "starting": 5.0}
"""About as long as a worker takes for a few steps, to save a checkpoint of `resnet`, and from its first sign of life to
its first step: the kill comes at a random instant of that."""

MOMENTS: Final[tuple[Moment, ...]] = ("in a step", "saving", "in a step", "starting", "in a step")
"""When workers are killed, in turns: at a step drawn at random; while the first of them, who is the one, saves a
checkpoint; in quick succession, before the group that was started for the last kill gets to its first step. No two of
these follow one another: so many restarts without a checkpoint in between would end the training."""


def bench_chaos(config: BenchChaosConfig) -> dict[str, Any]:
    """Train twice, undisturbed and with workers killed, compare, and write `chaos.json`.

    Returns:
        What `chaos.json` holds: of both trainings `val_loss`, `val_accuracy` and `wall_seconds`;
        `max_weight_difference` between the saved models; `kills`, with rank, step and moment of each, and
        `kills_by_moment`; `num_restarts`; `num_lost_steps` in all and `most_lost_steps` by one kill; `num_steps` of the
        training.

    Raises:
        UsageError: the data cannot be trained on as configured, or the output holds something else.
        TrainingError: the models differ, or a kill cost more steps than lie between two checkpoints.
    """
    if (address := cluster_address(None)) is not None:
        raise UsageError(
            "bench chaos kills processes of this machine, and must have a Ray of its own. "
            f"Received: RAY_ADDRESS={address}"
        )
    output = storage.absolute(config.output)
    storage.refuse_foreign_output(output, (RECORD_NAME,), says={"command": "bench chaos"})
    num_train = reading.load_info(config.data).num_images("train")
    steps_per_epoch = max(1, num_train // config.batch_size)
    epochs = math.ceil(config.num_kills * INTERVALS_PER_KILL * config.checkpoint_steps / steps_per_epoch)
    num_steps = epochs * steps_per_epoch
    outputs = {name: storage.join(output, name) for name in PARTS}
    configs = {name: resolve(_train_config(config, outputs[name], epochs)) for name in PARTS}
    for name in PARTS:
        storage.delete(outputs[name])
    storage.publish_json(storage.join(output, RECORD_NAME), {"command": "bench chaos"})
    with (
        connect(None, min_cpus=config.num_workers + (os.cpu_count() or 1)),
        tempfile.TemporaryDirectory(prefix="catdog-bench-") as scratch,
    ):
        in_memory = False if config.streamed else None
        calm = train(configs["undisturbed"], in_memory=in_memory)
        path = os.path.join(scratch, "board")
        killer = Killer(watched.create(path, config.num_workers), config, num_steps)
        with killer:
            watched_loop = functools.partial(watched.train_loop, path)
            chaos = train(configs["disturbed"], in_memory=in_memory, train_loop=watched_loop)
    record = {
        "command": "bench chaos",
        "output": output,
        "num_kills": len(killer.kills),
        "kills": killer.kills,
        "kills_by_moment": dict(Counter(kill["moment"] for kill in killer.kills)),
        "num_restarts": killer.num_restarts,
        "num_lost_steps": sum(killer.lost_steps),
        "most_lost_steps": max(killer.lost_steps, default=0),
        "max_weight_difference": _difference(*outputs.values()),
        "num_steps": num_steps,
        **{name: _outcome(each) for name, each in (("undisturbed", calm), ("disturbed", chaos))},
        "config": to_dict(config),
        "versions": {"catdog": __version__, **{name: version(name) for name in _LIBRARIES}},
    }
    storage.publish_json(storage.join(output, RECORD_NAME), record)
    check(record)
    return record


def _train_config(config: BenchChaosConfig, output: str, epochs: int) -> TrainConfig:
    return TrainConfig(
        data=config.data,
        output=output,
        arch=config.arch,
        weights="none",
        epochs=epochs,
        batch_size=config.batch_size,
        image_size=config.image_size,
        num_workers=config.num_workers,
        checkpoint_steps=config.checkpoint_steps,
        seed=config.seed,
    )


def _outcome(record: dict[str, Any]) -> dict[str, float]:
    names = ("val_loss", "val_accuracy")
    return {**{name: record["metrics"][name] for name in names}, "wall_seconds": record["wall_seconds"]}


def _difference(*urls: str) -> float:
    """Largest absolute difference between any two weights of two bundles, BatchNormalization's statistics included.

    Kernels are compared as they are saved, rounded to float16.
    """
    one, other = (bundle.load_model(bundle.load(url)).get_weights() for url in urls)
    return float(np.max([np.max(np.abs(a - b)) for a, b in zip(one, other, strict=True)]))


def check(record: dict[str, Any]) -> None:
    """Whether the training withstood the kills.

    Raises:
        TrainingError: it did not, or there were too few.
    """
    config = record["config"]
    for name, rule, most in (
        ("max_weight_difference", "the weights must be those of the undisturbed training", 0.0),
        ("most_lost_steps", "a kill must not cost more steps than --checkpoint-steps", config["checkpoint_steps"]),
    ):
        if not record[name] <= most:
            raise TrainingError(f"{rule}. Received: {name}={record[name]:g} after {record['num_kills']} kills")
    if record["num_kills"] < config["num_kills"]:
        raise TrainingError(
            f"--num-kills={config['num_kills']} workers must be killed. Received: {record['num_kills']} killed"
        )


@dataclass(frozen=True)
class Target:
    """When to kill whom."""

    moment: Moment
    step: int
    """Not before so many steps are done."""

    rank: int


class Killer:
    """Kills workers in a thread of its own, as long as a `with` block lasts, and counts what that costs."""

    def __init__(self, board: watched.Board, config: BenchChaosConfig, num_steps: int) -> None:
        self._board = board
        self._rng = np.random.default_rng((config.seed, config.num_kills))
        self._targets = list(self._draw(config.num_kills, config.num_workers, num_steps))
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, name="catdog-killer", daemon=True)
        self.kills: list[dict[str, Any]] = []
        """`rank`, `step` (steps done; those of a group that has not taken one: -1) and `moment` of each."""

        self.num_restarts = 0
        self.lost_steps: list[int] = []
        """Steps that were done again, for every group that took over from another one."""

        self._chief = 0
        """The process that is rank 0 of the present group; 0 before there is one."""

        self._has_stepped = False
        """Whether that group has begun its first step."""

        self._reached = 0
        """Steps done by the last group that took one."""

        self._dead: set[int] = set()
        """Processes of the groups that have lost a worker."""

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_exception: object) -> None:
        self._done.set()
        self._thread.join()

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
            "saving" if rank == 0 and record["is_saving"] else "in a step" if self._has_stepped else "starting"
        )
        kill = {"rank": rank, "step": int(record["step"]), "moment": moment}
        pid = int(record["pid"])
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            self._dead.add(pid)
            return False
        self._dead |= set(self._board["pid"].tolist())
        self.kills.append(kill)
        logger.info("Killed worker %(rank)d at step %(step)d, %(moment)s", kill)
        return True

    def _wait(self, target: Target) -> bool:
        """Until it is time; False where the training has ended before."""
        record = self._board[target.rank]
        delay_s = float(self._rng.uniform(0, DURATIONS_S[target.moment]))
        due_at = math.inf
        while not self._done.wait(POLL_S):
            self._look()
            if not record["pid"] or self._dead & {self._chief, int(record["pid"])}:
                due_at = math.inf  # the next group is not there yet
            elif self._is_time(target):
                due_at = min(due_at, time.monotonic() + delay_s)
            if time.monotonic() >= due_at or (target.moment == "starting" and self._has_stepped and due_at < math.inf):
                return True
        return False

    def _is_time(self, target: Target) -> bool:
        """Whether the present group has come to the moment."""
        if target.moment == "starting":
            return True
        record = self._board[target.rank]
        return bool(
            self._has_stepped
            and record["step"] >= target.step
            and (target.moment == "in a step" or record["is_saving"])
        )

    def _look(self) -> None:
        """Take note of a new group, and of how far it is."""
        chief = self._board[0]
        if chief["pid"] != self._chief:
            self.num_restarts += self._chief != 0
            self._chief, self._has_stepped = int(chief["pid"]), False
        if not self._has_stepped and chief["restored"] >= 0:
            self._has_stepped = True
            restored = int(chief["restored"])
            if self.num_restarts:
                self.lost_steps.append(self._reached - restored)
            self._reached = restored
        if self._has_stepped:  # the maximum: a group that starts clears the records of the one before
            self._reached = max(self._reached, int(self._board["step"].max()))
