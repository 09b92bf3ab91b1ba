"""What the records of all benches have in common."""

import importlib
import json
import re
from pathlib import Path
from typing import Any, get_type_hints

import pytest

from catdog import __version__, bench, storage
from catdog.bench.plan import BenchPlanRecord
from catdog.bench.record import Begun, BenchRecord, refuse_cluster
from catdog.cli.commands import COMMANDS
from catdog.config import BenchPlanConfig
from catdog.errors import OutputRefusedError, UsageError

BENCHES = sorted(name for name in COMMANDS if name.startswith("bench "))


def plan_record(begun: Begun) -> BenchPlanRecord:
    found: dict[str, Any] = {"one_list": {}, "many_lists": {}, "all_new": [], "indexing": [], "mostly_done": []}
    return BenchPlanRecord(layout="deep", page_ms=0, objects=[], **found, **begun.common({"daft": "1.0"}))


@pytest.mark.parametrize("name", BENCHES)
def test_every_bench_has_a_record_of_its_own(name: str) -> None:
    module = importlib.import_module(COMMANDS[name].module)
    record = get_type_hints(getattr(module, COMMANDS[name].function))["return"]
    assert issubclass(record, BenchRecord)
    assert record.command == name
    assert record.file_name == ("bench.json" if name == "bench train" else f"{name.partition(' ')[2]}.json")


def test_a_record_says_what_was_found_and_then_how(tmp_path: Path) -> None:
    begun = Begun(BenchPlanRecord, BenchPlanConfig(output=str(tmp_path)))
    record = begun.publish(plan_record(begun))
    found = json.loads((tmp_path / "plan.json").read_text())
    assert found == record.to_dict()
    names = list(found)
    assert names[:3] == ["command", "output", "layout"]
    assert names[-5:] == ["host", "load_average", "config", "versions", "duration_s"]
    assert (found["output"], found["config"]["output"]) == (str(tmp_path), str(tmp_path))
    assert (found["versions"]["catdog"], found["versions"]["daft"]) == (__version__, "1.0")


def test_an_output_is_claimed_before_there_is_a_record(tmp_path: Path) -> None:
    config = BenchPlanConfig(output=str(tmp_path))
    (left,) = Begun(BenchPlanRecord, config).claim(["left"])
    storage.publish_bytes(storage.join(left, "part"), b"")
    assert Begun(BenchPlanRecord, config).claim(["left"]) == [left]
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]
    (tmp_path / "plan.json").write_text('{"command": "another"}')
    with pytest.raises(OutputRefusedError, match=r"^--output must be empty"):
        Begun(BenchPlanRecord, config)


def test_processes_are_not_killed_where_there_is_a_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_cluster(BenchPlanRecord)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    with pytest.raises(UsageError, match=r"^bench plan kills .* a Ray of its own\. Received: RAY_ADDRESS=10\.0\."):
        refuse_cluster(BenchPlanRecord)


def test_every_module_is_told_of() -> None:
    package = Path(bench.__file__).parent
    said = set(re.findall(r"`(\w+)`", bench.__doc__ or ""))
    assert said == {path.stem for path in package.glob("*.py")} - {"__init__"}
