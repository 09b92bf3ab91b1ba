"""Drift: whether the rows of a night are like those of earlier nights.

Four things are compared: the confidence of the labels, their mix, the share that a person should review, and the share
that failed. Nights differ a little by nature, from day to day and from camera to camera, so the rows of a night are no
independent draws, and a plain chi-squared test would cry every night that is large enough. Here a share p of a night
of n rows has the variance p (1 - p) (1 / n + rho): rho is how much more nights differ than chance has it. It is found
from the earlier nights (as DerSimonian and Laird's between-study variance is: it makes the sum of squares what is to be
expected), mixed with a prior, which counts as eight more nights. A night is said to drift if, after Holm's correction
for the four questions, this had a chance of less than `ALPHA`, the difference is large enough to matter, and no earlier
night differed as much from the others.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from catdog.inference.findings import CONFIDENCE_EDGES
from catdog.records import plural
from catdog.schema import CLASS_NAMES

MAX_NIGHTS: Final = 30
"""With how many earlier nights a night is compared, at most: the last ones that labelled something."""

MIN_ROWS: Final = 50
"""A night, or all earlier ones together, of fewer rows is not compared."""

ALPHA: Final = 0.01
"""A night without drift is said to drift with at most this probability, if nights differ as the prior has it."""

MIN_DISTANCE: Final = 0.05
"""A difference of fewer than so many of the rows does not matter."""

PRIOR_RHO: Final = 0.01
"""How much nights differ, before any was seen: a share of one half by 5 points (its standard deviation), one of 2 % by
1.4 points."""

PRIOR_NIGHTS: Final = 8
"""As how many nights the prior counts."""

_MIN_EXPECTED: Final = 5.0
_MIN_SHARE: Final = 0.04
"""Neighbouring bins are put together until a night like the earlier ones has so many rows in each, and such a share:
the share of a rare bin varies from night to night in a way that no chi-squared has."""

_LOW: Final = CONFIDENCE_EDGES.index(0.9)
"""The bins below this one are those of labels with a confidence below 90 %."""


@dataclass(frozen=True, kw_only=True)
class Night:
    """What is compared of a run."""

    run_id: str
    model_id: str
    num_ok: int
    num_error: int
    labels: Mapping[str, int]
    needs_review: int
    confidence: Sequence[int]
    """Number of labels in each bin of `CONFIDENCE_EDGES`."""

    images_per_s: float
    num_listed: int | None = None
    """Number of the images that were listed; None if the listing did not come to its end."""

    num_known: int = 0
    """How many of them earlier runs had labelled."""

    sources: str = ""
    """What was listed: equal texts for equal places."""

    @property
    def is_empty(self) -> bool:
        """Whether it labelled nothing."""
        return self.num_ok + self.num_error == 0


def night_of(record: Mapping[str, Any]) -> Night:
    """What is compared of a run, by its record as JSON values.

    Raises:
        KeyError, TypeError, ValueError: it is no record, or that of an older catdog, which has no histograms.
    """
    if tuple(record["confidence_edges"]) != CONFIDENCE_EDGES:
        raise ValueError("the histograms of a record must have the bins of this catdog")
    return Night(
        run_id=str(record["run_id"]),
        model_id=str(record["model_id"]),
        num_ok=int(record["books"]["ok"]),
        num_error=int(record["books"]["error"]),
        labels={name: int(record["labels"].get(name, 0)) for name in CLASS_NAMES},
        needs_review=int(record["needs_review"]),
        confidence=[sum(counts) for counts in zip(*(record["confidence"][name] for name in CLASS_NAMES), strict=True)],
        images_per_s=float(record["images_per_s"]),
        num_listed=int(record["books"]["listed"] - record["books"]["skipped"])
        if record.get("is_listed", True)
        else None,
        num_known=int(record["books"]["already_done"]),
        sources=json.dumps([record["config"].get(name) for name in ("images", "include", "exclude", "uri_column")]),
    )


@dataclass(frozen=True, kw_only=True)
class Shift:
    """One question about a night, and its answer."""

    name: str
    """`confidence`, `labels`, `review` or `errors`."""

    distance: float
    """Share of the rows that would have to change for the night to be like the earlier ones (total variation)."""

    p_value: float
    """Chance of a difference like this, or a larger one, without drift; not corrected."""

    is_drift: bool
    text: str
    """What differs, as a sentence."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What a comparison of a night with earlier ones found."""

    num_nights: int
    """Number of the earlier nights."""

    shifts: Sequence[Shift]
    """The answers. There are none if too little is there to compare."""

    verdict: str
    """What they come to, as a sentence."""

    @property
    def drifted(self) -> list[Shift]:
        """The questions with drift for an answer."""
        return [shift for shift in self.shifts if shift.is_drift]


Counts = npt.NDArray[np.float64]


@dataclass(frozen=True)
class _Question:
    name: str
    counts: Callable[[Night], Sequence[float]]
    share: Callable[[Night], float]
    """What the sentence tells."""

    text: str


_QUESTIONS: Final = (
    _Question(
        "confidence",
        lambda night: night.confidence,
        lambda night: sum(night.confidence[:_LOW]) / max(1, night.num_ok),
        "{now} of the labels have less than 90 % confidence; on earlier nights {before} had",
    ),
    _Question(
        "labels",
        lambda night: [night.labels[name] for name in CLASS_NAMES],
        lambda night: night.labels["dog"] / max(1, night.num_ok),
        "{now} of the labels are dogs; on earlier nights {before} were",
    ),
    _Question(
        "review",
        lambda night: [night.needs_review, night.num_ok - night.needs_review],
        lambda night: night.needs_review / max(1, night.num_ok),
        "{now} of the labels need review; on earlier nights {before} did",
    ),
    _Question(
        "errors",
        lambda night: [night.num_error, night.num_ok],
        lambda night: night.num_error / max(1, night.num_ok + night.num_error),
        "{now} of the images failed; on earlier nights {before} did",
    ),
)


def compare(tonight: Night, earlier: Sequence[Night]) -> Comparison:
    """Say whether a night differs from earlier ones more than those differ from each other.

    Args:
        tonight: the night.
        earlier: earlier nights in any order. Those of another model, and those that labelled nothing, do not count.
    """
    nights = [each for each in earlier if each.model_id == tonight.model_id and not each.is_empty]
    others = sum(not each.is_empty for each in earlier) - len(nights)
    if reason := _reason_not_to(tonight, nights, others):
        return Comparison(num_nights=len(nights), shifts=(), verdict=reason)
    answers = [_answer(question, tonight, nights) for question in _QUESTIONS]
    significant = _holm([p_value for p_value, _ in answers])
    shifts = [
        Shift(
            name=question.name,
            distance=distance,
            p_value=p_value,
            is_drift=is_significant and distance >= MIN_DISTANCE,
            text=question.text.format(now=_percent(question.share(tonight)), before=_percent(_pooled(question, nights)))
            + ".",
        )
        for question, (p_value, distance), is_significant in zip(_QUESTIONS, answers, significant, strict=True)
    ]
    drifted = [shift for shift in shifts if shift.is_drift]
    among = f"the {plural(len(nights), 'earlier night')} with this model" if len(nights) > 1 else "the night before"
    verdict = (
        f"Drift: these images are not like those of {among}. {' '.join(shift.text for shift in drifted)}"
        if drifted
        else f"No drift: confidence, labels, review and errors differ from {among} no more than nights do."
    )
    return Comparison(num_nights=len(nights), shifts=shifts, verdict=verdict)


def _reason_not_to(tonight: Night, nights: Sequence[Night], others: int) -> str | None:
    if tonight.is_empty:
        return "Nothing was labelled, so there is nothing to compare."
    if not nights:
        with_another = "earlier nights had another model" if others else "it is the first night of this output"
        return f"Nothing to compare with: {with_another}."
    num_before = sum(night.num_ok + night.num_error for night in nights)
    if min(tonight.num_ok + tonight.num_error, num_before) < MIN_ROWS:
        return f"Too few images to look for drift: that takes {MIN_ROWS}, tonight and earlier."
    return None


def _answer(question: _Question, tonight: Night, nights: Sequence[Night]) -> tuple[float, float]:
    """(p-value, distance) of one question."""
    counts_NK = np.array([question.counts(each) for each in [*nights, tonight]], np.float64)
    counts_NK = counts_NK[counts_NK.sum(axis=1) > 0]
    if len(counts_NK) < 2 or sum(question.counts(tonight)) == 0:
        return 1.0, 0.0
    counts_NK = _joined(counts_NK)
    if counts_NK.shape[1] < 2:
        return 1.0, 0.0
    before_NK, now_K = counts_NK[:-1], counts_NK[-1]
    num_nights, num_bins = before_NK.shape
    rho = ((num_nights - 1) * _rho(before_NK) + PRIOR_NIGHTS * PRIOR_RHO) / (num_nights - 1 + PRIOR_NIGHTS)
    mean_K, variance = _mean(before_NK, rho)
    now_share_K = now_K / now_K.sum()
    num_now = float(now_K.sum())
    square = float(((now_share_K - mean_K) ** 2 / _safe(mean_K, num_now)).sum()) / (1 / num_now + rho + variance)
    degrees = num_bins - 1
    p_value = f_tail(square / degrees, degrees, (num_nights - 1 + PRIOR_NIGHTS) * degrees)
    distance = float(np.abs(now_share_K - mean_K).sum() / 2)
    return (p_value if distance > _usual_distance(before_NK) else 1.0), distance


def _usual_distance(counts_NK: Counts) -> float:
    """The largest distance of a night from all others together; zero for fewer than three nights."""
    if len(counts_NK) < 3:
        return 0.0
    others_NK = counts_NK.sum(axis=0) - counts_NK
    shares_NK = counts_NK / counts_NK.sum(axis=1, keepdims=True)
    return float(np.abs(shares_NK - others_NK / others_NK.sum(axis=1, keepdims=True)).sum(axis=1).max() / 2)


def _joined(counts_NK: Counts) -> Counts:
    """Neighbouring bins of more than two put together until the last night is to be expected to have enough rows in
    each. Of two bins, one may be next to empty on a good night, and is what is looked for."""
    if counts_NK.shape[1] == 2:
        return counts_NK
    share_K = counts_NK[:-1].sum(axis=0) / counts_NK[:-1].sum()
    num_rows = counts_NK[-1].sum()
    expected_K, enough = share_K * num_rows, max(_MIN_EXPECTED, _MIN_SHARE * num_rows)
    groups: list[list[int]] = [[]]
    for index in range(len(expected_K)):
        groups[-1].append(index)
        if expected_K[groups[-1]].sum() >= enough:
            groups.append([])
    rest = groups.pop()
    if rest and groups:
        groups[-1] += rest
    elif rest:
        groups.append(rest)
    return np.stack([counts_NK[:, group].sum(axis=1) for group in groups], axis=1)


def _safe(mean_K: Counts, num_rows: float) -> Counts:
    """Shares that are not zero: half a row of a night."""
    return np.maximum(mean_K, 0.5 / num_rows)


def _mean(counts_NK: Counts, rho: float) -> tuple[Counts, float]:
    """Mean share of each bin over nights, and its variance, relative to p (1 - p)."""
    num_N = counts_NK.sum(axis=1)
    weights_N = 1 / (1 / num_N + rho)
    shares_NK = counts_NK / num_N[:, None]
    return (weights_N[:, None] * shares_NK).sum(axis=0) / weights_N.sum(), 1 / float(weights_N.sum())


def _rho(counts_NK: Counts) -> float:
    """How much nights differ more than by chance: with it, their sum of squares is what is to be expected."""
    num_nights, num_bins = counts_NK.shape
    if num_nights < 2:
        return 0.0

    def excess(rho: float) -> float:
        mean_K, _ = _mean(counts_NK, rho)
        num_N = counts_NK.sum(axis=1)
        shares_NK = counts_NK / num_N[:, None]
        squares_N = ((shares_NK - mean_K) ** 2 / _safe(mean_K, num_N.sum())).sum(axis=1)
        found: float = (squares_N / (1 / num_N + rho)).sum() - (num_nights - 1) * (num_bins - 1)
        return found

    low, high = 0.0, 1.0
    if excess(low) <= 0:
        return 0.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if excess(middle) > 0 else (low, middle)
    return high


def _holm(p_values: Sequence[float]) -> list[bool]:
    """Which of several questions are significant at `ALPHA` together (Holm 1979)."""
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    found = [False] * len(p_values)
    for rank, index in enumerate(order):
        if p_values[index] > ALPHA / (len(p_values) - rank):
            break
        found[index] = True
    return found


def _pooled(question: _Question, nights: Sequence[Night]) -> float:
    """The share that a sentence tells, of all earlier rows together."""
    weights = [sum(question.counts(night)) for night in nights]
    return sum(weight * question.share(night) for weight, night in zip(weights, nights, strict=True)) / max(
        1, sum(weights)
    )


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def f_tail(value: float, degrees: float, other_degrees: float) -> float:
    """Probability that a variable with an F distribution is larger than `value`.

    Example:
        >>> round(f_tail(4.0, 3, 20), 4)
        0.0221
    """
    if value <= 0:
        return 1.0
    return _incomplete_beta(other_degrees / (other_degrees + degrees * value), other_degrees / 2, degrees / 2)


def _incomplete_beta(x: float, a: float, b: float) -> float:
    """The regularised incomplete beta function, by its continued fraction (DLMF 8.17.22)."""
    if x >= 1:
        return 1.0
    if x > (a + 1) / (a + b + 2):
        return 1 - _incomplete_beta(1 - x, b, a)
    front = math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x))
    tiny = 1e-300
    c, d = 1.0, 1 / ((1 - (a + b) * x / (a + 1)) or tiny)
    fraction = d
    for m in range(1, 300):
        for numerator in (
            m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)),
        ):
            d = 1 / ((1 + numerator * d) or tiny)
            c = (1 + numerator / c) or tiny
            fraction *= c * d
        if abs(c * d - 1) < 1e-12:
            break
    return min(1.0, front * fraction / a)
