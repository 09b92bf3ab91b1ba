"""`catdog.calibration` on simulated models whose temperature is known, and against slow and plain counterparts."""

import itertools
import json
import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from inference_case import Says, encoded_drawings

from catdog import calibration, metrics
from catdog.bundle import Bundle
from catdog.errors import UsageError
from catdog.labelling import Labeller

Arrays = tuple[np.ndarray, np.ndarray]


def simulated(num_images: int, *, temperature: float = 1.5, bias: float = 0.0, seed: int = 0) -> Arrays:
    """Labels, and logits that are `temperature` times too sharp; 97 % of the labels are right."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, num_images)
    # Of two normal distributions at ±7, the variance of each 2 · 7, the log odds at a point is that point.
    logits = rng.normal(np.where(labels, 7, -7), math.sqrt(14)) * temperature + bias
    return labels, logits.astype(np.float32)


def penalised_loss(labels: np.ndarray, logits: np.ndarray, temperature: float) -> float:
    """What the temperature shall minimise, written out: -log L - log √I, of labels as likely as sigmoid(logit / T)."""
    prob_dog = 1 / (1 + np.exp(-logits.astype(float) / temperature))
    likelihood = np.where(labels == 1, prob_dog, 1 - prob_dog)
    return float(-np.log(likelihood).sum() - np.log((logits.astype(float) ** 2 * prob_dog * (1 - prob_dog)).sum()) / 2)


labelled_logits = st.lists(
    st.tuples(st.integers(0, 1), st.floats(-12, 12, width=32) | st.sampled_from([-2.0, 0.0, 1.0, 2.0, 40.0])),
    min_size=1,
    max_size=40,
)


def arrays_of(pairs: Sequence[tuple[int, float]]) -> Arrays:
    labels, logits = zip(*pairs, strict=True)
    return np.array(labels), np.array(logits, dtype=np.float32)


def test_probabilities_of_both_classes_keep_their_digits() -> None:
    logits = np.array([-60.0, -2.0, 0.0, 2.0, 60.0])
    prob_dog, prob_cat = calibration.probabilities(logits, 2.0), calibration.probabilities(-logits, 2.0)
    assert prob_dog == pytest.approx([math.exp(-30), 1 / (1 + math.e), 0.5, 1 / (1 + math.exp(-1)), 1], rel=1e-6)
    assert (prob_cat == prob_dog[::-1]).all()
    assert prob_dog.dtype == np.float32


@pytest.mark.parametrize("temperature", [0.4, 1.0, 3.0])
def test_the_temperature_of_a_simulated_model_is_found(temperature: float) -> None:
    found = calibration.fit(*simulated(20_000, temperature=temperature), review_precision=0.995)
    assert found.temperature == found.report["temperature"] == pytest.approx(temperature, rel=0.05)
    assert found.report["fold_temperatures"] == pytest.approx([temperature] * 2, rel=0.1)


@pytest.mark.parametrize("temperature", [0.4, 3.0])
def test_calibration_makes_probabilities_better(temperature: float) -> None:
    labels, logits = simulated(5000, temperature=temperature)
    report = calibration.fit(labels, logits, review_precision=0.995).report
    assert report["num_images"] == 5000
    for name in ("log_loss", "expected_calibration_error"):
        before, after = report[name]["before"], report[name]["after"]
        assert after["ci95"][1] < before["value"]
        assert after["value"] < before["ci95"][0]
    before_B, after_B = calibration.probabilities(logits, 1.0), calibration.cross_fitted(labels, logits)
    both: tuple[tuple[Literal["before", "after"], np.ndarray], ...] = (("before", before_B), ("after", after_B))
    for key, prob_dog_B in both:
        found = metrics.classification_metrics(labels, prob_dog_B)
        assert report["log_loss"][key] == found["log_loss"]
        assert report["expected_calibration_error"][key] == found["expected_calibration_error"]
        error = metrics.expected_calibration_error(labels, prob_dog_B)
        assert report["expected_calibration_error"][key]["value"] == pytest.approx(error, abs=1e-9)


@pytest.mark.parametrize(("num_images", "seed"), [(20, 0), (60, 1), (300, 2), (1000, 3)])
def test_the_temperature_has_the_lowest_loss_of_all(num_images: int, seed: int) -> None:
    labels, logits = simulated(num_images, seed=seed)
    temperature = calibration.fit(labels, logits, review_precision=0.9).temperature
    grid = np.geomspace(0.3, 20, 5000)
    losses = [penalised_loss(labels, logits, each) for each in grid]
    assert temperature == pytest.approx(grid[np.argmin(losses)], rel=1e-3)
    assert penalised_loss(labels, logits, temperature) <= min(losses) + 1e-9


def test_of_two_valleys_the_deeper_is_found() -> None:
    # All right, and one of them so unsure that a temperature of 0.2 would suit it alone.
    logits = np.concatenate([[0.2], np.linspace(2.7, 9, 40)])
    temperature = calibration.fit(np.ones(41, int), logits, review_precision=0.9).temperature
    losses = {each: penalised_loss(np.ones(41, int), logits, each) for each in np.geomspace(0.1, 5, 2000)}
    valleys = [
        here for left, here, right in zip(*(list(losses)[i:] for i in range(3)), strict=False)
        if losses[left] > losses[here] < losses[right]
    ]  # fmt: skip
    assert len(valleys) == 2
    assert temperature == pytest.approx(min(valleys, key=losses.__getitem__), rel=0.01)


@pytest.mark.parametrize("num_images", [4, 20, 200])
def test_labels_that_are_all_right_do_not_make_probabilities_sure(num_images: int) -> None:
    labels = np.arange(num_images) % 2
    logits = np.where(labels, 1, -1) * np.linspace(1, 6, num_images)
    found = calibration.fit(labels, logits, review_precision=0.9)
    confidence_B = calibration.probabilities(np.abs(logits), found.temperature)
    assert 0.6 < confidence_B.mean() < 1 - 0.1 / num_images
    assert found.temperature > calibration.TEMPERATURE_BOUNDS[0]
    assert found.review_threshold == 0.5


@pytest.mark.slow
@settings(deadline=None, max_examples=15)
@given(labelled_logits, st.randoms(use_true_random=False))
def test_the_order_of_the_images_does_not_matter(pairs: list[tuple[int, float]], random: Any) -> None:
    labels, logits = arrays_of(pairs)
    found = calibration.fit(labels, logits, review_precision=0.97)
    order = list(range(len(pairs)))
    random.shuffle(order)
    assert calibration.fit(labels[order], logits[order], review_precision=0.97) == found

    # Images that are alike, label and logit, may change places.
    rows = zip(pairs, calibration.cross_fitted(labels, logits), strict=True)
    shuffled = zip([pairs[i] for i in order], calibration.cross_fitted(labels[order], logits[order]), strict=True)
    assert sorted(rows) == sorted(shuffled)

    assert json.loads(json.dumps(found.report, allow_nan=False)) == found.report
    assert calibration.TEMPERATURE_BOUNDS[0] <= found.temperature <= calibration.TEMPERATURE_BOUNDS[1]


@pytest.mark.parametrize("num_images", [41, 400])
def test_no_image_has_a_say_in_the_temperature_that_it_is_scaled_with(num_images: int) -> None:
    labels, logits = simulated(num_images, temperature=0.7)
    prob_dog = calibration.cross_fitted(labels, logits).astype(float)
    # The temperature of each image, read off where float32 has the digits for it.
    told = np.abs(logits) < 8
    temperature_B = logits[told] / (np.log(prob_dog[told]) - np.log1p(-prob_dog[told]))
    temperatures = calibration.fit(labels, logits, review_precision=0.9).report["fold_temperatures"]
    scaled_with_first = np.abs(temperature_B - temperatures[0]) < np.abs(temperature_B - temperatures[1])
    nearest = np.where(scaled_with_first, temperatures[0], temperatures[1])
    assert temperatures[0] != pytest.approx(temperatures[1], rel=0.01)
    assert temperature_B == pytest.approx(nearest, rel=5e-3)

    # So for every image: the half that it is in, and the temperature that the other half gives.
    candidates = np.stack([calibration.probabilities(logits, temperature) for temperature in temperatures])
    in_second = np.abs(candidates[0] - prob_dog) <= np.abs(candidates[1] - prob_dog)
    assert (prob_dog == np.where(in_second, *candidates)).all()
    for label in (0, 1):
        assert abs(2 * in_second[labels == label].sum() - (labels == label).sum()) <= 1
    grid = np.geomspace(0.3, 5, 5000)
    for half, temperature in ((~in_second, temperatures[0]), (in_second, temperatures[1])):
        best = grid[np.argmin([penalised_loss(labels[half], logits[half], each) for each in grid])]
        assert temperature == pytest.approx(best, rel=1e-3)


@pytest.fixture
def quick_bootstrap(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests that fit often, and look at no interval."""
    monkeypatch.setattr(metrics, "NUM_BOOTSTRAP_SAMPLES", 10)


@pytest.mark.slow
def test_cross_fitting_does_not_flatter(quick_bootstrap: None) -> None:
    def loss(labels: np.ndarray, prob_dog: np.ndarray) -> float:
        prob_true = np.where(labels == 1, prob_dog, 1 - prob_dog.astype(float))
        return float(-np.log(np.maximum(prob_true, 1e-7)).mean())

    gaps = []
    for seed in range(50):
        labels, logits = simulated(60, seed=seed)
        fresh_labels, fresh_logits = simulated(20_000, seed=1000 + seed)
        temperature = calibration.fit(labels, logits, review_precision=0.9).temperature
        fresh = loss(fresh_labels, calibration.probabilities(fresh_logits, temperature))
        same = loss(labels, calibration.probabilities(logits, temperature))
        gaps.append((loss(labels, calibration.cross_fitted(labels, logits)) - fresh, same - fresh))
    cross_fitted, in_sample = np.mean(gaps, axis=0)
    assert cross_fitted > -np.std(gaps) / math.sqrt(len(gaps))  # no better than on images never seen
    assert in_sample < cross_fitted - 0.005


def plain_threshold(labels: np.ndarray, logits: np.ndarray, temperature: float, precision: float) -> Any:
    """The smallest threshold that keeps right labels often enough, how many it keeps and how many are right."""
    prob_dog, prob_cat = (calibration.probabilities(sign * logits, temperature).tolist() for sign in (1, -1))
    rows = [
        (max(dog, cat), (dog >= cat) == bool(label)) for label, dog, cat in zip(labels, prob_dog, prob_cat, strict=True)
    ]
    for threshold in sorted({0.5, *(confidence for confidence, _ in rows)}):
        kept = [is_right for confidence, is_right in rows if confidence >= threshold]
        if sum(kept) / len(kept) >= precision:
            return threshold, len(kept), sum(kept)
    return None, 0, 0


@settings(deadline=None, max_examples=300)
@given(labelled_logits, st.sampled_from([0.3, 1.0, 1.7]), st.lists(st.floats(0.01, 1), min_size=1, max_size=4))
def test_thresholds_are_those_of_trying_them_all(
    pairs: list[tuple[int, float]], temperature: float, precisions: list[float]
) -> None:
    labels, logits = arrays_of(pairs)
    precisions.sort()
    rows = calibration.thresholds(labels, logits, temperature=temperature, precisions=precisions)
    assert [row["requested_precision"] for row in rows] == precisions
    confidences = calibration.probabilities(np.abs(logits), temperature).tolist()
    for row in rows:
        threshold, num_kept, num_right = plain_threshold(labels, logits, temperature, row["requested_precision"])
        assert row["coverage"] == metrics.share(num_kept, len(pairs))
        assert row["coverage"]["value"] == sum(each >= row["threshold"] for each in confidences) / len(pairs)
        if num_kept:
            assert row["threshold"] == threshold <= 1
            assert row["precision"] == metrics.share(num_right, num_kept)
            assert row["precision"]["value"] >= row["requested_precision"]
        else:
            assert row["threshold"] > max(confidences)
            assert row["threshold"] == (1 if max(confidences) < 1 else 1 + 2**-23)
            assert row["precision"] == {"value": None, "ci95": None, "reason": "no image is kept"}
    for lower, higher in itertools.pairwise(rows):
        assert lower["threshold"] <= higher["threshold"]
        assert lower["coverage"]["value"] >= higher["coverage"]["value"]


def test_thresholds_worked_out_by_hand() -> None:
    # By confidence: right, right, wrong, right and right alike, wrong.
    labels, logits = np.array([1, 0, 0, 1, 0, 1]), np.array([5, -4, 3, 2, -2, -1])
    rows = calibration.thresholds(labels, logits, temperature=1.0, precisions=[1, 0.8, 0.7, 0.6])
    assert [row["coverage"]["value"] for row in rows] == pytest.approx([2 / 6, 5 / 6, 5 / 6, 1])
    sigmoid = [1 / (1 + math.exp(-4)), 1 / (1 + math.exp(-2)), 1 / (1 + math.exp(-2)), 0.5]
    assert [row["threshold"] for row in rows] == pytest.approx(sigmoid, abs=1e-6)
    assert [row["precision"]["value"] for row in rows] == pytest.approx([1, 4 / 5, 4 / 5, 4 / 6])


def test_the_report_has_the_threshold_asked_for_and_the_usual_ones() -> None:
    labels, logits = simulated(5000)
    found = calibration.fit(labels, logits, review_precision=0.985)
    rows = found.report["thresholds"]
    assert list(found.report) == list(calibration.CalibrationReport.__annotations__)
    assert list(rows[0]) == list(calibration.ThresholdRow.__annotations__)
    assert found.report["review_precision"] == 0.985
    assert [row["requested_precision"] for row in rows] == [0.985, 0.99, 0.995, 0.998, 0.999]
    assert rows[0]["threshold"] == found.review_threshold
    precisions = [row["requested_precision"] for row in rows]
    assert rows == calibration.thresholds(labels, logits, temperature=found.temperature, precisions=precisions)
    among_the_usual = calibration.fit(labels, logits, review_precision=0.995)
    assert [row["requested_precision"] for row in among_the_usual.report["thresholds"]] == [0.99, 0.995, 0.998, 0.999]
    assert among_the_usual.review_threshold == rows[2]["threshold"]


@pytest.mark.parametrize(("scale", "review_precision"), [(1, 0.99), (1, 0.9999), (50, 0.99), (1000, 1.0)])
def test_predict_keeps_what_the_threshold_promises(scale: float, review_precision: float) -> None:
    labels, logits = simulated(2000)
    logits *= scale  # at the largest, temperature ends at its bound and most confidences are 1.0
    found = calibration.fit(labels, logits, review_precision=review_precision)
    card = {"image_size": 1, "temperature": found.temperature, "review_threshold": found.review_threshold}
    with Labeller(Bundle(url="", card=card, model_id="", paths={}), Says(*logits)) as labeller:
        verdicts = labeller.label(encoded_drawings(1) * len(labels))
    prob_dog_B = calibration.probabilities(logits, found.temperature)
    assert [verdict.prob_dog for verdict in verdicts] == prob_dog_B.tolist()
    expected = calibration.probabilities(np.abs(logits), found.temperature).tolist()
    assert [verdict.confidence for verdict in verdicts] == expected
    is_dog_B = np.array([verdict.label == "dog" for verdict in verdicts])
    assert (is_dog_B == metrics.predicted_classes(prob_dog_B)).all()

    promised = {row["requested_precision"]: row for row in found.report["thresholds"]}[review_precision]
    kept = metrics.review_metrics(labels, prob_dog_B, np.array([verdict.needs_review for verdict in verdicts]))
    assert kept["coverage"] == promised["coverage"]
    assert kept["selective_accuracy"]["value"] == promised["precision"]["value"]


def test_a_threshold_among_confidences_of_one_keeps_them() -> None:
    # Surer than float32 can tell from 1, and right; the others are wrong.
    rows = calibration.thresholds([1, 1, 0], [80, 90, 1], temperature=1.0, precisions=[1.0])
    assert rows[0]["threshold"] == 1.0
    assert rows[0]["coverage"]["value"] == pytest.approx(2 / 3)
    # One of those is wrong: no threshold that float32 reaches is high enough.
    rows = calibration.thresholds([1, 0, 0], [80, 90, 1], temperature=1.0, precisions=[1.0])
    assert np.float32(rows[0]["threshold"]) > np.float32(1)
    assert rows[0]["coverage"]["value"] == 0


@pytest.mark.parametrize(
    ("labels", "logits", "temperature"),
    [
        ([0, 1], [0.0, 0.0], 1.0),  # nothing to go by
        ([1], [0.0], 1.0),
        ([0, 1] * 20, [3.0, -3.0] * 20, 20.0),  # all wrong
        ([1] * 30, [-5.0] * 30, 20.0),
        ([0, 1] * 20, [-1e-3, 1e-3] * 20, 0.05),  # all right, and far too modest
        ([0, 1] * 20, [-3e38, 3e38] * 20, 20.0),
    ],
)
def test_degenerate_images_give_a_temperature_within_bounds(
    labels: list[int], logits: list[float], temperature: float
) -> None:
    found = calibration.fit(labels, logits, review_precision=0.9)
    assert found.temperature == temperature
    json.dumps(found.report, allow_nan=False)


@pytest.mark.parametrize("num_images", [1, 2, 3, 30])
def test_images_of_one_class(num_images: int) -> None:
    found = calibration.fit([1] * num_images, np.linspace(2, 3, num_images), review_precision=0.9)
    assert 0.5 < found.temperature < 4
    assert calibration.probabilities(3.0, found.temperature) < 1 - 0.1 / num_images
    assert found.review_threshold == 0.5
    assert found.report["bias_log_likelihood_ratio_p"] is None


def test_the_lone_image_of_a_half_is_left_as_it_is() -> None:
    assert calibration.cross_fitted([1], [2.0]) == calibration.probabilities([2.0], 1.0)


@pytest.mark.slow
def test_a_bias_shows_and_chance_does_not(quick_bootstrap: None) -> None:
    shifted = calibration.fit(*simulated(2000, bias=2.0), review_precision=0.9)
    assert shifted.report["bias_log_likelihood_ratio_p"] is not None
    assert shifted.report["bias_log_likelihood_ratio_p"] < 1e-6
    reports = [calibration.fit(*simulated(200, seed=seed), review_precision=0.9).report for seed in range(60)]
    values = np.array([report["bias_log_likelihood_ratio_p"] for report in reports])
    assert 0.4 < values.mean() < 0.6  # uniform, where there is no bias
    assert (values < 0.05).mean() < 0.15


def test_the_test_for_a_bias_is_the_likelihood_ratio_of_plain_logistic_regressions() -> None:
    from scipy import optimize, stats

    labels, logits = simulated(300, bias=1.0)
    sign = 2 * labels - 1
    free = optimize.minimize(lambda ab: np.logaddexp(0, -sign * (ab[0] * logits + ab[1])).sum(), (1, 0)).fun
    nested = optimize.minimize(lambda a: np.logaddexp(0, -sign * a * logits).sum(), 1).fun
    found = calibration.fit(labels, logits, review_precision=0.9).report["bias_log_likelihood_ratio_p"]
    assert found == pytest.approx(stats.chi2.sf(2 * (nested - free), df=1), rel=1e-3)


@pytest.mark.parametrize(
    ("labels", "logits", "precision", "message"),
    [
        ([], [], 0.9, "at least one image. Received: none"),
        ([0, 1], [0.5], 0.9, r"labels and logits must be two lists of one length. Received: \(2,\) and \(1,\)"),
        ([0, 2], [0.5, 0.5], 0.9, r"labels must be 0 \(cat\) or 1 \(dog\). Received: 2"),
        ([0, 1], [0.5, math.nan], 0.9, "logits must be finite. Received: nan"),
        ([0, 1], [-math.inf, 0.5], 0.9, "logits must be finite. Received: -inf"),
        ([0, 1], [-1.0, 1.0], 0.0, "a precision must be above 0 and at most 1. Received: 0.0"),
        ([0, 1], [-1.0, 1.0], 1.01, "a precision must be above 0 and at most 1. Received: 1.01"),
        ([0, 1], [-1.0, 1.0], math.nan, "a precision must be above 0 and at most 1. Received: nan"),
    ],
)
def test_input_that_makes_no_sense_is_refused(
    labels: list[int], logits: list[float], precision: float, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        calibration.fit(labels, logits, review_precision=precision)
    if precision == 0.9:
        with pytest.raises(UsageError, match=message):
            calibration.cross_fitted(labels, logits)
    with pytest.raises(UsageError, match=message):
        calibration.thresholds(labels, logits, temperature=1.0, precisions=[precision])
