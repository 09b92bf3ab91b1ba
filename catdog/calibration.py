"""Calibration: the temperature that makes probabilities honest, and the confidence that makes a review unnecessary.

Shapes: `B` images, `L` distinct confidences, ascending. `labels_B` holds the true class of each image as an index into
`CLASS_NAMES` (0 = cat, 1 = dog), and `logits_B` the model's logit of class 1. Both have the same order, and no result
depends on that order. The images must be ones that the model was not trained on.

A probability is sigmoid(logit / temperature): Guo et al., "On calibration of modern neural networks" (ICML 2017).
Another temperature changes neither which class is the likelier one, nor the order of the images by confidence.
`probabilities` is the only function of the package that turns logits into probabilities.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, Generic, TypedDict, TypeVar

import numpy as np
import numpy.typing as npt

from catdog import metrics
from catdog.errors import UsageError
from catdog.metrics import CalibrationError, Estimate, FloatArray, IntArray, Metric
from catdog.schema import CLASS_NAMES

TEMPERATURE_BOUNDS: Final = (0.05, 20.0)
REPORTED_PRECISIONS: Final = (0.99, 0.995, 0.998, 0.999)
"""Shares of right labels for which every report gives the threshold, in addition to the share that was asked for."""

_ABOVE_ALL: Final = float(np.nextafter(np.float32(1), np.float32(2)))
_GRID_POINTS: Final = 61  # the logarithms of neighbouring temperatures are a tenth apart
_FOLD_SEED: Final = 0
_MOST_SCALE: Final = 100.0  # the likelihood is flat from there on if an infinite scale fits best


_Estimate = TypeVar("_Estimate", bound=Estimate)


class BeforeAndAfter(TypedDict, Generic[_Estimate]):
    """A metric of the probabilities before and after calibration."""

    before: _Estimate
    """With temperature 1."""

    after: _Estimate
    """Cross-fitted: on images that had no part in the choice of the temperature. See `cross_fitted`."""


class ThresholdRow(TypedDict):
    """A threshold on the confidence, and what it does on the images that it was found on."""

    requested_precision: float
    """Share of right labels that was asked for."""

    threshold: float
    """A label is kept, and needs no review, if its confidence is at least this."""

    coverage: Estimate
    """Share of images whose label is kept."""

    precision: Metric
    """Share of right labels among those that are kept."""


class CalibrationReport(TypedDict):
    """How well the calibration does on the images that it was found on."""

    num_images: int
    temperature: float
    fold_temperatures: list[float]
    """The temperatures that the two halves of the images give, each half alone."""

    log_loss: BeforeAndAfter[Estimate]
    expected_calibration_error: BeforeAndAfter[CalibrationError]
    bias_log_likelihood_ratio_p: float | None
    """P-value of the test whether a bias, added to the scaled logits, fits the labels better. It is small if the bias
    gains more than chance would, and None if every image is of one class."""

    review_precision: float
    """Share of right labels that was asked for among the images that nobody reviews."""

    thresholds: list[ThresholdRow]
    """Ascending by precision: `review_precision` and `REPORTED_PRECISIONS`."""


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What the card of a model bundle says about its probabilities."""

    temperature: float
    """The logits are divided by this before the sigmoid."""

    review_threshold: float
    """A label whose confidence is below this needs review by a person."""

    report: CalibrationReport


def fit(labels_B: npt.ArrayLike, logits_B: npt.ArrayLike, *, review_precision: float) -> Calibration:
    """Find the temperature that fits the labels best, and the confidence above which labels are right often enough.

    Args:
        labels_B: true classes, 0 or 1.
        logits_B: logits of class 1.
        review_precision: share of right labels that is asked for among the images that nobody reviews, in (0, 1].

    Raises:
        UsageError: no images, arrays of different length, a label that is neither class, a logit that is not finite, a
            precision outside (0, 1].
    """
    labels, logits = _checked(labels_B, logits_B)
    order_B = np.lexsort((logits, labels))  # because the order of the images would show in the last digit of a sum
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
            "log_loss": {"before": before["log_loss"], "after": after["log_loss"]},
            "expected_calibration_error": {
                "before": before["expected_calibration_error"],
                "after": after["expected_calibration_error"],
            },
            "bias_log_likelihood_ratio_p": _bias_p(labels, logits, temperature),
            "review_precision": review_precision,
            "thresholds": rows,
        },
    )


def best_temperature(labels_B: npt.ArrayLike, logits_B: npt.ArrayLike) -> float:
    """The temperature that `fit` finds, alone.

    Raises:
        UsageError: as `fit`.
    """
    labels, logits = _checked(labels_B, logits_B)
    return _temperature(labels, logits)


def probabilities(logits_B: npt.ArrayLike, temperature: float) -> npt.NDArray[np.float32]:
    """The probability of class 1 of each image, as float32, as predict writes it.

    The negated logits give the probability of class 0, and that is more exact than 1 minus the probability of class 1.
    """
    return _sigmoid(np.asarray(logits_B, dtype=np.float64) / temperature).astype(np.float32)


def _sigmoid(scaled_B: FloatArray) -> FloatArray:
    """1 / (1 + exp(-x)), written as exp(-log(1 + exp(-x))), which is exact to the last digits for large and small x."""
    sigmoid_B: FloatArray = np.exp(-np.logaddexp(0, -scaled_B))
    return sigmoid_B


def cross_fitted(labels_B: npt.ArrayLike, logits_B: npt.ArrayLike) -> npt.NDArray[np.float32]:
    """The calibrated probability of class 1, where no image has a part in the choice of its own temperature.

    The images are divided into two halves, and the logits of each half are divided by the temperature that fits the
    other half. The halves are drawn at random within each class; they are the same whatever the order of the images.

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
) -> list[ThresholdRow]:
    """For each precision, find the confidence above which labels are right as often as that.

    A label is kept if `confidence >= threshold`, so images of equal confidence are either all kept or all left out. The
    candidates for the threshold are `DECISION_THRESHOLD` and every confidence that occurs; it is the smallest candidate
    at which the share of right labels among all that are kept is at least the precision. That share may fall while the
    threshold rises. Still, a higher precision never gives a lower threshold, and never keeps more labels.

    If even the most confident labels are not right often enough, nothing is kept: the threshold is 1.0, or the next
    float32 above 1.0 if there are confidences that round to 1.0.

    Args:
        labels_B: true classes, 0 or 1.
        logits_B: logits of class 1.
        temperature: the logits are divided by this before the sigmoid.
        precisions: shares of right labels that are asked for, in (0, 1].

    Returns:
        One row per precision, in the same order.

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

    rows: list[ThresholdRow] = []
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
                "coverage": metrics.share(num_kept, len(labels)),
                "precision": metrics.proportion(num_right, num_kept, "no image is kept"),
            }
        )
    return rows


def _temperature(labels_B: IntArray, logits_B: FloatArray) -> float:
    """The temperature with the lowest penalised negative log-likelihood; 1 if all logits are 0.

    The likelihood alone is best at a temperature of 0 if every label is right, even if there are few labels; if few are
    wrong, it is best at a temperature that is too low. Jeffreys's prior on 1 / temperature removes that bias, and its
    weight falls as the number of images grows: Firth, "Bias reduction of maximum likelihood estimates" (Biometrika
    1993). For the case that every label is right: Heinze and Schemper, "A solution to the problem of separation in
    logistic regression" (Statistics in Medicine 2002).
    """
    largest = np.abs(logits_B).max(initial=0)
    if not largest:
        return 1.0
    from scipy import optimize, special

    margins_B = np.where(labels_B == 1, logits_B, -logits_B)
    squares_B = np.square(logits_B / largest)  # the unit does not matter, and this one does not overflow

    def loss(temperature: float) -> float:
        scaled_B = margins_B / temperature
        sizes_B = np.abs(scaled_B)
        logs_B = np.log1p(np.exp(-sizes_B))
        log_information = special.logsumexp(-sizes_B - 2 * logs_B, b=squares_B)  # logarithm of Σ z² p (1 - p)
        return float(np.sum(np.maximum(-scaled_B, 0) + logs_B) - log_information / 2)

    # With few images that are all right, the loss may have several minima: the grid finds the lowest.
    grid = np.geomspace(*TEMPERATURE_BOUNDS, _GRID_POINTS)
    lowest = int(np.argmin([loss(temperature) for temperature in grid]))
    around = np.log(grid[[max(lowest - 1, 0), min(lowest + 1, _GRID_POINTS - 1)]])
    found = optimize.minimize_scalar(
        lambda x: loss(np.exp(x)), bounds=around, method="bounded", options={"xatol": 1e-8}
    )
    return float(min(grid[lowest], np.exp(found.x), key=loss))  # the search never quite reaches its bounds


def _cross_fitted(labels_B: IntArray, logits_B: FloatArray) -> tuple[npt.NDArray[np.float32], list[float]]:
    """What `cross_fitted` returns, for sorted images, and the temperature that each half gives."""
    rng = np.random.default_rng(_FOLD_SEED)
    # Every second image of the sorted ones would make two halves that are nearly the same, and so hide the noise.
    shuffled_B = np.concatenate([rng.permutation(np.flatnonzero(labels_B == k)) for k in range(len(CLASS_NAMES))])
    folds = shuffled_B[::2], shuffled_B[1::2]
    temperatures = [_temperature(labels_B[fold], logits_B[fold]) for fold in folds]
    prob_dog_B = np.empty(len(labels_B), np.float32)
    for fold, temperature in zip(folds, reversed(temperatures), strict=True):
        prob_dog_B[fold] = probabilities(logits_B[fold], temperature)
    return prob_dog_B, temperatures


def _bias_p(labels_B: IntArray, logits_B: FloatArray, temperature: float) -> float | None:
    """P-value of the likelihood-ratio test that compares sigmoid(a z) with sigmoid(a z + b), z = logit / temperature.

    The second is the scaling of Platt, "Probabilistic outputs for support vector machines" (1999).
    """
    if len(np.unique(labels_B)) < len(CLASS_NAMES):
        return None
    from scipy import optimize, stats

    scaled_B = logits_B / temperature

    def loss(scale_and_bias: FloatArray) -> tuple[float, FloatArray]:
        sums_B = scale_and_bias[0] * scaled_B + scale_and_bias[1]
        slopes_B = _sigmoid(sums_B) - labels_B
        losses_B = np.logaddexp(0, np.where(labels_B == 1, -sums_B, sums_B))
        return float(losses_B.sum()), np.array([slopes_B @ scaled_B, slopes_B.sum()])

    without, with_bias = (
        optimize.minimize(loss, (1.0, 0.0), jac=True, method="L-BFGS-B", bounds=((0, _MOST_SCALE), bias)).fun
        for bias in ((0, 0), (None, None))
    )
    return float(stats.chi2.sf(2 * max(0.0, without - with_bias), df=1))


def _sums_from(count_L: npt.NDArray[np.int64]) -> IntArray:
    """For each level, the sum of the counts from that level to the last."""
    return np.cumsum(count_L[::-1])[::-1]


def _checked(labels_B: npt.ArrayLike, logits_B: npt.ArrayLike) -> tuple[IntArray, FloatArray]:
    """Labels and logits as arrays; `UsageError` if a label is not 0 or 1, or a logit is not finite."""
    labels, logits = metrics.checked_labels(labels_B, logits_B, "logits"), np.asarray(logits_B, dtype=np.float64)
    odd = logits[~np.isfinite(logits)]
    if len(odd):
        raise UsageError(f"logits must be finite. Received: {odd[0]}")
    return labels, logits
