"""Verifying an output: everything is counted again from the files, and compared with what the run records say."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import duckdb

from catdog import records, storage
from catdog.config import VerifyConfig
from catdog.errors import BooksError, OutputRefusedError
from catdog.inference.books import RUNS_NAME, Books
from catdog.inference.database import open_database
from catdog.inference.publish import is_part, read_parts, spill_keys
from catdog.provenance import one_line, redact
from catdog.schema import CLASS_NAMES, ERROR_CODES

_COLUMNS: Final = (
    *("uri", "source_version", "model_id", "run_id", "status", "error_code"),
    *("label", "prob_dog", "confidence", "needs_review"),
)

_ROWS: Final = "read_parquet($keys, hive_partitioning = false)"

_TOTALS: Final = f"""
SELECT count(*), count(*) FILTER (status = 'ok'), count(DISTINCT model_id) FROM {_ROWS}
"""

_TWICE: Final = f"""
SELECT uri, source_version, count(*), string_agg(DISTINCT part, ', ' ORDER BY part)
FROM {_ROWS} GROUP BY uri, source_version, model_id HAVING count(*) > 1 ORDER BY ALL
"""

_CONTRADICTIONS: Final = f"""
SELECT part, uri FROM {_ROWS} WHERE NOT coalesce(CASE status
    WHEN 'ok' THEN label IN {CLASS_NAMES} AND prob_dog BETWEEN 0 AND 1 AND confidence BETWEEN 0.5 AND 1
        AND needs_review IS NOT NULL AND error_code IS NULL
    WHEN 'error' THEN error_code IN {ERROR_CODES} AND label IS NULL AND prob_dog IS NULL
END, false) ORDER BY ALL
"""

_RUNS: Final = f"""
SELECT
    run_id, model_id, count(*) FILTER (status = 'ok'), count(*) FILTER (status <> 'ok'),
    count(*) FILTER (label = 'cat'), count(*) FILTER (label = 'dog'),
    count(*) FILTER (status = 'ok' AND needs_review)
FROM {_ROWS} GROUP BY ALL
"""


@dataclass(frozen=True, kw_only=True)
class Verification(records.Record):
    """What an output of `predict` holds, counted from its files."""

    output: str
    parts: int
    rows: int
    ok: int
    error: int
    models: int
    runs: int
    """Number of run records."""

    rows_without_record: int
    """Number of rows of runs that have no run record, because they were stopped before their end."""

    differences: list[str]
    """What is not as it should be, one sentence each."""

    unrelated: list[str]
    """Names in the output that `predict` did not write. Nothing is said of them."""

    def summary(self) -> list[str]:
        """The numbers of rows, part files, models and runs; every difference; and the names that are not ours."""
        counts = [records.plural(self.parts, "part"), records.plural(self.models, "model")]
        lines = [
            f"Verified {self.output}: {self.rows:,} rows = {self.ok:,} ok + {self.error:,} error.",
            f"  {', '.join(counts)}, {records.plural(self.runs, 'run')}",
        ]
        if self.rows_without_record:
            lines.append(f"  {self.rows_without_record:,} rows are of runs that were stopped before their end")
        lines += [f"  unrelated, not judged: {name}" for name in self.unrelated]
        return [*lines, *(f"  difference: {text}" for text in self.differences)]

    def complaint(self) -> str | None:
        """That the books do not close."""
        if not self.differences:
            return None
        num = records.plural(len(self.differences), "difference")
        return f"the files of an output must agree with its run records. Received: {num}"


def run_verify(config: VerifyConfig) -> Verification:
    """Run `catdog verify`. Errors as `recount`."""
    return recount(config.output)


def verify(output: str) -> Verification:
    """Check that an output of `predict` is whole, as `recount` does.

    Raises:
        BooksError: there are differences. The message has all of them.
        OutputRefusedError: the directory holds nothing that `predict` wrote.
    """
    found = recount(output)
    if found.differences:
        raise BooksError("; ".join(found.differences))
    return found


def recount(output: str) -> Verification:
    """Count everything in an output again from its files. Compare the files with each other and with the run records.

    These are differences: a part file that is damaged or missing; an image with two rows for one version and model; a
    row that contradicts itself; a run record that cannot be read, or whose books do not balance; and a run whose rows
    are not those of its record. Later runs may have replaced rows of a run that were errors, and nothing else.

    Raises:
        OutputRefusedError: the directory holds nothing that `predict` wrote.
        StorageError: the storage failed.
    """
    output = storage.absolute(output)
    names = storage.list_names(output)
    parts = [name for name in names if is_part(name)]
    if not parts and RUNS_NAME not in names:
        raise OutputRefusedError(f"OUTPUT must hold predictions. Received: {redact(output)}, which holds none")
    differences: list[str] = []
    with open_database() as (database, scratch):
        keys = scratch / "keys.parquet"
        damaged: list[str] = []
        spill_keys(keys, read_parts(output, parts, on_error=lambda error: damaged.append(one_line(error))), _COLUMNS)
        differences += damaged
        ((num_rows, num_ok, num_models),) = _query(database, _TOTALS, str(keys))
        differences += [
            f"An image must have at most one row for one version and model. "
            f"Received: {num} of {redact(uri)} (version {version}), in {among}"
            for uri, version, num, among in _query(database, _TWICE, str(keys))
        ]
        differences += [
            f"a row must be a label or an error. Received: the row of {redact(uri)} in {part} is neither, or both"
            for part, uri in _query(database, _CONTRADICTIONS, str(keys))
        ]
        written = {(run, model): tuple(counts) for run, model, *counts in _query(database, _RUNS, str(keys))}
    run_records, unreadable = _read_records(output)
    differences += unreadable
    for name, record in run_records.items():
        differences += _differences(name, record, written, set(parts))
    recorded = {record["run_id"] for record in run_records.values()}
    return Verification(
        output=output,
        parts=len(parts),
        rows=num_rows,
        ok=num_ok,
        error=num_rows - num_ok,
        models=num_models,
        runs=len(run_records) + len(unreadable),
        rows_without_record=sum(ok + error for (run, _), (ok, error, *_) in written.items() if run not in recorded),
        differences=differences,
        unrelated=[name for name in names if not is_part(name) and name != RUNS_NAME],
    )


def _query(database: duckdb.DuckDBPyConnection, sql: str, keys: str) -> list[Any]:
    return database.execute(sql, {"keys": keys}).fetchall()


def _read_records(output: str) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """The run records by their names, and a sentence for each file that is none."""
    found, unreadable = {}, []
    for name in storage.list_names(storage.join(output, RUNS_NAME), ".json"):
        try:
            record = storage.read_json(storage.join(output, RUNS_NAME, name))
            Books(**record["books"])
            {key: record[key] for key in ("run_id", "model_id", "parts", "labels", "needs_review")}
        except (ValueError, TypeError, KeyError) as error:
            unreadable.append(f"{name}: a run record must be whole. Received: {one_line(repr(error))}")
        else:
            found[name] = record
    return found, unreadable


def _differences(
    name: str, record: dict[str, Any], written: dict[tuple[str, str], tuple[int, ...]], parts: set[str]
) -> Iterator[str]:
    """What is wrong with one run record, and with the rows of its run."""
    books = Books(**record["books"])
    try:
        books.check(whose=f"{name}: ")
    except BooksError as error:
        yield str(error)
    if books.skipped != (num := sum(record.get("skipped", {}).values())) and "skipped" in record["books"]:
        yield f"{name}: the books must count what was skipped. Received: {books.skipped}; the record says {num}"
    for part in sorted(set(record["parts"]) - parts):
        yield f"{name}: every part that a run wrote must be there. Received: {part} is missing"
    run = record["run_id"]
    ok, failed, cat, dog, review = written.get((run, record["model_id"]), (0, 0, 0, 0, 0))
    said = (books.ok, record["labels"].get("cat", 0), record["labels"].get("dog", 0))
    if (ok, cat, dog) != said:
        yield (
            f"{name}: the labels of a run must be those of its record. "
            f"Received: {ok} ok, {cat} cat, {dog} dog; the record says {said[0]} ok, {said[1]} cat, {said[2]} dog"
        )
    if review != record["needs_review"] and ok == books.ok:
        yield (
            f"{name}: the rows that need review must be those of the record. "
            f"Received: {review}; the record says {record['needs_review']}"
        )
    if failed > books.error:
        yield (
            f"{name}: a run must not have more errors than its record says. "
            f"Received: {failed}; the record says {books.error}"
        )
    for model in sorted(model for other, model in written if other == run and model != record["model_id"]):
        yield f"{name}: a run must label with one model. Received: rows of {model}"
