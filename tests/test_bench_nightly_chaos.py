"""`catdog bench nightly-chaos`: whether it sees what it is to see, and a short form of it."""

import dataclasses
import io
import json
import os
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from fault_proxy import Fault, FaultProxy
from s3_server import S3Server

from catdog import provenance, schema, storage
from catdog.bench import nightly_chaos, tree
from catdog.bench.growing import Growing
from catdog.bench.nightly_chaos import BenchNightlyChaosRecord, bench_nightly_chaos
from catdog.bench.opened import Opened
from catdog.bench.polling import Reader
from catdog.config import BenchNightlyChaosConfig
from catdog.errors import BooksError, CatdogError, OutputRefusedError, UsageError

pytest_plugins = ["s3_server", "fault_proxy"]


# The parts.


def test_every_opening_of_a_file_is_counted(tmp_path: Path) -> None:
    with Opened() as opened:
        growing = Growing(str(tmp_path), None, 3, opened)
        growing.add_night()
        growing.add_night()
        files = sorted(tmp_path.glob("night-*/*.jpg"))
        assert len({path.read_bytes() for path in files}) == len(files) == growing.num_pictures == 6
        files[0].read_bytes()
        assert opened.take_recent() == set(map(str, files))
        assert opened.take_recent() == set()
        assert (opened.num_opened, opened.num_opened_again) == (7, 1)


def test_a_night_needs_pictures(tmp_path: Path) -> None:
    (tmp_path / "a.gif").write_bytes(b"GIF89a")
    with pytest.raises(UsageError, match=rf"^--images must hold JPEG or PNG files\. Received: --images={tmp_path}$"):
        Growing(str(tmp_path / "out"), str(tmp_path), 3, None)


def rows(*uris: str) -> bytes:
    row = dict.fromkeys(schema.PREDICTIONS_SCHEMA.names) | {"source_version": "1", "status": "ok", "model_id": "m"}
    row |= {"run_id": "r", "predicted_at": schema._EPOCH}
    buffer = io.BytesIO()
    pq.write_table(schema.table_of([row | {"uri": uri} for uri in uris], schema.PREDICTIONS_SCHEMA), buffer)
    return buffer.getvalue()


@pytest.mark.parametrize("is_remote", [False, True])
def test_a_reader_sees_what_no_reader_should(tmp_path: Path, is_remote: bool) -> None:
    output = "memory://polled" if is_remote else str(tmp_path)
    reader = Reader(output, 1000.0)

    def found() -> tuple[int, int, int, int, int]:
        reader.poll()
        return reader.num_polls, reader.num_rows, len(reader.torn), reader.num_twice, reader.num_shrunk

    try:
        assert found() == (0, 0, 0, 0, 0)
        storage.publish_bytes(f"{output}/part-1.parquet", rows("a", "b"))
        storage.publish_bytes(f"{output}/_index/1.parquet", rows("a", "b"))
        assert found() == (1, 2, 0, 0, 0)
        storage.publish_bytes(f"{output}/part-2.parquet", rows("b", "c"))
        assert found() == (2, 4, 0, 1, 0)
        storage.publish_bytes(f"{output}/part-2.parquet", rows("c"))
        assert found() == (3, 3, 0, 1, 1)
        storage.publish_bytes(f"{output}/part-2.parquet", rows("c")[:-9])
        assert found() == (4, 3, 1, 1, 1)
    finally:
        storage.delete(output)


def test_the_processes_that_a_process_started() -> None:
    child = os.fork()
    if child == 0:
        time.sleep(60)
        os._exit(0)
    try:
        assert child in tree.children(os.getpid())
        assert child in tree.descendants(os.getppid())
        assert os.getppid() not in tree.descendants(os.getppid())
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)


# What it says.

RECORD = BenchNightlyChaosRecord(
    output="chaos",
    num_images=27_000,
    num_runs=91,
    ends={"done": 50, "killed": 20, "refused": 20, "gave up": 1},
    num_kills={"worker": 100, "driver": 20},
    kills_by_moment={"labelling": 90, "starting": 20, "between": 10},
    num_overlaps=20,
    compactions={},
    most_under_way=1000,
    num_opened_again=40_000,
    num_polls=5000,
    num_torn=0,
    num_twice=0,
    num_shrunk=0,
    num_missing=0,
    num_extra=0,
    differences=[],
    disturbances=[],
    host=provenance.Host(cpu="", num_cores=2, system=""),
    load_average=0.0,
    config={"executor": "inline"},
    versions={},
    duration_s=600.0,
)


@pytest.mark.parametrize("name", ["num_missing", "num_extra", "num_torn", "num_twice", "num_shrunk"])
def test_what_no_reader_should_see_is_an_error(name: str) -> None:
    nightly_chaos.check(RECORD, is_complete=True, calm="done")
    with pytest.raises(BooksError, match=rf"^the rows must be those of an undisturbed run, .*'{name}': 1"):
        nightly_chaos.check(dataclasses.replace(RECORD, **{name: 1}), is_complete=True, calm="done")  # type: ignore[arg-type]


def test_rows_may_be_missing_while_an_output_is_compacted() -> None:
    compacted = dataclasses.replace(RECORD, num_shrunk=1, compactions={"done": 1})
    nightly_chaos.check(compacted, is_complete=True, calm="done")
    with pytest.raises(CatdogError, match=r"^a run must end by itself, .*Received: exit code 1: x$"):
        nightly_chaos.check(
            dataclasses.replace(compacted, compactions={"exit code 1: x": 1}), is_complete=True, calm="done"
        )


def test_a_run_that_ends_as_none_should_is_an_error() -> None:
    with pytest.raises(CatdogError, match=r"^the last run over the disturbed output must come to its end"):
        nightly_chaos.check(RECORD, is_complete=False, calm="done")
    with pytest.raises(CatdogError, match=r"^the undisturbed run must come to its end\. Received: .*exit code 1: x$"):
        nightly_chaos.check(RECORD, is_complete=True, calm="exit code 1: x")
    failed = dataclasses.replace(RECORD, ends={"done": 5, "exit code 1: the disk is full": 1})
    with pytest.raises(CatdogError, match=r"^a run must end by itself, .*Received: exit code 1: the disk is full$"):
        nightly_chaos.check(failed, is_complete=True, calm="done")


def test_it_touches_neither_a_cluster_nor_what_is_not_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(OutputRefusedError, match="must be empty, or hold what this command wrote"):
        bench_nightly_chaos(BenchNightlyChaosConfig(output=str(tmp_path)))
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    with pytest.raises(UsageError, match=r"must have a Ray of its own\. Received: RAY_ADDRESS=10"):
        bench_nightly_chaos(BenchNightlyChaosConfig(output=str(tmp_path / "new")))


# The short form.


@pytest.mark.slow
def test_rows_are_those_of_an_undisturbed_run_whoever_is_killed(model: str, tmp_path: Path) -> None:
    config = BenchNightlyChaosConfig(
        output=str(tmp_path),
        model=model,
        num_worker_kills=3,
        num_driver_kills=1,
        num_overlaps=1,
        num_compactions=2,
        night_size=600,
        seed=1,
    )
    record = bench_nightly_chaos(config)  # which compares
    assert json.loads((tmp_path / "nightly-chaos.json").read_text()) == record.to_dict()
    assert (record.num_kills, record.num_overlaps) == ({"worker": 3, "driver": 1}, 1)
    assert sum(record.kills_by_moment.values()) == 4
    assert record.most_under_way is not None
    assert record.num_opened_again is not None
    assert sum(record.compactions.values()) == 2
    assert record.num_polls > 10
    parts = list((tmp_path / "disturbed").glob("part-*.parquet"))
    assert sum(pq.read_metadata(part).num_rows for part in parts) == record.num_images
    assert record.summary()[0].startswith(f"Labelled {record.num_images:,} images in {record.num_runs} runs (inline)")

    part = max(parts, key=lambda path: path.stat().st_size)
    shutil.copy(part, part.with_name("part-0.parquet"))
    assert nightly_chaos._difference(str(tmp_path / "disturbed"), str(tmp_path / "undisturbed")) == (
        0,
        pq.read_metadata(part).num_rows,
    )


@pytest.fixture
def misbehaving(s3: S3Server, proxy: FaultProxy) -> Iterator[str]:
    """A bucket that throttles, fails, and does what it said it did not do."""
    bucket = s3.new_bucket()
    done = threading.Event()

    def misbehave() -> None:
        faults: list[Fault] = ["503", "lost", "500", "truncated", "reset"]
        while not done.wait(0.5):
            proxy.inject(faults[0], times=1000, chance=0.15)
            faults.append(faults.pop(0))

    thread = threading.Thread(target=misbehave)
    thread.start()
    yield bucket
    done.set()
    thread.join()
    proxy.inject(None)


@pytest.mark.slow
def test_rows_are_those_of_an_undisturbed_run_whatever_the_storage_does(model: str, misbehaving: str) -> None:
    config = BenchNightlyChaosConfig(
        output=f"{misbehaving}/chaos",
        model=model,
        num_worker_kills=2,
        num_driver_kills=1,
        num_overlaps=1,
        num_compactions=1,
        night_size=100,
    )
    record = bench_nightly_chaos(config)
    assert (record.num_kills, record.num_overlaps, record.most_under_way) == ({"worker": 2, "driver": 1}, 1, None)
