"""Labels and probabilities to numbers, each with its 95 % confidence interval.

Shapes: `B` images, `K` calibration bins. `labels_B` holds the true class as an index into `CLASS_NAMES` (0 = cat,
1 = dog), `prob_dog_B` the probability of class 1, both in the same order; no number depends on that order.

A metric is `{"value": float, "ci95": [low, high]}`, or `{"value": None, "ci95": None, "reason": str}` where it is not
defined, as ROC AUC is not when every image is of one class.
"""

from typing import Any, Final

import numpy as np
import numpy.typing as npt

from catdog.errors import UsageError
from catdog.schema import CLASS_NAMES

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
Metric = dict[str, Any]

DECISION_THRESHOLD: Final = 0.5
"""An image is a dog from this `prob_dog` on. Calibration by temperature leaves it where it is."""

NUM_CALIBRATION_BINS: Final = 15  # of Guo et al., "On calibration of modern neural networks", ICML 2017
NUM_BOOTSTRAP_SAMPLES: Final = 1000
_BOOTSTRAP_SEED: Final = 0
_Z95: Final = 1.959963984540054  # 97.5 % quantile of the standard normal distribution
_SMALLEST_PROB: Final = float(np.finfo(np.float32).eps)  # so that the log loss stays finite; as in scikit-learn


def classification_metrics(labels_B: npt.ArrayLike, prob_dog_B: npt.ArrayLike) -> dict[str, Any]:
    """Every metric of a two-class classifier.

    Args:
        labels_B: true classes, 0 or 1.
        prob_dog_B: probability of class 1, in [0, 1].

    Returns:
        `num_images`; `class_counts`; the metrics `accuracy`, `roc_auc`, `log_loss` (natural logarithm), `brier_score`
        and `expected_calibration_error`; `per_class` with `precision`, `recall`, `f1` and `support` of each class;
        `confusion_matrix`, rows true class, columns predicted class.

    Raises:
        UsageError: no images, arrays of different length, a label that is neither class, a probability outside [0, 1].
    """
    labels_B, prob_dog_B = _checked(labels_B, prob_dog_B)
    matrix = confusion_matrix(labels_B, prob_dog_B)
    support = matrix.sum(axis=1)
    return {
        "num_images": len(labels_B),
        "class_counts": {name: int(count) for name, count in zip(CLASS_NAMES, support, strict=True)},
        "accuracy": proportion(int(np.trace(matrix)), len(labels_B), "there are no images"),
        "roc_auc": roc_auc(labels_B, prob_dog_B),
        **_bootstrapped(labels_B, prob_dog_B),
        "per_class": {name: _per_class(matrix, index) for index, name in enumerate(CLASS_NAMES)},
        "confusion_matrix": matrix.tolist(),
    }


def review_metrics(
    labels_B: npt.ArrayLike, prob_dog_B: npt.ArrayLike, needs_review_B: npt.ArrayLike
) -> dict[str, Metric]:
    """What leaving the doubtful images to a person buys (selective classification, El-Yaniv and Wiener, JMLR 2010).

    Args:
        labels_B: true classes, 0 or 1.
        prob_dog_B: probability of class 1, in [0, 1].
        needs_review_B: bool, true where a person should look.

    Returns:
        `coverage`, the share of images that need no review, and `selective_accuracy`, the accuracy on those.
    """
    labels_B, prob_dog_B = _checked(labels_B, prob_dog_B)
    kept_B = ~np.asarray(needs_review_B, dtype=np.bool_)
    num_kept = int(kept_B.sum())
    num_correct = int((predicted_classes(prob_dog_B) == labels_B)[kept_B].sum())
    return {
        "coverage": proportion(num_kept, len(labels_B), "there are no images"),
        "selective_accuracy": proportion(num_correct, num_kept, "every image needs review"),
    }


def predicted_classes(prob_dog_B: npt.ArrayLike) -> IntArray:
    """The class of each image, 0 or 1, from its probability of class 1."""
    return (np.asarray(prob_dog_B) >= DECISION_THRESHOLD).astype(np.int64)


def confusion_matrix(labels_B: npt.ArrayLike, prob_dog_B: npt.ArrayLike) -> IntArray:
    """Number of images by true class (rows) and predicted class (columns), shape (2, 2)."""
    labels_B, prob_dog_B = _checked(labels_B, prob_dog_B)
    cells_B = 2 * labels_B + predicted_classes(prob_dog_B)
    return np.bincount(cells_B, minlength=4).reshape(2, 2).astype(np.int64)


def proportion(num_hits: int, num_trials: int, undefined: str) -> Metric:
    """A share with Wilson's score interval; `undefined` is the reason where there was no trial."""
    if num_trials == 0:
        return _undefined(undefined)
    from scipy import stats

    interval = stats.binomtest(num_hits, num_trials).proportion_ci(confidence_level=0.95, method="wilson")
    return _metric(num_hits / num_trials, interval.low, interval.high)


def _log_losses(labels_B: IntArray, prob_dog_B: FloatArray) -> FloatArray:
    """Negative natural logarithm of the true class's probability, which is at least float32's epsilon."""
    prob_true_B = np.where(labels_B == 1, prob_dog_B, 1 - prob_dog_B)
    losses_B: FloatArray = -np.log(np.clip(prob_true_B, _SMALLEST_PROB, 1))
    return losses_B


def roc_auc(labels_B: npt.ArrayLike, prob_dog_B: npt.ArrayLike) -> Metric:
    """Probability that a dog gets a higher `prob_dog` than a cat, ties counting half.

    The variance is that of DeLong, DeLong and Clarke-Pearson (Biometrics 1988), by the mid-ranks of Sun and Xu (IEEE
    Signal Processing Letters 2014); the interval is symmetric on the logit scale, so that it stays within [0, 1]. Where
    that variance says nothing (a perfect ranking, scores all alike, one image of a class), the interval is that of
    Newcombe's method 5 (Statistics in Medicine 2006), the counterpart of Wilson's.
    """
    labels_B, prob_dog_B = _checked(labels_B, prob_dog_B)
    # Sorted, so that the order of the images does not show in the last digit.
    cats_M, dogs_N = np.sort(prob_dog_B[labels_B == 0]), np.sort(prob_dog_B[labels_B == 1])
    num_cats, num_dogs = len(cats_M), len(dogs_N)
    if not num_cats or not num_dogs:
        return _undefined("every image is of one class")
    from scipy import special, stats

    ranks_B = stats.rankdata(np.concatenate([cats_M, dogs_N]))
    # Of each dog, the share of cats it stands above; of each cat, the share of dogs that stand above it.
    above_N = (ranks_B[num_cats:] - stats.rankdata(dogs_N)) / num_cats
    above_M = 1 - (ranks_B[:num_cats] - stats.rankdata(cats_M)) / num_dogs
    auc = float(above_N.mean())
    variance = above_N.var(ddof=1) / num_dogs + above_M.var(ddof=1) / num_cats if min(num_cats, num_dogs) > 1 else 0.0
    if variance <= 0 or not 0 < auc < 1:
        return _metric(auc, *_newcombe_interval(auc, num_cats, num_dogs))
    logit = special.logit(auc)
    margin = _Z95 * np.sqrt(variance) / (auc * (1 - auc))
    return _metric(auc, special.expit(logit - margin), special.expit(logit + margin))


def expected_calibration_error(labels_B: npt.ArrayLike, prob_dog_B: npt.ArrayLike) -> float:
    """By how much `prob_dog` is off: the gap between its mean and the share of dogs, over 15 bins of equal mass.

    The gaps are averaged in the l2 norm, and the part of them that chance alone opens is subtracted: Kumar, Liang and
    Ma, "Verified uncertainty calibration" (NeurIPS 2019), definition 5.2. Equal mass, since bins of equal width bias it
    more: Roelofs et al., "Mitigating bias in calibration error estimation" (AISTATS 2022). 0 where the gaps are no
    larger than chance.
    """
    labels_B, prob_dog_B = _checked(labels_B, prob_dog_B)
    return _root(_squared_calibration_errors(calibration_bins(prob_dog_B), labels_B, prob_dog_B)[1])


def calibration_bins(prob_dog_B: npt.ArrayLike) -> IntArray:
    """The equal-mass bin of each image; equal probabilities share one, so that bins are at times larger, or empty."""
    probs = np.asarray(prob_dog_B, dtype=np.float64)
    edges = np.quantile(probs, np.linspace(0, 1, NUM_CALIBRATION_BINS + 1)[1:-1])
    return np.searchsorted(edges, probs, side="right").astype(np.int64)


def _per_class(matrix: IntArray, index: int) -> dict[str, Any]:
    """Precision, recall, F1 and support of one class, from the confusion matrix."""
    hits = int(matrix[index, index])
    num_true, num_predicted = int(matrix[index].sum()), int(matrix[:, index].sum())
    # F1 is 2J / (1 + J) of the Jaccard index J, which is a proportion with an interval of its own
    # (Hand, Christen and Kirielle, "F*: an interpretable transformation of the F-measure", Machine Learning 2021).
    jaccard = proportion(hits, num_true + num_predicted - hits, "no image is of this class or predicted to be")
    return {
        "precision": proportion(hits, num_predicted, "no image is predicted to be of this class"),
        "recall": proportion(hits, num_true, "no image is of this class"),
        "f1": jaccard
        if jaccard["value"] is None
        else _metric(*(2 * j / (1 + j) for j in (jaccard["value"], *jaccard["ci95"]))),
        "support": num_true,
    }


def _bootstrapped(labels_B: IntArray, prob_dog_B: FloatArray) -> dict[str, Metric]:
    """Log loss, Brier score and calibration error, with intervals from a bootstrap that keeps the class counts."""
    order_B = np.lexsort((labels_B, prob_dog_B))  # the same samples whatever order the images came in
    labels_B, prob_dog_B = labels_B[order_B], prob_dog_B[order_B]
    losses_B = _log_losses(labels_B, prob_dog_B)
    squares_B = np.square(prob_dog_B - labels_B)
    bins_B = calibration_bins(prob_dog_B)
    strata = [np.flatnonzero(labels_B == index) for index in range(len(CLASS_NAMES))]

    rng = np.random.default_rng(_BOOTSTRAP_SEED)
    samples = np.empty((NUM_BOOTSTRAP_SAMPLES, 3))
    for row in samples:
        sample_B = np.concatenate([members[rng.integers(0, len(members), len(members))] for members in strata])
        row[0] = losses_B[sample_B].mean()
        row[1] = squares_B[sample_B].mean()
        row[2] = _squared_calibration_errors(bins_B[sample_B], labels_B[sample_B], prob_dog_B[sample_B])[1]
    low, high = np.quantile(samples, [0.025, 0.975], axis=0)
    plain, corrected = _squared_calibration_errors(bins_B, labels_B, prob_dog_B)
    # The corrected samples scatter around the plain estimate: the interval is mirrored in the mean of both, as in Kumar
    # et al.'s own code.
    ends = plain + corrected - high[2], plain + corrected - low[2]
    return {
        "log_loss": _metric(losses_B.mean(), low[0], high[0]),
        "brier_score": _metric(squares_B.mean(), low[1], high[1]),
        "expected_calibration_error": _metric(_root(corrected), *map(_root, ends)) | {"norm": "l2"},
    }


def _squared_calibration_errors(bins_B: IntArray, labels_B: IntArray, prob_dog_B: FloatArray) -> tuple[float, float]:
    """Mean squared calibration error, plain and without its bias."""
    count_K = np.bincount(bins_B)
    filled_K = count_K > 0
    count_K = count_K[filled_K]
    dogs_K = np.bincount(bins_B, labels_B)[filled_K] / count_K
    gap_K = np.bincount(bins_B, prob_dog_B)[filled_K] / count_K - dogs_K
    chance_K = dogs_K * (1 - dogs_K) / np.maximum(count_K - 1, 1)
    plain = float(np.average(gap_K**2, weights=count_K))
    return plain, plain - float(np.average(chance_K, weights=count_K))


def _root(squared: float) -> float:
    """Root of a square whose estimate may fall below 0."""
    return float(np.sqrt(max(0.0, squared)))


def _newcombe_interval(auc: float, num_cats: int, num_dogs: int) -> tuple[float, float]:
    """The AUCs from which the observed one is no further than 1.96 of their own standard errors."""
    from scipy import optimize

    balanced = (num_cats + num_dogs) / 2 - 1

    def excess(theta: float) -> float:
        spread = theta * (1 - theta) * (1 + balanced * ((1 - theta) / (2 - theta) + theta / (1 + theta)))
        return float((auc - theta) ** 2 - _Z95**2 * spread / (num_cats * num_dogs))

    margin = 1e-9  # both ends are roots of their own where the AUC is 0 or 1
    low = optimize.brentq(excess, margin, auc - margin) if auc > margin else 0.0
    high = optimize.brentq(excess, auc + margin, 1 - margin) if auc < 1 - margin else 1.0
    return float(low), float(high)


def checked_labels(labels_B: npt.ArrayLike, scores_B: npt.ArrayLike, name: str) -> IntArray:
    """The labels as integers.

    Args:
        labels_B: true classes, 0 or 1.
        scores_B: a score per label.
        name: what an error calls the scores.

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
    """Both as arrays of one length, labels 0 or 1 and probabilities in [0, 1], or `UsageError`."""
    labels, probs = checked_labels(labels_B, prob_dog_B, "probabilities"), np.asarray(prob_dog_B, dtype=np.float64)
    odd = probs[~((probs >= 0) & (probs <= 1))]  # true of NaN as well
    if len(odd):
        raise UsageError(f"probabilities must lie between 0 and 1. Received: {odd[0]}")
    return labels, probs


def _metric(value: float, low: float, high: float) -> Metric:
    return {"value": float(value), "ci95": [float(low), float(high)]}


def _undefined(reason: str) -> Metric:
    return {"value": None, "ci95": None, "reason": reason}
