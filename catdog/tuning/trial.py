"""What a trial does, in a process of its own: it trains, and reports every epoch."""

from __future__ import annotations

import gc
import os
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
import ray.tune

from catdog import calibration
from catdog.training import ResolvedTrainConfig
from catdog.training.decoding import Source
from catdog.training.epochs import train_alone
from catdog.training.history import HistoryRow
from catdog.training.result import Validation
from catdog.tuning.space import Params, apply


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """What all trials of a search share."""

    base: ResolvedTrainConfig
    """The training that the settings of a trial vary."""

    sources: Mapping[int, tuple[Source, Source]]
    """Image size → the splits to train and to validate on. All trials on a node see the same pixels in its memory."""

    weights: ray.ObjectRef[Any] | None
    """The file of the backbone's pretrained weights."""

    class_weights: tuple[float, float]
    """The weight of an image of each class in the loss."""


class Trainable(ray.tune.Trainable):  # type: ignore[misc]
    """A trial as Ray Tune runs it: each step is an epoch. One process does one trial after the other."""

    def setup(self, config: Params, assignment: Assignment) -> None:
        """Begin a trial with settings."""
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
        self._assignment = assignment
        self._begin(config)

    def step(self) -> dict[str, Any]:
        """Train an epoch, and report it."""
        row, validation = next(self._epochs)
        epoch = int(row["epoch"])
        return {
            "epoch": epoch,
            "train_loss": row["train_loss"],
            "val_log_loss": log_loss(validation),
            "val_accuracy": validation.accuracy,
            "done": epoch == self._num_epochs,
        }

    def reset_config(self, new_config: Params) -> bool:
        """Begin another trial in this process, which has TensorFlow already."""
        self.cleanup()
        gc.collect()
        self._begin(new_config)
        return True

    def cleanup(self) -> None:
        """Leave the trial."""
        self._epochs.close()

    def _begin(self, params: Params) -> None:
        given = self._assignment
        config = apply(given.base, params)
        self._num_epochs = config.epochs
        train, val = given.sources[config.image_size]
        self._epochs: Generator[tuple[HistoryRow, Validation]] = train_alone(
            config,
            train,
            val,
            weights=None if given.weights is None else ray.get(given.weights),
            class_weights=given.class_weights,
        )


def log_loss(validation: Validation) -> float:
    """The validation's mean cross-entropy at the best temperature, as the saved model would have it.

    Without that, a trial with label smoothing would seem worse than it is: its model knows as much, and says it with
    less confidence.
    """
    labels, logits = validation.labels_N, validation.logits_N
    scaled = logits / calibration.best_temperature(labels, logits)
    return float(np.mean(np.logaddexp(0, np.where(labels == 1, -scaled, scaled))))
