"""Logits to probabilities that hold what they say, and to the confidence from which nobody need look again.

Shapes: `B` images, `L` distinct confidences, ascending. `labels_B` holds the true class as an index into `CLASS_NAMES`
(0 = cat, 1 = dog), `logits_B` the model's logit of class 1, both in the same order; no number depends on that order.
They are of images that the model was not trained on.

A probability is sigmoid(logit / temperature): Guo et al., "On calibration of modern neural networks" (ICML 2017). What
is the likelier class stays it, and so does the order of the images by confidence.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from catdog import metrics
from catdog.errors import UsageError
from catdog.metrics import FloatArray, IntArray
from catdog.schema import CLASS_NAMES

TEMPERATURE_BOUNDS: Final = (0.05, 20.0)
REPORTED_PRECISIONS: Final = (0.99, 0.995, 0.998, 0.999)
"""Shares of right labels for which a report gives the threshold, beside the one asked for."""

_ABOVE_ALL: Final = float(np.nextafter(np.float32(1), np.float32(2)))
_GRID_POINTS: Final = 61  # temperatures a tenth apart in their logarithm
_FOLD_SEED: Final = 0
_MOST_SCALE: Final = 100.0  # where a scale without end fits best, the likelihood is flat by then


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What a bundle's card says of its probabilities."""

    temperature: float
    """What the logits are divided by before the sigmoid."""

    review_threshold: float
    """Confidence below which a person should look."""

    report: dict[str, Any]
    """How well that does on the images it was found on, as JSON: `num_images`; `temperature`; `fold_temperatures`, what
    each half of the images gives alone; the metrics `log_loss` and `expected_calibration_error`, each `before` and
    `after`, where after is cross-fitted; `bias_log_likelihood_ratio_p`, small where a bias added to the scaled logits
    would fit better than chance makes it, None where every image is of one class; `review_precision`; `thresholds`."""


def fit(labels_B: npt.ArrayLike, logits_B: npt.ArrayLike, *, review_precision: float) -> Calibration:
    """The temperature that fits the labels best, and the confidence from which they are right often enough.

    Args:
        labels_B: true classes, 0 or 1.
        logits_B: logits of class 1.
        review_precision: share of right labels among those that no person looks at, in (0, 1].

    Raises:
        UsageError: no images, arrays of different length, a label that is neither class, a logit that is not finite, a
            precision outside (0, 1].
    """
    labels, logits = _checked(labels_B, logits_B)
    order_B = np.lexsort((logits, labels))  # so that the order of the images does not show in the last digit
    labels, logits = labels[order_B], logits[order_B]
    temperature = _temperature(labels, logits)
    before = metrics.classification_metrics(labels, probabilities(logits, 1.0))
    prob_dog_B, fold_temperatures = _cross_fitted(labels, logits)
    after = metrics.classification_metrics(labels, prob_dog_B)
    precisions = sorted({*REPORTED_PRECISIONS, review_precision})
    rows = thresholds(labels, logits, temperature=temperature, precisions=precisions)
    return Calibration(
        temperature=temperature,
        review_threshold=rows[precisions.index(review_precision)]["threshold"],
        report={
            "num_images": len(labels),
            "temperature": temperature,
            "fold_temperatures": fold_temperatures,
            **{
                name: {"before": before[name], "after": after[name]}
                for name in ("log_loss", "expected_calibration_error")
            },
            "bias_log_likelihood_ratio_p": _bias_p(labels, logits, temperature),
            "review_precision": review_precision,
            "thresholds": rows,
        },
    )


def probabilities(logits_B: npt.ArrayLike, temperature: float) -> npt.NDArray[np.float32]:
    """The probability of class 1, float32, as in predict's output; of negated logits, that of class 0."""
    scaled_B = np.asarray(logits_B, dtype=np.float64) / temperature
    # sigmoid(x) = exp(-log(1 + exp(-x))), which keeps its digits at both ends.
    return np.exp(-np.logaddexp(0, -scaled_B)).astype(np.float32)


def cross_fitted(labels_B: npt.ArrayLike, logits_B: npt.ArrayLike) -> npt.NDArray[np.float32]:
    """The calibrated probability of class 1 of images that had no say in their temperature.

    Each half of the images is scaled with the temperature that fits the other half. Every second image of a random
    order within each class makes a half, the same images however they come.

    Raises:
        UsageError: as `fit`.
    """
    labels, logits = _checked(labels_B, logits_B)
    order_B = np.lexsort((logits, labels))
    prob_dog_B = np.empty(len(labels), np.float32)
    prob_dog_B[order_B] = _cross_fitted(labels[order_B], logits[order_B])[0]
    return prob_dog_B


def thresholds(
    labels_B: npt.ArrayLike, logits_B: npt.ArrayLike, *, temperature: float, precisions: Iterable[float]
) -> list[dict[str, Any]]:
    """From which confidence on labels are right as often as asked for.

    A label is kept where `confidence >= threshold`, so that images of equal confidence are kept or left together. The
    threshold is the smallest of `DECISION_THRESHOLD` and of the confidences seen at which the kept labels, all of them
    taken together, are right often enough. As the threshold rises, their precision need not; but a higher precision
    never has a lower threshold, nor keeps more. Where not even the surest images reach it, the threshold is 1.0, or the
    next float32 above 1.0 where confidences round to 1.0, so that nothing is kept.

    Args:
        labels_B: true classes, 0 or 1.
        logits_B: logits of class 1.
        temperature: what the logits are divided by before the sigmoid.
        precisions: shares of right labels, in (0, 1].

    Returns:
        Per precision, in the same order, `requested_precision`, `threshold`, and the metrics `coverage`, the share of
        images kept, and `precision`, the share of right labels among those.

    Raises:
        UsageError: as `fit`.
    """
    labels, logits = _checked(labels_B, logits_B)
    is_right_B = metrics.predicted_classes(probabilities(logits, temperature)) == labels
    levels_L, level_B, count_L = np.unique(
        probabilities(np.abs(logits), temperature), return_inverse=True, return_counts=True
    )
    num_kept_L = _sums_from(count_L)
    num_right_L = _sums_from(np.bincount(level_B, is_right_B).astype(np.int64))
    precision_L = num_right_L / num_kept_L

    rows = []
    for precision in precisions:
        if not 0 < precision <= 1:
            raise UsageError(f"a precision must be above 0 and at most 1. Received: {precision}")
        reached = np.flatnonzero(precision_L >= precision)
        if len(reached):
            first = reached[0]
            threshold = float(levels_L[first]) if first else metrics.DECISION_THRESHOLD
            num_right, num_kept = int(num_right_L[first]), int(num_kept_L[first])
        else:
            threshold = 1.0 if levels_L[-1] < 1 else _ABOVE_ALL
            num_right, num_kept = 0, 0
        rows.append(
            {
                "requested_precision": precision,
                "threshold": threshold,
                "coverage": metrics.proportion(num_kept, len(labels), "there are no images"),
                "precision": metrics.proportion(num_right, num_kept, "no image is kept"),
            }
        )
    return rows


def _temperature(labels_B: IntArray, logits_B: FloatArray) -> float:
    """The temperature of the lowest penalised negative log-likelihood; 1 where nothing speaks for any.

    Alone, the likelihood asks for a temperature of 0 as soon as every label is right, however few there are, and for
    one too low where few are wrong. Jeffreys's prior on 1 / temperature takes off that bias, and counts for less the
    more images there are: Firth, "Bias reduction of maximum likelihood estimates" (Biometrika 1993); where every label
    is right, Heinze and Schemper, "A solution to the problem of separation in logistic regression" (Statistics in
    Medicine 2002).
    """
    largest = np.abs(logits_B).max(initial=0)
    if not largest:
        return 1.0
    from scipy import optimize, special

    margins_B = np.where(labels_B == 1, logits_B, -logits_B)
    squares_B = np.square(logits_B / largest)  # in a unit that neither overflows nor matters

    def loss(temperature: float) -> float:
        scaled_B = margins_B / temperature
        sizes_B = np.abs(scaled_B)
        logs_B = np.log1p(np.exp(-sizes_B))
        log_information = special.logsumexp(-sizes_B - 2 * logs_B, b=squares_B)  # of Σ z² p (1 - p)
        return float(np.sum(np.maximum(-scaled_B, 0) + logs_B) - log_information / 2)

    # Few images that are all right may have more than one valley: the grid finds the deepest.
    grid = np.geomspace(*TEMPERATURE_BOUNDS, _GRID_POINTS)
    lowest = int(np.argmin([loss(temperature) for temperature in grid]))
    around = np.log(grid[[max(lowest - 1, 0), min(lowest + 1, _GRID_POINTS - 1)]])
    found = optimize.minimize_scalar(
        lambda x: loss(np.exp(x)), bounds=around, method="bounded", options={"xatol": 1e-8}
    )
    return float(min(grid[lowest], np.exp(found.x), key=loss))  # the search stays just short of its bounds


def _cross_fitted(labels_B: IntArray, logits_B: FloatArray) -> tuple[npt.NDArray[np.float32], list[float]]:
    """Out-of-fold probabilities of sorted images, and the temperature that each half gives."""
    rng = np.random.default_rng(_FOLD_SEED)
    # At random, not every second of the sorted: halves that are near copies of each other would hide the noise.
    shuffled_B = np.concatenate([rng.permutation(np.flatnonzero(labels_B == k)) for k in range(len(CLASS_NAMES))])
    folds = shuffled_B[::2], shuffled_B[1::2]
    temperatures = [_temperature(labels_B[fold], logits_B[fold]) for fold in folds]
    prob_dog_B = np.empty(len(labels_B), np.float32)
    for fold, temperature in zip(folds, reversed(temperatures), strict=True):
        prob_dog_B[fold] = probabilities(logits_B[fold], temperature)
    return prob_dog_B, temperatures


def _bias_p(labels_B: IntArray, logits_B: FloatArray, temperature: float) -> float | None:
    """P-value of the likelihood-ratio test of sigmoid(a z + b), with b = 0 and without (Platt scaling, 1999)."""
    if len(np.unique(labels_B)) < len(CLASS_NAMES):
        return None
    from scipy import optimize, stats

    scaled_B = logits_B / temperature

    def loss(scale_and_bias: FloatArray) -> tuple[float, FloatArray]:
        sums_B = scale_and_bias[0] * scaled_B + scale_and_bias[1]
        slopes_B = np.exp(-np.logaddexp(0, -sums_B)) - labels_B
        losses_B = np.logaddexp(0, np.where(labels_B == 1, -sums_B, sums_B))
        return float(losses_B.sum()), np.array([slopes_B @ scaled_B, slopes_B.sum()])

    without, with_bias = (
        optimize.minimize(loss, (1.0, 0.0), jac=True, method="L-BFGS-B", bounds=((0, _MOST_SCALE), bias)).fun
        for bias in ((0, 0), (None, None))
    )
    return float(stats.chi2.sf(2 * max(0.0, without - with_bias), df=1))


def _sums_from(count_L: npt.NDArray[np.int64]) -> IntArray:
    """Of each level, the sum from it to the last."""
    return np.cumsum(count_L[::-1])[::-1]


def _checked(labels_B: npt.ArrayLike, logits_B: npt.ArrayLike) -> tuple[IntArray, FloatArray]:
    """Both as arrays of one length, labels 0 or 1 and logits finite, or `UsageError`."""
    labels, logits = metrics.checked_labels(labels_B, logits_B, "logits"), np.asarray(logits_B, dtype=np.float64)
    odd = logits[~np.isfinite(logits)]
    if len(odd):
        raise UsageError(f"logits must be finite. Received: {odd[0]}")
    return labels, logits
