"""The run record, whose books close, and what can be verified of an output later."""

import importlib.metadata
import platform
import secrets
from collections import Counter
from datetime import UTC, datetime
from typing import Any, Final

from catdog import __version__, storage
from catdog.config import PredictConfig, to_dict
from catdog.errors import BooksError
from catdog.inference.executors import SliceResult
from catdog.inference.plan import Counts, open_database
from catdog.inference.publish import KEY_COLUMNS, list_parts, read_parts, spill_keys

RUNS_NAME: Final = "_runs"
_PACKAGES: Final = ("duckdb", "keras", "numpy", "pillow", "pyarrow", "ray", "tensorflow")


def new_run_id(now: datetime) -> str:
    """A name for a run, unlike any other, that sorts by time."""
    return f"{now.astimezone(UTC):%Y%m%dT%H%M%S.%fZ}-{secrets.token_hex(4)}"


class Ledger:
    """Adds up what became of a run's slices."""

    def __init__(self) -> None:
        """Empty."""
        self.parts: list[str] = []
        self.labels: Counter[str] = Counter(cat=0, dog=0)
        self.errors: Counter[str] = Counter()
        self.needs_review = 0
        self.num_bytes = 0
        self.thread_s: Counter[str] = Counter()

    def add(self, result: SliceResult) -> None:
        """Enter one slice."""
        self.parts.append(result.part)
        self.labels.update(result.labels)
        self.errors.update(result.errors)
        self.needs_review += result.needs_review
        self.num_bytes += result.num_bytes
        for stage in ("decode", "score", "publish"):
            self.thread_s[stage] += getattr(result, f"{stage}_s")

    @property
    def num_labelled(self) -> int:
        """Rows written so far."""
        return self.labels.total() + self.errors.total()

    def close(self, counts: Counts) -> dict[str, int]:
        """The books.

        Raises:
            BooksError: they do not close.
        """
        books = {
            "listed": counts.listed,
            "ok": self.labels.total(),
            "error": self.errors.total(),
            "already_done": counts.already_done,
            "duplicate": counts.duplicate,
        }
        if not _closes(books) or len(set(self.parts)) != len(self.parts):
            raise BooksError(f"listed must be ok + error + already_done + duplicate. Received: {books}")
        return books


def _closes(books: dict[str, int]) -> bool:
    return books["listed"] == books["ok"] + books["error"] + books["already_done"] + books["duplicate"]


def run_record(
    config: PredictConfig,
    *,
    run_id: str,
    model_id: str,
    executor: str,
    started_at: datetime,
    durations_s: dict[str, float],
    books: dict[str, int],
    ledger: Ledger,
) -> dict[str, Any]:
    """What `_runs/<run_id>.json` holds, as plain JSON values."""
    num_labelled = ledger.num_labelled
    failed_fraction = books["error"] / num_labelled if num_labelled else 0.0
    return {
        "run_id": run_id,
        "output": config.output,
        "model_id": model_id,
        "executor": executor,
        "books": books,
        "labels": dict(ledger.labels),
        "needs_review": ledger.needs_review,
        "errors": dict(sorted(ledger.errors.items())),
        "failed_fraction": failed_fraction,
        "failed_fraction_exceeded": failed_fraction > config.max_failed_fraction,
        "parts": sorted(ledger.parts),
        "num_bytes": ledger.num_bytes,
        "started_at": started_at.isoformat(timespec="seconds"),
        "durations_s": {stage: round(seconds, 3) for stage, seconds in durations_s.items()},
        "thread_s": {stage: round(seconds, 3) for stage, seconds in ledger.thread_s.items()},
        "images_per_s": round(num_labelled / durations_s["label"], 1) if num_labelled else 0.0,
        "config": to_dict(config),
        "versions": {"catdog": __version__, "python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in _PACKAGES},
    }


def verify(output: str) -> dict[str, Any]:
    """Check an output of predict: every part whole and in the schema, no image labelled twice, all books closed.

    Returns:
        Counts of `parts`, `rows`, `ok`, `error`, `models` and `runs`.

    Raises:
        BooksError: an image has two rows for one version and model, a run's books do not close, or a part that a run
            wrote is missing.
        OutputRefusedError: a part is not whole, or not one of predict.
    """
    output = storage.absolute(output)
    parts = list_parts(output)
    with open_database() as (database, scratch):
        keys = scratch / "keys.parquet"
        spill_keys(keys, read_parts(output, parts))
        rows = database.execute(
            "SELECT count(*), count(*) FILTER (status = 'ok'), count(DISTINCT model_id) FROM read_parquet(?)",
            [str(keys)],
        ).fetchall()
        twice = database.execute(
            f"SELECT {', '.join(KEY_COLUMNS[:3])}, count(*), min(part), max(part) FROM read_parquet(?) "
            "GROUP BY ALL HAVING count(*) > 1 ORDER BY ALL LIMIT 1",
            [str(keys)],
        ).fetchall()
    if twice:
        uri, version, _, num_rows, first, last = twice[0]
        raise BooksError(
            "An image must have at most one row for one version and model. "
            f"Received: {num_rows} of {uri} (version {version}), in {first} and {last}"
        )
    runs = storage.list_names(storage.join(output, RUNS_NAME), ".json")
    known = set(parts)
    for run in runs:
        record = storage.read_json(storage.join(output, RUNS_NAME, run))
        if not _closes(record["books"]):
            raise BooksError(
                f"{run}: listed must be ok + error + already_done + duplicate. Received: {record['books']}"
            )
        if missing := sorted(set(record["parts"]) - known):
            raise BooksError(f"{run}: every part that a run wrote must be there. Received: {missing[0]} is missing")
    ((num_rows, num_ok, num_models),) = rows
    return {
        "output": output,
        "parts": len(parts),
        "rows": num_rows,
        "ok": num_ok,
        "error": num_rows - num_ok,
        "models": num_models,
        "runs": len(runs),
    }
