"""What each training worker does."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import ray
import ray.train

from catdog import architectures, bundle, calibration, metrics, report, storage
from catdog.config import TrainConfig, to_dict
from catdog.errors import TrainingError, UsageError
from catdog.training import checkpoint, schedule
from catdog.training.checkpoint import Checkpoint
from catdog.training.decoding import Source
from catdog.training.feed import Feed, Share
from catdog.training.progress import Teller, Tick
from catdog.training.recorder import Recorder, Row, history_files
from catdog.training.schedule import resolved
from catdog.training.step import Learner, resolve_precision

logger = logging.getLogger(__name__)

RELIABILITY_NAME: Final = "reliability.png"

EPOCH_SUMS: Final = ("loss", "correct", "input_s", "compute_s", "checkpoint_s")
"""What an epoch adds up, step by step, on every worker."""


_ELSEWHERE: Final = ("data", "output", "ray_address")
"""Fields that say where, not what: a card travels, and holds the data's digest."""

STAGES: Final = ("input_s", "compute_s", "checkpoint_s", "validation_s")
"""What a training's seconds go to."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What the driver settled before the workers started; the same for all of them."""

    config: TrainConfig
    """With no field left to the recipe."""

    steps_per_epoch: int
    train: Source
    val: Source
    weights: ray.ObjectRef[Any] | None
    """The file of the backbone's pretrained weights."""

    card: dict[str, Any]
    """What the bundle's card says of data, configuration and versions."""

    progress: Any
    """The queue of a `Teller`."""


def train_loop(settings: dict[str, Any]) -> None:
    """Train to the end of the plan, as one of a group of workers. `settings["plan"]` is a `Plan`."""
    plan: Plan = settings["plan"]
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(plan.config.cpus_per_worker)
    tf.config.threading.set_inter_op_parallelism_threads(plan.config.cpus_per_worker)
    context = ray.train.get_context()
    rank = context.get_world_rank()
    share = Share(rank=rank, num_workers=context.get_world_size(), batch_size=resolved(plan.config.batch_size))
    # First of all: TensorFlow joins the group before it runs anything.
    learner = Learner(
        plan.config,
        share,
        steps_per_epoch=plan.steps_per_epoch,
        precision=resolve_precision(plan.config.precision),
    )
    if rank == 0:
        _check_output(plan.config.output)
    with contextlib.ExitStack() as stack:
        recorder = stack.enter_context(Recorder(plan.config.output)) if rank == 0 else None
        # What one worker raises ends them all: Ray Train does not leave the others to wait for it in a collective.
        _Worker(plan, share, learner, recorder).run()


def _check_output(output: str) -> None:
    """That this node's output is the driver's; what killed workers left there is removed."""
    if not storage.exists(storage.join(output, checkpoint.CONFIG_NAME)):
        raise UsageError(
            "--output must be where every node of the cluster finds it: a shared directory, or object storage. "
            f"Received: --output={output}, and no {checkpoint.CONFIG_NAME} there on {socket.gethostname()}"
        )
    checkpoint.delete_temporaries(output)


class _Worker:
    """One worker's way through the plan. All workers are at the same step at all times."""

    def __init__(self, plan: Plan, share: Share, learner: Learner, recorder: Recorder | None) -> None:
        self._plan, self._config = plan, plan.config
        self._share, self._learner = share, learner
        self._recorder = recorder
        """Open in the chief, the group's first worker, alone: it is who writes."""
        self._teller = Teller(plan.progress)
        self._train_feed, self._val_feed = Feed(plan.train, share), Feed(plan.val, share)
        self._history: list[Row] = []
        self._sums = dict.fromkeys(EPOCH_SUMS, 0.0)
        self._verdict: _Validation | None = None

    def run(self) -> None:
        """From the last checkpoint to the saved bundle."""
        step = self._restore()
        for epoch in range(step // self._plan.steps_per_epoch, resolved(self._config.epochs)):
            self._train_epoch(epoch, first_step=step % self._plan.steps_per_epoch)
            step = (epoch + 1) * self._plan.steps_per_epoch
            row = self._finish_epoch(epoch)
            self._save_checkpoint(step, self._sums)
            if self._recorder is not None:
                self._recorder.record(self._history)
                self._teller.tell(row)
            ray.train.report(row)
        validation = self._verdict or self._validate()
        if self._recorder is not None:
            self._save_bundle(validation)
        ray.train.report({"epochs_done": len(self._history)})

    def _restore(self) -> int:
        """Take over the last checkpoint, the chief's choice; without one, the pretrained weights. Steps done so far."""
        learner, output = self._learner, self._config.output
        latest = checkpoint.load_latest(output) if self._recorder is not None else None
        if latest is None and self._recorder is not None and self._plan.weights is not None:
            architectures.load_weights(learner.model, self._config.arch, ray.get(self._plan.weights))
            learner.reset_average()
            latest = Checkpoint(step=0, history=[], sums=self._sums, arrays=learner.state())
            checkpoint.save(output, latest)
        # All workers go on from what the chief found, whatever a worker that is still dying publishes.
        step = int(learner.sum_over_workers(latest.step if latest is not None else -1 if self._recorder else 0))
        if step < 0:
            return 0
        latest = latest or checkpoint.load(output, step)
        learner.load_state(latest.arrays)
        self._history = latest.history
        self._sums = {name: value / self._share.num_workers for name, value in latest.sums.items()}
        return step

    def _train_epoch(self, epoch: int, first_step: int) -> None:
        plan, config, learner, sums = self._plan, self._config, self._learner, self._sums
        num_epochs = resolved(config.epochs)
        crop_scales = architectures.architecture(config.arch).recipe.crop_scales if config.augment else (1.0,)
        crop_size = schedule.crop_size(crop_scales, resolved(config.image_size), epoch, num_epochs)
        head_only = epoch < resolved(config.head_epochs)
        steps = range(first_step, plan.steps_per_epoch)
        batches = self._train_feed.train_batches(seed=config.seed if config.shuffle else None, epoch=epoch, steps=steps)
        with contextlib.closing(batches):
            for step in steps:
                with _timed(sums, "input_s"):
                    images_BSSC, labels_B = next(batches)
                with _timed(sums, "compute_s"):
                    position = epoch * plan.steps_per_epoch + step
                    loss, num_correct = learner.train_step(
                        images_BSSC, labels_B, step=position, crop_size=crop_size, head_only=head_only
                    ).numpy()
                sums["loss"] += float(loss)
                sums["correct"] += float(num_correct)
                done = step + 1
                if done % config.checkpoint_steps == 0 and done < plan.steps_per_epoch:
                    totals = self._totals(epoch)
                    learner.average_moving_statistics()
                    self._save_checkpoint(position + 1, totals)
                if self._recorder is not None and self._teller.is_due():
                    self._tell(epoch, done)
        learner.average_moving_statistics()

    def _tell(self, epoch: int, done: int) -> None:
        plan, share, sums = self._plan, self._share, self._sums
        seconds_per_step = (sums["input_s"] + sums["compute_s"]) / done
        num_epochs = resolved(self._config.epochs)
        last_epoch = self._history[-1] if self._history else {}
        around_s = last_epoch.get("validation_s", 0.0) + last_epoch.get("checkpoint_s", 0.0)
        steps_left = (num_epochs - epoch) * plan.steps_per_epoch - done
        tick = Tick(
            epoch=epoch + 1,
            num_epochs=num_epochs,
            step=done,
            steps_per_epoch=plan.steps_per_epoch,
            loss=sums["loss"] / (done * (share.stop - share.start)),
            images_per_s=share.batch_size / seconds_per_step,
            eta_s=steps_left * seconds_per_step + (num_epochs - epoch) * around_s,
        )
        self._teller.tell(tick)
        if self._recorder is not None:
            values = {"train/loss": tick.loss, "train/images_per_s": tick.images_per_s}
            self._recorder.scalars(values, step=epoch * plan.steps_per_epoch + done)

    def _finish_epoch(self, epoch: int) -> Row:
        """The epoch's row of the history: sums over its images, and the mean of the workers' seconds."""
        started = time.monotonic()
        totals = self._totals(epoch)
        self._sums = dict.fromkeys(EPOCH_SUMS, 0.0)
        num_images = self._plan.steps_per_epoch * self._share.batch_size
        seconds = {name: totals[name] / self._share.num_workers for name in EPOCH_SUMS if name.endswith("_s")}
        self._verdict = self._validate()
        self._check_finite(epoch, self._verdict.loss)
        seconds["validation_s"] = time.monotonic() - started
        row = {
            "epoch": float(epoch + 1),
            "train_loss": totals["loss"] / num_images,
            "train_accuracy": totals["correct"] / num_images,
            "val_loss": self._verdict.loss,
            "val_accuracy": self._verdict.accuracy,
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
                "the loss must stay finite; a lower --learning-rate may help. The last good checkpoint is kept. "
                f"Received: loss={loss} in epoch {epoch + 1}"
            )

    def _validate(self) -> _Validation:
        """Labels and logits of the whole validation split, each image once, the same on every worker."""
        size = resolved(self._config.batch_size)
        values = np.zeros((2, self._plan.val.num_images))
        for start, images_BSSC, labels_B in self._val_feed.all_batches(size):
            values[:, start : start + len(labels_B)] = labels_B, self._learner.logits(images_BSSC)
        labels_N, logits_N = self._learner.sum_over_workers(values)
        return _Validation(labels_N.astype(np.int64), logits_N)

    def _save_checkpoint(self, step: int, totals: dict[str, float]) -> None:
        """The chief alone saves; the state is the same everywhere."""
        started = time.monotonic()
        arrays = self._learner.state()
        if not all(np.isfinite(array).all() for group in arrays.values() for array in group):
            self._check_finite((step - 1) // self._plan.steps_per_epoch, math.nan)
        if self._recorder is None:
            return
        state = Checkpoint(step=step, history=self._history, sums=totals, arrays=arrays)
        checkpoint.save(self._config.output, state)
        self._sums["checkpoint_s"] += (time.monotonic() - started) * self._share.num_workers  # the others wait

    def _save_bundle(self, validation: _Validation) -> None:
        config, history = self._config, self._history
        last = history[-1]
        labels_N, logits_N = validation.labels_N, validation.logits_N
        calibrated = calibration.fit(labels_N, logits_N, review_precision=config.review_precision)
        prob_dog_N = calibration.cross_fitted(labels_N, logits_N)
        model = architectures.exported(self._learner.average, config.arch)
        card = {
            "arch": config.arch,
            "image_size": config.image_size,
            "temperature": calibrated.temperature,
            "review_threshold": calibrated.review_threshold,
            "metrics": {name: last[name] for name in ("train_loss", "train_accuracy", "val_loss", "val_accuracy")},
            "validation": metrics.classification_metrics(labels_N, prob_dog_N),
            "calibration": calibrated.report,
            "epochs_trained": len(history),
            "training_seconds": round(sum(row["seconds"] for row in history), 1),
            "durations_s": {name: round(sum(row[name] for row in history), 1) for name in STAGES},
            "precision": self._learner.precision,
            "num_parameters": model.count_params(),
            **self._plan.card,
            "training_config": {name: value for name, value in to_dict(config).items() if name not in _ELSEWHERE},
        }
        files = history_files(history) | {
            RELIABILITY_NAME: report.reliability(
                labels_N,
                {"as trained": calibration.probabilities(logits_N, 1.0), "calibrated, cross-fitted": prob_dog_N},
            )
        }
        bundle.save(config.output, model, card, extra_files=files)


@dataclass(frozen=True)
class _Validation:
    """What the averaged model makes of the validation split."""

    labels_N: npt.NDArray[np.int64]  # noqa: N815
    logits_N: npt.NDArray[np.float64]  # noqa: N815

    @property
    def loss(self) -> float:
        """Mean cross-entropy."""
        return float(np.mean(np.logaddexp(0, np.where(self.labels_N == 1, -self.logits_N, self.logits_N))))

    @property
    def accuracy(self) -> float:
        """Share of right answers."""
        return float(np.mean((self.logits_N > 0) == (self.labels_N == 1)))


@contextlib.contextmanager
def _timed(sums: dict[str, float], name: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    sums[name] += time.perf_counter() - started
