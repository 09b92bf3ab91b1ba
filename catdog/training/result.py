"""What a training ends with: the validation of its model, and the bundle.

Shapes: `N` images in the validation split.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from catdog import architectures, bundle, calibration, metrics, neither, openvino_ir, provenance, quantization, report
from catdog.neither import Gauge
from catdog.openvino_ir import IR
from catdog.training.feed import Feed
from catdog.training.history import HistoryRow, best_row, history_files
from catdog.training.request import ResolvedTrainConfig
from catdog.training.step import Learner

RELIABILITY_NAME: Final = "reliability.png"

STAGES: Final = ("input_s", "compute_s", "checkpoint_s", "validation_s")
"""What the seconds of a training go to."""

_ELSEWHERE: Final = ("data", "output", "ray_address", "from_")
"""Fields that say where a model was made, not what it is: a card travels, and holds the data's digest."""


@dataclass(frozen=True)
class Validation:
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


def save_bundle(
    config: ResolvedTrainConfig,
    learner: Learner,
    history: Sequence[HistoryRow],
    validation: Validation,
    card: dict[str, Any],
    train_feed: Feed,
    val_feed: Feed,
) -> None:
    """Calibrate the averaged model on the validation split, quantize it, and write its bundle.

    Args:
        config: what was trained, and how.
        learner: holds the model.
        history: a row per epoch.
        validation: of the model as it is.
        card: what the driver says of data and versions.
        train_feed: the whole training split.
        val_feed: the whole validation split.
    """
    saved = history[-1] if config.early_stopping is None else best_row(history)
    labels_N, logits_N = validation.labels_N, validation.logits_N
    calibrated = calibration.fit(labels_N, logits_N, review_precision=config.review_precision)
    prob_dog_N = calibration.cross_fitted(labels_N, logits_N)
    model = architectures.exported(learner.average, config.arch)
    ir = openvino_ir.float_ir(model, config.image_size)
    gauge = _gauge(ir, config, train_feed, learner.classifier)
    photographs = (image for _, images, _ in train_feed.all_batches(config.batch_size) for image in images)
    int8 = quantization.quantized(
        ir,
        config.image_size,
        itertools.islice(photographs, quantization.NUM_PHOTOGRAPHS),
        lambda: ((images, labels) for _, images, labels in val_feed.all_batches(config.batch_size)),
        review_precision=config.review_precision,
        gauge=gauge,
    )
    full_card = {
        "arch": config.arch,
        "image_size": config.image_size,
        "temperature": calibrated.temperature,
        "review_threshold": calibrated.review_threshold,
        "metrics": {
            "train_loss": saved["train_loss"],
            "train_accuracy": saved["train_accuracy"],
            "val_loss": validation.loss,
            "val_accuracy": validation.accuracy,
        },
        "validation": metrics.classification_metrics(labels_N, prob_dog_N),
        "calibration": calibrated.report,
        "epochs_trained": len(history),
        "best_epoch": None if config.early_stopping is None else int(saved["epoch"]),
        "training_seconds": round(sum(row["seconds"] for row in history), 1),
        "durations_s": {name: round(sum(row[name] for row in history), 1) for name in STAGES},
        "precision": learner.precision,
        "num_parameters": model.count_params(),
        "int8": int8.card,
        "neither": int8.neither_card(gauge, bundle.golden_scores(model, gauge, config.image_size)),
        **card,
        "training_config": {
            name: value for name, value in provenance.configuration(config).items() if name not in _ELSEWHERE
        },
    }
    diagram = report.reliability(
        labels_N, {"as trained": calibration.probabilities(logits_N, 1.0), "calibrated, cross-fitted": prob_dog_N}
    )
    irs: dict[bundle.Weights, IR] = {"float": openvino_ir.gauged(ir, gauge)}
    if int8.card["is_accepted"]:
        irs["int8"] = int8.ir
    extra_files = history_files(history) | {RELIABILITY_NAME: diagram}
    bundle.save(config.output, model, full_card, irs=irs, gauge=gauge, extra_files=extra_files)


def _gauge(
    ir: IR, config: ResolvedTrainConfig, train_feed: Feed, classifier: architectures.Classifier | None
) -> Gauge | None:
    """What tells cats and dogs from other things: the published network's classifier, or else a distance."""
    if classifier is not None:
        return neither.of_classes(classifier.kernel_FC, classifier.bias_C, classifier.kin)
    batches = ((images, labels) for _, images, labels in train_feed.all_batches(config.batch_size))
    return quantization.fitted_gauge(ir, config.image_size, batches)
