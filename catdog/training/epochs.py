"""One worker's epochs: it trains on its share of every batch, and validates the averaged model."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Generator, Iterator
from typing import Final

import numpy as np

from catdog import architectures, hardware
from catdog.errors import TrainingError
from catdog.training import schedule
from catdog.training.decoding import Source
from catdog.training.feed import Feed, Share
from catdog.training.history import HistoryRow
from catdog.training.observers import Observer, Tick
from catdog.training.request import ResolvedTrainConfig
from catdog.training.result import Validation
from catdog.training.step import Learner, resolve_precision

TICK_INTERVAL_S: Final = 10.0
"""Between two ticks of a worker within an epoch."""

EPOCH_SUMS: Final = ("loss", "correct", "input_s", "compute_s", "checkpoint_s")
"""What every worker adds up in an epoch, step by step."""


class Epochs:
    """The epochs of one worker. All workers of a group are at the same step at all times."""

    def __init__(
        self,
        config: ResolvedTrainConfig,
        learner: Learner,
        share: Share,
        *,
        steps_per_epoch: int,
        train: Source,
        val: Source,
        observers: Observer | None = None,
        save: Callable[[int, dict[str, float]], None] | None = None,
    ) -> None:
        """Get ready.

        Args:
            config: what to train, and how.
            learner: this worker's model.
            share: this worker's share of every batch.
            steps_per_epoch: of the whole group.
            train: the split to train on.
            val: the split to validate on.
            observers: what watches this worker.
            save: saves the state within an epoch, given the steps done and the sums over all workers. It is called
                after every `checkpoint_steps`.
        """
        self._config, self._learner, self._share = config, learner, share
        self._steps_per_epoch = steps_per_epoch
        self._train_feed, self._val_feed = Feed(train, share), Feed(val, share)
        self._num_val = val.num_images
        self._observers = observers or Observer()
        self._save = save
        self._ticked_at = time.monotonic()
        self.history: list[HistoryRow] = []
        """A row for every epoch that is done."""

        self.sums = dict.fromkeys(EPOCH_SUMS, 0.0)
        """What this worker has added up in the epoch that is not done yet."""

        self.validation: Validation | None = None
        """Of the last epoch; None if this process has finished none."""

    def train(self, epoch: int, *, first_step: int = 0) -> None:
        """Train an epoch, which counts from 0, from one of its steps to its end.

        Raises:
            TrainingError: the loss is not finite any more.
        """
        config, learner, sums = self._config, self._learner, self.sums
        crop_scales = architectures.architecture(config.arch).recipe.crop_scales if config.augment else (1.0,)
        crop_size = schedule.crop_size(crop_scales, config.image_size, epoch, config.epochs)
        head_only = epoch < config.head_epochs
        steps = range(first_step, self._steps_per_epoch)
        batches = self._train_feed.train_batches(seed=config.seed if config.shuffle else None, epoch=epoch, steps=steps)
        with contextlib.closing(batches):
            for step in steps:
                with _timed(sums, "input_s"):
                    images_BSSC, labels_B = next(batches)
                with _timed(sums, "compute_s"):
                    position = epoch * self._steps_per_epoch + step
                    loss, num_correct = learner.train_step(
                        images_BSSC, labels_B, step=position, crop_size=crop_size, head_only=head_only
                    ).numpy()
                sums["loss"] += float(loss)
                sums["correct"] += float(num_correct)
                self._observers.stepped(position + 1)
                done = step + 1
                if self._save is not None and done % config.checkpoint_steps == 0 and done < self._steps_per_epoch:
                    totals = self._totals(epoch)
                    learner.average_moving_statistics()
                    self._save(position + 1, totals)
                if time.monotonic() - self._ticked_at >= TICK_INTERVAL_S:
                    self._observers.ticked(self._tick(epoch, done))
                    self.ticked()
        learner.average_moving_statistics()

    def ticked(self) -> None:
        """Whoever watches has just been told how far this worker is."""
        self._ticked_at = time.monotonic()

    def _tick(self, epoch: int, done: int) -> Tick:
        share, sums, num_epochs = self._share, self.sums, self._config.epochs
        seconds_per_step = (sums["input_s"] + sums["compute_s"]) / done
        last_epoch = self.history[-1] if self.history else {}
        around_s = last_epoch.get("validation_s", 0.0) + last_epoch.get("checkpoint_s", 0.0)
        steps_left = (num_epochs - epoch) * self._steps_per_epoch - done
        return Tick(
            epoch=epoch + 1,
            num_epochs=num_epochs,
            step=done,
            steps_per_epoch=self._steps_per_epoch,
            loss=sums["loss"] / (done * (share.stop - share.start)),
            images_per_s=share.batch_size / seconds_per_step,
            eta_s=steps_left * seconds_per_step + (num_epochs - epoch) * around_s,
        )

    def finish(self, epoch: int) -> HistoryRow:
        """Validate, and add the epoch's row to the history: sums over its images, and the workers' mean seconds.

        Raises:
            TrainingError: the loss is not finite any more.
        """
        started = time.monotonic()
        totals = self._totals(epoch)
        self.sums = dict.fromkeys(EPOCH_SUMS, 0.0)
        num_images = self._steps_per_epoch * self._share.batch_size
        seconds = {name: totals[name] / self._share.num_workers for name in EPOCH_SUMS if name.endswith("_s")}
        self.validation = self.validate()
        check_finite(epoch, self.validation.loss)
        seconds["validation_s"] = time.monotonic() - started
        row = {
            "epoch": float(epoch + 1),
            "train_loss": totals["loss"] / num_images,
            "train_accuracy": totals["correct"] / num_images,
            "val_loss": self.validation.loss,
            "val_accuracy": self.validation.accuracy,
            "learning_rate": self._learner.learning_rate(),
            "images_per_s": num_images / (seconds["input_s"] + seconds["compute_s"]),
            **seconds,
            "seconds": sum(seconds.values()),
        }
        self.history.append(row)
        return row

    def _totals(self, epoch: int) -> dict[str, float]:
        """The epoch's sums so far, over all workers."""
        totals = self._learner.sum_over_workers([self.sums[name] for name in EPOCH_SUMS])
        check_finite(epoch, float(totals[0]))
        return dict(zip(EPOCH_SUMS, totals.tolist(), strict=True))

    def validate(self) -> Validation:
        """Labels and logits of the whole validation split, each image once, the same on every worker."""
        values = np.zeros((2, self._num_val))
        for start, images_BSSC, labels_B in self._val_feed.all_batches(self._config.batch_size):
            values[:, start : start + len(labels_B)] = labels_B, self._learner.logits(images_BSSC)
        labels_N, logits_N = self._learner.sum_over_workers(values)
        return Validation(labels_N.astype(np.int64), logits_N)


def train_alone(
    config: ResolvedTrainConfig,
    train: Source,
    val: Source,
    *,
    weights: bytes | None = None,
    class_weights: tuple[float, float] = (1.0, 1.0),
) -> Generator[tuple[HistoryRow, Validation]]:
    """Train in this process, epoch by epoch, as a group of one worker does; nothing is saved.

    Args:
        config: what to train, and how.
        train: the split to train on.
        val: the split to validate on.
        weights: the file of the backbone's pretrained weights; None for random weights.
        class_weights: the weight of an image of each class in the loss.

    Yields:
        Of every epoch its row in the history, and the validation of the averaged model.

    Raises:
        TrainingError: the loss is not finite any more.
    """
    import keras

    keras.utils.clear_session()  # an earlier training of this process may have left its names and graphs
    num_threads = config.cpus_per_worker
    hardware.configure_tensorflow(num_threads=num_threads, num_parallel=num_threads, use_gpu=config.use_gpu)
    share = Share(rank=0, num_workers=1, batch_size=config.batch_size)
    steps_per_epoch = train.num_images // config.batch_size
    learner = Learner(
        config,
        share,
        steps_per_epoch=steps_per_epoch,
        precision=resolve_precision(config.precision),
        class_weights=class_weights,
    )
    if weights is not None:
        architectures.load_weights(learner.model, config.arch, weights)
        learner.reset_average()
        if config.distillation_weight:
            learner.distil(weights)
    epochs = Epochs(config, learner, share, steps_per_epoch=steps_per_epoch, train=train, val=val)
    for epoch in range(config.epochs):
        epochs.train(epoch)
        row = epochs.finish(epoch)
        if epochs.validation is not None:
            yield row, epochs.validation


def check_finite(epoch: int, loss: float) -> None:
    """Check the loss of an epoch, which counts from 0.

    Raises:
        TrainingError: it is not finite.
    """
    if not math.isfinite(loss):
        raise TrainingError(
            "the loss must stay finite; a lower --learning-rate may help, in another --output. "
            "The last good checkpoint is kept. "
            f"Received: loss={loss} in epoch {epoch + 1}"
        )


@contextlib.contextmanager
def _timed(sums: dict[str, float], name: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    sums[name] += time.perf_counter() - started
