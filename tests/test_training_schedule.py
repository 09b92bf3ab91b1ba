import math

import numpy as np
import pytest

from catdog.training import schedule


def rates(num_steps: int, *, head_steps: int = 0) -> list[float]:
    chosen = schedule.learning_rate_schedule(head_rate=1e-3, head_steps=head_steps, peak_rate=0.1, num_steps=num_steps)
    return [float(chosen(step)) for step in range(head_steps + num_steps + 1)]


@pytest.mark.slow
def test_one_stage_warms_up_and_falls_to_nothing() -> None:
    found = rates(200)
    assert found[0] == pytest.approx(0.1 / 20)
    assert found[19] == found[20] == pytest.approx(0.1)
    assert max(found) == pytest.approx(0.1)
    assert found[110] == pytest.approx(0.05)
    assert found[200] == pytest.approx(0, abs=1e-8)
    assert np.all(np.diff(found[:20]) > 0)
    assert np.all(np.diff(found[20:]) < 0)
    expected = [0.05 * (1 + math.cos(math.pi * (step - 20) / 180)) for step in range(20, 201)]
    np.testing.assert_allclose(found[20:], expected, rtol=1e-4, atol=1e-7)


@pytest.mark.slow
def test_a_head_alone_comes_first_at_a_rate_of_its_own() -> None:
    found = rates(200, head_steps=50)
    assert found[0] == pytest.approx(1e-3 / 5)
    np.testing.assert_allclose(found[4:50], 1e-3, rtol=1e-6)
    np.testing.assert_allclose(found[50:], rates(200), rtol=1e-5, atol=1e-8)


@pytest.mark.slow
@pytest.mark.parametrize("head_steps", [0, 1, 5])
@pytest.mark.parametrize("num_steps", [0, 1, 2, 9])
def test_few_steps_have_finite_rates_of_at_most_the_peak(num_steps: int, head_steps: int) -> None:
    found = rates(num_steps, head_steps=head_steps)
    taken = np.array(found[: head_steps + num_steps])
    assert np.all((taken > 0) & (taken <= 0.1 * (1 + 1e-6)))


def test_each_crop_rules_its_share_of_the_epochs() -> None:
    scales = (0.4, 0.5, 0.6, 0.7, 0.8)
    sizes = [schedule.crop_size(scales, 160, epoch, 60) for epoch in range(60)]
    assert sizes == [64] * 12 + [80] * 12 + [96] * 12 + [112] * 12 + [128] * 12
    assert [schedule.crop_size(scales, 160, epoch, 2) for epoch in range(2)] == [64, 96]
    assert schedule.crop_size((1.0,), 150, 29, 30) == 150


def test_a_crop_is_never_too_small_for_a_network() -> None:
    assert schedule.crop_size((0.4,), 48, 0, 1) == 32
