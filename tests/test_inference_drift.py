"""Drift: it is found where it was planted, and seldom cried where there is none; the distribution it is judged by."""

from collections.abc import Sequence

import numpy as np
import pytest

from catdog.inference import drift
from catdog.inference.drift import Night
from catdog.inference.findings import CONFIDENCE_EDGES

SURE = [0.002, 0.003, 0.004, 0.006, 0.01, 0.02, 0.03, 0.05, 0.1, 0.15, 0.625]
"""Confidences of a good model on the photographs that it was made for."""

UNSURE = [0.02, 0.03, 0.04, 0.05, 0.07, 0.08, 0.09, 0.1, 0.12, 0.15, 0.25]


class Nights:
    """Draws nights, which differ by more than chance where `rho` is not 0."""

    def __init__(self, seed: int, rho: float = 0.0) -> None:
        self.rng = np.random.default_rng(seed)
        self.rho = rho

    def counts(self, num: int, shares: Sequence[float]) -> list[int]:
        drawn = np.array(shares)
        if self.rho:
            drawn = self.rng.dirichlet(np.maximum((1 / self.rho - 1) * drawn, 1e-6))
        return [int(count) for count in self.rng.multinomial(num, drawn)]

    def night(
        self,
        num: int,
        *,
        confidence: Sequence[float] = SURE,
        dogs: float = 0.5,
        review: float = 0.01,
        errors: float = 0.005,
        model_id: str = "model",
    ) -> Night:
        num_error, num_ok = self.counts(num, [errors, 1 - errors])
        num_dogs, num_cats = self.counts(num_ok, [dogs, 1 - dogs])
        return Night(
            run_id="20261127T020000.000000Z-00000000",
            model_id=model_id,
            num_ok=num_ok,
            num_error=num_error,
            labels={"cat": num_cats, "dog": num_dogs},
            needs_review=self.counts(num_ok, [review, 1 - review])[0],
            confidence=self.counts(num_ok, confidence),
            images_per_s=1.0,
        )

    def size(self) -> int:
        return int(self.rng.integers(100, 20_000))


def test_bins_of_the_example_are_those_of_the_records() -> None:
    assert len(SURE) == len(UNSURE) == len(CONFIDENCE_EDGES) - 1


def test_the_tail_of_f_is_scipys() -> None:
    stats = pytest.importorskip("scipy.stats")
    for value in (0.01, 0.5, 1.0, 2.0, 4.0, 40.0):
        for degrees in (1, 3, 10):
            for other in (8, 55, 330):
                expected = float(stats.f.sf(value, degrees, other))
                assert drift.f_tail(value, degrees, other) == pytest.approx(expected, rel=1e-9, abs=1e-14)


@pytest.mark.parametrize(
    ("rho", "most"),
    [
        (0.0, 0.0),  # nights that differ by chance alone
        (0.005, 0.02),
        (0.01, 0.05),  # a share of one half varies by 5 points
    ],
)
@pytest.mark.parametrize("num_earlier", [1, 2, 7, 30])
def test_it_does_not_cry_where_nothing_drifts(rho: float, most: float, num_earlier: int) -> None:
    nights, num_trials = Nights(5, rho), 100
    cries = 0
    for _ in range(num_trials):
        tonight, *earlier = (nights.night(nights.size()) for _ in range(num_earlier + 1))
        cries += bool(drift.compare(tonight, earlier).drifted)
    assert cries <= most * num_trials


@pytest.mark.parametrize("num_earlier", [2, 5, 15])
@pytest.mark.parametrize(
    ("name", "planted"),
    [
        ("confidence", {"confidence": UNSURE}),
        ("labels", {"dogs": 0.9}),
        ("review", {"review": 0.2}),
        ("errors", {"errors": 0.2}),
    ],
)
def test_it_finds_what_is_planted(name: str, planted: dict[str, float], num_earlier: int) -> None:
    nights, num_trials = Nights(7, rho=0.003), 30
    found = 0
    for _ in range(num_trials):
        earlier = [nights.night(2000) for _ in range(num_earlier)]
        comparison = drift.compare(nights.night(1000, **planted), earlier)  # type: ignore[arg-type]
        found += name in {shift.name for shift in comparison.drifted}
        assert {shift.name for shift in comparison.drifted} <= {name}
    assert found >= 0.9 * num_trials


def test_it_says_in_words_what_has_drifted() -> None:
    nights = Nights(1)
    comparison = drift.compare(nights.night(1000, review=0.25), [nights.night(4000) for _ in range(6)])
    (shift,) = comparison.drifted
    assert shift.name == "review"
    assert shift.text.startswith("2")
    assert shift.text.endswith("% of the labels need review; on earlier nights 0.9 % did.")
    assert comparison.verdict == (
        "Drift: these images are not like those of the 6 earlier nights with this model. " + shift.text
    )
    calm = drift.compare(nights.night(1000), [nights.night(4000)])
    assert calm.verdict.startswith(
        "No drift: confidence, labels, review and errors differ from the night before no more"
    )


def test_it_says_why_there_is_nothing_to_compare() -> None:
    nights = Nights(1)
    assert "first night" in drift.compare(nights.night(500), []).verdict
    assert "another model" in drift.compare(nights.night(500), [nights.night(500, model_id="other")]).verdict
    assert "Too few images" in drift.compare(nights.night(20), [nights.night(5000)]).verdict
    assert drift.compare(nights.night(0), [nights.night(5000)]).verdict.startswith("Nothing was labelled")


def test_a_record_of_an_older_catdog_is_no_night() -> None:
    with pytest.raises(KeyError):
        drift.night_of({"run_id": "1", "model_id": "m", "books": {"ok": 1, "error": 0}, "labels": {}})
