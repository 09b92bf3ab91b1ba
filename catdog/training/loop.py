"""What each training worker does."""

from __future__ import annotations

import contextlib
import csv
import io
import logging
import math
import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import ray.train

from catdog import bundle, report, storage
from catdog.config import TrainConfig, to_dict
from catdog.errors import TrainingError
from catdog.training import checkpoint
from catdog.training.checkpoint import Checkpoint
from catdog.training.feed import Feed
from catdog.training.step import Learner, resolve_precision

logger = logging.getLogger(__name__)

HISTORY_NAME: Final = "history.csv"
CURVES_NAME: Final = "curves.png"
TENSORBOARD_DIRECTORY: Final = "tensorboard"

REVIEW_THRESHOLD: Final = 0.9
"""Confidence below which a person should look: calls out a few percent of ordinary pictures."""

History = list[dict[str, float]]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What the driver settled before the workers started; the same for all of them."""

    config: TrainConfig
    """With no field left to the recipe."""

    steps_per_epoch: int
    in_memory: bool
    card: dict[str, Any]
    """What the bundle's card says of data, configuration and versions."""

    progress: Any
    """A `ray.util.queue.Queue` that takes a row of the history per epoch, or the `TrainingError` that ended them."""


def resolved(value: int | None) -> int:
    """A field that the driver has filled from the recipe."""
    if value is None:
        raise ValueError("the plan's configuration must have no field left to the recipe")
    return value


def train_loop(settings: dict[str, Any]) -> None:
    """Train to the end of the plan, as one of a group of workers. `settings["plan"]` is a `Plan`."""
    plan: Plan = settings["plan"]
    config = plan.config
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(config.cpus_per_worker)
    tf.config.threading.set_inter_op_parallelism_threads(config.cpus_per_worker)
    learner = Learner(
        config,
        num_steps=resolved(config.epochs) * plan.steps_per_epoch,
        image_size=resolved(config.image_size),
        precision=resolve_precision(config.precision),
    )
    is_chief = ray.train.get_context().get_world_rank() == 0
    with contextlib.ExitStack() as stack:
        recorder = stack.enter_context(Recorder(config.output)) if is_chief else None
        try:
            history, best_weights = _fit(plan, learner, recorder)
        except TrainingError as error:
            # Every worker comes to the same conclusion, and would again: a failure would have Ray Train start anew.
            if is_chief:
                plan.progress.put(error)
            return
    learner.load_state({"model": best_weights, "optimizer": learner.state()["optimizer"]})
    if recorder is not None:
        _save_bundle(plan, learner, history)
    ray.train.report({"epochs_done": len(history)})


def _fit(plan: Plan, learner: Learner, recorder: Recorder | None) -> tuple[History, list[Any]]:
    """Train epoch by epoch, from the last checkpoint on. Returns the history and the best epoch's weights."""
    config = plan.config
    train_feed = Feed(ray.train.get_dataset_shard("train"), plan.in_memory)
    val_feed = Feed(ray.train.get_dataset_shard("val"), plan.in_memory)
    # All workers go on from the checkpoint that the chief chose, whatever a worker that is still dying publishes.
    latest = checkpoint.load_latest(config.output) if recorder is not None else None
    epoch = int(learner.sum_over_workers(latest.epoch if latest is not None else 0))
    history: History = []
    best_weights = learner.state()["model"]
    if epoch:
        latest = latest or checkpoint.load(config.output, epoch)
        learner.load_state(latest.arrays)
        history, best_weights = latest.history, latest.arrays["best"]

    while epoch < resolved(config.epochs) and epoch - best_epoch(history) < config.patience:
        started = time.monotonic()
        row = {"epoch": float(epoch + 1)}
        row |= _train_epoch(plan, learner, train_feed, epoch)
        row |= _validate(plan, learner, val_feed)
        row |= {"learning_rate": learner.learning_rate(), "seconds": time.monotonic() - started}
        history.append(row)
        epoch += 1
        if best_epoch(history) == epoch:
            best_weights = learner.state()["model"]
        if recorder is not None:
            arrays = learner.state() | {"best": best_weights}
            checkpoint.save(config.output, Checkpoint(epoch=epoch, history=history, arrays=arrays))
            recorder.record(history)
            plan.progress.put(row)
        ray.train.report(row)
    return history, best_weights


def best_epoch(history: History) -> int:
    """The epoch, from 1, with the lowest validation loss; 0 before the first."""
    return int(min(history, key=lambda row: row["val_loss"])["epoch"]) if history else 0


def _train_epoch(plan: Plan, learner: Learner, feed: Feed, epoch: int) -> dict[str, float]:
    config = plan.config
    context = ray.train.get_context()
    rank, num_workers = context.get_world_rank(), context.get_world_size()
    batch_size = resolved(config.batch_size) // num_workers
    batches = feed.train_batches(
        num_batches=plan.steps_per_epoch,
        batch_size=batch_size,
        shuffle_seed=(config.seed, epoch, rank) if config.shuffle else None,
    )
    totals = np.zeros(2)
    for step, (images_BSSC, labels_B) in enumerate(batches, start=epoch * plan.steps_per_epoch):
        seed = (config.seed, step * num_workers + rank)
        totals += np.asarray(learner.train_step(images_BSSC, labels_B, seed=seed))
    learner.average_moving_statistics()
    loss_sum, num_correct = learner.sum_over_workers(totals)
    num_images = plan.steps_per_epoch * batch_size * num_workers
    loss = loss_sum / num_images
    if not math.isfinite(loss):
        raise TrainingError(
            "the training loss must stay finite; a lower --learning-rate may help. "
            f"Received: loss={loss} in epoch {epoch + 1}"
        )
    return {"train_loss": float(loss), "train_accuracy": float(num_correct / num_images)}


def _validate(plan: Plan, learner: Learner, feed: Feed) -> dict[str, float]:
    """Loss and accuracy over the whole validation split, each image counted once."""
    batch_size = resolved(plan.config.batch_size)
    totals = np.zeros(3)
    for images_BSSC, labels_B in feed.all_batches(batch_size):
        totals[:2] += np.asarray(learner.validate(images_BSSC, labels_B))
        totals[2] += len(labels_B)
    loss_sum, num_correct, num_images = learner.sum_over_workers(totals)
    return {"val_loss": float(loss_sum / num_images), "val_accuracy": float(num_correct / num_images)}


class Recorder:
    """Keeps what a person looks at up to date: `history.csv`, `curves.png` and TensorBoard's events."""

    def __init__(self, output: str) -> None:
        self._output = output
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Recorder:
        """Open an event file."""
        import tensorflow as tf

        self._local = Path(self._stack.enter_context(tempfile.TemporaryDirectory()))
        self._writer = tf.summary.create_file_writer(str(self._local))
        self._stack.callback(self._writer.close)
        return self

    def __exit__(self, *_exception: object) -> None:
        """Close it."""
        self._stack.close()

    def record(self, history: History) -> None:
        """Publish the history, its curves, and its last row's events."""
        import tensorflow as tf

        storage.publish_bytes(storage.join(self._output, HISTORY_NAME), history_csv(history))
        storage.publish_bytes(storage.join(self._output, CURVES_NAME), report.curves(history))
        row = history[-1]
        with self._writer.as_default(step=int(row["epoch"])):
            for name, value in row.items():
                if name != "epoch":
                    tf.summary.scalar(name, value)
        self._writer.flush()
        for path in self._local.iterdir():
            storage.publish_file(storage.join(self._output, TENSORBOARD_DIRECTORY, path.name), str(path))


def history_csv(history: History) -> bytes:
    """The history as CSV, a row per epoch."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(history[0]), lineterminator="\n")
    writer.writeheader()
    for row in history:
        writer.writerow({name: int(value) if name == "epoch" else f"{value:.6g}" for name, value in row.items()})
    return text.getvalue().encode()


def _save_bundle(plan: Plan, learner: Learner, history: History) -> None:
    config = plan.config
    best = history[best_epoch(history) - 1]
    card = {
        "arch": config.arch,
        "image_size": config.image_size,
        "temperature": 1.0,
        "review_threshold": REVIEW_THRESHOLD,
        "metrics": {name: best[name] for name in ("train_loss", "train_accuracy", "val_loss", "val_accuracy")},
        "best_epoch": int(best["epoch"]),
        "epochs_trained": len(history),
        "training_seconds": round(sum(row["seconds"] for row in history), 1),
        "precision": learner.precision,
        "num_parameters": learner.model.count_params(),
        **plan.card,
        "training_config": to_dict(config),
    }
    extra_files = {HISTORY_NAME: history_csv(history), CURVES_NAME: report.curves(history)}
    bundle.save(config.output, learner.model, card, extra_files=extra_files)
    checkpoint.delete_all(config.output)
