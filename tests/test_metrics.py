"""`catdog.metrics` against scikit-learn, against values worked out by hand, and against what any input must show."""

import json
import warnings
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sklearn_metrics
from sklearn.exceptions import UndefinedMetricWarning

from catdog import metrics
from catdog.errors import UsageError


def simulated(num_images: int, seed: int = 0, sharpness: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Labels drawn from known probabilities, and probabilities that are right where `sharpness` is 1."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(scale=3, size=num_images)
    labels = (rng.random(num_images) < 1 / (1 + np.exp(-logits))).astype(np.int8)
    return labels, (1 / (1 + np.exp(-sharpness * logits))).astype(np.float32)


labelled_probs = st.lists(
    st.tuples(st.integers(0, 1), st.floats(0, 1, width=32) | st.sampled_from([0.0, 0.25, 0.5, 1.0])),
    min_size=1,
    max_size=40,
)


def every_metric(tree: Any) -> list[dict[str, Any]]:
    """Every `{"value", "ci95"}` in a tree of metrics."""
    if "ci95" in tree:
        return [tree]
    return [found for branch in tree.values() if isinstance(branch, dict) for found in every_metric(branch)]


@pytest.mark.parametrize("num_images", [30, 1000])
def test_values_are_those_of_scikit_learn(num_images: int) -> None:
    labels, prob_dog = simulated(num_images)
    found = metrics.classification_metrics(labels, prob_dog)
    predicted = prob_dog >= 0.5
    assert found["accuracy"]["value"] == pytest.approx(sklearn_metrics.accuracy_score(labels, predicted))
    assert found["log_loss"]["value"] == pytest.approx(sklearn_metrics.log_loss(labels, prob_dog), rel=1e-5)
    assert found["roc_auc"]["value"] == pytest.approx(sklearn_metrics.roc_auc_score(labels, prob_dog))
    assert found["brier_score"]["value"] == pytest.approx(sklearn_metrics.brier_score_loss(labels, prob_dog), rel=1e-5)
    assert found["confusion_matrix"] == sklearn_metrics.confusion_matrix(labels, predicted).tolist()
    columns = sklearn_metrics.precision_recall_fscore_support(labels, predicted)
    for index, name in enumerate(["cat", "dog"]):
        ours = found["per_class"][name]
        values = [ours["precision"]["value"], ours["recall"]["value"], ours["f1"]["value"], ours["support"]]
        assert values == pytest.approx([column[index] for column in columns])


def test_values_worked_out_by_hand() -> None:
    # Cats at 0.1 and 0.6, dogs at 0.4, 0.8 and 0.9: one of each is wrong; 5 of the 6 pairs are in order.
    found = metrics.classification_metrics([0, 0, 1, 1, 1], [0.1, 0.6, 0.4, 0.8, 0.9])
    assert found["num_images"] == 5
    assert found["class_counts"] == {"cat": 2, "dog": 3}
    assert found["confusion_matrix"] == [[1, 1], [1, 2]]
    assert found["accuracy"]["value"] == pytest.approx(3 / 5)
    assert found["roc_auc"]["value"] == pytest.approx(5 / 6)
    assert found["log_loss"]["value"] == pytest.approx(-np.log([0.9, 0.4, 0.4, 0.8, 0.9]).mean())
    assert found["brier_score"]["value"] == pytest.approx((0.01 + 0.36 + 0.36 + 0.04 + 0.01) / 5)
    # Wilson's interval for 3 of 5, as tabulated by Agresti and Coull (1998).
    assert found["accuracy"]["ci95"] == pytest.approx([0.2307, 0.8824], abs=5e-5)
    # F1 of the dogs: 2·2 / (2·2 + 1 + 1); its interval is that of 2 of 4, carried over.
    assert found["per_class"]["dog"]["f1"]["value"] == pytest.approx(2 / 3)
    low, high = metrics.share(2, 4)["ci95"]
    assert found["per_class"]["dog"]["f1"]["ci95"] == pytest.approx([2 * low / (1 + low), 2 * high / (1 + high)])


def test_the_keys_are_those_of_the_types_in_their_order() -> None:
    found = metrics.classification_metrics(*simulated(30))
    assert list(found) == list(metrics.ClassificationMetrics.__annotations__)
    assert list(found["per_class"]["cat"]) == list(metrics.ClassMetrics.__annotations__)
    assert list(found["expected_calibration_error"]) == ["value", "ci95", "norm"]
    assert list(metrics.review_metrics([0], [0.1], [True])) == list(metrics.ReviewMetrics.__annotations__)


def test_a_metric_as_text() -> None:
    estimate = metrics.share(3, 5)
    assert metrics.text(estimate) == "0.6000 (95 % interval 0.2307 to 0.8824)"
    assert metrics.text(estimate, percent=True) == "60.00 % (95 % interval 23.07 to 88.24)"
    undefined = metrics.proportion(0, 0, "every image needs review")
    assert metrics.text(undefined) == metrics.text(undefined, percent=True) == "undefined: every image needs review"


def test_a_sure_but_wrong_answer_has_a_finite_log_loss() -> None:
    found = metrics.classification_metrics([0, 1], np.array([1.0, 1.0], dtype=np.float32))
    assert found["log_loss"]["value"] == pytest.approx(-np.log(np.finfo(np.float32).eps) / 2)


def test_the_same_input_gives_the_same_json() -> None:
    first, second = (json.dumps(metrics.classification_metrics(*simulated(200)), allow_nan=False) for _ in range(2))
    assert first == second


@pytest.mark.slow
@settings(deadline=None, max_examples=25)
@given(labelled_probs, st.randoms(use_true_random=False))
def test_properties_of_any_input(pairs: list[tuple[int, float]], random: Any) -> None:
    labels, prob_dog = zip(*pairs, strict=True)
    found = metrics.classification_metrics(labels, prob_dog)

    shuffled = list(pairs)
    random.shuffle(shuffled)
    assert metrics.classification_metrics(*zip(*shuffled, strict=True)) == found

    matrix = np.array(found["confusion_matrix"])
    assert matrix.sum() == found["num_images"] == len(pairs)
    assert found["accuracy"]["value"] == np.trace(matrix) / matrix.sum()

    pairs_in_order = [(d > c) + 0.5 * (d == c) for i, d in pairs if i == 1 for j, c in pairs if j == 0]
    if pairs_in_order:
        assert found["roc_auc"]["value"] == pytest.approx(np.mean(pairs_in_order))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UndefinedMetricWarning)
            assert found["roc_auc"]["value"] == pytest.approx(sklearn_metrics.roc_auc_score(labels, prob_dog))

    for metric in every_metric(found):
        if metric["value"] is None:
            assert metric["ci95"] is None
            assert metric["reason"]
        else:
            low, high = metric["ci95"]
            assert low <= high
            assert np.isfinite([low, high]).all()


@pytest.mark.slow
@settings(deadline=None, max_examples=25)
@given(labelled_probs)
def test_the_mirror_image_swaps_the_classes(pairs: list[tuple[int, float]]) -> None:
    # Thirds and their like are not symmetric in binary: keep to probabilities that are.
    labels = np.array([label for label, _ in pairs])
    prob_dog = np.round(np.array([prob for _, prob in pairs]) * 64) / 64
    prob_dog[prob_dog == 0.5] = 0.75  # the decision itself is not symmetric there
    found = metrics.classification_metrics(labels, prob_dog)
    mirrored = metrics.classification_metrics(1 - labels, 1 - prob_dog)
    assert mirrored["accuracy"] == found["accuracy"]
    assert mirrored["per_class"]["cat"] == found["per_class"]["dog"]
    assert mirrored["log_loss"]["value"] == pytest.approx(found["log_loss"]["value"])
    if found["roc_auc"]["value"] is not None:
        assert mirrored["roc_auc"]["value"] == pytest.approx(found["roc_auc"]["value"])
        assert mirrored["roc_auc"]["ci95"] == pytest.approx(found["roc_auc"]["ci95"], abs=1e-6)


def test_delong_interval_covers_what_it_should() -> None:
    # Dogs score 2 standard deviations above cats: the true AUC is Φ(√2) = 0.9214.
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1], 100)
    num_covered = 0
    for _ in range(300):
        scores = rng.normal(size=200) + 2 * labels
        interval = metrics.roc_auc(labels, 1 / (1 + np.exp(-scores)))["ci95"]
        assert interval is not None
        low, high = interval
        num_covered += low <= 0.92135 <= high
    assert 0.91 <= num_covered / 300 <= 0.99


@pytest.mark.parametrize("prob_dog", [[0.1, 0.2, 0.8, 0.9], [0.9, 0.8, 0.2, 0.1], [0.5, 0.5, 0.5, 0.5]])
def test_auc_where_delong_has_no_variance_still_has_an_interval(prob_dog: list[float]) -> None:
    found = metrics.roc_auc([0, 0, 1, 1], prob_dog)
    assert found["value"] is not None
    low, high = found["ci95"]
    assert 0 <= low <= found["value"] <= high <= 1
    assert high - low > 0.2


def test_calibration_error_of_right_and_of_overconfident_probabilities() -> None:
    right = metrics.classification_metrics(*simulated(20_000))["expected_calibration_error"]
    assert right["value"] < 0.01
    assert right["ci95"][0] == 0
    assert right["norm"] == "l2"

    # Twice too sharp: the root mean square of the difference is 0.091, by numerical integration.
    labels, prob_dog = simulated(20_000, sharpness=2.0)
    wrong = metrics.classification_metrics(labels, prob_dog)["expected_calibration_error"]
    assert wrong["ci95"][0] <= 0.091 <= wrong["ci95"][1]
    assert wrong["value"] == metrics.expected_calibration_error(labels, prob_dog) == pytest.approx(0.091, abs=0.01)


def test_calibration_error_is_not_what_chance_alone_makes_of_few_images() -> None:
    estimates = [metrics.expected_calibration_error(*simulated(300, seed)) for seed in range(50)]
    assert np.median(estimates) < 0.02  # 0.06 without the correction


def test_one_class_only_leaves_some_metrics_undefined() -> None:
    found = metrics.classification_metrics([1, 1, 1], [0.9, 0.8, 0.7])

    def undefined(reason: str) -> dict[str, Any]:
        return {"value": None, "ci95": None, "reason": reason}

    assert found["roc_auc"] == undefined("every image is of one class")
    assert found["per_class"]["cat"]["recall"] == undefined("no image is of this class")
    assert found["per_class"]["cat"]["precision"] == undefined("no image is predicted to be of this class")
    assert found["per_class"]["cat"]["f1"] == undefined("no image is of this class or predicted to be")
    assert found["accuracy"]["value"] == 1.0


def test_balanced_accuracy_weighs_both_classes_alike() -> None:
    labels, prob_dog = [0] * 40 + [1] * 10, [0.1] * 38 + [0.9] * 2 + [0.9] * 5 + [0.1] * 5
    balanced = metrics.classification_metrics(labels, prob_dog)["balanced_accuracy"]
    predicted = metrics.predicted_classes(prob_dog)
    assert balanced["value"] == pytest.approx(sklearn_metrics.balanced_accuracy_score(labels, predicted))
    # Wilson's intervals are 0.8350 to 0.9862 for 38 of 40, and 0.2366 to 0.7634 for 5 of 10.
    assert balanced["ci95"] == pytest.approx([0.725 - 0.1437, 0.725 + 0.1330], abs=2e-3)


def test_a_class_of_one_image_has_an_interval_that_says_so() -> None:
    """The other images are sure and right, so that all the loss is that of the one dog."""
    one_dog = metrics.classification_metrics([0] * 50 + [1], [0.0] * 50 + [0.2])
    low, high = one_dog["log_loss"]["ci95"]
    assert low == pytest.approx(0, abs=1e-6)  # of other 51 images, none may be that dog
    assert high > 2 * one_dog["log_loss"]["value"]  # or several like it
    recall_ci95 = one_dog["per_class"]["dog"]["recall"]["ci95"]
    assert recall_ci95 is not None
    assert recall_ci95[1] - recall_ci95[0] > 0.7


def test_review_metrics() -> None:
    # Four images are kept, one of them wrong; the doubtful fifth is wrong as well.
    found = metrics.review_metrics([0, 0, 1, 1, 1], [0.1, 0.9, 0.8, 0.9, 0.4], [False, False, False, False, True])
    assert found["coverage"]["value"] == pytest.approx(4 / 5)
    assert found["selective_accuracy"]["value"] == pytest.approx(3 / 4)
    none_kept = metrics.review_metrics([0, 1], [0.4, 0.6], [True, True])
    assert none_kept["selective_accuracy"] == {"value": None, "ci95": None, "reason": "every image needs review"}


@pytest.mark.parametrize(
    ("labels", "prob_dog", "message"),
    [
        ([], [], "metrics need at least one image. Received: none"),
        ([0, 1], [0.5], r"labels and probabilities must be two lists of one length. Received: \(2,\) and \(1,\)"),
        ([[0], [1]], [[0.5], [0.5]], "must be two lists"),
        ([0, 2], [0.5, 0.5], r"labels must be 0 \(cat\) or 1 \(dog\). Received: 2"),
        ([0, 1], [0.5, float("nan")], "probabilities must lie between 0 and 1. Received: nan"),
        ([0, 1], [0.5, 1.5], "probabilities must lie between 0 and 1. Received: 1.5"),
        ([0, 1], [-0.5, 0.5], "probabilities must lie between 0 and 1. Received: -0.5"),
    ],
)
def test_input_that_makes_no_sense_is_refused(labels: list[int], prob_dog: list[float], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        metrics.classification_metrics(labels, prob_dog)
