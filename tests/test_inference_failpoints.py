"""`predict` dies before and after each of its steps, or finds the disk full; the same command then does the rest."""

import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from inference_case import answers, encoded_drawings
from ray_case import UNSHARED, can_hide

from catdog import failpoints
from catdog.inference import verify

pytestmark = pytest.mark.slow

NUM_PICTURES = 40

FORKING = """
import os, sys
from catdog import failpoints
from catdog.config import PredictConfig
from catdog.errors import CatdogError
from catdog.inference import predict
from catdog.inference.plan import index, planner
planner.SLICE_SIZE = 8
index.MIN_PARTS = 1
for line in sys.stdin:
    images, output, model, point = line.rstrip().split(" ")
    if (child := os.fork()) == 0:
        failpoints._text = None if point == "-" else point
        try:
            predict(PredictConfig(images=images, output=output, model=model, executor="inline"))
        except CatdogError as error:
            print(error, file=sys.stderr)
            os._exit(1)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
"""Forks runs, whose slices are small, from a process that has imported everything."""


class Runs:
    """Runs over the same pictures."""

    def __init__(self, forking: "subprocess.Popen[str]", images: Path, model: str) -> None:
        self._forking, self._images, self._model = forking, images, model

    def run(self, output: Path, point: str = "-") -> int:
        """The exit code of one."""
        assert self._forking.stdin is not None
        assert self._forking.stdout is not None
        print(self._images, output, self._model, point, file=self._forking.stdin, flush=True)
        return int(self._forking.stdout.readline())


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, model: str) -> Iterator[Runs]:
    images = tmp_path_factory.mktemp("images")
    for number, picture in enumerate(encoded_drawings(NUM_PICTURES)):
        (images / f"{number:03}.jpg").write_bytes(picture)
    (images / "letter.jpg").write_text("Dear cat,")
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen([sys.executable, "-c", FORKING], text=True, **pipes) as forking:
        yield Runs(forking, images, model)
        forking.kill()


@pytest.fixture(scope="module")
def expected(runs: Runs, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The rows of a run that nobody disturbs."""
    output = tmp_path_factory.mktemp("undisturbed") / "out"
    assert runs.run(output) == 0
    rows = answers(output)
    assert len(rows) == NUM_PICTURES + 1
    return rows


STEPS = {
    "claim": 1,
    "list": 1,
    "plan": 1,
    "read": 5,
    "write": 3,
    "sync": 4,
    "publish": 5,
    "index": 1,
    "record": 1,
    "delete": 1,
}
"""Step → which time. A file is written for the plan, each of six slices, the index and the record."""

POINTS = [f"{moment}:{step}:{number}" for step, number in STEPS.items() for moment in ("before", "after")]


def test_every_step_of_a_run_is_hit() -> None:
    assert list(STEPS) == [*failpoints.STEPS[:7], "index", "record", "delete"]


@pytest.mark.parametrize("point", POINTS)
def test_whenever_a_run_dies_the_next_one_does_the_rest(
    runs: Runs, expected: list[dict[str, Any]], tmp_path: Path, point: str
) -> None:
    output = tmp_path / "out"
    if "index" in point:  # which is written by a run that finds parts
        runs.run(output, "before:record:1=kill")
    assert runs.run(output, f"{point}=kill") == -signal.SIGKILL
    seen = Counter(row["uri"] for part in output.glob("part-*.parquet") for row in pq.read_table(part).to_pylist())
    assert set(seen.values()) <= {1}  # whole files, and no image twice
    assert runs.run(output) == 0
    assert answers(output) == expected
    assert verify(str(output)).rows == NUM_PICTURES + 1


@pytest.mark.parametrize("point", ["write:1", "write:4", "write:8"])
def test_a_full_disk_ends_a_run_and_loses_nothing(
    runs: Runs, expected: list[dict[str, Any]], tmp_path: Path, point: str
) -> None:
    output = tmp_path / "out"
    assert runs.run(output, f"before:{point}=full") == 1
    runs.run(output, f"before:{point}=full")  # which writes an index before its plan, if it can, and has less to do
    assert runs.run(output) == 0
    assert answers(output) == expected
    assert verify(str(output)).rows == NUM_PICTURES + 1


def test_on_a_disk_that_is_really_full(runs: Runs, expected: list[dict[str, Any]], tmp_path: Path) -> None:
    """In a namespace of mounts, the output is a disk that has no room for all rows, and then is given more."""
    if not can_hide():
        pytest.skip("needs namespaces of users and mounts")
    output = tmp_path / "out"
    output.mkdir()
    line = f"'{sys.executable}' -m catdog predict --images '{runs._images}' --output '{output}' --model '{runs._model}'"
    script = f"""
        mount -t tmpfs -o size=20k none '{output}'
        {line} --executor inline; echo exit code $?
        mount -o remount,size=16m '{output}'
        {line} --executor inline; echo exit code $?
        cp -r '{output}' '{tmp_path}/copy'
    """
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    said = subprocess.run([*UNSHARED, script], capture_output=True, text=True, env=environment)
    assert [row for row in said.stdout.splitlines() if row.startswith("exit code")] == ["exit code 1", "exit code 0"]
    assert "No space left on device" in said.stderr
    assert "Traceback" not in said.stderr
    assert answers(tmp_path / "copy") == expected


@pytest.mark.parametrize("point", ["before:empty:3", "before:replace:1", "before:close:1"])
def test_a_run_finishes_a_compaction_that_died(
    runs: Runs, expected: list[dict[str, Any]], tmp_path: Path, point: str
) -> None:
    output = tmp_path / "out"
    assert runs.run(output) == 0
    environment = os.environ | {failpoints.VARIABLE: f"{point}=kill"}
    command = [sys.executable, "-m", "catdog", "compact", str(output)]
    assert subprocess.run(command, env=environment, capture_output=True).returncode == -signal.SIGKILL
    assert verify(str(output)).rows == NUM_PICTURES + 1
    assert runs.run(output) == 0
    assert answers(output) == expected
    assert len({row["run_id"] for path in output.glob("part-*") for row in pq.read_table(path).to_pylist()}) == 1
    assert verify(str(output)).runs == 2
