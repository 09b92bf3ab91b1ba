"""`catdog compact`: merges small part files into large ones, while readers read and runs run.

Row by row, nothing changes: a row is in one part file before, and in another one after. At no moment, and not after a
crash either, does a reader that lists the output and reads what it has listed see a row twice, or find a file missing:

1. The merged rows are written whole under hidden names.
2. A journal names the sources and the targets (`catdog.inference.journals`).
3. Each source is replaced by a valid part file without rows (`without_rows`).
4. The targets get their names. They are new names: a reader that has listed the output before does not know them, and
   one that lists it from now on finds the sources empty.
5. The journal is closed.
6. A compaction that comes an hour later, or more, deletes the sources.

Between 3 and 4 the rows are missing for readers. A crash before 2 has changed nothing. After a crash between 2 and 5
the next compaction, or the next run of `predict`, does the rest from 3 on.

A run of `predict` must not lose sight of rows while it plans, so that no compaction is under way then (`paused`). While
it labels, it writes parts of its own, and writes parts anew whose images it tries again, which are errors. So a
compaction beside a run, or beside workers of a dead run whose plan nobody has taken over yet, takes only parts without
errors, and without rows of a run that has no record. Errors are kept in parts of their own, no larger than a slice: the
next run that tries them again writes those anew, and not a large one.
"""

import contextlib
import hashlib
import io
import logging
import re
import secrets
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Final, TypeVar

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from catdog import failpoints, records, schema, storage
from catdog.config import CompactConfig
from catdog.errors import OutputClaimedError, OutputRefusedError
from catdog.inference.books import RUNS_NAME
from catdog.inference.journals import COMPACT_NAME, Journal, hidden, merged_away, read_journals
from catdog.inference.plan import SLICE_SIZE
from catdog.inference.publish import columns_of, list_parts, part_name, read_parts, read_whole_part
from catdog.provenance import redact
from catdog.storage.listing import list_all_names

logger = logging.getLogger(__name__)

GRACE_S: Final = 3600.0
"""How long sources without rows are kept for readers that have listed them."""

LARGE: Final = 0.5
"""Share of the target's rows from which on a part counts as large, and is left alone. A collection that grows by a
tenth of the target in every night is thus rewritten five times at most."""

_MAX_CLEARED: Final = 8
"""With more journals than that, of which nothing is left to do, they are made one."""

_PLAN: Final = re.compile(r"(.+)\.plan-\d+\.parquet")
_ROW_GROUP_ROWS: Final = 100_000
_WRITERS: Final = 16
_POLL_S: Final = 1.0
_MAX_WAIT_S: Final = 1800.0

S = TypeVar("S")
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class CompactRecord(records.Record):
    """What a compaction did."""

    output: str
    num_parts_before: int
    """Number of part files that had rows."""

    num_parts_after: int
    num_rows: int
    """Rows of the part files that were merged."""

    num_merged: int
    """Number of part files that were merged."""

    num_finished: int
    """Number of compactions that had died, and were brought to their end."""

    num_deleted: int
    """Number of part files without rows that were deleted, an hour or more after they were merged."""

    left: dict[str, int]
    """Why part files were left as they are → number."""

    duration_s: float

    def summary(self) -> list[str]:
        """The numbers of part files before and after."""
        if not self.num_merged:
            lines = ["Nothing to merge."]
        else:
            parts = records.plural(self.num_merged, "part")
            lines = [f"Merged {parts} with {self.num_rows:,} rows in {self.duration_s:,.1f} s."]
        lines.append(f"  parts    {self.num_parts_before:,} before, {self.num_parts_after:,} after")
        if self.left:
            lines.append(f"  left     {records.counted(self.left)}")
        if self.num_deleted:
            lines.append(f"  deleted  {records.plural(self.num_deleted, 'part')} that had been merged earlier")
        if self.num_finished:
            lines.append(f"  finished {records.plural(self.num_finished, 'compaction')} that had died")
        return [*lines, f"Predictions: {self.output}"]


@dataclass(frozen=True, kw_only=True)
class _Part:
    name: str
    num_rows: int
    num_errors: int
    first_uri: str
    runs: frozenset[str]


def compact(config: CompactConfig) -> CompactRecord:
    """Merge the small part files of an output of `predict`.

    Raises:
        OutputRefusedError: the directory holds nothing that `predict` wrote, or something else.
        OutputClaimedError: another compaction is at work there, or a run that plans.
        ClaimLostError: another compaction took over.
        StorageError: a storage failed. No row is lost: the same command does the rest.
    """
    started = time.monotonic()
    output = storage.absolute(config.output)
    if not list_parts(output) and not storage.list_names(storage.join(output, RUNS_NAME)):
        raise OutputRefusedError(f"OUTPUT must hold predictions. Received: {redact(output)}, which holds none")
    with storage.claimed(storage.join(output, COMPACT_NAME), "compact") as claim:
        num_finished = _finish(output, claim)
        num_deleted = _clear(output)
        found, left = _small_parts(output, config.target_rows)
        num_before = len(found) + left.total()
        num_merged = num_rows = num_targets = 0
        for group in _groups(found, config.target_rows):
            journal = _prepare(output, group)
            if journal is None:
                left["too few"] += len(group)
                continue
            _swap(output, journal, claim)
            num_merged += len(journal.sources)
            num_targets += len(journal.targets)
            num_rows += sum(journal.targets.values())
    return CompactRecord(
        output=redact(output),
        num_parts_before=num_before,
        num_parts_after=num_before - num_merged + num_targets,
        num_rows=num_rows,
        num_merged=num_merged,
        num_finished=num_finished,
        num_deleted=num_deleted,
        left=dict(+left),
        duration_s=round(time.monotonic() - started, 3),
    )


@contextlib.contextmanager
def paused(output: str) -> Iterator[None]:
    """No compaction is under way in an output for the length of a `with` block. One that died is finished before.

    Raises:
        OutputClaimedError: one is at work there, and does not come to its end.
        StorageError: a storage failed.
    """
    deadline = time.monotonic() + _MAX_WAIT_S
    with contextlib.ExitStack() as stack:
        while True:
            try:
                claim = stack.enter_context(storage.claimed(storage.join(output, COMPACT_NAME), "predict"))
                break
            except OutputClaimedError:
                if time.monotonic() > deadline:
                    raise
                logger.info("Waiting for the end of a compaction")
                time.sleep(_POLL_S)
        _finish(output, claim)
        yield


def _finish(output: str, claim: storage.Claim) -> int:
    """Bring compactions that died to their end. Returns their number."""
    journals = [journal for journal in read_journals(output) if journal.state == "open"]
    for journal in journals:
        logger.info("Finishing a compaction of %s that died", records.plural(len(journal.sources), "part"))
        _swap(output, journal, claim)
    place = storage.join(output, COMPACT_NAME)
    for name in list_all_names(place):
        if name.startswith((".part-", "..part-")):  # of a compaction that died before it had a journal
            storage.delete(storage.join(place, name))
    return len(journals)


def _clear(output: str) -> int:
    """Delete the sources of compactions that were closed an hour ago, or earlier. Returns their number."""
    num_deleted = 0
    if _unfinished(storage.list_names(storage.join(output, RUNS_NAME))):
        return 0  # whoever takes over the plan of a dead run knows by the names of its parts what is done
    for journal in read_journals(output):
        if journal.state != "closed" or journal.closed_at is None:
            continue
        closed_s = (datetime.now(UTC) - datetime.fromisoformat(journal.closed_at)).total_seconds()
        if closed_s >= GRACE_S:
            there = set(list_parts(output))
            empty = [name for name, rows in read_parts(output, there & set(journal.sources), ("uri",)) if not len(rows)]
            _each(lambda name: storage.delete(storage.join(output, name)), empty)
            num_deleted += len(empty)
            replace(journal, state="cleared").publish(output)
    _unite([journal for journal in read_journals(output) if journal.state == "cleared"], output)
    return num_deleted


def _unite(cleared: Sequence[Journal], output: str) -> None:
    """Put journals of which nothing is left to do into one, if there are many: every run reads them all."""
    if len(cleared) <= _MAX_CLEARED:
        return
    last = cleared[-1]
    sources = {part: rows for journal in cleared for part, rows in journal.sources.items()}
    targets = {part: rows for journal in cleared for part, rows in journal.targets.items() if part not in sources}
    replace(last, sources=sources, targets=targets).publish(output)
    for journal in cleared[:-1]:
        storage.delete(storage.join(output, COMPACT_NAME, f"{journal.id}.json"))


def _small_parts(output: str, target_rows: int) -> tuple[list[_Part], Counter[str]]:
    """The part files that may be merged, and why others may not → number."""
    journals = read_journals(output)
    emptied = merged_away(journals)
    large = {name for journal in journals for name, rows in journal.targets.items() if rows >= LARGE * target_rows}
    names = [name for name in list_parts(output) if name not in emptied]
    left = Counter({"large": sum(name in large for name in names)})
    in_runs = storage.list_names(storage.join(output, RUNS_NAME))
    is_beside = storage.holder(output) is not None or bool(_unfinished(in_runs))
    recorded = {name.removesuffix(".json") for name in in_runs if name.endswith(".json")}
    found = []
    columns = ("uri", "status", "run_id")
    for name, rows in read_parts(output, [name for name in names if name not in large], columns):
        part = _Part(
            name=name,
            num_rows=len(rows),
            num_errors=pc.sum(pc.not_equal(rows["status"], "ok")).as_py() or 0,
            first_uri=pc.min(rows["uri"]).as_py() or "",
            runs=frozenset(rows["run_id"].unique().to_pylist()),
        )
        if part.num_rows >= LARGE * target_rows:
            left["large"] += 1
        elif is_beside and part.num_errors:
            left["with errors"] += 1
        elif is_beside and not part.runs <= recorded:
            left["of a run that has not ended"] += 1
        else:
            found.append(part)
    return found, left


def _unfinished(in_runs: Sequence[str]) -> set[str]:
    """The runs that have a plan and no record, of the names in `_runs`. Some of their workers may be alive."""
    planned = {match[1] for name in in_runs if (match := _PLAN.fullmatch(name))}
    return {run for run in planned if f"{run}.json" not in in_runs}


def _groups(parts: Sequence[_Part], target_rows: int) -> Iterator[list[_Part]]:
    """Parts that are merged with each other, neighbours by their URIs, each time about so many rows."""
    group: list[_Part] = []
    for part in sorted(parts, key=lambda part: (part.first_uri, part.name)):
        if group and sum(each.num_rows for each in group) + part.num_rows > target_rows:
            yield group
            group = []
        group.append(part)
    if group:
        yield group


def _prepare(output: str, group: Sequence[_Part]) -> Journal | None:
    """Write the merged rows of a group under hidden names, and the journal; None where that gives no fewer files."""
    if len(group) < 2:
        return None
    columns = columns_of(output, [group[0].name])
    tables = _each(lambda part: read_whole_part(output, part.name), group)
    alike = [(part.name, rows) for part, rows in zip(group, tables, strict=True) if tuple(rows.schema.names) == columns]
    sources = {name: len(rows) for name, rows in alike}
    merged = pa.concat_tables([rows for _, rows in alike])
    del tables, alike  # a million rows take 300 MB, and are sorted by copying them
    merged = merged.sort_by([("uri", "ascending"), ("source_version", "ascending")])
    cut = _by_status(merged)
    del merged
    if len(cut) >= len(sources):
        return None
    digest = hashlib.blake2b("\n".join(sorted(sources)).encode(), digest_size=14).hexdigest()
    targets = {part_name(f"{digest}{number:04x}"): rows for number, rows in enumerate(cut)}
    for name, rows in targets.items():
        with failpoints.step("merge"):
            whole = schema.conformed(rows, schema.predictions_with(columns))
            storage.publish_parquet(storage.join(output, hidden(name)), whole, row_group_rows=_ROW_GROUP_ROWS)
    journal = Journal(
        id=f"{datetime.now(UTC):%Y%m%dT%H%M%S.%fZ}-{secrets.token_hex(4)}",
        state="open",
        sources=sources,
        targets={name: len(rows) for name, rows in targets.items()},
        columns=list(columns),
    )
    with failpoints.step("journal"):
        journal.publish(output)
    return journal


def _by_status(rows: pa.Table) -> list[pa.Table]:
    """The labels, and then the errors, in pieces as large as a slice."""
    is_ok = pc.equal(rows["status"], "ok")
    num_ok = pc.sum(is_ok).as_py()
    if num_ok == len(rows):
        return [rows]
    errors = rows.filter(pc.invert(is_ok))
    pieces = [errors.slice(start, SLICE_SIZE) for start in range(0, len(errors), SLICE_SIZE)]
    return [rows.filter(is_ok), *pieces] if num_ok else pieces


def _swap(output: str, journal: Journal, claim: storage.Claim) -> None:
    """Take the rows from the sources of a journal, give them to its targets, and close the journal.

    All that may have been done before, by a compaction that died. Then it changes nothing.
    """

    def empty(name: str) -> None:
        url = storage.join(output, name)
        data = storage.read_bytes(url)
        if pq.read_metadata(pa.BufferReader(data)).num_rows:
            with failpoints.step("empty"):
                storage.publish_bytes(url, without_rows(data, journal.columns))

    claim.check()
    _each(empty, journal.sources)
    claim.check()
    for name in journal.targets:
        data = storage.read_bytes(storage.join(output, hidden(name)))
        with failpoints.step("replace"):
            storage.publish_bytes(storage.join(output, name), data)
    with failpoints.step("close"):
        replace(journal, state="closed", closed_at=datetime.now(UTC).isoformat()).publish(output)
    for name in journal.targets:
        storage.delete(storage.join(output, hidden(name)))


def without_rows(part: bytes, columns: Sequence[str]) -> bytes:
    """What replaces a part file: all its bytes, and after them a footer that says that there are no rows.

    A reader may open a file more than once. DuckDB does: it reads all footers first, and then the rows where these say
    that they are. If the file was replaced in between, it finds there what it expects: what it read is what it listed.
    """
    buffer = io.BytesIO()
    buffer.write(part)
    pq.write_table(schema.predictions_with(columns).empty_table(), buffer)
    return buffer.getvalue()


def _each(do: Callable[[S], T], things: Iterable[S]) -> list[T]:
    """Do something with each of some things, several at a time."""
    with ThreadPoolExecutor(_WRITERS, thread_name_prefix="catdog-compact") as pool:
        return list(pool.map(do, things))
