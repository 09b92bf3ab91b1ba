"""A worker: it labels the images of a slice, and publishes their rows. The threads of one process are one worker."""

import collections
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from functools import partial
from typing import Final

import pyarrow as pa
import pyarrow.compute as pc

from catdog import bundle, storage
from catdog.config import EngineName
from catdog.errors import BundleError
from catdog.inference.plan import Slice
from catdog.inference.publish import publish_part
from catdog.labelling import PORTION_BYTES, Labelled, Verdict, load_labeller
from catdog.portions import portions
from catdog.schema import PREDICTIONS_SCHEMA
from catdog.storage import SourceFile

_PUBLISHERS: Final = 4
"""Number of part files that a worker publishes at the same time, while it labels the next slices."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a worker must know to label slices. The same for all workers of a run."""

    model: str | None
    """URL of the bundle; None for the bundle that ships with catdog, which each worker has at its own place."""

    model_id: str
    """SHA-256 of the bundle's `bundle.json`, in hex."""

    output: str
    """Directory of the part files."""

    run_id: str
    batch_size: int
    """Largest number of images that are read, decoded and scored as one portion."""

    engine: EngineName
    use_gpu: bool


@dataclass(frozen=True, kw_only=True)
class SliceResult:
    """What a worker did for one slice. Rows that were kept from an earlier run do not count."""

    part: str
    """Name of the part file that holds the rows of the slice."""

    labels: dict[str, int]
    """`cat` or `dog` → number of rows."""

    errors: dict[str, int]
    """Error code → number of rows."""

    needs_review: int
    """Number of rows that a person should review."""

    num_bytes: int
    """Size of the images."""

    decode_s: float
    """Seconds that threads spent reading and decoding."""

    score_s: float
    """Seconds that threads spent computing the model."""

    engine: str
    """Engine that computed the model, and its number format: `tensorflow bfloat16`."""

    publish_s: float
    """Seconds that a thread spent writing the part file."""


class Worker:
    """Labels and publishes slices with the threads of this process. It is a context manager."""

    def __init__(self, job: Job, num_workers: int | None) -> None:
        """Load the model.

        Args:
            job: what to label with, and where to publish.
            num_workers: number of decoding threads; None for one per core.

        Raises:
            BundleError: the model cannot be used, or is not the one that the job names.
        """
        model = bundle.load(job.model)
        if model.model_id != job.model_id:
            raise BundleError(f"{model.url} must not change during a run. Received: another {bundle.CARD_NAME}")
        self._job = job
        self._labeller = load_labeller(model, job.engine, num_workers=num_workers, use_gpu=job.use_gpu)
        self._publishers = ThreadPoolExecutor(_PUBLISHERS, thread_name_prefix="catdog-publish")

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_exception: object) -> None:
        """Drop the slices that no thread has begun, and wait for the others."""
        self._publishers.shutdown(wait=False, cancel_futures=True)
        self._labeller.close()
        self._publishers.shutdown()

    def run(self, slices: Iterable[Slice]) -> Iterator[SliceResult]:
        """Label and publish slices. Yields the result of each, in their order.

        Raises:
            CatdogError: labelling cannot go on. Each slice is published as a whole or not at all.
        """
        parts: collections.deque[Future[SliceResult]] = collections.deque()
        for piece in slices:
            cut = portions(piece.files, lambda file: (1, file.num_bytes), self._job.batch_size, PORTION_BYTES)
            labelling = [self._submit(files) for files in cut]
            parts.append(self._publishers.submit(self._publish, piece, labelling))
            while parts and (parts[0].done() or len(parts) > 2 * _PUBLISHERS):
                yield parts.popleft().result()
        for part in parts:
            yield part.result()

    def _submit(self, files: Sequence[SourceFile]) -> "Future[Labelled]":
        sizes = [file.num_bytes for file in files]
        read = partial(storage.read_sources, [file.uri for file in files], sizes)
        return self._labeller.submit(read, num_bytes=sum(sizes))

    def _publish(self, piece: Slice, labelling: "Sequence[Future[Labelled]]") -> SliceResult:
        labelled = [future.result() for future in labelling]
        started = time.perf_counter()
        rows = _rows(self._job, piece.files, [verdict for portion in labelled for verdict in portion.verdicts])
        publish_part(self._job.output, piece.part, rows, keep_others=piece.is_retry)
        return SliceResult(
            part=piece.part,
            labels=_tally(rows["label"]),
            errors=_tally(rows["error_code"]),
            needs_review=pc.sum(rows["needs_review"]).as_py() or 0,
            num_bytes=pc.sum(rows["num_bytes"]).as_py() or 0,
            decode_s=sum(portion.decode_s for portion in labelled),
            score_s=sum(portion.score_s for portion in labelled),
            engine=f"{self._labeller.engine.name} {self._labeller.engine.arithmetic}",
            publish_s=time.perf_counter() - started,
        )


_VERDICT_COLUMNS: Final = tuple(field.name for field in fields(Verdict))


def _rows(job: Job, files: Sequence[SourceFile], verdicts: Sequence[Verdict]) -> pa.Table:
    """The rows for files and their verdicts, in `PREDICTIONS_SCHEMA` and in the same order."""
    now = datetime.now(UTC)
    rows = []
    for file, verdict in zip(files, verdicts, strict=True):
        row = {name: getattr(verdict, name) for name in _VERDICT_COLUMNS}
        row["num_bytes"] = file.num_bytes if verdict.num_bytes is None else verdict.num_bytes
        row["status"] = "ok" if verdict.error_code is None else "error"
        row |= {"uri": file.uri, "source_version": file.version, "model_id": job.model_id, "run_id": job.run_id}
        rows.append(row | {"predicted_at": now})
    return pa.Table.from_pylist(rows, schema=PREDICTIONS_SCHEMA)


def _tally(column: pa.ChunkedArray) -> dict[str, int]:
    """Value → number of rows that have it; nulls do not count."""
    return {item["values"]: item["counts"] for item in column.drop_null().value_counts().to_pylist()}
