"""What each training worker does."""

from __future__ import annotations

import contextlib
import math
import os
import socket
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import ray
import ray.train

from catdog import architectures, bundle, hardware, storage
from catdog.errors import TrainingError, UsageError
from catdog.provenance import redact
from catdog.training import checkpoint, schedule
from catdog.training.checkpoint import Checkpoint
from catdog.training.decoding import Source
from catdog.training.feed import Feed, Share
from catdog.training.history import HistoryRow, best_row
from catdog.training.observers import Observer, ObserverFactory, Observers, Tick, WorkerInfo
from catdog.training.request import ResolvedTrainConfig
from catdog.training.result import Validation, save_bundle
from catdog.training.step import Arrays, Learner, resolve_precision

TICK_INTERVAL_S: Final = 10.0
"""Between two ticks of a worker within an epoch."""

EPOCH_SUMS: Final = ("loss", "correct", "input_s", "compute_s", "checkpoint_s")
"""What every worker adds up in an epoch, step by step."""


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
        self._train_feed, self._val_feed = Feed(briefing.train, share), Feed(briefing.val, share)
        self._history: list[HistoryRow] = []
        self._sums = dict.fromkeys(EPOCH_SUMS, 0.0)
        self._validation: Validation | None = None
        self._best: Arrays | None = None
        """The averaged model of the best epoch, with `--early-stopping`."""

        self._ticked_at = time.monotonic()

    def run(self) -> None:
        """Train from the last checkpoint to the saved bundle."""
        step = self._restore()
        self._observers.started(step)
        for epoch in range(step // self._briefing.steps_per_epoch, self._config.epochs):
            if self._is_stopped():
                break
            self._train_epoch(epoch, first_step=step % self._briefing.steps_per_epoch)
            step = (epoch + 1) * self._briefing.steps_per_epoch
            row = self._finish_epoch(epoch)
            if self._config.early_stopping is not None and row is best_row(self._history):
                self._best = self._learner.average_state()
            self._save_checkpoint(step, self._sums)
            self._observers.epoch_done(self._history)
            self._ticked_at = time.monotonic()
            ray.train.report(row)
        validation = self._final_validation()
        self._observers.finishing()
        if self._is_chief:
            checkpoint.check_claim(self._briefing.claim_url)
            alone = Share(rank=0, num_workers=1, batch_size=self._config.batch_size)
            train_feed, val_feed = Feed(self._briefing.train, alone), Feed(self._briefing.val, alone)
            save_bundle(
                self._config, self._learner, self._history, validation, self._briefing.card, train_feed, val_feed
            )
        ray.train.report({"epochs_done": len(self._history)})

    def _is_stopped(self) -> bool:
        """Whether the validation loss has not fallen for as many epochs as `--early-stopping` says."""
        patience, history = self._config.early_stopping, self._history
        return patience is not None and bool(history) and len(history) - best_row(history)["epoch"] >= patience

    def _final_validation(self) -> Validation:
        """The validation of the model that is saved: that of the last epoch, or of the best one."""
        if self._best is not None and self._history[-1] is not best_row(self._history):
            self._learner.load_average(self._best)
            return self._validate()
        return self._validation or self._validate()

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
            latest = self._checkpoint(0, self._sums, learner.state())
            self._publish(latest)
        # All workers go on from what the chief found, whatever a worker that is still dying publishes.
        found = (latest.step if latest is not None else -1) if self._is_chief else 0
        step = int(learner.sum_over_workers(found))
        if step < 0:
            return 0
        latest = latest or checkpoint.load(output, step)
        learner.load_state(latest.arrays)
        self._best = latest.arrays.get("best")
        self._history = latest.history
        self._sums = {name: value / self._share.num_workers for name, value in latest.sums.items()}
        return step

    def _train_epoch(self, epoch: int, first_step: int) -> None:
        config, learner, sums = self._config, self._learner, self._sums
        steps_per_epoch = self._briefing.steps_per_epoch
        crop_scales = architectures.architecture(config.arch).recipe.crop_scales if config.augment else (1.0,)
        crop_size = schedule.crop_size(crop_scales, config.image_size, epoch, config.epochs)
        head_only = epoch < config.head_epochs
        steps = range(first_step, steps_per_epoch)
        batches = self._train_feed.train_batches(seed=config.seed if config.shuffle else None, epoch=epoch, steps=steps)
        with contextlib.closing(batches):
            for step in steps:
                with _timed(sums, "input_s"):
                    images_BSSC, labels_B = next(batches)
                with _timed(sums, "compute_s"):
                    position = epoch * steps_per_epoch + step
                    loss, num_correct = learner.train_step(
                        images_BSSC, labels_B, step=position, crop_size=crop_size, head_only=head_only
                    ).numpy()
                sums["loss"] += float(loss)
                sums["correct"] += float(num_correct)
                self._observers.stepped(position + 1)
                done = step + 1
                if done % config.checkpoint_steps == 0 and done < steps_per_epoch:
                    totals = self._totals(epoch)
                    learner.average_moving_statistics()
                    self._save_checkpoint(position + 1, totals)
                if time.monotonic() - self._ticked_at >= TICK_INTERVAL_S:
                    self._observers.ticked(self._tick(epoch, done))
                    self._ticked_at = time.monotonic()
        learner.average_moving_statistics()

    def _tick(self, epoch: int, done: int) -> Tick:
        share, sums, num_epochs = self._share, self._sums, self._config.epochs
        steps_per_epoch = self._briefing.steps_per_epoch
        seconds_per_step = (sums["input_s"] + sums["compute_s"]) / done
        last_epoch = self._history[-1] if self._history else {}
        around_s = last_epoch.get("validation_s", 0.0) + last_epoch.get("checkpoint_s", 0.0)
        steps_left = (num_epochs - epoch) * steps_per_epoch - done
        return Tick(
            epoch=epoch + 1,
            num_epochs=num_epochs,
            step=done,
            steps_per_epoch=steps_per_epoch,
            loss=sums["loss"] / (done * (share.stop - share.start)),
            images_per_s=share.batch_size / seconds_per_step,
            eta_s=steps_left * seconds_per_step + (num_epochs - epoch) * around_s,
        )

    def _finish_epoch(self, epoch: int) -> HistoryRow:
        """Validate, and add the epoch's row to the history: sums over its images, and the workers' mean seconds."""
        started = time.monotonic()
        totals = self._totals(epoch)
        self._sums = dict.fromkeys(EPOCH_SUMS, 0.0)
        num_images = self._briefing.steps_per_epoch * self._share.batch_size
        seconds = {name: totals[name] / self._share.num_workers for name in EPOCH_SUMS if name.endswith("_s")}
        self._validation = self._validate()
        self._check_finite(epoch, self._validation.loss)
        seconds["validation_s"] = time.monotonic() - started
        row = {
            "epoch": float(epoch + 1),
            "train_loss": totals["loss"] / num_images,
            "train_accuracy": totals["correct"] / num_images,
            "val_loss": self._validation.loss,
            "val_accuracy": self._validation.accuracy,
            "learning_rate": self._learner.learning_rate(),
            "images_per_s": num_images / (seconds["input_s"] + seconds["compute_s"]),
            **seconds,
            "seconds": sum(seconds.values()),
        }
        self._history.append(row)
        return row

    def _totals(self, epoch: int) -> dict[str, float]:
        """The epoch's sums so far, over all workers."""
        totals = self._learner.sum_over_workers([self._sums[name] for name in EPOCH_SUMS])
        self._check_finite(epoch, float(totals[0]))
        return dict(zip(EPOCH_SUMS, totals.tolist(), strict=True))

    def _check_finite(self, epoch: int, loss: float) -> None:
        if not math.isfinite(loss):
            raise TrainingError(
                "the loss must stay finite; a lower --learning-rate may help, in another --output. "
                "The last good checkpoint is kept. "
                f"Received: loss={loss} in epoch {epoch + 1}"
            )

    def _validate(self) -> Validation:
        """Labels and logits of the whole validation split, each image once, the same on every worker."""
        values = np.zeros((2, self._briefing.val.num_images))
        for start, images_BSSC, labels_B in self._val_feed.all_batches(self._config.batch_size):
            values[:, start : start + len(labels_B)] = labels_B, self._learner.logits(images_BSSC)
        labels_N, logits_N = self._learner.sum_over_workers(values)
        return Validation(labels_N.astype(np.int64), logits_N)

    def _save_checkpoint(self, step: int, totals: dict[str, float]) -> None:
        """Have the chief save a checkpoint. Its state is that of every worker."""
        started = time.monotonic()
        arrays = self._learner.state()
        if not all(np.isfinite(array).all() for group in arrays.values() for array in group):
            self._check_finite((step - 1) // self._briefing.steps_per_epoch, math.nan)
        if self._is_chief:
            self._publish(self._checkpoint(step, totals, arrays))
            # The other workers wait as long.
            self._sums["checkpoint_s"] += (time.monotonic() - started) * self._share.num_workers

    def _checkpoint(self, step: int, sums: dict[str, float], arrays: dict[str, Any]) -> Checkpoint:
        if self._best is not None:
            arrays = {**arrays, "best": self._best}
        return Checkpoint(step=step, history=self._history, sums=sums, precision=self._learner.precision, arrays=arrays)

    def _publish(self, state: Checkpoint) -> None:
        checkpoint.check_claim(self._briefing.claim_url)
        self._observers.saving(state.step)
        checkpoint.save(self._config.output, state)
        self._observers.saved(state.step)


@contextlib.contextmanager
def _timed(sums: dict[str, float], name: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    sums[name] += time.perf_counter() - started
