"""Whether a model may label in int8: it is quantized, calibrated anew, and compared with what it was.

Shapes: `B` images in a batch, `S` pixels per side.
"""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final, TypedDict

import numpy as np
import numpy.typing as npt

from catdog import calibration, hardware, metrics, openvino_ir
from catdog.bundle import golden_images
from catdog.engines.openvino import OpenVINOEngine
from catdog.metrics import Estimate
from catdog.openvino_ir import IR

NUM_PHOTOGRAPHS: Final = 300
"""Number of photographs of the training split from which the ranges of the feature maps are taken."""

NUM_FLOAT: Final = (0, 6)
"""How many convolutions, from the first, keep their float weights: what is tried, until a model is accepted. The first
ones see the finest details, and do little of the work."""

MAX_ACCURACY_LOSS: Final = 0.0005
"""By how much the validation accuracy of the int8 model may be lower: 0.05 points."""

MAX_LOG_LOSS_RATIO: Final = 1.02
"""How many times as high the log loss of the int8 model may be, each model calibrated, and cross-fitted."""

_RULE: Final = (
    f"accuracy at most {100 * MAX_ACCURACY_LOSS:g} points lower, log loss at most {MAX_LOG_LOSS_RATIO - 1:.0%} higher"
)

Batches = Callable[[], Iterable[tuple[npt.NDArray[np.uint8], npt.NDArray[np.integer]]]]
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

    temperature: float
    review_threshold: float
    golden_logits: list[float]
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


def quantized(
    ir: IR,
    image_size: int,
    photographs: Iterable[npt.NDArray[np.uint8]],
    validation: Batches,
    *,
    review_precision: float,
) -> Quantized:
    """Quantize a model, and compare it with what it was on the validation split.

    Args:
        ir: the model with float weights.
        image_size: pixels per side, `S`.
        photographs: of the training split, SSC; `NUM_PHOTOGRAPHS` are enough.
        validation: the validation split.
        review_precision: as for `catdog.calibration.fit`.
    """
    num_parallel = hardware.num_cores()
    held = list(photographs)
    before_engine = OpenVINOEngine(ir, image_size, is_int8=False, num_parallel=num_parallel)
    labels_N, logits_N = _logits(before_engine, validation(), num_parallel)
    before = _figures(labels_N, logits_N)
    for num_float in NUM_FLOAT:
        made = openvino_ir.quantized_ir(ir, held, num_float=num_float)
        engine = OpenVINOEngine(made, image_size, is_int8=True, num_parallel=num_parallel)
        labels_N, logits_N = _logits(engine, validation(), num_parallel)
        after = _figures(labels_N, logits_N)
        is_accepted = (
            after["accuracy"]["value"] >= before["accuracy"]["value"] - MAX_ACCURACY_LOSS
            and after["log_loss"]["value"] <= MAX_LOG_LOSS_RATIO * before["log_loss"]["value"]
        )
        if is_accepted:
            break
    calibrated = calibration.fit(labels_N, logits_N, review_precision=review_precision)
    card = Int8Card(
        is_accepted=is_accepted,
        rule=_RULE,
        num_float=num_float,
        temperature=calibrated.temperature,
        review_threshold=calibrated.review_threshold,
        golden_logits=[round(float(logit), 4) for logit in engine.predict(golden_images(image_size))],
        validation=after,
        float_validation=before,
        float_arithmetic=before_engine.arithmetic,
    )
    return Quantized(made, card)


def _logits(
    engine: OpenVINOEngine,
    batches: Iterable[tuple[npt.NDArray[np.uint8], npt.NDArray[np.integer]]],
    num_parallel: int,
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """The labels, and the engine's logits, of images in batches."""
    labels: list[npt.NDArray[np.integer]] = []
    logits: list[npt.NDArray[np.float32]] = []
    with ThreadPoolExecutor(num_parallel) as pool:
        for images_BSSC, labels_B in batches:
            labels.append(labels_B)
            logits += pool.map(engine.predict, np.array_split(images_BSSC, num_parallel))
    return np.concatenate(labels).astype(np.int64), np.concatenate(logits)


def _figures(labels_N: npt.NDArray[np.int64], logits_N: npt.NDArray[np.float32]) -> Figures:
    measured = metrics.classification_metrics(labels_N, calibration.cross_fitted(labels_N, logits_N))
    return Figures(num_images=len(labels_N), accuracy=measured["accuracy"], log_loss=measured["log_loss"])
