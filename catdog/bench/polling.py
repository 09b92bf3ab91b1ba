"""A reader that reads predictions over and over while they are written, and notes whatever no reader should see."""

from __future__ import annotations

import time
from typing import Final

import duckdb

from catdog import storage
from catdog.bench.background import Background
from catdog.errors import CatdogError
from catdog.inference.publish import is_part, list_parts, read_parts
from catdog.provenance import one_line
from catdog.storage.urls import is_local

_IDENTITY: Final = ("uri", "source_version", "model_id")
_COUNTS: Final = "SELECT count(*), count(DISTINCT (uri, source_version, model_id)) FROM "


class Reader(Background):
    """Reads an output in a thread, for the length of a `with` block: with DuckDB, as its users do.

    An output on a remote storage is read through `catdog.storage`, because DuckDB has no way to it of its own.

    Attributes:
        num_polls: how many times it read everything.
        torn: for each time that it met a file which it could not read, what was wrong.
        num_twice: how many times it saw an image with two rows.
        num_shrunk: how many times it saw fewer rows than the time before.
        num_rows: rows that it saw the last time.
    """

    def __init__(self, output: str, interval_s: float) -> None:
        super().__init__()
        self.num_polls = self.num_twice = self.num_shrunk = self.num_rows = 0
        self.torn: list[str] = []
        self._output = output
        self._interval_s = interval_s
        self._database = duckdb.connect(config={"threads": 1, "python_enable_replacements": False})

    def _run(self) -> None:
        while not self._done.is_set():
            started = time.monotonic()
            self.poll()
            self._done.wait(max(0.0, started + self._interval_s - time.monotonic()))

    def _close(self) -> None:
        self.poll()
        self._database.close()

    def poll(self) -> None:
        """Read everything once. Before the first part file is there, nothing is read."""
        try:
            if not self.num_polls and not any(map(is_part, storage.list_names(self._output))):
                return
            num_rows, num_images = self._counts()
        except (duckdb.Error, CatdogError) as error:
            self.torn.append(one_line(error))
        else:
            self.num_twice += num_rows != num_images
            self.num_shrunk += num_rows < self.num_rows
            self.num_rows = num_rows
        self.num_polls += 1

    def _counts(self) -> tuple[int, int]:
        if is_local(self._output):
            files = f"{self._output}/*.parquet"
            found = self._database.execute(
                f"{_COUNTS} read_parquet($files, hive_partitioning = false)", {"files": files}
            )
            ((num_rows, num_images),) = found.fetchall()
            return num_rows, num_images
        rows = [
            key for _, table in read_parts(self._output, list_parts(self._output), _IDENTITY) for key in _keys(table)
        ]
        return len(rows), len(set(rows))


def _keys(table: object) -> list[tuple[str, ...]]:
    return list(zip(*(table[name].to_pylist() for name in _IDENTITY), strict=True))  # type: ignore[index]
