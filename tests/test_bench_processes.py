"""How a bench runs processes."""

import sys
from pathlib import Path

import pytest

from catdog.bench import processes
from catdog.errors import CatdogError


def test_a_role_is_played_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = processes.role("planning", {"role": "lists"}, str(tmp_path / "result"))
    assert command[:3] == [sys.executable, "-m", "catdog.bench.planning"]
    monkeypatch.setattr(sys, "argv", command[2:])
    processes.main(lists, plans)
    assert (tmp_path / "result").read_text() == '{"role": "lists"}'


def lists(settings: processes.Settings) -> processes.Settings:
    return settings


def plans(_: processes.Settings) -> None:
    raise AssertionError


def test_a_role_that_fails_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CatdogError, match=r"^plans must finish\. Received: exit code 1: .* KeyError: 'output'$"):
        processes.play("planning", {"role": "plans"}, str(tmp_path))


def test_processes_stay_on_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    monkeypatch.setenv("CATDOG_TOKEN", "secret")
    monkeypatch.setenv("TF_CPP_MIN_LOG_LEVEL", "0")
    found = processes.environment({"MINE": "1"})
    assert not {"RAY_ADDRESS", "CATDOG_TOKEN"} & set(found)
    assert (found["TF_CPP_MIN_LOG_LEVEL"], found["MINE"]) == ("0", "1")


def test_a_model_is_a_flag_if_there_is_one() -> None:
    assert processes.catdog("predict")[1:] == ["-m", "catdog", "predict"]
    assert processes.catdog("predict", model="m")[3:] == ["predict", "--model", "m"]
