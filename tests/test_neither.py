"""`catdog.neither`: the scores are what their definitions say, and a gauge outlives its file."""

import io

import numpy as np
import pytest

from catdog import neither
from catdog.errors import BundleError
from catdog.neither import Gauge

RNG = np.random.default_rng(0)
NUM_FEATURES = 12
MIXING_FF = RNG.normal(size=(NUM_FEATURES, NUM_FEATURES))
LABELS_N = np.arange(2000) % 2
FEATURES_NF = RNG.normal(size=(2000, NUM_FEATURES)) @ MIXING_FF + 5 + 2 * LABELS_N[:, np.newaxis]


def of_distance() -> Gauge:
    return neither.of_distance(FEATURES_NF, LABELS_N)


def of_classes() -> tuple[Gauge, np.ndarray, np.ndarray]:
    kernel_FC, bias_C = RNG.normal(size=(NUM_FEATURES, 7)), RNG.normal(size=7)
    return neither.of_classes(kernel_FC, bias_C, (2, 5)), kernel_FC, bias_C


def test_a_distance_is_mahalanobiss_to_the_nearer_class() -> None:
    gauge = of_distance()
    assert gauge.kind == "distance"
    means_CF = np.stack([FEATURES_NF[label == LABELS_N].mean(axis=0) for label in range(2)])
    inverse = np.linalg.inv(neither._covariance(FEATURES_NF - means_CF[LABELS_N]))
    others_BF = RNG.normal(size=(50, NUM_FEATURES)) * 9
    expected_B = np.log(
        np.min([np.einsum("bi,ij,bj->b", d, inverse, d) for d in (others_BF - mean_F for mean_F in means_CF)], axis=0)
    )
    np.testing.assert_allclose(gauge.scores(others_BF), expected_B, atol=0.1)
    assert gauge.scores(others_BF).min() > np.median(gauge.scores(FEATURES_NF))


def test_the_odds_of_the_other_classes() -> None:
    gauge, kernel_FC, bias_C = of_classes()
    assert gauge.kind == "classes"
    odds = np.exp(FEATURES_NF @ kernel_FC + bias_C - 20)
    kin = odds[:, [2, 5]].sum(axis=1)
    expected_N = np.log(odds.sum(axis=1) - kin) - np.log(kin)
    np.testing.assert_allclose(gauge.scores(FEATURES_NF), expected_N, atol=0.5)
    assert np.corrcoef(gauge.scores(FEATURES_NF), expected_N)[0, 1] > 0.999


@pytest.mark.parametrize("num_images", [3, 40, 2000])
def test_the_covariance_of_few_images_is_drawn_to_the_unit_matrix(num_images: int) -> None:
    covariance = pytest.importorskip("sklearn.covariance")
    spread_NF = FEATURES_NF[:num_images] - FEATURES_NF[:num_images].mean(axis=0)
    expected_FF, _ = covariance.ledoit_wolf(spread_NF, assume_centered=True)
    np.testing.assert_allclose(neither._covariance(spread_NF), expected_FF, rtol=1e-6, atol=1e-6)


def test_features_that_never_change_are_borne() -> None:
    gauge = neither.of_distance(np.zeros((4, 3)), [0, 1, 0, 1])
    assert np.isfinite(gauge.scores(np.ones((2, 3)))).all()


@pytest.mark.parametrize("gauge", [of_distance(), of_classes()[0]], ids=["distance", "classes"])
def test_a_gauge_outlives_its_file(gauge: Gauge) -> None:
    data = gauge.encoded()
    assert data == gauge.encoded()
    read = neither.decoded(data, "there")
    assert read.kind == gauge.kind
    np.testing.assert_array_equal(read.scores(FEATURES_NF), gauge.scores(FEATURES_NF))


def test_a_damaged_file_is_one_error() -> None:
    whole = of_distance().encoded()
    file = io.BytesIO()
    np.savez(file, kernel_FK=np.array([object()]), allow_pickle=True)
    for data in (b"", b"no arrays", whole[:-100], file.getvalue()):
        with pytest.raises(BundleError, match=r"^there must hold the arrays of a score\. Received: "):
            neither.decoded(data, "there")


def test_a_share_of_cats_and_dogs_is_above_the_threshold() -> None:
    scores_N = RNG.normal(size=1000).astype(np.float32)
    card = neither.measured(scores_N, scores_N[:2])
    assert np.mean(scores_N > card["threshold"]) == card["flagged"]["value"] <= neither.MAX_FLAGGED
    assert card["flagged"]["value"] > neither.MAX_FLAGGED - 0.002
    assert card["golden_scores"] == [round(float(score), 4) for score in scores_N[:2]]
