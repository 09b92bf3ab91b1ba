"""Who labels a plan's slices: the threads of this process, or the actors of a Ray Data job.

Both run the same `Worker` over the same slices; a slice's rows do not depend on who labels it.
"""

import collections
import itertools
import json
import logging
import os
import time
import warnings
import zlib
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, Final

import pyarrow as pa
import pyarrow.compute as pc

from catdog import bundle, errors, ray_session, storage
from catdog.config import EngineName
from catdog.engines import load_engine
from catdog.errors import BundleError, CatdogError
from catdog.inference.label import DecodedBatch, Labeller
from catdog.inference.plan import Slice
from catdog.inference.publish import publish_part
from catdog.storage import SourceFile

logger = logging.getLogger(__name__)

_PUBLISHERS: Final = 4
"""Parts that a worker publishes at the same time, while it labels the next."""

_MAX_RESTARTS: Final = 3
"""Of an actor, and of a slice that died with one. Ray Data's default is to try for ever."""

_SLICES_PER_JOB: Final = 10_000
"""Slices of one Ray Data job, some five million images; the driver holds their manifests, compressed. A larger plan
is run as several jobs, one after the other."""

_MAX_WAIT_S: Final = 20.0
"""A cluster that has no CPU at all after this long will not have one."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a worker must know, wherever it runs."""

    model: str | None
    """The bundle's URL; None for the one that ships with catdog, wherever it is installed."""

    model_id: str
    output: str
    run_id: str
    batch_size: int
    engine: EngineName


@dataclass(frozen=True, kw_only=True)
class SliceResult:
    """What became of a slice. Rows that a retried part held already do not count.

    Attributes:
        part: the file that holds its rows.
        labels: `cat` and `dog` → rows.
        errors: error code → rows.
        needs_review: rows that a person should look at.
        num_bytes: of the images.
        decode_s: thread seconds of reading and decoding.
        score_s: thread seconds in the model.
        publish_s: thread seconds of writing.
    """

    part: str
    labels: dict[str, int]
    errors: dict[str, int]
    needs_review: int
    num_bytes: int
    decode_s: float
    score_s: float
    publish_s: float


class Worker:
    """Labels slices with the threads of this process.

    Some threads read and decode, others score, and yet others publish; what lies between them is bounded.
    """

    def __init__(self, job: Job, num_workers: int) -> None:
        """Load the model.

        Args:
            job: what to label with.
            num_workers: decoding threads. As many batches are scored at the same time, each on one core.

        Raises:
            BundleError: the model cannot be used.
        """
        model = bundle.load(job.model)
        if model.model_id != job.model_id:
            raise BundleError(f"{model.url} must not change during a run. Received: another {bundle.CARD_NAME}")
        num_scorers = min(num_workers, num_cores())
        engine = load_engine(model, job.engine, num_threads=num_scorers)
        self._output = job.output
        self._labeller = Labeller(model, engine, job.batch_size, job.run_id)
        self._max_batches = 2 * num_workers + num_scorers
        self._decoders = ThreadPoolExecutor(num_workers, thread_name_prefix="catdog-decode")
        self._scorers = ThreadPoolExecutor(num_scorers, thread_name_prefix="catdog-score")
        self._publishers = ThreadPoolExecutor(_PUBLISHERS, thread_name_prefix="catdog-publish")

    def run(self, slices: Iterable[Slice]) -> Iterator[SliceResult]:
        """Label and publish slices; what became of each, in their order.

        Raises:
            CatdogError: labelling cannot go on. Slices that were done are published, others are not.
        """
        batches: collections.deque[Future[_Scored]] = collections.deque()
        parts: collections.deque[Future[SliceResult]] = collections.deque()
        for piece in slices:
            scored = []
            for files in self._labeller.batches(piece.files):
                if len(batches) >= self._max_batches:
                    batches.popleft().result()
                scored.append(self._scorers.submit(self._score, self._decoders.submit(self._decode, files)))
                batches.append(scored[-1])
            parts.append(self._publishers.submit(self._publish, piece, scored))
            while parts and (parts[0].done() or len(parts) > 2 * _PUBLISHERS):
                yield parts.popleft().result()
        for part in parts:
            yield part.result()

    def close(self) -> None:
        """Drop what has not begun, and wait for what has."""
        pools = (self._decoders, self._scorers, self._publishers)
        for pool in pools:
            pool.shutdown(wait=False, cancel_futures=True)
        for pool in pools:
            pool.shutdown()

    def _decode(self, files: Sequence[SourceFile]) -> tuple[DecodedBatch, float]:
        started = time.perf_counter()
        contents = storage.read_sources([file.uri for file in files], [file.num_bytes for file in files])
        batch = self._labeller.decode(files, contents)
        return batch, time.perf_counter() - started

    def _score(self, decoding: "Future[tuple[DecodedBatch, float]]") -> "_Scored":
        batch, decode_s = decoding.result()
        started = time.perf_counter()
        rows = self._labeller.score(batch)
        return _Scored(rows, decode_s, time.perf_counter() - started)

    def _publish(self, piece: Slice, scoring: "Sequence[Future[_Scored]]") -> SliceResult:
        scored = [future.result() for future in scoring]
        rows = pa.concat_tables([batch.rows for batch in scored])
        started = time.perf_counter()
        publish_part(self._output, piece.part, rows, keep_others=piece.is_retry)
        return SliceResult(
            part=piece.part,
            labels=_tally(rows["label"]),
            errors=_tally(rows["error_code"]),
            needs_review=pc.sum(rows["needs_review"]).as_py() or 0,
            num_bytes=pc.sum(rows["num_bytes"]).as_py() or 0,
            decode_s=sum(batch.decode_s for batch in scored),
            score_s=sum(batch.score_s for batch in scored),
            publish_s=time.perf_counter() - started,
        )


@dataclass(frozen=True)
class _Scored:
    rows: pa.Table
    decode_s: float
    score_s: float


def _tally(column: pa.ChunkedArray) -> dict[str, int]:
    return {item["values"]: item["counts"] for item in column.drop_null().value_counts().to_pylist()}


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_inline(job: Job, slices: Iterable[Slice], num_workers: int | None) -> Generator[SliceResult, None, None]:
    """Label slices in this process. Errors as `Worker`."""
    worker = Worker(job, num_workers or num_cores())
    try:
        yield from worker.run(slices)
    finally:
        worker.close()


def run_ray(
    job: Job, slices: Iterable[Slice], num_workers: int | None, ray_address: str | None
) -> Generator[SliceResult, None, None]:
    """Label slices as a Ray Data job: actors of one CPU each read, decode, score and publish whole slices.

    Raises:
        CatdogError: the one that an actor raised, or the cluster has no CPU.
    """
    with ray_session.connect(ray_address):
        num_actors = num_workers or _num_cluster_cpus()
        remaining = iter(slices)
        while wave := list(itertools.islice(remaining, _SLICES_PER_JOB)):
            yield from _run_wave(job, [_pack(piece) for piece in wave], min(num_actors, len(wave)))


def _run_wave(job: Job, packed: list[bytes], num_actors: int) -> Iterator[SliceResult]:
    import ray
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.WARNING)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)  # warns that there are no progress bars
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.max_consecutive_actor_init_deaths = _MAX_RESTARTS
    num_free = int(ray.available_resources().get("CPU", 0))
    slices = ray.data.from_items([{"slice": data} for data in packed], override_num_blocks=len(packed))
    # The only operator that takes CPUs, so it cannot wait for another of its own. It takes what is free by and by.
    pool = ray.data.ActorPoolStrategy(
        min_size=max(1, min(num_free, num_actors)), max_size=num_actors, max_tasks_in_flight_per_actor=2
    )
    with warnings.catch_warnings():
        # Deprecated is any argument without a name of its own, though these two have none so far.
        warnings.filterwarnings("ignore", message="`ray_remote_args` is deprecated")
        results = slices.map(
            _SliceLabeller,
            fn_constructor_args=(job,),
            compute=pool,
            num_cpus=1,
            max_restarts=_MAX_RESTARTS,
            max_task_retries=_MAX_RESTARTS,
        )
    try:
        for batch in results.iter_batches(batch_size=None, batch_format="pyarrow"):
            for kind, text in zip(batch["kind"].to_pylist(), batch["text"].to_pylist(), strict=True):
                if kind != SliceResult.__name__:
                    raise getattr(errors, kind)(text)
                yield SliceResult(**json.loads(text))
    except ray.exceptions.RayActorError as error:
        reason = str(error).strip().splitlines()[-1][:400]
        raise CatdogError(f"An actor may die {_MAX_RESTARTS} times. Received: once more. {reason}") from error


class _SliceLabeller:
    """An actor's work: a packed slice to what became of it, or to the error that ends the job.

    The error travels as a value, so that the job ends with that one line instead of Ray's account of it.
    """

    def __init__(self, job: Job) -> None:
        self._job = job
        self._worker: Worker | None = None

    def __call__(self, row: dict[str, Any]) -> dict[str, str]:
        try:
            if self._worker is None:
                self._worker = Worker(self._job, num_workers=1)
            (result,) = self._worker.run([_unpack(row["slice"])])
        except CatdogError as error:
            return {"kind": type(error).__name__, "text": str(error)}
        return {"kind": SliceResult.__name__, "text": json.dumps(asdict(result))}


def _pack(piece: Slice) -> bytes:
    return zlib.compress(json.dumps(asdict(piece)).encode(), level=1)


def _unpack(packed: bytes) -> Slice:
    fields = json.loads(zlib.decompress(packed))
    return Slice(**fields | {"files": [SourceFile(**file) for file in fields["files"]]})


def _num_cluster_cpus() -> int:
    import ray

    deadline = time.monotonic() + _MAX_WAIT_S
    while (num_cpus := int(ray.cluster_resources().get("CPU", 0))) < 1:
        if time.monotonic() > deadline:
            raise CatdogError(f"The cluster must have a CPU for each actor. Received: none within {_MAX_WAIT_S:g} s")
        time.sleep(1)
    return num_cpus
