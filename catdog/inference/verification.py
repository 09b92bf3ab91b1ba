"""Verifying an output: everything is counted again from the files, and compared with what the run records say."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

import duckdb

from catdog import records, storage
from catdog.config import VerifyConfig
from catdog.errors import BooksError, OutputRefusedError
from catdog.inference.books import Books
from catdog.inference.database import open_database
from catdog.inference.findings import CONFIDENCE_EDGES, ROW_NUMBER_SQL
from catdog.inference.journals import COMPACT_NAME, settled
from catdog.inference.plan import INDEX_NAME
from catdog.inference.publish import RUNS_NAME, is_part, read_parts, spill_keys
from catdog.provenance import one_line, redact
from catdog.schema import CLASS_NAMES, ERROR_CODES, REVIEW_REASONS

_COLUMNS: Final = (
    *("uri", "source_version", "model_id", "run_id", "status", "error_code", "image_id"),
    *("label", "prob_dog", "confidence", "needs_review", "review_reason"),
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
        AND abs(confidence - CASE label WHEN '{CLASS_NAMES[1]}' THEN prob_dog ELSE 1 - prob_dog END) < 1e-5
        AND needs_review IS NOT NULL AND (review_reason IS NULL OR needs_review AND review_reason IN {REVIEW_REASONS})
        AND error_code IS NULL
    WHEN 'error' THEN error_code IN {ERROR_CODES} AND label IS NULL AND prob_dog IS NULL
END, false) ORDER BY ALL
"""

_BIN: Final = " + ".join(f"(confidence >= {edge}::FLOAT)::INT" for edge in CONFIDENCE_EDGES[1:-1])

_RUNS: Final = f"""
SELECT
    run_id, model_id, status, label, error_code, coalesce(needs_review, false), review_reason,
    CASE WHEN status = 'ok' THEN {_BIN} END, count(*), coalesce(sum({ROW_NUMBER_SQL}) FILTER (status = 'ok'), 0)
FROM {_ROWS} GROUP BY ALL
"""


@dataclass(frozen=True)
class _Written:
    """What the rows of one run and model come to, counted from the files."""

    ok: int = 0
    error: int = 0
    labels: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    needs_review: int = 0
    review_reasons: Counter[str] = field(default_factory=Counter)
    confidence: Counter[tuple[str, int]] = field(default_factory=Counter)
    checksum: int = 0


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
    are not those of its record: in their numbers, or in what they say (a checksum over all labels). Later runs may have
    replaced rows of a run that were errors, and nothing else; their records say how many.

    Raises:
        OutputRefusedError: the directory holds nothing that `predict` wrote.
        StorageError: the storage failed.
    """
    output = storage.absolute(output)
    return settled(output, lambda parts, merged: _recount(output, parts, merged))


def _recount(output: str, parts: Sequence[str], merged: set[str]) -> Verification:
    """Count again what is in these part files, of which some were `merged` into others."""
    names = storage.list_names(output)
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
        written = _written(_query(database, _RUNS, str(keys)))
    run_records, unreadable = _read_records(output)
    differences += unreadable
    for name, record in run_records.items():
        differences += _differences(name, record, written, {*parts, *merged})
    recorded = {record["run_id"] for record in run_records.values()}
    num_unrecorded = sum(each.ok + each.error for (run, _), each in written.items() if run not in recorded)
    differences += _gone_errors(run_records, written, num_unrecorded)
    return Verification(
        output=output,
        parts=len(parts),
        rows=num_rows,
        ok=num_ok,
        error=num_rows - num_ok,
        models=num_models,
        runs=len(run_records) + len(unreadable),
        rows_without_record=num_unrecorded,
        differences=differences,
        unrelated=[name for name in names if not is_part(name) and name not in (RUNS_NAME, INDEX_NAME, COMPACT_NAME)],
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


def _written(rows: Iterable[Any]) -> dict[tuple[str, str], _Written]:
    """(run, model) → what its rows come to, of the groups that `_RUNS` makes."""
    found: dict[tuple[str, str], _Written] = {}
    for run, model, status, label, error_code, needs_review, reason, bin_, num, checksum in rows:
        before = found.get((run, model), _Written())
        is_ok = status == "ok"
        before.labels.update({label: num} if is_ok and label is not None else {})
        before.errors.update({} if is_ok or error_code is None else {error_code: num})
        before.review_reasons.update({reason: num} if is_ok and reason is not None else {})
        before.confidence.update({(label, bin_): num} if is_ok and label is not None and bin_ is not None else {})
        found[run, model] = replace(
            before,
            ok=before.ok + num * is_ok,
            error=before.error + num * (not is_ok),
            needs_review=before.needs_review + num * (is_ok and needs_review),
            checksum=(before.checksum + int(checksum)) % 2**64,
        )
    return found


def _differences(
    name: str, record: dict[str, Any], written: Mapping[tuple[str, str], _Written], parts: set[str]
) -> Iterator[str]:
    """What is wrong with one run record, and with the rows of its run."""
    books = Books(**record["books"])
    try:
        books.check(whose=f"{name}: ")
    except BooksError as error:
        yield str(error)
    if books.skipped != (num := sum(record.get("skipped", {}).values())) and "skipped" in record["books"]:
        yield f"{name}: the books must count what was skipped. Received: {books.skipped}; the record says {num}"
    if books.error != (num := sum(record.get("errors", {}).values())) and "errors" in record:
        yield f"{name}: the books must count the errors. Received: {books.error}; the record says {num}"
    for part in sorted(set(record["parts"]) - parts):
        yield f"{name}: every part that a run wrote must be there. Received: {part} is missing"
    run = record["run_id"]
    found = written.get((run, record["model_id"]), _Written())
    yield from _differing_labels(name, record, books, found)
    if found.error > books.error:
        yield (
            f"{name}: a run must not have more errors than its record says. "
            f"Received: {found.error}; the record says {books.error}"
        )
    for code, count in sorted(found.errors.items()):
        if found.error <= books.error and count > record.get("errors", found.errors).get(code, 0):
            said = record["errors"].get(code, 0)
            yield f"{name}: the errors of a run must be those of its record. Received: {count} {code}, not {said}"
    for model in sorted(model for other, model in written if other == run and model != record["model_id"]):
        yield f"{name}: a run must label with one model. Received: rows of {model}"


def _differing_labels(name: str, record: dict[str, Any], books: Books, found: _Written) -> Iterator[str]:
    """How the labels of a run differ from what its record says of them: the first of the ways in which they do."""
    labels = {each: found.labels[each] for each in CLASS_NAMES}
    said = {each: record["labels"].get(each, 0) for each in CLASS_NAMES}
    if (found.ok, labels) != (books.ok, said):
        yield (
            f"{name}: the labels of a run must be those of its record. Received: {found.ok} ok, "
            f"{_counts(labels)}; the record says {books.ok} ok, {_counts(said)}"
        )
        return
    if found.needs_review != record["needs_review"]:
        yield (
            f"{name}: the rows that need review must be those of the record. "
            f"Received: {found.needs_review}; the record says {record['needs_review']}"
        )
    reasons = record.get("review_reasons", {})
    # An output that an older catdog began has no column for them.
    if found.review_reasons and "review_reasons" in record and found.review_reasons != Counter(reasons):
        yield (
            f"{name}: the reasons for review must be those of the record. "
            f"Received: {_counts(found.review_reasons)}; the record says {_counts(reasons)}"
        )
    if tuple(record.get("confidence_edges") or ()) == CONFIDENCE_EDGES:
        drawn = {each: [found.confidence[each, bin_] for bin_ in range(len(CONFIDENCE_EDGES) - 1)] for each in labels}
        if drawn != record["confidence"]:
            yield (
                f"{name}: the confidence of the labels must be that of the record. "
                f"Received: {drawn}; the record says {record['confidence']}"
            )
            return
    checksum = record.get("checksum")
    if checksum is not None and checksum != f"{found.checksum:016x}":
        yield (
            f"{name}: the labels of a run must be those that it wrote. Received: as many, but not the same: an image, "
            f"its label or its probability has changed (checksum {found.checksum:016x}; the record says {checksum})"
        )


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{counts[each]} {each}" for each in sorted(counts)) or "none"


def _gone_errors(
    run_records: Mapping[str, dict[str, Any]], written: Mapping[tuple[str, str], _Written], num_unrecorded: int
) -> Iterator[str]:
    """Runs of which rows with errors are gone that no later run says it has replaced.

    A run that was stopped before its record may have replaced as many as it has rows. So may one of an older catdog.
    """
    replaced = Counter[str]()
    num_unknown = num_unrecorded
    for record in run_records.values():
        told = record.get("replaced")
        num_unknown += Books(**record["books"]).labelled if told is None else told.get("", 0)
        replaced.update(told or {})
    for name, record in run_records.items():
        there = written.get((record["run_id"], record["model_id"]), _Written()).error
        num_gone = Books(**record["books"]).error - there - replaced[record["run_id"]]
        if num_gone > num_unknown:
            yield (
                f"{name}: an error must stay until a later run replaces it. "
                f"Received: {there} of {Books(**record['books']).error} are there, and "
                f"{replaced[record['run_id']]} were replaced"
            )
