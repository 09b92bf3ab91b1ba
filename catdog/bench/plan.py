"""`catdog bench plan`: how long listing and planning take, and how much memory, as a collection grows.

The collection lies in an S3 that is simulated on this machine (`catdog.bench.simulated_s3`), each page of whose
listings takes as long as the network would. Everything is measured in processes of their own (`catdog.bench.planning`).
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ClassVar, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from catdog import scratch
from catdog.bench import processes, simulated_s3
from catdog.bench.planning import Measured
from catdog.bench.record import Begun, BenchRecord
from catdog.config import BenchPlanConfig
from catdog.schema import CLASS_NAMES, PREDICTIONS_SCHEMA

MODEL_ID: Final = "0" * 64
RUN_ID: Final = "20260101T000000.000000Z-bench"

NEW_OF: Final = 100
"""One of so many objects is new where the others are done: 99 % are done."""

_PART_ROWS: Final = 50_000
"""Rows of a part file that is done, as `catdog compact` leaves them."""

_LISTED_OBJECTS: Final = 100_000
"""Objects that are listed by one request at a time, too: more would take minutes."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class BenchPlanRecord(BenchRecord):
    """What `plan.json` holds."""

    file_name: ClassVar[str] = "plan.json"

    command: str = "bench plan"
    layout: str
    page_ms: int
    one_list: Measured
    """Listing by one request at a time, of at most 100,000 objects."""

    many_lists: Measured
    """The listing of as many objects as catdog lists them."""

    objects: list[int]
    """Sizes of the collection, of which each of the next three holds one measurement."""

    all_new: list[Measured]
    """Planning, with an output that holds nothing."""

    indexing: list[Measured]
    """Planning when 99 % are done, and their part files are in no index yet."""

    mostly_done: list[Measured]
    """Planning when 99 % are done, and the index knows them: every night but the first."""

    def summary(self) -> list[str]:
        """The seconds, and the memory."""
        one, many = (each["listed"] / each["seconds"] for each in (self.one_list, self.many_lists))
        lines = [
            f"Planned up to {max(self.objects):,} objects ({self.layout} names, {self.page_ms} ms a page).",
            f"  listing   {many:,.0f} objects/s, {many / one:.1f} times as fast as one request after the other",
            "                          all new                          99 % done          99 % done, no index yet",
        ]
        for place, num_objects in enumerate(self.objects):
            cells = (_cell(each[place]) for each in (self.all_new, self.mostly_done, self.indexing))
            lines.append(f"  {num_objects:>10,}  " + "  ".join(f"{cell:>32}" for cell in cells))
        return [*lines, f"Bench: {self.output}"]


def _cell(measured: Measured) -> str:
    size = f"{measured['peak_bytes'] / 2**20:,.0f} MiB"
    return f"{measured['seconds']:,.1f} s, {size}, {measured['num_parts']:,.0f} parts"


def bench_plan(config: BenchPlanConfig) -> BenchPlanRecord:
    """Measure, and write `plan.json`.

    Raises:
        UsageError: the output holds something else.
        CatdogError: a process failed.
    """
    begun = Begun(BenchPlanRecord, config)
    objects = list(_sizes(config.num_objects))
    with scratch.directory("bench") as directory:
        bench = _Bench(config, directory)
        one_list = bench.lists(min(config.num_objects, _LISTED_OBJECTS), {"CATDOG_S3_LISTS": "1"})
        many_lists = bench.lists(config.num_objects, {})
        measured = [bench.plans(num_objects) for num_objects in objects]
    record = BenchPlanRecord(
        layout=config.layout,
        page_ms=config.page_ms,
        one_list=one_list,
        many_lists=many_lists,
        objects=objects,
        all_new=[each[0] for each in measured],
        indexing=[each[1] for each in measured],
        mostly_done=[each[2] for each in measured],
        **begun.common(),
    )
    return begun.publish(record)


def _sizes(most: int) -> Iterator[int]:
    """10,000 and its tenfolds, and then `most`."""
    size = 10_000
    while size < most:
        yield size
        size *= 10
    yield most


class _Bench:
    """Measures with these settings, each time in a process of its own, and with a store of its own."""

    def __init__(self, config: BenchPlanConfig, directory: str) -> None:
        self._config, self._directory = config, directory

    def lists(self, num_objects: int, variables: dict[str, str]) -> Measured:
        """The listing of so many objects."""
        with self._store(num_objects) as store:
            measured: Measured = processes.play("planning", {"role": "lists"}, self._directory, store | variables)
        logger.info("%d objects are listed in %.1f s", num_objects, measured["seconds"])
        return measured

    def plans(self, num_objects: int) -> list[Measured]:
        """Planning of so many objects: when all are new, when 99 % are done, and when an index knows that."""
        settings = {"role": "plans", "model_id": MODEL_ID, "run_id": RUN_ID}

        def planned(output: Path) -> Measured:
            measured: Measured = processes.play("planning", settings | {"output": str(output)}, self._directory, store)
            return measured

        with self._store(num_objects) as store, tempfile.TemporaryDirectory(dir=self._directory) as directory:
            found = [planned(Path(directory, "new"))]
            done = Path(directory, "done")
            write_done(done, num_objects, self._config.layout)
            found += [planned(done), planned(done)]
        seconds = tuple(each["seconds"] for each in found)
        logger.info("%d objects are planned in %.1f s; 99 %% done: %.1f s, %.1f s", num_objects, *seconds)
        return found

    def _store(self, num_objects: int) -> AbstractContextManager[dict[str, str]]:
        """A store of so many objects. Gives the variables by which a process finds it."""
        return simulated_s3.serving(num_objects, self._config.layout, self._config.page_ms / 1000)


def write_done(directory: Path, num_objects: int, layout: str) -> None:
    """Write the part files of a run that labelled all objects but one of `NEW_OF`."""
    directory.mkdir()
    keys = simulated_s3.Objects(num_objects, layout)
    for begin in range(0, num_objects, _PART_ROWS):
        numbers = [number for number in range(begin, min(begin + _PART_ROWS, num_objects)) if number % NEW_OF]
        rows = rows_of([keys[number] for number in numbers], numbers)
        pq.write_table(rows, directory / f"part-{begin:032x}.parquet", compression="zstd")


def rows_of(keys: list[str], numbers: list[int]) -> pa.Table:
    """The rows of objects that were labelled."""
    size = len(keys)
    spread_N = np.array(numbers, np.int64) * 2654435761 % 2**32 / 2**32
    now = datetime(2026, 1, 1, tzinfo=UTC)
    same: dict[str, Any] = {
        "needs_review": False,
        "status": "ok",
        "width": 200,
        "height": 200,
        "model_id": MODEL_ID,
        "run_id": RUN_ID,
        "predicted_at": now,
    }
    columns: dict[str, Any] = {
        "uri": [f"s3://{simulated_s3.BUCKET}/{key}" for key in keys],
        "image_id": [f"{number:064x}" for number in numbers],
        "source_version": [simulated_s3.etag_of(number) for number in numbers],
        "label": np.array(CLASS_NAMES)[(spread_N >= 0.5).astype(int)],
        "prob_dog": spread_N.astype(np.float32),
        "confidence": np.maximum(spread_N, 1 - spread_N).astype(np.float32),
        "num_bytes": [simulated_s3.num_bytes_of(number) for number in numbers],
    }
    arrays = [
        pa.array(columns[field.name], field.type)
        if field.name in columns
        else pa.repeat(pa.scalar(same.get(field.name), field.type), size)
        for field in PREDICTIONS_SCHEMA
    ]
    return pa.Table.from_arrays(arrays, schema=PREDICTIONS_SCHEMA)
