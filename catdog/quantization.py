"""Whether a model may label in int8: it is quantized, calibrated anew, and compared with what it was.

Shapes: `B` images in a batch, `S` pixels per side.
"""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final, TypedDict

import numpy as np
import numpy.typing as npt

from catdog import calibration, hardware, metrics, neither, openvino_ir
from catdog.bundle import golden_images
from catdog.engines import Outputs
from catdog.engines.openvino import OpenVINOEngine
from catdog.metrics import Estimate
from catdog.neither import Gauge, NeitherCard
from catdog.openvino_ir import IR

NUM_PHOTOGRAPHS: Final = 600
"""Number of photographs of the training split from which the ranges of the feature maps are taken."""

NUM_FLOAT: Final = ((0, 0), (6, 0), (6, 2))
"""How many convolutions keep their float weights, from the first, and before the last: what is tried, until a model is
accepted. The first ones see the finest details. Those before the last give it what it makes the features of."""

MAX_ACCURACY_LOSS: Final = 0.0005
"""By how much the validation accuracy of the int8 model may be lower: 0.05 points."""

MAX_LOG_LOSS_RATIO: Final = 1.02
"""How many times as high the log loss of the int8 model may be, each model calibrated, and cross-fitted."""

_RULE: Final = (
    f"accuracy at most {100 * MAX_ACCURACY_LOSS:g} points lower, log loss at most {MAX_LOG_LOSS_RATIO - 1:.0%} higher"
)

NUM_FITTED: Final = 4000
"""Number of photographs of the training split to whose features a gauge is fitted: three for each of 1,280 features."""

LabelledBatch = tuple[npt.NDArray[np.uint8], npt.NDArray[np.integer]]
"""Images, uint8 (B, S, S, 3), with their labels."""

Batches = Callable[[], Iterable[LabelledBatch]]
"""Returns the validation split in batches, uint8 (B, S, S, 3), with their labels."""


class Figures(TypedDict):
    """How right a model is on the validation split."""

    num_images: int
    accuracy: Estimate
    log_loss: Estimate


class Int8Card(TypedDict):
    """What the card of a bundle says of the int8 model."""

    is_accepted: bool
    """Whether the bundle has the int8 model, and the `openvino` engine uses it."""

    rule: str
    """What was asked of it."""

    num_float: int
    """How many convolutions, from the first, have float weights."""

    num_late_float: int
    """How many do of those before the last."""

    temperature: float
    review_threshold: float
    golden_logits: list[float]
    neither: NeitherCard | None
    """Of the score, where the bundle has one."""

    validation: Figures
    float_validation: Figures
    """As `validation`, of the model with float weights, on the same machine."""

    float_arithmetic: str
    """Number format in which that was computed."""


@dataclass(frozen=True)
class Quantized:
    """An int8 model, and what it was found to be."""

    ir: IR
    card: Int8Card
    float_scores_N: npt.NDArray[np.float32] | None  # noqa: N815
    """The scores that the model with float weights gives the validation split."""

    def neither_card(self, gauge: Gauge | None, golden_B: npt.NDArray[np.float32] | None) -> dict[str, Any] | None:
        """What the card says of the score for float weights; None without a gauge.

        Args:
            gauge: as for `quantized`.
            golden_B: `catdog.bundle.golden_scores`.
        """
        if gauge is None or golden_B is None or self.float_scores_N is None:
            return None
        return {"kind": gauge.kind, **neither.measured(self.float_scores_N, golden_B)}


def fitted_gauge(ir: IR, image_size: int, photographs: Iterable[LabelledBatch]) -> Gauge | None:
    """A gauge of the kind `distance` for a model.

    Args:
        ir: the model with float weights.
        image_size: pixels per side, `S`.
        photographs: the training split in batches; the first `NUM_FITTED` images are used.

    Returns:
        None if the model gives no features, or numbers that are too large.
    """
    with_features = openvino_ir.with_features(ir)
    if with_features is None:
        return None
    num_parallel = hardware.num_cores()
    engine = OpenVINOEngine(with_features, image_size, is_int8=False, num_parallel=num_parallel)
    features: list[npt.NDArray[np.float32]] = []
    labels: list[npt.NDArray[np.integer]] = []
    with ThreadPoolExecutor(num_parallel) as pool:
        for images_BSSC, labels_B in photographs:
            labels.append(labels_B)
            parts = [part for part in np.array_split(images_BSSC, num_parallel) if len(part)]
            features += [outputs[1] for outputs in pool.map(engine.outputs, parts)]
            if sum(map(len, labels)) >= NUM_FITTED:
                break
    features_NF = np.concatenate(features)
    return neither.of_distance(features_NF, np.concatenate(labels)) if np.isfinite(features_NF).all() else None


def quantized(
    ir: IR,
    image_size: int,
    photographs: Iterable[npt.NDArray[np.uint8]],
    validation: Batches,
    *,
    review_precision: float,
    gauge: Gauge | None = None,
) -> Quantized:
    """Quantize a model, and compare it with what it was on the validation split.

    Args:
        ir: the model with float weights, without a score.
        image_size: pixels per side, `S`.
        photographs: of the training split, SSC; `NUM_PHOTOGRAPHS` are enough.
        validation: the validation split.
        review_precision: as for `catdog.calibration.fit`.
        gauge: what computes the score, if the bundle is to have one.
    """
    num_parallel = hardware.num_cores()
    held = list(photographs)
    before_engine = OpenVINOEngine(openvino_ir.gauged(ir, gauge), image_size, is_int8=False, num_parallel=num_parallel)
    labels_N, logits_N, float_scores_N = _outputs(before_engine, validation(), num_parallel)
    before = _figures(labels_N, logits_N)
    for num_float, num_late in NUM_FLOAT:
        small = openvino_ir.quantized_ir(ir, held, num_float=num_float, num_late=num_late)
        made = openvino_ir.gauged(small, gauge)
        engine = OpenVINOEngine(made, image_size, is_int8=True, num_parallel=num_parallel)
        labels_N, logits_N, scores_N = _outputs(engine, validation(), num_parallel)
        after = _figures(labels_N, logits_N)
        is_accepted = (
            after["accuracy"]["value"] >= before["accuracy"]["value"] - MAX_ACCURACY_LOSS
            and after["log_loss"]["value"] <= MAX_LOG_LOSS_RATIO * before["log_loss"]["value"]
        )
        if is_accepted:
            break
    calibrated = calibration.fit(labels_N, logits_N, review_precision=review_precision)
    golden = engine.predict(golden_images(image_size))
    card = Int8Card(
        is_accepted=is_accepted,
        rule=_RULE,
        num_float=num_float,
        num_late_float=num_late,
        temperature=calibrated.temperature,
        review_threshold=calibrated.review_threshold,
        golden_logits=[round(float(logit), 4) for logit in golden.logits_B],
        neither=_score_card(scores_N, golden),
        validation=after,
        float_validation=before,
        float_arithmetic=before_engine.arithmetic,
    )
    return Quantized(made, card, float_scores_N)


def _score_card(scores_N: npt.NDArray[np.float32] | None, golden: Outputs) -> NeitherCard | None:
    return None if scores_N is None or golden.neither_B is None else neither.measured(scores_N, golden.neither_B)


def _outputs(
    engine: OpenVINOEngine,
    batches: Iterable[LabelledBatch],
    num_parallel: int,
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32], npt.NDArray[np.float32] | None]:
    """The labels of images in batches, and the engine's logits and scores."""
    labels: list[npt.NDArray[np.integer]] = []
    outputs: list[Outputs] = []
    with ThreadPoolExecutor(num_parallel) as pool:
        for images_BSSC, labels_B in batches:
            labels.append(labels_B)
            outputs += pool.map(engine.predict, np.array_split(images_BSSC, num_parallel))
    scores = [each.neither_B for each in outputs if each.neither_B is not None]
    return (
        np.concatenate(labels).astype(np.int64),
        np.concatenate([each.logits_B for each in outputs]),
        np.concatenate(scores) if scores else None,
    )


def _figures(labels_N: npt.NDArray[np.int64], logits_N: npt.NDArray[np.float32]) -> Figures:
    measured = metrics.classification_metrics(labels_N, calibration.cross_fitted(labels_N, logits_N))
    return Figures(num_images=len(labels_N), accuracy=measured["accuracy"], log_loss=measured["log_loss"])
