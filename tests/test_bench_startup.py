"""What `catdog bench startup` measures: whether the stages are what they say, not how long they take."""

import json
from pathlib import Path

import pytest

from catdog.bench import startup, tree
from catdog.config import BenchStartupConfig
from catdog.errors import UsageError


def test_the_stages_sum_up_to_the_process() -> None:
    usage = tree.Usage(
        exit_code=0, wall_s=5.0, started_at=1_700_000_000.0, cpu_s=4.0, peak_memory_bytes=2**30, log_tail=""
    )
    record = {
        "run_id": "20231114T221320.750000Z-00000000",
        "durations_s": {"plan": 0.25, "label": 2.5, "total": 2.75},
        "thread_s": {"decode": 0.125, "score": 0.25, "publish": 0.125},
    }
    stages = startup.stages(usage, record, 0.5)
    assert stages == {
        "interpreter": 0.5,
        "imports": 0.25,
        "plan": 0.25,
        "model": 2.0,
        "decode": 0.125,
        "score": 0.25,
        "publish": 0.125,
        "exit": 1.5,
    }
    assert sum(stages.values()) == usage.wall_s


def test_imports_are_added_up_by_package_the_slowest_first() -> None:
    lines = [
        "import time: self [us] | cumulative | imported package",
        "import time:      1000 |       9000 |       numpy.linalg",
        "import time:       500 |      10000 |   numpy",
        "12:00:00 INFO a line of the log",
        "import time:      3000 |       3000 | scipy",
        *(f"import time: 1 | 1 | package{number}" for number in range(20)),
    ]
    found = startup.packages(lines)
    assert list(found.items())[:2] == [("scipy", 0.003), ("numpy", 0.0015)]
    assert len(found) == startup.NUM_PACKAGES


def test_a_photograph_that_is_not_there_is_refused(tmp_path: Path) -> None:
    config = BenchStartupConfig(images=str(tmp_path / "cat.jpg"), output=str(tmp_path / "output"))
    with pytest.raises(UsageError, match=r"^--images must exist\. Received: "):
        startup.bench_startup(config)
    assert not (tmp_path / "output").exists()


@pytest.mark.slow
def test_one_photograph_is_labelled_from_the_shell(tmp_path: Path, model: str) -> None:
    record = startup.bench_startup(BenchStartupConfig(output=str(tmp_path), model=model, rounds=2))
    assert record.to_dict() == json.loads((tmp_path / "startup.json").read_text())
    assert list(record.seconds) == ["inline", "ray", "floor", "interpreter"]
    assert len(record.rounds) == 2
    for name in startup.EXECUTORS:
        stages = record.stages[name]
        assert all(stages[stage] >= 0 for stage in ("interpreter", "plan", "decode", "score", "publish", "exit"))
        assert 0 < record.outside_labelling_s[name] < record.seconds[name].max
    assert record.seconds["inline"].min > record.seconds["interpreter"].min
    assert "catdog" in record.import_s or len(record.import_s) == startup.NUM_PACKAGES
    lines = record.summary()
    assert lines[0].startswith("Labelled one photograph, 2 times, in ")
    assert lines[-1] == f"Bench: {tmp_path}"
