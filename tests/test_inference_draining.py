"""When a run stops before its end: deadlines, and what the first and the second signal do."""

import signal
import subprocess
import sys
from datetime import datetime, timedelta
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


def test_a_command_that_is_started_again_has_the_deadline_of_the_first_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that dies at 05:59 is started again at 06:00, and must not go on until the next morning."""
    now = datetime.now()
    monkeypatch.setenv("CATDOG_BEGIN", str((now - timedelta(minutes=5)).timestamp()))
    assert Drain((now - timedelta(minutes=2)).strftime("%H:%M")).is_over()
    assert not Drain((now + timedelta(minutes=2)).strftime("%H:%M")).is_over()
    monkeypatch.delenv("CATDOG_BEGIN")
    assert not Drain((now - timedelta(minutes=2)).strftime("%H:%M")).is_over()
    monkeypatch.setenv("CATDOG_BEGIN", "yesterday")
    with pytest.raises(UsageError, match="CATDOG_BEGIN must be seconds since 1970"):
        Drain("06:00")


@pytest.mark.parametrize("text", ["", "6", "24:00", "06:60", "6am", "06:00:00", " 06:00"])
def test_a_deadline_must_be_a_time_of_day(text: str) -> None:
    with pytest.raises(UsageError, match="--deadline must be a time from 00:00 to 23:59"):
        PredictConfig(images="photos", output="out", deadline=text)


SIGNALLED = """if True:
    import os, signal, sys, time
    from catdog.inference.draining import Drain

    number = signal.Signals(int(sys.argv[1]))
    seen = []
    signal.signal(number, lambda received, _frame: seen.append(received))

    def send():
        os.kill(os.getpid(), number)
        time.sleep(0)

    drain = Drain()
    with drain.on_signals():
        send()
        print(drain.is_over(), drain.reason, len(seen))
        send()
        print(len(seen))
    drain.pass_on()
    time.sleep(0)
    print(len(seen))
    Drain().pass_on()
    print(len(seen))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_drains_and_the_second_does_what_it_did(number: signal.Signals) -> None:
    command = [sys.executable, "-c", SIGNALLED, str(int(number))]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["True", number.name, "0", "1", "2", "2"]
