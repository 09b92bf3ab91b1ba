"""Metrics of a classifier of cats and dogs, each with its 95 % confidence interval.

Shapes: `B` images, `M` cats and `N` dogs among them; `C` = 2 classes; `K` calibration bins. `labels_B` holds the true
class of each image as an index into `CLASS_NAMES` (0 = cat, 1 = dog), and `prob_dog_B` its probability of class 1. Both
have the same order, and no metric depends on that order.

The results are written into JSON files and read back, so their types are those that JSON has.
"""

from collections.abc import Sequence
from typing import Final, Literal, TypeAlias, TypedDict

import numpy as np
import numpy.typing as npt

from catdog.errors import UsageError
from catdog.schema import CLASS_NAMES

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

DECISION_THRESHOLD: Final = 0.5
"""An image is called a dog if its `prob_dog` is at least this. Calibration by temperature changes no such decision."""

NUM_CALIBRATION_BINS: Final = 15  # of Guo et al., "On calibration of modern neural networks", ICML 2017
NUM_BOOTSTRAP_SAMPLES: Final = 1000
_BOOTSTRAP_SEED: Final = 0
_Z95: Final = 1.959963984540054  # 97.5 % quantile of the standard normal distribution
_SMALLEST_PROB: Final = float(np.finfo(np.float32).eps)  # so that the log loss stays finite; as in scikit-learn


class Estimate(TypedDict):
    """A metric that has a value."""

    value: float
    ci95: list[float]
    """The lower and the upper end of the 95 % confidence interval."""


class Undefined(TypedDict):
    """A metric that has no value for these images, as ROC AUC has none if every image is of one class."""

    value: None
    ci95: None
    reason: str
    """Why there is no value, as the end of the sentence "undefined: ..."."""


Metric: TypeAlias = Estimate | Undefined


class CalibrationError(Estimate):
    """What `expected_calibration_error` gives, with its interval."""

    norm: Literal["l2"]
    """How the errors of the bins are averaged: the root of the mean of their squares."""


class ClassMetrics(TypedDict):
    """How well the images of one class are told from those of the other."""

    precision: Metric
    """Share of images of this class among those predicted to be of it."""

    recall: Metric
    """Share of images predicted to be of this class among those that are of it."""

    f1: Metric
    """Harmonic mean of precision and recall."""

    support: int
    """Number of images of this class."""


class ClassificationMetrics(TypedDict):
    """Every metric of a two-class classifier."""

    num_images: int
    class_counts: dict[str, int]
    """Class name → number of images of that class."""

    accuracy: Estimate
    balanced_accuracy: Metric
    """Mean of the recalls of both classes. It does not depend on how many images each of them has."""

    roc_auc: Metric
    log_loss: Estimate
    """Mean negative natural logarithm of the probability of the true class."""

    brier_score: Estimate
    """Mean squared difference between `prob_dog` and the label."""

    expected_calibration_error: CalibrationError
    per_class: dict[str, ClassMetrics]
    """Class name → metrics of that class."""

    confusion_matrix: list[list[int]]
    """Numbers of images: a row per true class, a column per predicted class."""


class ReviewMetrics(TypedDict):
    """What it brings to leave the doubtful images to a person.

    This is selective classification: El-Yaniv and Wiener, JMLR 2010.
    """

    coverage: Estimate
    """Share of images that need no review."""

    selective_accuracy: Metric
    """Accuracy on the images that need no review."""


def classification_metrics(labels_B: npt.ArrayLike, prob_dog_B: npt.ArrayLike) -> ClassificationMetrics:
    """Compute every metric of a two-class classifier.

    Args:
        labels_B: true classes, 0 or 1.
        prob_dog_B: probability of class 1, in [0, 1].

    Raises:
        UsageError: no images, arrays of different length, a label that is neither class, a probability outside [0, 1].
    """
    labels_B, prob_dog_B = _checked(labels_B, prob_dog_B)
    matrix = confusion_matrix(labels_B, prob_dog_B)
    log_loss, brier_score, calibration_error = _bootstrapped(labels_B, prob_dog_B)
    per_class = {name: _class_metrics(matrix, index) for index, name in enumerate(CLASS_NAMES)}
    return {
        "num_images": len(labels_B),
        "class_counts": {name: int(count) for name, count in zip(CLASS_NAMES, matrix.sum(axis=1), strict=True)},
        "accuracy": share(int(np.trace(matrix)), len(labels_B)),
        "balanced_accuracy": _balanced_accuracy([each["recall"] for each in per_class.values()]),
        "roc_auc": roc_auc(labels_B, prob_dog_B),
        "log_loss": log_loss,
        "brier_score": brier_score,
        "expected_calibration_error": calibration_error,
        "per_class": per_class,
        "confusion_matrix": matrix.tolist(),
    }


def review_metrics(labels_B: npt.ArrayLike, prob_dog_B: npt.ArrayLike, needs_review_B: npt.ArrayLike) -> ReviewMetrics:
    """Measure how many images need no review, and how many of those are right.

    Args:
        labels_B: true classes, 0 or 1.
        prob_dog_B: probability of class 1, in [0, 1].
        needs_review_B: bool, true where a person should look.

    Raises:
        UsageError: as `classification_metrics`.
    """
    labels_B, prob_dog_B = _checked(labels_B, prob_dog_B)
    kept_B = ~np.asarray(needs_review_B, dtype=np.bool_)
    num_kept = int(kept_B.sum())
    num_right = int((predicted_classes(prob_dog_B) == labels_B)[kept_B].sum())
    return {
        "coverage": share(num_kept, len(labels_B)),
        "selective_accuracy": proportion(num_right, num_kept, "every image needs review"),
    }


def text(metric: Metric, *, percent: bool = False) -> str:
    """Write a metric as people read it.

    Example:
        >>> text({"value": 0.9643, "ci95": [0.9191, 0.9847]}, percent=True)
        '96.43 % (95 % interval 91.91 to 98.47)'
        >>> text({"value": None, "ci95": None, "reason": "every image is of one class"})
        'undefined: every image is of one class'
    """
    if metric["value"] is None:
        return f"undefined: {metric['reason']}"
    low, high = metric["ci95"]
    if percent:
        return f"{100 * metric['value']:.2f} % (95 % interval {100 * low:.2f} to {100 * high:.2f})"
    return f"{metric['value']:.4f} (95 % interval {low:.4f} to {high:.4f})"


def predicted_classes(prob_dog_B: npt.ArrayLike) -> IntArray:
    """The class of each image, 0 or 1, from its probability of class 1."""
    return (np.asarray(prob_dog_B) >= DECISION_THRESHOLD).astype(np.int64)


def confusion_matrix(labels_B: npt.ArrayLike, prob_dog_B: npt.ArrayLike) -> IntArray:
    """The number of images by true class (rows) and predicted class (columns), shape (2, 2)."""
    labels_B, prob_dog_B = _checked(labels_B, prob_dog_B)
    cells_B = 2 * labels_B + predicted_classes(prob_dog_B)
    return np.bincount(cells_B, minlength=4).reshape(2, 2).astype(np.int64)


def share(num_hits: int, num_trials: int) -> Estimate:
    """The share of hits among trials, of which there is at least one, with Wilson's score interval."""
    from scipy import stats

    interval = stats.binomtest(num_hits, num_trials).proportion_ci(confidence_level=0.95, method="wilson")
    return _estimate(num_hits / num_trials, interval.low, interval.high)


def proportion(num_hits: int, num_trials: int, undefined: str) -> Metric:
    """What `share` gives; if there are no trials, an undefined metric with the reason `undefined`."""
    return share(num_hits, num_trials) if num_trials else _undefined(undefined)


def _log_losses(labels_B: IntArray, prob_dog_B: FloatArray) -> FloatArray:
    """The negative natural logarithm of the probability of the true class, or of float32's epsilon if that is more."""
    prob_true_B = np.where(labels_B == 1, prob_dog_B, 1 - prob_dog_B)
    losses_B: FloatArray = -np.log(np.clip(prob_true_B, _SMALLEST_PROB, 1))
    return losses_B


def roc_auc(labels_B: npt.ArrayLike, prob_dog_B: npt.ArrayLike) -> Metric:
    """The probability that a dog gets a higher `prob_dog` than a cat. A tie counts half.

    The variance is that of DeLong, DeLong and Clarke-Pearson (Biometrics 1988), computed from the mid-ranks of Sun and
    Xu (IEEE Signal Processing Letters 2014). The interval is symmetric on the logit scale, so it stays within [0, 1].
    That variance says nothing if the ranking is perfect, if all scores are alike, or if a class has one image. The
    interval is then that of Newcombe's method 5 (Statistics in Medicine 2006), which corresponds to Wilson's.
    """
    labels_B, prob_dog_B = _checked(labels_B, prob_dog_B)
    # Sorted, because the order of the images would show in the last digit of a sum.
    cats_M, dogs_N = np.sort(prob_dog_B[labels_B == 0]), np.sort(prob_dog_B[labels_B == 1])
    num_cats, num_dogs = len(cats_M), len(dogs_N)
    if not num_cats or not num_dogs:
        return _undefined("every image is of one class")
    from scipy import special, stats

    ranks_B = stats.rankdata(np.concatenate([cats_M, dogs_N]))
    # For each dog, the share of the cats that rank below it; for each cat, the share of the dogs that rank above it.
    above_N = (ranks_B[num_cats:] - stats.rankdata(dogs_N)) / num_cats
    above_M = 1 - (ranks_B[:num_cats] - stats.rankdata(cats_M)) / num_dogs
    auc = float(above_N.mean())
    variance = above_N.var(ddof=1) / num_dogs + above_M.var(ddof=1) / num_cats if min(num_cats, num_dogs) > 1 else 0.0
    if variance <= 0 or not 0 < auc < 1:
        return _estimate(auc, *_newcombe_interval(auc, num_cats, num_dogs))
    logit = special.logit(auc)
    margin = _Z95 * np.sqrt(variance) / (auc * (1 - auc))
    return _estimate(auc, special.expit(logit - margin), special.expit(logit + margin))


def expected_calibration_error(labels_B: npt.ArrayLike, prob_dog_B: npt.ArrayLike) -> float:
    """How far `prob_dog` is from the share of dogs, as the root mean square over 15 bins of equal mass.

    The gap of a bin is the difference between the mean of `prob_dog` and the share of dogs in that bin. From the mean
    of the squared gaps, the part is subtracted that chance alone would cause: Kumar, Liang and Ma, "Verified
    uncertainty calibration" (NeurIPS 2019), definition 5.2. The result is 0 if the gaps are no larger than chance makes
    them. Bins of equal width would bias the result more than bins of equal mass do: Roelofs et al., "Mitigating bias in
    calibration error estimation" (AISTATS 2022).
    """
    labels_B, prob_dog_B = _checked(labels_B, prob_dog_B)
    return _root(_squared_calibration_errors(calibration_bins(prob_dog_B), labels_B, prob_dog_B)[1])


def calibration_bins(prob_dog_B: npt.ArrayLike) -> IntArray:
    """The number of each image's bin, from 0; every bin gets about as many images as any other.

    Images of equal probability share a bin, so some bins may be larger, and some empty.
    """
    probs = np.asarray(prob_dog_B, dtype=np.float64)
    edges = np.quantile(probs, np.linspace(0, 1, NUM_CALIBRATION_BINS + 1)[1:-1])
    return np.searchsorted(edges, probs, side="right").astype(np.int64)


def _balanced_accuracy(recalls: Sequence[Metric]) -> Metric:
    """The mean of the recalls of both classes, with the interval that follows from theirs.

    It is that of Zou and Donner for the sum of two estimates (Statistics in Medicine 2008): the distances to the ends
    of both intervals add up as the sides of a right angle do.
    """
    ends = [(each["value"], *each["ci95"]) for each in recalls if each["value"] is not None]
    if len(ends) < len(CLASS_NAMES):
        return _undefined("every image is of one class")
    value_C, low_C, high_C = np.transpose(ends)
    value = value_C.mean()
    margins = [np.hypot(*(value_C - end_C)) / len(CLASS_NAMES) for end_C in (low_C, high_C)]
    return _estimate(value, value - margins[0], value + margins[1])


def _class_metrics(matrix: IntArray, index: int) -> ClassMetrics:
    """The metrics of the class with this index, from the confusion matrix."""
    hits = int(matrix[index, index])
    num_true, num_predicted = int(matrix[index].sum()), int(matrix[:, index].sum())
    return {
        "precision": proportion(hits, num_predicted, "no image is predicted to be of this class"),
        "recall": proportion(hits, num_true, "no image is of this class"),
        "f1": _f1(hits, num_true, num_predicted),
        "support": num_true,
    }


def _f1(hits: int, num_true: int, num_predicted: int) -> Metric:
    """F1 as 2J / (1 + J) of the Jaccard index J, which is a proportion and so has an interval.

    The formula is from Hand, Christen and Kirielle, "F*: an interpretable transformation of the F-measure" (Machine
    Learning 2021).
    """
    jaccard = proportion(hits, num_true + num_predicted - hits, "no image is of this class or predicted to be")
    if jaccard["value"] is None:
        return jaccard
    return _estimate(*(2 * j / (1 + j) for j in (jaccard["value"], *jaccard["ci95"])))


def _bootstrapped(labels_B: IntArray, prob_dog_B: FloatArray) -> tuple[Estimate, Estimate, CalibrationError]:
    """Log loss, Brier score and calibration error, with intervals from a bootstrap.

    The images are drawn regardless of their class, so that the number of cats among them varies as it would among other
    images. Drawn within each class, a class of one image would always be the same image, and its interval too narrow.
    """
    order_B = np.lexsort((labels_B, prob_dog_B))  # so that the samples do not depend on the order of the images
    labels_B, prob_dog_B = labels_B[order_B], prob_dog_B[order_B]
    losses_B = _log_losses(labels_B, prob_dog_B)
    squares_B = np.square(prob_dog_B - labels_B)
    bins_B = calibration_bins(prob_dog_B)

    rng = np.random.default_rng(_BOOTSTRAP_SEED)
    samples = np.empty((NUM_BOOTSTRAP_SAMPLES, 3))
    for row in samples:
        sample_B = rng.integers(0, len(labels_B), len(labels_B))
        row[0] = losses_B[sample_B].mean()
        row[1] = squares_B[sample_B].mean()
        row[2] = _squared_calibration_errors(bins_B[sample_B], labels_B[sample_B], prob_dog_B[sample_B])[1]
    low, high = np.quantile(samples, [0.025, 0.975], axis=0)
    plain, corrected = _squared_calibration_errors(bins_B, labels_B, prob_dog_B)
    # The corrected errors of the samples scatter around the plain error of the images. So the interval is mirrored at
    # the mean of plain and corrected error, as in the code of Kumar et al.
    mirrored_low, mirrored_high = plain + corrected - high[2], plain + corrected - low[2]
    return (
        _estimate(losses_B.mean(), low[0], high[0]),
        _estimate(squares_B.mean(), low[1], high[1]),
        {**_estimate(_root(corrected), _root(mirrored_low), _root(mirrored_high)), "norm": "l2"},
    )


def _squared_calibration_errors(bins_B: IntArray, labels_B: IntArray, prob_dog_B: FloatArray) -> tuple[float, float]:
    """The mean squared calibration error, first as it is, then without the part that chance causes."""
    count_K = np.bincount(bins_B)
    filled_K = count_K > 0
    count_K = count_K[filled_K]
    dogs_K = np.bincount(bins_B, labels_B)[filled_K] / count_K
    gap_K = np.bincount(bins_B, prob_dog_B)[filled_K] / count_K - dogs_K
    chance_K = dogs_K * (1 - dogs_K) / np.maximum(count_K - 1, 1)
    plain = float(np.average(gap_K**2, weights=count_K))
    return plain, plain - float(np.average(chance_K, weights=count_K))


def _root(squared: float) -> float:
    """The root of an estimate of a square, which chance may have made negative; then 0."""
    return float(np.sqrt(max(0.0, squared)))


def _newcombe_interval(auc: float, num_cats: int, num_dogs: int) -> tuple[float, float]:
    """The least and the greatest AUC whose distance to the observed AUC is at most 1.96 of its standard errors."""
    from scipy import optimize

    balanced = (num_cats + num_dogs) / 2 - 1

    def excess(theta: float) -> float:
        spread = theta * (1 - theta) * (1 + balanced * ((1 - theta) / (2 - theta) + theta / (1 + theta)))
        return float((auc - theta) ** 2 - _Z95**2 * spread / (num_cats * num_dogs))

    margin = 1e-9  # if the AUC is 0 or 1, that itself is a root, but not the one that is looked for
    low = optimize.brentq(excess, margin, auc - margin) if auc > margin else 0.0
    high = optimize.brentq(excess, auc + margin, 1 - margin) if auc < 1 - margin else 1.0
    return float(low), float(high)


def checked_labels(labels_B: npt.ArrayLike, scores_B: npt.ArrayLike, name: str) -> IntArray:
    """Check that there is a label for each score, and return the labels as integers.

    Args:
        labels_B: true classes, 0 or 1.
        scores_B: one score per image, in the same order.
        name: what the scores are called in an error's text.

    Raises:
        UsageError: no images, arrays of different length, a label that is neither class.
    """
    labels, scores = np.asarray(labels_B), np.asarray(scores_B)
    if labels.ndim != 1 or labels.shape != scores.shape:
        shapes = f"{labels.shape} and {scores.shape}"
        raise UsageError(f"labels and {name} must be two lists of one length. Received: {shapes}")
    if not len(labels):
        raise UsageError("metrics need at least one image. Received: none")
    odd = labels[~np.isin(labels, range(len(CLASS_NAMES)))]
    if len(odd):
        raise UsageError(f"labels must be 0 (cat) or 1 (dog). Received: {odd[0]}")
    return labels.astype(np.int64)


def _checked(labels_B: npt.ArrayLike, prob_dog_B: npt.ArrayLike) -> tuple[IntArray, FloatArray]:
    """Labels and probabilities as arrays; `UsageError` if a label is not 0 or 1, or a probability not in [0, 1]."""
    labels, probs = checked_labels(labels_B, prob_dog_B, "probabilities"), np.asarray(prob_dog_B, dtype=np.float64)
    odd = probs[~((probs >= 0) & (probs <= 1))]  # true of NaN as well
    if len(odd):
        raise UsageError(f"probabilities must lie between 0 and 1. Received: {odd[0]}")
    return labels, probs


def _estimate(value: float, low: float, high: float) -> Estimate:
    return {"value": float(value), "ci95": [float(low), float(high)]}


def _undefined(reason: str) -> Undefined:
    return {"value": None, "ci95": None, "reason": reason}
