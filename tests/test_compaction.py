"""`catdog compact`: parts are merged while readers read and runs run; whoever dies, no row is lost or doubled."""

import itertools
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from s3_server import S3Server

from catdog import schema, storage
from catdog.bench.polling import Reader
from catdog.config import CompactConfig
from catdog.errors import OutputClaimedError, OutputRefusedError, StorageError
from catdog.inference import compaction, journals, verify
from catdog.inference.compaction import CompactRecord, compact, paused
from catdog.inference.journals import read_journals
from catdog.schema import PREDICTIONS_SCHEMA

pytest_plugins = ["s3_server"]

COMPARED = ("uri", "source_version", "image_id", "label", "prob_dog", "error_code", "run_id")


def row(number: int, *, error: str | None = None, run: str = "earlier") -> dict[str, Any]:
    found: dict[str, Any] = dict.fromkeys(PREDICTIONS_SCHEMA.names)
    found |= {"uri": f"/photos/{number:06d}.jpg", "source_version": f"{number}-1", "model_id": "m", "run_id": run}
    found |= {"predicted_at": datetime(2026, 11, 27, tzinfo=UTC), "num_bytes": 1000}
    if error is not None:
        return found | {"status": "error", "error_code": error}
    prob = (number % 50) / 100
    return found | {
        "status": "ok",
        "image_id": f"{number:064x}",
        "label": "cat",
        "prob_dog": prob,
        "confidence": 1 - prob,
        "needs_review": False,
    }


def write_parts(output: str, num_parts: int, size: int, *, errors: Sequence[int] = (), run: str = "earlier") -> None:
    """Parts of neighbours, whose names are in another order. The images with these numbers are errors."""
    for part in range(num_parts):
        rows = [
            row(number, error="decode_failed" if number in errors else None, run=run)
            for number in range(part * size, (part + 1) * size)
        ]
        name = f"part-{run}{part * 7919 % num_parts:06x}.parquet"
        storage.publish_parquet(storage.join(output, name), schema.table_of(rows, PREDICTIONS_SCHEMA))


def rows_of(output: str) -> Counter[tuple[Any, ...]]:
    """The rows that a reader sees."""
    found: Counter[tuple[Any, ...]] = Counter()
    for name in storage.list_names(output, ".parquet"):
        table = storage.read_parquet(storage.join(output, name), COMPARED)
        found.update(zip(*(table[column].to_pylist() for column in COMPARED), strict=True))
    return found


def sizes(output: str) -> list[int]:
    """The numbers of rows of the parts that have any, ascending."""
    names = storage.list_names(output, ".parquet")
    return sorted(filter(None, (len(storage.read_parquet(storage.join(output, name))) for name in names)))


def compacted(output: str, **changes: Any) -> CompactRecord:
    return compact(CompactConfig(output=output, **changes))


def test_small_parts_become_one_with_the_same_rows(tmp_path: Path) -> None:
    output = str(tmp_path)
    write_parts(output, 30, 12)
    before = rows_of(output)
    record = compacted(output)
    assert (record.num_parts_before, record.num_parts_after, record.num_merged, record.num_rows) == (30, 1, 30, 360)
    assert rows_of(output) == before
    assert sizes(output) == [360]
    assert len(list(tmp_path.glob("part-*"))) == 31
    (merged,) = [path for path in tmp_path.glob("part-*") if pq.read_metadata(path).num_rows]
    table = pq.read_table(merged)
    assert table["uri"].to_pylist() == sorted(table["uri"].to_pylist())
    assert {pq.read_schema(path).metadata[b"catdog.schema"] for path in tmp_path.glob("part-*")} == {b"predictions/3"}
    assert verify(output).rows == 360
    assert record.summary()[:2] == [
        f"Merged 30 parts with 360 rows in {record.duration_s:,.1f} s.",
        "  parts    30 before, 1 after",
    ]
    assert sorted(path.name for path in (tmp_path / "_compact").iterdir()) == [f"{read_journals(output)[0].id}.json"]


def test_what_is_merged_is_left_alone_and_its_sources_go_an_hour_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = str(tmp_path)
    write_parts(output, 30, 12)
    before = rows_of(output)
    compacted(output)
    again = compacted(output)
    assert (again.num_merged, again.num_deleted, again.num_parts_before, again.num_parts_after) == (0, 0, 1, 1)
    assert again.summary()[0] == "Nothing to merge."
    monkeypatch.setattr(compaction, "GRACE_S", 0.0)
    assert compacted(output).num_deleted == 30
    assert len(list(tmp_path.glob("part-*"))) == 1
    assert [journal.state for journal in read_journals(output)] == ["cleared"]
    assert compacted(output).num_deleted == 0
    assert rows_of(output) == before
    assert verify(output).differences == []


def test_a_year_of_nights_leaves_few_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = str(tmp_path)
    monkeypatch.setattr(compaction, "GRACE_S", 0.0)
    for night in range(15):
        write_parts(output, 2, 4, run=f"night{night:02}")
        compacted(output, target_rows=30)
    assert len(read_journals(output)) <= compaction._MAX_CLEARED + 1
    gone = journals.merged_away(read_journals(output))
    assert gone >= {f"part-night{night:02}{part:06x}.parquet" for night in range(14) for part in (0, 1)}
    compacted(output, target_rows=30)
    assert len(list(tmp_path.glob("part-*"))) == len(sizes(output)) < 9
    assert sum(sizes(output)) == 15 * 8


def test_parts_grow_to_the_target_and_no_further(tmp_path: Path) -> None:
    output = str(tmp_path)
    write_parts(output, 30, 10)
    record = compacted(output, target_rows=100)
    assert sizes(output) == [100, 100, 100]
    assert record.num_parts_after == 3
    write_parts(output, 3, 10, run="later")
    record = compacted(output, target_rows=100)
    assert record.left == {"large": 3}
    assert sizes(output) == [30, 100, 100, 100]
    write_parts(output, 3, 10, run="last")
    assert compacted(output, target_rows=100).num_merged == 4
    assert sizes(output) == [60, 100, 100, 100]


def test_errors_are_kept_in_parts_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compaction, "SLICE_SIZE", 4)
    output = str(tmp_path)
    write_parts(output, 30, 12, errors=range(0, 360, 40))
    before = rows_of(output)
    compacted(output)
    assert sizes(output) == [1, 4, 4, 351]
    assert rows_of(output) == before
    assert compacted(output).left == {"too few": 4}


def test_an_output_keeps_its_columns(tmp_path: Path) -> None:
    output = str(tmp_path)
    older = schema.predictions_with(
        [name for name in PREDICTIONS_SCHEMA.names if name not in ("remark", "review_reason")]
    )
    for part in range(3):
        rows = schema.table_of([row(part)], PREDICTIONS_SCHEMA)
        storage.publish_parquet(f"{output}/part-{part}.parquet", schema.conformed(rows.select(older.names), older))
    compacted(output)
    assert {tuple(pq.read_schema(path).names) for path in tmp_path.glob("part-*")} == {tuple(older.names)}
    assert sizes(output) == [3]


def test_an_output_must_hold_predictions(tmp_path: Path) -> None:
    with pytest.raises(OutputRefusedError, match=r"^OUTPUT must hold predictions\. Received: .*, which holds none$"):
        compacted(str(tmp_path / "nothing"))
    assert not (tmp_path / "nothing").exists()
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(OutputRefusedError, match="must be empty, or hold what this command wrote"):
        compacted(str(tmp_path))


def test_a_damaged_part_ends_it_before_anything_is_changed(tmp_path: Path) -> None:
    output = str(tmp_path)
    write_parts(output, 3, 4)
    (tmp_path / "part-torn.parquet").write_bytes(b"PAR1")
    with pytest.raises(OutputRefusedError, match=r"part-torn\.parquet, which holds none"):
        compacted(output)
    assert len(list(tmp_path.glob("part-*"))) == 4
    (tmp_path / "part-torn.parquet").unlink()
    assert sizes(output) == [4, 4, 4]
    storage.publish_json(f"{output}/_compact/1.json", {"id": "1", "state": "open"})
    with pytest.raises(
        StorageError, match=r"^the journal of a compaction must be whole\. Received: .*_compact/1\.json"
    ):
        compacted(output)


# Beside others.


def test_two_compactions_are_one_too_many(tmp_path: Path) -> None:
    output = str(tmp_path)
    write_parts(output, 3, 4)
    with (
        storage.claimed(f"{output}/_compact", "compact"),
        pytest.raises(OutputClaimedError, match="held by `catdog compact`"),
    ):
        compacted(output)
    with paused(output), pytest.raises(OutputClaimedError, match="held by `catdog predict`"):
        compacted(output)
    assert compacted(output).num_merged == 3


def test_a_run_that_plans_waits_for_a_compaction(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = str(tmp_path)
    monkeypatch.setattr(compaction, "_POLL_S", 0.01)
    claim = storage.claimed(f"{output}/_compact", "compact")
    claim.__enter__()
    sleep = time.sleep
    slept = []

    def sleep_and_release(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 3:
            claim.__exit__(None, None, None)
        sleep(0)

    monkeypatch.setattr(time, "sleep", sleep_and_release)
    with paused(output):
        assert len(slept) == 3
    monkeypatch.setattr(compaction, "_MAX_WAIT_S", 0.0)
    with (
        storage.claimed(f"{output}/_compact", "compact"),
        pytest.raises(OutputClaimedError, match="held by `catdog compact`"),
        paused(output),
    ):
        pass


def test_beside_a_run_only_labels_of_runs_with_a_record_are_merged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = str(tmp_path)
    write_parts(output, 4, 10, errors=[5])
    write_parts(output, 3, 10, run="atwork")
    storage.publish_json(f"{output}/_runs/earlier.json", {})
    with storage.claimed(output, "predict"):
        record = compacted(output)
    assert record.left == {"of a run that has not ended": 3, "with errors": 1}
    assert sizes(output) == [10, 10, 10, 10, 30]
    storage.publish_bytes(f"{output}/_runs/atwork.plan-00000.parquet", b"a plan that nobody has taken over")
    monkeypatch.setattr(compaction, "GRACE_S", 0.0)
    record = compacted(output)
    assert (record.num_merged, record.num_deleted) == (0, 0)
    storage.delete(f"{output}/_runs/atwork.plan-00000.parquet")
    record = compacted(output)
    assert (record.num_merged, record.num_deleted) == (5, 3)
    assert sizes(output) == [1, 69]


def test_readers_see_each_row_at_most_once_at_any_moment(tmp_path: Path) -> None:
    output = str(tmp_path)
    write_parts(output, 400, 12)
    before = rows_of(output)
    with Reader(output, 0.0) as reader:
        compacted(output, target_rows=1200)
    assert (reader.torn, reader.num_twice, reader.num_rows) == ([], 0, 4800)
    assert reader.num_polls > 3
    assert rows_of(output) == before


def test_what_was_listed_before_is_there_and_no_row_twice(tmp_path: Path) -> None:
    """A reader that has listed, and reads some files before a compaction and the others after it."""
    output = str(tmp_path)
    write_parts(output, 6, 10)
    listed = storage.list_names(output, ".parquet")

    def read(names: Sequence[str]) -> list[str]:
        return [uri for name in names for uri in storage.read_parquet(f"{output}/{name}", ["uri"])["uri"].to_pylist()]

    seen = read(listed[:3])
    compacted(output)
    seen += read(listed[3:])
    assert len(seen) == len(set(seen)) == 30


def test_who_has_read_a_footer_finds_the_rows_that_it_names(tmp_path: Path) -> None:
    """DuckDB reads all footers first, and opens the files again for the rows."""
    output = str(tmp_path)
    write_parts(output, 3, 10)
    parts = {path: (pq.read_metadata(path), pq.read_table(path)) for path in tmp_path.glob("part-*")}
    compacted(output)
    for path, (footer, rows) in parts.items():
        assert pq.read_table(path).num_rows == 0
        assert pq.ParquetFile(path, metadata=footer).read() == rows


# What dies.

FORKING = """
import os, sys
from catdog import failpoints
from catdog.config import CompactConfig
from catdog.inference import compaction
compaction.GRACE_S = 0.0
compaction._WRITERS = 1
for line in sys.stdin:
    output, point = line.rstrip().split(" ")
    if (child := os.fork()) == 0:
        failpoints._text = point
        compaction.compact(CompactConfig(output=output, target_rows=40))
        os._exit(0)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Compactions:
    """Processes that compact and are hit at a point. They are forked by a process that has imported everything."""

    def __init__(self, forking: "subprocess.Popen[str]") -> None:
        self._forking = forking

    def start(self, output: str, point: str) -> int:
        """Start one. Returns its id."""
        assert self._forking.stdin is not None
        print(output, point, file=self._forking.stdin, flush=True)
        return self._said()

    def end(self) -> int:
        """Wait for its end. Returns its exit code."""
        return self._said()

    def _said(self) -> int:
        assert self._forking.stdout is not None
        return int(self._forking.stdout.readline())


@pytest.fixture(scope="module")
def compactions() -> Iterator[Compactions]:
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen([sys.executable, "-c", FORKING], text=True, **pipes) as forking:
        yield Compactions(forking)
        forking.kill()


POINTS = [
    f"{moment}:{step}:{number}"
    for step, numbers in {
        "claim": (1,),
        "merge": (1,),
        "journal": (1,),
        "empty": (1, 5),
        "replace": (1, 2),
        "close": (1,),
        "write": (2,),
        "sync": (3,),
        "publish": (6,),
        "delete": (1,),
    }.items()
    for moment, number in itertools.product(("before", "after"), numbers)
]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("written")
    write_parts(str(directory), 8, 10, errors=[3])
    return directory


@pytest.mark.slow
@pytest.mark.parametrize("point", POINTS)
def test_whenever_it_dies_the_next_one_brings_it_to_its_end(
    written: Path, tmp_path: Path, compactions: Compactions, point: str
) -> None:
    output = str(tmp_path / "out")
    shutil.copytree(written, output)
    before = rows_of(output)
    compactions.start(output, f"{point}=kill")
    assert compactions.end() == -signal.SIGKILL
    assert not rows_of(output) - before  # some may be missing, none is there twice
    assert verify(output).rows == 80
    with paused(output):  # as a run that plans
        assert rows_of(output) == before
    compacted(output, target_rows=40)
    assert rows_of(output) == before
    assert verify(output).rows == 80
    assert len(sizes(output)) <= 4
    assert not [name for name in os.listdir(f"{output}/_compact") if name.startswith(".part")]


@pytest.mark.slow
@pytest.mark.parametrize("step", ["merge", "journal", "empty", "replace", "close"])
def test_a_full_disk_loses_nothing(written: Path, tmp_path: Path, compactions: Compactions, step: str) -> None:
    output = str(tmp_path / "out")
    shutil.copytree(written, output)
    before = rows_of(output)
    compactions.start(output, f"before:{step}:1=full")
    assert compactions.end() == 1
    assert verify(output).rows == 80
    compacted(output, target_rows=40)
    assert rows_of(output) == before


@pytest.mark.slow
def test_one_that_was_taken_for_dead_does_no_harm(written: Path, tmp_path: Path, compactions: Compactions) -> None:
    """It is stopped before it gives the targets their names; another one takes over; then it goes on."""
    output = str(tmp_path / "out")
    shutil.copytree(written, output)
    before = rows_of(output)
    process = compactions.start(output, "before:empty:2=stop")
    try:
        while Path(f"/proc/{process}/stat").read_text().rpartition(") ")[2][0] != "T":
            time.sleep(0.01)
        (claim,) = Path(output, "_compact").glob(".catdog-claim-*")
        claim.unlink()  # as if it had expired
        compacted(output, target_rows=40)
        assert rows_of(output) == before
    finally:
        os.kill(process, signal.SIGCONT)
    assert compactions.end() == 1
    assert rows_of(output) == before
    assert verify(output).rows == 80


# On S3.


@pytest.mark.slow
def test_on_s3(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    output = f"{s3.new_bucket()}/predictions"
    write_parts(output, 12, 10, errors=[3, 77])
    before = rows_of(output)
    with Reader(output, 0.0) as reader:
        compacted(output)
    assert (reader.torn, reader.num_twice, reader.num_rows) == ([], 0, 120)
    assert rows_of(output) == before
    assert sizes(output) == [2, 118]
    assert verify(output).rows == 120
    monkeypatch.setattr(compaction, "GRACE_S", 0.0)
    assert compacted(output).num_deleted == 12
    assert rows_of(output) == before
