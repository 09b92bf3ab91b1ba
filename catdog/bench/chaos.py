"""`catdog bench chaos`: a training whose workers are killed over and over must end where the undisturbed one ends.

The data's order, the augmentation and every other random choice are functions of the seed and the step, and with a
thread per worker sums are taken in the same order every time. So the weights must be the same, to the last bit.
"""

from __future__ import annotations

import functools
import math
import os
from collections import Counter
from dataclasses import dataclass
from typing import ClassVar, Final

import numpy as np

from catdog import bundle, hardware, scratch, storage
from catdog.bench import watched
from catdog.bench.killer import Kill, Killer
from catdog.bench.record import Begun, BenchRecord, refuse_cluster
from catdog.config import BenchChaosConfig, TrainConfig
from catdog.dataset import reading
from catdog.errors import TrainingError
from catdog.ray_session import connect
from catdog.records import counted, percent, plural
from catdog.training import ResolvedTrainConfig, TrainRecord, resolve, train

PARTS: Final = ("undisturbed", "disturbed")

INTERVALS_PER_KILL: Final = 2.5
"""Each kill falls somewhere in a stretch of the training that has no other kill in it. A stretch has at least so many
times the steps between two checkpoints."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How one of the two trainings ended."""

    val_loss: float
    val_accuracy: float
    wall_seconds: float


@dataclass(frozen=True, kw_only=True)
class BenchChaosRecord(BenchRecord):
    """What `chaos.json` holds."""

    file_name: ClassVar[str] = "chaos.json"

    command: str = "bench chaos"
    num_kills: int
    kills: list[Kill]
    kills_by_moment: dict[str, int]
    num_restarts: int
    num_lost_steps: int
    """Steps that were done again, after all kills together."""

    most_lost_steps: int
    """Steps that were done again after one kill, at most."""

    max_weight_difference: float
    """Largest difference between any two weights of the two saved models."""

    num_steps: int
    """Of each of the two trainings."""

    undisturbed: Outcome
    disturbed: Outcome

    def summary(self) -> list[str]:
        """Both trainings side by side."""
        calm, chaos = self.undisturbed, self.disturbed
        return [
            f"Killed {plural(self.num_kills, 'worker')} of a training of {self.num_steps:,} steps: "
            f"{counted(self.kills_by_moment)}.",
            f"  restarts    {self.num_restarts:,}; {self.num_lost_steps:,} steps done again, "
            f"at most {self.most_lost_steps:,} at once, with {self.config['checkpoint_steps']:,} "
            "between checkpoints",
            f"  weights     differ by at most {self.max_weight_difference:g}",
            f"  validation  accuracy {percent(chaos.val_accuracy)}, loss {chaos.val_loss:.6f}; "
            f"undisturbed {percent(calm.val_accuracy)}, {calm.val_loss:.6f}",
            f"  time        {chaos.wall_seconds:,.0f} s; undisturbed {calm.wall_seconds:,.0f} s",
            f"Chaos: {self.output}",
        ]


def bench_chaos(config: BenchChaosConfig) -> BenchChaosRecord:
    """Train twice, undisturbed and with workers killed, compare, and write `chaos.json`.

    Raises:
        UsageError: the data cannot be trained on as configured, or the output holds something else.
        TrainingError: the models differ, or a kill cost more steps than lie between two checkpoints.
    """
    refuse_cluster(BenchChaosRecord)
    begun = Begun(BenchChaosRecord, config)
    num_train = reading.load_info(config.data).num_images("train")
    steps_per_epoch = max(1, num_train // config.batch_size)
    epochs = math.ceil(config.num_kills * INTERVALS_PER_KILL * config.checkpoint_steps / steps_per_epoch)
    num_steps = epochs * steps_per_epoch
    outputs = {name: storage.join(begun.output, name) for name in PARTS}
    configs = {name: resolve(_train_config(config, outputs[name], epochs)) for name in PARTS}
    begun.claim(PARTS)
    with connect(None, min_cpus=config.num_workers + hardware.num_cores()):
        calm = train(configs["undisturbed"], in_memory=_in_memory(config))
        chaos, killer = _train_disturbed(config, configs["disturbed"], num_steps)
    record = BenchChaosRecord(
        num_kills=len(killer.kills),
        kills=killer.kills,
        kills_by_moment=dict(Counter(kill.moment for kill in killer.kills)),
        num_restarts=killer.num_restarts,
        num_lost_steps=sum(killer.lost_steps),
        most_lost_steps=max(killer.lost_steps, default=0),
        max_weight_difference=_difference(*outputs.values()),
        num_steps=num_steps,
        undisturbed=_outcome(calm),
        disturbed=_outcome(chaos),
        **begun.common(),
    )
    begun.publish(record)
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


def _train_disturbed(
    config: BenchChaosConfig, training: ResolvedTrainConfig, num_steps: int
) -> tuple[TrainRecord, Killer]:
    """Train while workers are killed."""
    with scratch.directory("bench") as directory:
        path = os.path.join(directory, "board")
        killer = Killer(watched.create(path, config.num_workers), config, num_steps)
        with killer:
            reporter = functools.partial(watched.Reporter, path)
            return train(training, in_memory=_in_memory(config), observers=[reporter]), killer


def _in_memory(config: BenchChaosConfig) -> bool | None:
    return False if config.streamed else None


def _outcome(record: TrainRecord) -> Outcome:
    return Outcome(
        val_loss=record.metrics["val_loss"],
        val_accuracy=record.metrics["val_accuracy"],
        wall_seconds=record.wall_seconds,
    )


def _difference(*urls: str) -> float:
    """Largest absolute difference between any two weights of two bundles, BatchNormalization's statistics included.

    Kernels are compared as they are saved, rounded to float16.
    """
    one, other = (bundle.load_model(bundle.load(url)).get_weights() for url in urls)
    return float(np.max([np.max(np.abs(a - b)) for a, b in zip(one, other, strict=True)]))


def check(record: BenchChaosRecord) -> None:
    """Check that the training withstood the kills.

    Raises:
        TrainingError: it did not, or there were too few kills.
    """
    config = record.config
    after = f"after {record.num_kills} kills"
    if not record.max_weight_difference <= 0:  # a difference may be no number
        raise TrainingError(
            "the weights must be those of the undisturbed training. "
            f"Received: max_weight_difference={record.max_weight_difference:g} {after}"
        )
    if record.most_lost_steps > config["checkpoint_steps"]:
        raise TrainingError(
            "a kill must not cost more steps than --checkpoint-steps. "
            f"Received: most_lost_steps={record.most_lost_steps} {after}"
        )
    if record.num_kills < config["num_kills"]:
        raise TrainingError(
            f"--num-kills={config['num_kills']} workers must be killed. Received: {record.num_kills} killed"
        )
