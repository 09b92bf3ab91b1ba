"""When a run stops before its end: deadlines, and what the first and the second signal do."""

import os
import signal
import time
from datetime import datetime
from zoneinfo import ZoneInfo

import pytest

from catdog.config import PredictConfig
from catdog.errors import UsageError
from catdog.inference.draining import Drain, next_time


def at(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=ZoneInfo("Europe/Berlin"))


@pytest.mark.parametrize(
    ("now", "time_of_day", "expected"),
    [
        ("2026-03-01 22:00", "06:00", "2026-03-02T06:00:00+01:00"),
        ("2026-03-01 05:59", "6:00", "2026-03-01T06:00:00+01:00"),
        ("2026-03-01 06:00:30", "06:00", "2026-03-02T06:00:00+01:00"),
        ("2026-12-31 23:30", "00:15", "2027-01-01T00:15:00+01:00"),
        ("2026-03-28 23:00", "06:00", "2026-03-29T06:00:00+02:00"),  # the clocks were put forward in between
    ],
)
def test_a_deadline_is_the_next_such_time(now: str, time_of_day: str, expected: str) -> None:
    assert next_time(time_of_day, at(now)).isoformat() == expected


def test_a_deadline_that_has_come_is_over() -> None:
    assert not Drain().is_over()
    drain = Drain("06:00", at("2026-03-01 22:00"))
    assert drain.is_over()
    assert drain.reason == "deadline"


@pytest.mark.parametrize("text", ["", "6", "24:00", "06:60", "6am", "06:00:00", " 06:00"])
def test_a_deadline_must_be_a_time_of_day(text: str) -> None:
    with pytest.raises(UsageError, match="--deadline must be a time from 00:00 to 23:59"):
        PredictConfig(images="photos", output="out", deadline=text)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_drains_and_the_second_does_what_it_did(number: signal.Signals) -> None:
    seen: list[int] = []
    former = signal.signal(number, lambda received, _frame: seen.append(received))
    try:
        drain = Drain()
        with drain.on_signals():
            os.kill(os.getpid(), number)
            time.sleep(0)
            assert (drain.is_over(), drain.reason, seen) == (True, number.name, [])
            os.kill(os.getpid(), number)
            time.sleep(0)
            assert seen == [number]
        drain.pass_on()
        time.sleep(0)
        assert seen == [number, number]
        Drain().pass_on()
        assert seen == [number, number]
    finally:
        signal.signal(number, former)
