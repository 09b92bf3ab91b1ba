"""The driver of a training: from its configuration to its record."""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from catdog import hardware
from catdog.config import TrainConfig
from catdog.ray_session import connect
from catdog.records import Record, percent
from catdog.training import checkpoint
from catdog.training.observers import ObserverFactory
from catdog.training.request import accepted

if TYPE_CHECKING:
    from catdog.calibration import CalibrationReport

logger = logging.getLogger(__name__)

_STAGES: Final = {
    "compute_s": "computing",
    "input_s": "waiting for images",
    "validation_s": "validating",
    "checkpoint_s": "saving",
}
"""What the seconds of a training go to, and how the summary calls it."""


@dataclass(frozen=True, kw_only=True)
class TrainRecord(Record):
    """What a training came to."""

    command: str = "train"
    output: str
    model_id: str
    arch: str
    resumed: bool
    """Whether the output held a part of this training, or all of it, before."""

    wall_seconds: float
    """How long this run of the command took."""

    metrics: dict[str, float]
    """Loss and accuracy of the saved model's epoch, in training and validation."""

    recall: dict[str, float | None]
    """Class → share of its validation images that the model knows; None if there are none."""

    best_epoch: int | None
    """The epoch of the saved model, where `--early-stopping` chose it by its validation loss."""

    calibration: CalibrationReport
    epochs_trained: int
    training_seconds: float
    """How long all epochs took, in all the runs that were necessary."""

    durations_s: dict[str, float]
    """Stage → its part of `training_seconds`."""

    precision: str
    """The number format of the layers' arithmetic."""

    config: dict[str, Any]
    """The configuration without secrets, and with no field left to the recipe."""

    num_repeated_steps: int
    """Steps that this run of the command did again, since workers died or their number changed after a checkpoint."""

    def summary(self) -> list[str]:
        """The saved epoch's figures, what calibration changed, and where the time went."""
        last = self.metrics
        errors = self.calibration["expected_calibration_error"]
        total = max(sum(self.durations_s[name] for name in _STAGES), 1e-9)
        shares = ", ".join(f"{percent(self.durations_s[name] / total)} {text}" for name, text in _STAGES.items())
        known = {name: share for name, share in self.recall.items() if share is not None}
        recalls = ", ".join(f"{name}s {percent(share)}" for name, share in known.items())
        chosen = []
        if self.best_epoch is not None:
            chosen = [
                f"  stopping    epoch {self.best_epoch} was the best; its validation figures are too good for that"
            ]
        return [
            f"Trained {self.arch} for {self.epochs_trained} epochs in {self.training_seconds:,.0f} s "
            f"({self.precision}).",
            f"  training    accuracy {percent(last['train_accuracy'])}, loss {last['train_loss']:.4f}",
            f"  validation  accuracy {percent(last['val_accuracy'])}, loss {last['val_loss']:.4f}",
            f"  recall      {recalls}; balanced accuracy {percent(statistics.mean(known.values()))}",
            *chosen,
            f"  calibration temperature {self.calibration['temperature']:.2f}: "
            f"ECE {errors['before']['value']:.4f}, cross-fitted {errors['after']['value']:.4f}",
            f"  time        {shares}",
            f"Model: {self.output}",
        ]


def train(
    config: TrainConfig, *, in_memory: bool | None = None, observers: Sequence[ObserverFactory] = ()
) -> TrainRecord:
    """Train a model, or go on with a training that was cut short, and write its bundle.

    Args:
        config: what to train, and how.
        in_memory: hold the decoded images in the object store, or stream them; default: whatever fits.
        observers: what watches every worker, besides what keeps the output's files and the log up to date.

    Raises:
        UsageError: the data cannot be trained on as configured, or the output holds something else or is in use.
        ClaimLostError: another run took over the output.
        StorageError: a storage kept failing.
        TrainingError: the workers kept failing, the cluster cannot hold them, or the output holds another model now.
    """
    started = time.monotonic()
    num_repeated_steps = 0
    with accepted(config) as request:
        if request.is_done:
            logger.info("%s holds this very model already", request.published["output"])
        else:
            # Training workers hold their CPUs for good; the tasks that decode for them need some of their own.
            num_cpus = request.config.num_workers * request.config.cpus_per_worker + hardware.num_cores()
            with connect(request.config.ray_address, min_cpus=num_cpus):
                from catdog.training import group

                num_repeated_steps = group.run(request, in_memory=in_memory, observers=observers)
        card, model_id = request.result()
        # Not before the workers are gone: a group that starts late would find no checkpoint, and begin anew.
        checkpoint.delete_all(request.config.output)
    return TrainRecord(
        output=request.published["output"],
        model_id=model_id,
        arch=request.config.arch,
        resumed=request.is_resumed,
        wall_seconds=round(time.monotonic() - started, 1),
        metrics=card["metrics"],
        recall={name: each["recall"]["value"] for name, each in card["validation"]["per_class"].items()},
        best_epoch=card.get("best_epoch"),
        calibration=card["calibration"],
        epochs_trained=card["epochs_trained"],
        training_seconds=card["training_seconds"],
        durations_s=card["durations_s"],
        precision=card["precision"],
        config=request.published,
        num_repeated_steps=num_repeated_steps,
    )
