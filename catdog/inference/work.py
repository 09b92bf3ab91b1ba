"""A worker: it labels the images of a slice, and publishes their rows. The threads of one process are one worker."""

import collections
import hashlib
import socket
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from functools import partial
from typing import Final

import pyarrow as pa
import pyarrow.compute as pc

from catdog import bundle, failpoints, storage
from catdog.config import EngineName
from catdog.errors import BooksError, BundleError, ClaimLostError, ImageError, StorageError
from catdog.inference import trial
from catdog.inference.findings import Findings, findings
from catdog.inference.plan import CONTENT_VERSION, Slice
from catdog.inference.progress import Watch
from catdog.inference.publish import create_part, publish_part, rows_of_run, split_rows
from catdog.inference.sources import Root
from catdog.labelling import PORTION_BYTES, Labelled, Verdict, load_labeller
from catdog.portions import portions
from catdog.provenance import redact
from catdog.schema import PREDICTIONS_SCHEMA, table_of
from catdog.storage import SourceFile

_PUBLISHERS: Final = 4
"""Number of part files that a worker publishes at the same time, while it labels the next slices."""

MAX_UNDER_WAY: Final = 2 * _PUBLISHERS + 2
"""Largest number of slices that a worker has begun and not yet published."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a worker must know to label slices. The same for all workers of a run."""

    model: str | None
    """URL of the bundle; None for the bundle that ships with catdog, which each worker has at its own place."""

    model_id: str
    """SHA-256 of the bundle's `bundle.json`, in hex."""

    output: str
    """Directory of the part files."""

    claim_url: str
    """The file that is there as long as the run holds the claim of its output."""

    claim_owner: str
    """What that file says of its owner. A file of the same name that lies elsewhere, or is of another run, does not."""

    roots: tuple[Root, ...]
    """The local places of the images. A slice names those that came later (`Slice.roots`)."""

    own: tuple[str, ...]
    """The storages whose failure ends the run (`storage.storage_of`)."""

    is_after_death: bool
    """Whether the last run in the output died. An image may have killed it."""

    run_id: str
    batch_size: int
    """Largest number of images that are read, decoded and scored as one portion."""

    engine: EngineName
    use_gpu: bool

    columns: tuple[str, ...] = tuple(PREDICTIONS_SCHEMA.names)
    """Those of the part files."""


@dataclass(frozen=True, kw_only=True)
class SliceResult:
    """What a worker did for one slice. Rows that were kept from an earlier run do not count."""

    part: str
    """Name of the part file that holds the rows of the slice."""

    is_retry: bool
    """Whether the images had failed in an earlier run."""

    is_published: bool
    """Whether the worker wrote the part file. It does not if it found nothing new."""

    already_done: int
    """Number of images of which the worker found what the output holds of them, or the rows of another run."""

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

    findings: Findings | None = None
    """What was found in the rows."""

    replaced: dict[str, int] = field(default_factory=dict)
    """Run → number of its rows, all of them errors, in whose place there are rows of this slice now. An empty name
    stands for rows of which nobody knows whose place they took."""
    same: list[tuple[str, str, str]] = field(default_factory=list)
    """(uri, version, content) of images whose version is new, and whose bytes are not (`Plan.note_same`)."""


class Worker:
    """Labels and publishes slices with the threads of this process. It is a context manager."""

    def __init__(
        self,
        job: Job,
        num_workers: int | None,
        model: bundle.Bundle | None = None,
        *,
        may_have_double: bool = False,
    ) -> None:
        """Load the model.

        Args:
            job: what to label with, and where to publish.
            num_workers: number of decoding threads; None for one per core.
            model: the job's bundle, if this process has verified it; else it is loaded.
            may_have_double: whether another worker may be given the same slice. If that one has published it, its rows
                stay, and are the result.

        Raises:
            BundleError: the model cannot be used, or is not the one that the job names.
            StorageError: this process does not see the output, or the images, that the driver sees.
        """
        _prove_output(job)
        self._seen: set[str] = set()
        self._prove_sight(job.roots)
        model = model or bundle.load(job.model)
        if model.model_id != job.model_id:
            raise BundleError(f"{model.url} must not change during a run. Received: another {bundle.CARD_NAME}")
        self._job = job
        self._may_have_double = may_have_double
        self._labeller = load_labeller(model, job.engine, num_workers=num_workers, use_gpu=job.use_gpu)
        self._publishers = ThreadPoolExecutor(_PUBLISHERS, thread_name_prefix="catdog-publish")
        self._watch = Watch()

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_exception: object) -> None:
        """Drop the slices that no thread has begun, and wait for the others."""
        self._publishers.shutdown(wait=False, cancel_futures=True)
        self._labeller.close()
        self._publishers.shutdown()
        self._watch.close()

    def run(self, slices: Iterable[Slice], *, num_suspects: int = 0) -> Iterator[SliceResult]:
        """Label and publish slices. Yields the result of each, in their order.

        Args:
            slices: the slices.
            num_suspects: how many of them, from the first, a worker had under way when it died. Their images are tried
                in a child process before (`catdog.inference.trial`), and those that kill it become rows.

        Raises:
            CatdogError: labelling cannot go on. Each slice is published as a whole or not at all.
        """
        parts: collections.deque[Future[SliceResult]] = collections.deque()
        for number, piece in enumerate(slices):
            self._prove_sight(piece.roots)
            deadly = {}
            if number < num_suspects:
                deadly = trial.deadly(piece.files, self._labeller.bundle.image_size, self._job.own)
            known = dict(zip(piece.files, piece.known, strict=True))
            cut = portions(piece.files, lambda file: (1, file.num_bytes), self._job.batch_size, PORTION_BYTES)
            labelling: list[Future[Labelled]] = []
            self._watch.begin(piece, partial(_are_done, labelling))
            labelling += [self._submit(files, known, deadly) for files in cut]
            published = self._publishers.submit(self._publish, piece, labelling)
            published.add_done_callback(partial(self._end, piece.part))
            parts.append(published)
            while parts and (parts[0].done() or len(parts) > 2 * _PUBLISHERS):
                yield parts.popleft().result()
        for part in parts:
            yield part.result()

    def _end(self, part: str, _published: "Future[SliceResult]") -> None:
        self._watch.end(part)

    def _submit(
        self, files: Sequence[SourceFile], known: dict[SourceFile, list[str]], deadly: dict[SourceFile, ImageError]
    ) -> "Future[Labelled]":
        read = partial(_read, files, known, deadly, self._job.own)
        labelling = self._labeller.submit(read, num_bytes=sum(file.num_bytes for file in files))
        labelling.add_done_callback(lambda _: self._watch.add(len(files)))
        return labelling

    def _publish(self, piece: Slice, labelling: "Sequence[Future[Labelled]]") -> SliceResult:
        labelled = [future.result() for future in labelling]
        started = time.perf_counter()
        verdicts = [verdict for portion in labelled for verdict in portion.verdicts]
        _refuse_lost_roots(self._job.roots + piece.roots, piece.files, verdicts)
        found, same = [], []
        for file, verdict, known in zip(piece.files, verdicts, piece.known, strict=True):
            if verdict.error_code == _ALREADY_LABELLED:
                same += [(file.uri, file.version, verdict.error_message or "")] if file.version else []
            elif verdict.error_code not in known and _content(verdict) not in known:
                found.append((file, verdict))
        rows, replaced = self._publish_rows(piece, _rows(self._job, found), [file for file, _ in found])
        return SliceResult(
            part=piece.part,
            is_retry=piece.is_retry,
            is_published=len(rows) > 0,
            already_done=len(piece.files) - len(rows),
            labels=_tally(rows["label"]),
            errors=_tally(rows["error_code"]),
            needs_review=pc.sum(rows["needs_review"]).as_py() or 0,
            num_bytes=pc.sum(rows["num_bytes"]).as_py() or 0,
            decode_s=sum(portion.decode_s for portion in labelled),
            score_s=sum(portion.score_s for portion in labelled),
            engine=f"{self._labeller.engine.name} {self._labeller.engine.arithmetic}",
            publish_s=time.perf_counter() - started,
            findings=findings(rows),
            replaced=dict(replaced),
            same=same,
        )

    def _publish_rows(self, piece: Slice, rows: pa.Table, files: Sequence[SourceFile]) -> tuple[pa.Table, Counter[str]]:
        """Publish the rows of these files of a slice, if there are any.

        A file that is tried again and fails as before is not among them: its row stays.

        Returns:
            The rows of this run that the part then has of the slice; and the runs whose rows they replace, with their
            numbers.

        Raises:
            ClaimLostError: the run no longer holds the claim of its output. A worker that outlives its driver ends so.
        """
        if piece.is_retry and self._may_have_double:
            published = rows_of_run(self._job.output, piece.part, self._job.run_id)
            if published is not None:
                published = _of_slice(piece, published)
                return published, Counter({"": len(published)})
        if not len(rows):
            return rows, Counter()
        if not storage.is_held(self._job.claim_url, self._job.claim_owner):
            raise ClaimLostError(
                "a run must hold the claim of its --output to its end. "
                f"Received: {redact(self._job.output)} was taken over, or given back"
            )
        if piece.is_retry:
            replaced = [(file.uri, file.version) for file in files]
            return rows, publish_part(self._job.output, piece.part, rows, replaced=replaced, columns=self._job.columns)
        if create_part(self._job.output, piece.part, rows, columns=self._job.columns):
            return rows, Counter()
        own, others = split_rows(self._job.output, piece.part, self._job.run_id)
        _refuse_foreign_rows(piece, rows, own, others)
        return _of_slice(piece, own), Counter()

    def _prove_sight(self, roots: Iterable[Root]) -> None:
        """Raise `StorageError` unless this process sees the images in these places that the driver sees."""
        for root in roots:
            if root.path not in self._seen:
                if not root.is_seen():
                    files = " and ".join(root.witnesses)
                    raise StorageError(
                        f"every node must see the same --images. Received: {files} missing on {socket.gethostname()}"
                    )
                self._seen.add(root.path)


_ALREADY_LABELLED: Final = "already_labelled"
"""In the place of an error code: the output has a label of the same bytes. Never written to a row."""


class _AlreadyLabelledError(ImageError):
    """In the place of an image's bytes: the output has a label of them. The message is their digest."""

    def __init__(self, content: str) -> None:
        super().__init__(_ALREADY_LABELLED, content)


def _are_done(labelling: "Sequence[Future[Labelled]]") -> bool:
    return bool(labelling) and all(portion.done() for portion in labelling)


def _read(
    files: Sequence[SourceFile],
    known: dict[SourceFile, list[str]],
    deadly: dict[SourceFile, ImageError],
    own: Sequence[str],
) -> Iterator[bytes | ImageError]:
    """The bytes of images, in order, or errors in their place.

    Those that are deadly are not read. Those whose bytes the output knows need not be decoded.
    """
    alive = [file for file in files if file not in deadly]
    contents = storage.read_sources(
        [file.uri for file in alive], [file.num_bytes for file in alive], [file.version for file in alive], own=own
    )
    with failpoints.step("read"):
        for file in files:
            content = deadly[file] if file in deadly else next(contents)
            if known[file] and isinstance(content, bytes):
                digest = _content_version(hashlib.sha256(content).hexdigest())
                content = _AlreadyLabelledError(digest) if digest in known[file] else content
            yield content


def _prove_output(job: Job) -> None:
    """Raise `StorageError` unless this process sees the output that the driver sees."""
    if not storage.is_held(job.claim_url, job.claim_owner):
        raise StorageError(
            f"every node must see the same --output. Received: {redact(job.claim_url)} is not there on "
            f"{socket.gethostname()}, or is another run's"
        )


def _of_slice(piece: Slice, rows: pa.Table) -> pa.Table:
    """Those of the rows that are of images of a slice. A part that was merged has others, too."""
    uris = {file.uri for file in piece.files}
    return rows.filter(pa.array([uri in uris for uri in rows["uri"].to_pylist()], pa.bool_()))


def _refuse_foreign_rows(piece: Slice, rows: pa.Table, own: pa.Table, others: pa.Table) -> None:
    """Raise `BooksError` if a part that is there already lacks images of a slice. An empty one was merged into another.

    An image without a version may have another row there, because it has changed meanwhile.
    """
    there = {row["uri"] for table in (own, others) for row in table.select(["uri"]).to_pylist()}
    missing = [uri for uri in rows["uri"].to_pylist() if uri not in there]
    if there and missing:
        raise BooksError(
            f"a part file must hold the images of its slice. Received: {piece.part} lacks {redact(missing[0])}"
        )


def _refuse_lost_roots(roots: Sequence[Root], files: Sequence[SourceFile], verdicts: Sequence[Verdict]) -> None:
    """Raise `StorageError` if a listed file is gone together with the place in which it lay."""
    for file, verdict in zip(files, verdicts, strict=True):
        if verdict.error_code == "not_found" and file.version:
            for root in roots:
                if root.holds(file.uri) and root.is_gone():
                    raise StorageError(
                        f"--images must stay where they are during a run. Received: {root.path} is gone or empty on "
                        f"{socket.gethostname()}"
                    )


def _version(file: SourceFile, verdict: Verdict) -> str:
    """The `source_version` of an image: what its storage says, else a digest of its bytes, else nothing."""
    return file.version or _content(verdict)


def _content(verdict: Verdict) -> str:
    """A digest of an image's bytes; "" if they could not be read."""
    return "" if verdict.image_id is None else _content_version(verdict.image_id)


def _content_version(image_id: str) -> str:
    return CONTENT_VERSION + image_id[:32]


_VERDICT_COLUMNS: Final = tuple(field.name for field in fields(Verdict))


def _rows(job: Job, found: Sequence[tuple[SourceFile, Verdict]]) -> pa.Table:
    """The rows for files and their verdicts, in `PREDICTIONS_SCHEMA` and in the same order."""
    now = datetime.now(UTC)
    rows = []
    for file, verdict in found:
        row = {name: getattr(verdict, name) for name in _VERDICT_COLUMNS}
        row["num_bytes"] = file.num_bytes if verdict.num_bytes is None else verdict.num_bytes
        row["status"] = "ok" if verdict.error_code is None else "error"
        row |= {"uri": file.uri, "source_version": _version(file, verdict)}
        row |= {"model_id": job.model_id, "run_id": job.run_id, "predicted_at": now}
        rows.append(row)
    return table_of(rows, PREDICTIONS_SCHEMA)


def _tally(column: pa.ChunkedArray) -> dict[str, int]:
    """Value → number of rows that have it; nulls do not count."""
    return {item["values"]: item["counts"] for item in column.drop_null().value_counts().to_pylist()}
