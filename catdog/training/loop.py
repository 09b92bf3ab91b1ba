"""What each training worker does."""

from __future__ import annotations

import contextlib
import math
import os
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
import ray.train

from catdog import architectures, bundle, hardware, storage
from catdog.errors import UsageError
from catdog.provenance import redact
from catdog.training import checkpoint
from catdog.training.checkpoint import Checkpoint
from catdog.training.decoding import Source
from catdog.training.epochs import Epochs, check_finite
from catdog.training.feed import Feed, Share
from catdog.training.history import best_row
from catdog.training.observers import Observer, ObserverFactory, Observers, WorkerInfo
from catdog.training.request import ResolvedTrainConfig
from catdog.training.result import Validation, save_bundle
from catdog.training.step import Arrays, Learner, resolve_precision


@dataclass(frozen=True, kw_only=True)
class Briefing:
    """What the driver settled before the workers started; the same for all of them."""

    config: ResolvedTrainConfig
    steps_per_epoch: int
    train: Source
    val: Source
    class_weights: tuple[float, float]
    """The weight of an image of each class in the loss."""

    claim_url: str
    """The file that is there as long as the driver holds the output."""

    weights: ray.ObjectRef[Any] | None
    """The file of the backbone's pretrained weights, or the Keras file of the model to start from."""

    card: dict[str, Any]
    """What the bundle's card says of data and versions."""

    observers: Sequence[ObserverFactory]
    """Of every worker."""

    chief_observers: Sequence[ObserverFactory]
    """Of the chief alone, which is the only worker that writes to the output."""


def train_loop(settings: dict[str, Any]) -> None:
    """Train to the end, as one of a group of workers. `settings["briefing"]` is a `Briefing`."""
    briefing: Briefing = settings["briefing"]
    config = briefing.config
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    hardware.configure_tensorflow(
        num_threads=config.cpus_per_worker, num_parallel=config.cpus_per_worker, use_gpu=config.use_gpu
    )
    context = ray.train.get_context()
    rank, num_workers = context.get_world_rank(), context.get_world_size()
    worker = WorkerInfo(rank=rank, num_workers=num_workers, output=config.output)
    factories = [*briefing.observers, *(briefing.chief_observers if rank == 0 else ())]
    with contextlib.closing(Observers(factories, worker)) as observers:
        latest = None
        if rank == 0:
            _check_output(config.output)
            latest = checkpoint.load_latest(config.output)
        share = Share(rank=rank, num_workers=num_workers, batch_size=config.batch_size)
        learner = Learner(
            config,
            share,
            steps_per_epoch=briefing.steps_per_epoch,
            precision=_precision(config, latest),
            class_weights=briefing.class_weights,
        )
        this_worker = _Worker(briefing, share, learner, observers, latest)
        del latest  # it takes as much memory as the model and its optimizer; the worker drops it, too
        # What one worker raises ends them all: Ray Train does not leave the others to wait for it in a collective.
        this_worker.run()


def _precision(config: ResolvedTrainConfig, latest: Checkpoint | None) -> str:
    """The precision that the training began with, or else the one that suits this machine.

    After a restart the chief may be a machine that would choose another one.
    """
    if latest is not None and latest.precision is not None:
        return latest.precision
    return resolve_precision(config.precision)


def _check_output(output: str) -> None:
    """Check that this node's output is the driver's, and remove what killed workers left there."""
    if not storage.exists(storage.join(output, checkpoint.CONFIG_NAME)):
        raise UsageError(
            "--output must be where every node of the cluster finds it: a shared directory, or object storage. "
            f"Received: --output={redact(output)}, and no {checkpoint.CONFIG_NAME} there on {socket.gethostname()}"
        )
    checkpoint.delete_temporaries(output)


class _Worker:
    """One worker's way through the training. All workers are at the same step at all times."""

    def __init__(
        self, briefing: Briefing, share: Share, learner: Learner, observers: Observer, latest: Checkpoint | None
    ) -> None:
        """Get ready.

        Args:
            briefing: what to do.
            share: this worker's share of every batch.
            learner: this worker's model.
            observers: what watches this worker.
            latest: the checkpoint that the chief found; None for the other workers.
        """
        self._briefing, self._config = briefing, briefing.config
        self._share, self._learner, self._observers = share, learner, observers
        self._is_chief = share.rank == 0
        self._latest = latest
        self._epochs = Epochs(
            briefing.config,
            learner,
            share,
            steps_per_epoch=briefing.steps_per_epoch,
            train=briefing.train,
            val=briefing.val,
            observers=observers,
            save=self._save_checkpoint,
        )
        self._best: Arrays | None = None
        """The averaged model of the best epoch, with `--early-stopping`."""

    def run(self) -> None:
        """Train from the last checkpoint to the saved bundle."""
        step = self._restore()
        if self._config.distillation_weight:
            self._learner.distil(ray.get(self._briefing.weights))
        self._observers.started(step)
        for epoch in range(step // self._briefing.steps_per_epoch, self._config.epochs):
            if self._is_stopped():
                break
            self._epochs.train(epoch, first_step=step % self._briefing.steps_per_epoch)
            step = (epoch + 1) * self._briefing.steps_per_epoch
            row = self._epochs.finish(epoch)
            if self._config.early_stopping is not None and row is best_row(self._epochs.history):
                self._best = self._learner.average_state()
            self._save_checkpoint(step, self._epochs.sums)
            self._observers.epoch_done(self._epochs.history)
            self._epochs.ticked()
            ray.train.report(row)
        validation = self._final_validation()
        self._observers.finishing()
        if self._is_chief:
            checkpoint.check_claim(self._briefing.claim_url)
            alone = Share(rank=0, num_workers=1, batch_size=self._config.batch_size)
            train_feed, val_feed = Feed(self._briefing.train, alone), Feed(self._briefing.val, alone)
            save_bundle(
                self._config,
                self._learner,
                self._epochs.history,
                validation,
                self._briefing.card,
                train_feed,
                val_feed,
            )
        ray.train.report({"epochs_done": len(self._epochs.history)})

    def _is_stopped(self) -> bool:
        """Whether the validation loss has not fallen for as many epochs as `--early-stopping` says."""
        patience, history = self._config.early_stopping, self._epochs.history
        return patience is not None and bool(history) and len(history) - best_row(history)["epoch"] >= patience

    def _final_validation(self) -> Validation:
        """The validation of the model that is saved: that of the last epoch, or of the best one."""
        if self._best is not None and self._epochs.history[-1] is not best_row(self._epochs.history):
            self._learner.load_average(self._best)
            return self._epochs.validate()
        return self._epochs.validation or self._epochs.validate()

    def _restore(self) -> int:
        """Take over the checkpoint that the chief found, or else what to start from. Returns the steps done."""
        learner, output = self._learner, self._config.output
        latest, self._latest = self._latest, None
        if latest is None and self._is_chief and self._briefing.weights is not None:
            weights, parent = ray.get(self._briefing.weights), self._config.from_
            if parent is None:
                architectures.load_weights(learner.model, self._config.arch, weights)
            else:
                architectures.load_trained(learner.model, bundle.model_of(weights, redact(parent)))
            learner.reset_average()
            latest = self._checkpoint(0, self._epochs.sums, learner.state())
            self._publish(latest)
        # All workers go on from what the chief found, whatever a worker that is still dying publishes.
        found = (latest.step if latest is not None else -1) if self._is_chief else 0
        step = int(learner.sum_over_workers(found))
        if step < 0:
            return 0
        latest = latest or checkpoint.load(output, step)
        learner.load_state(latest.arrays)
        self._best = latest.arrays.get("best")
        self._epochs.history = latest.history
        self._epochs.sums = {name: value / self._share.num_workers for name, value in latest.sums.items()}
        return step

    def _save_checkpoint(self, step: int, totals: dict[str, float]) -> None:
        """Have the chief save a checkpoint. Its state is that of every worker."""
        started = time.monotonic()
        arrays = self._learner.state()
        if not all(np.isfinite(array).all() for group in arrays.values() for array in group):
            check_finite((step - 1) // self._briefing.steps_per_epoch, math.nan)
        if self._is_chief:
            self._publish(self._checkpoint(step, totals, arrays))
            # The other workers wait as long.
            self._epochs.sums["checkpoint_s"] += (time.monotonic() - started) * self._share.num_workers

    def _checkpoint(self, step: int, sums: dict[str, float], arrays: dict[str, Any]) -> Checkpoint:
        if self._best is not None:
            arrays = {**arrays, "best": self._best}
        return Checkpoint(
            step=step, history=self._epochs.history, sums=sums, precision=self._learner.precision, arrays=arrays
        )

    def _publish(self, state: Checkpoint) -> None:
        checkpoint.check_claim(self._briefing.claim_url)
        self._observers.saving(state.step)
        checkpoint.save(self._config.output, state)
        self._observers.saved(state.step)
