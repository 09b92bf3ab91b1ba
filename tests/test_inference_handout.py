"""Which slices a run gives to a second worker."""

import threading

import pytest

from catdog.inference.handout import MAX_ATTEMPTS, MIN_LATE_S, SLOW_FACTOR, Handout

SLICE_S = 2 * MIN_LATE_S
"""How long a worker takes for a slice."""


def handout_of(num_slices: int, num_images: int = 100) -> Handout:
    """All slices are given at 0 s."""
    handout = Handout()
    for number in range(num_slices):
        assert handout.give(b"%d" % number, num_images, 0.0) == number
    handout.all_given(0.0)
    return handout


def do(handout: Handout, number: int, worker: str, begun: float, took: float = SLICE_S) -> None:
    handout.begin(number, worker, begun)
    assert handout.finish(number, worker, took, begun + took)


def test_a_slice_is_late_after_three_times_the_median() -> None:
    handout = handout_of(3)
    handout.begin(2, "slow", 1.0)
    do(handout, 0, "fast", 0.0)
    do(handout, 1, "fast", SLICE_S)
    due = 1.0 + SLOW_FACTOR * SLICE_S
    assert handout.late(due) == []
    assert handout.late(due + 0.1) == [(2, b"2")]
    assert handout.late(due + 0.2) == []


def test_a_large_slice_may_take_longer() -> None:
    handout = Handout()
    for num_images in (100, 100, 200):
        handout.give(b"", num_images, 0.0)
    handout.all_given(0.0)
    handout.begin(2, "slow", 0.0)
    do(handout, 0, "fast", 0.0)
    do(handout, 1, "fast", SLICE_S)
    assert handout.late(2 * SLOW_FACTOR * SLICE_S - 0.1) == []
    assert len(handout.late(2 * SLOW_FACTOR * SLICE_S + 0.1)) == 1


def test_no_slice_is_late_in_a_moment() -> None:
    handout = handout_of(2)
    handout.begin(1, "slow", 0.0)
    do(handout, 0, "fast", 0.0, took=0.01)
    assert handout.late(MIN_LATE_S - 0.1) == []
    assert len(handout.late(MIN_LATE_S + 0.1)) == 1


def test_only_idle_workers_get_late_slices() -> None:
    handout = handout_of(5)
    do(handout, 0, "one", 0.0)
    for number, worker in enumerate(["one", "two", "three"], start=1):
        handout.begin(number, worker, SLICE_S)
    assert handout.late(100 * SLICE_S) == []
    assert handout.finish(1, "one", SLICE_S, 2 * SLICE_S)
    assert len(handout.late(100 * SLICE_S)) == 1


def test_a_worker_between_two_slices_is_not_idle() -> None:
    handout = handout_of(3)
    handout.begin(2, "slow", 0.0)
    do(handout, 0, "fast", 0.0)
    now = 100 * SLICE_S
    handout.begin(1, "fast", now - SLICE_S)
    assert handout.finish(1, "fast", SLICE_S, now)
    assert handout.late(now + 0.5) == []
    assert handout.late(now + 1.5) == [(2, b"2")]


def test_before_all_slices_are_given_none_is_late() -> None:
    handout = Handout()
    for _ in range(2):
        handout.give(b"", 1, 0.0)
    do(handout, 0, "fast", 0.0)
    handout.begin(1, "slow", 0.0)
    assert handout.late(100 * SLICE_S) == []
    handout.all_given(100 * SLICE_S)
    assert len(handout.late(100 * SLICE_S + 1)) == 1


def test_a_slice_that_waits_behind_a_slow_one_or_was_lost_is_late_too() -> None:
    handout = handout_of(2)
    do(handout, 0, "fast", 0.0)
    assert handout.late(SLOW_FACTOR * SLICE_S) == []
    assert handout.late(SLOW_FACTOR * SLICE_S + 0.1) == [(1, b"1")]


def test_the_first_result_counts_and_a_slice_is_tried_so_often() -> None:
    handout = handout_of(2)
    do(handout, 0, "fast", 0.0)
    handout.begin(1, "slow", 0.0)
    late = [handout.late(number * 10 * SLICE_S) for number in range(1, MAX_ATTEMPTS + 2)]
    assert late == [[(1, b"1")]] * (MAX_ATTEMPTS - 1) + [[], []]
    assert not handout.has_only_doubles()
    assert handout.finish(1, "fast", SLICE_S, 1000.0)
    assert handout.wait(0)
    assert handout.has_only_doubles()
    assert not handout.finish(1, "slow", SLICE_S, 1001.0)
    assert handout.has_only_doubles()
    assert not handout.finish(1, "third", SLICE_S, 1002.0)
    assert not handout.has_only_doubles()


def test_a_start_that_becomes_known_after_the_end_is_none() -> None:
    handout = handout_of(3)
    handout.begin(2, "slow", 0.0)
    for number in range(2):
        assert handout.finish(number, "fast", SLICE_S, SLICE_S)
        handout.begin(number, "fast", 0.0)
    assert handout.late(100 * SLICE_S) == [(2, b"2")]


def test_one_can_wait_for_room() -> None:
    handout = Handout()
    assert handout.is_below(1)
    handout.give(b"", 1, 0.0)
    assert not handout.is_below(1)
    other = threading.Timer(0.1, lambda: handout.finish(0, "one", 1.0, 1.0))
    other.start()
    assert handout.is_below(1, 60)
    other.join()


@pytest.mark.parametrize("is_all_given", [False, True])
def test_a_run_that_stops_waits_for_nothing(is_all_given: bool) -> None:
    handout = Handout()
    handout.give(b"", 1, 0.0)
    if is_all_given:
        handout.all_given(0.0)
    assert not handout.wait(0)
    assert not handout.is_below(1)
    handout.stop()
    assert handout.wait(60)
    assert handout.is_below(1, 60)
