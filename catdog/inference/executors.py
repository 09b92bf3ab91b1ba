"""The executors, which label the slices of a plan: the threads of this process, or the actors of Ray Data jobs.

Both run the same `Worker` over the same slices, and the rows of a slice do not depend on the executor.
"""

import itertools
import json
import time
import warnings
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import asdict
from typing import Any, Final, Literal

from catdog import errors, ray_internals, ray_session
from catdog.bundle import Bundle
from catdog.config import Executor
from catdog.errors import CatdogError
from catdog.inference.plan import Slice
from catdog.inference.work import MAX_UNDER_WAY, Job, SliceResult, Worker
from catdog.storage import SourceFile

_MAX_RESTARTS: Final = 3
"""How many times an actor that died is started again. Ray Data's default is for ever. The loss of its node is no death
of an actor."""

_MAX_TASK_RETRIES: Final = -1
"""A slice is tried again as long as its actor is started again. Ray gives a slice to the actors of a lost node once a
second until it notices the loss, which takes it some 15 s, and each time counts."""

_SLICES_PER_RAY_DATA_JOB: Final = 10_000
"""Largest number of slices of one Ray Data job, some four million images. The driver holds these slices in memory,
compressed. A larger plan is run as several Ray Data jobs, one after the other."""

_MAX_IN_FLIGHT: Final = 2
"""How many slices an actor is given at a time, so that it has the next one when it is done with one."""

_MAX_WAIT_S: Final = 20.0
"""Longest wait for a cluster to have any CPU at all."""

after_publishing: Callable[[], object] = bool
"""Is called each time the threads of this process have published a part. The command line sets it."""


def chosen(executor: Executor, ray_address: str | None) -> Literal["inline", "ray"]:
    """The executor to use. `auto` means `ray` if there is a cluster to run on, else `inline`."""
    if executor != "auto":
        return executor
    is_cluster = ray_address != "local" if ray_address else bool(ray_session.cluster_address(None))
    return "ray" if is_cluster else "inline"


def run(
    executor: Literal["inline", "ray"],
    job: Job,
    model: Bundle,
    slices: Iterable[Slice],
    num_workers: int | None,
    cpus_per_worker: int,
    ray_address: str | None,
) -> Generator[SliceResult]:
    """Label and publish slices. Yields the result of each as it is done.

    Args:
        executor: `inline` to label on the threads of this process, or `ray` to label in Ray Data jobs, whose actors
            label whole slices.
        job: what to label with, and where to publish.
        model: the job's bundle, which this process has verified. Actors load it for themselves.
        slices: the slices of the plan.
        num_workers: number of decoding threads (`inline`) or largest number of actors (`ray`); None for one per core of
            this machine, or as many as the cluster has room for at the time.
        cpus_per_worker: number of CPUs of an actor, and of its decoding threads.
        ray_address: address of the cluster, as for `catdog.ray_session.connect`.

    Raises:
        CatdogError: a worker raised it, or actors died too often, or the cluster has no CPU.
    """
    if executor == "inline":
        with Worker(job, num_workers, model) as worker:
            for result in worker.run(slices, num_suspects=MAX_UNDER_WAY if job.is_after_death else 0):
                if result.is_published:
                    after_publishing()
                yield result
        return
    with ray_session.connect(ray_address):
        _wait_for_cpus(cpus_per_worker)
        remaining = iter(slices)
        while group := list(itertools.islice(remaining, _SLICES_PER_RAY_DATA_JOB)):
            max_actors = min(num_workers or len(group), len(group))
            yield from _run_ray_data_job(job, [_pack(piece) for piece in group], max_actors, cpus_per_worker)


def _run_ray_data_job(job: Job, packed: list[bytes], max_actors: int, cpus_per_worker: int) -> Iterator[SliceResult]:
    """Label packed slices in one Ray Data job. Yields the result of each as it is done."""
    import ray
    import ray.data

    context = ray.data.DataContext.get_current()
    ray_internals.quiet_ray_data(context)
    context.max_consecutive_actor_init_deaths = _MAX_RESTARTS
    num_free = int(ray.available_resources().get("CPU", 0)) // cpus_per_worker
    slices = ray.data.from_items([{"slice": data} for data in packed], override_num_blocks=len(packed))
    # No other operator of the job takes CPUs, so the pool may take all. It begins with those that are free, grows when
    # CPUs come, and shrinks when they go.
    pool = ray.data.ActorPoolStrategy(
        min_size=1,
        initial_size=max(1, min(num_free, max_actors)),
        max_size=max_actors,
        max_tasks_in_flight_per_actor=_MAX_IN_FLIGHT,
    )
    with warnings.catch_warnings():
        # Ray deprecates options that are not parameters of `map`, but the two for restarts have no parameters yet.
        warnings.filterwarnings("ignore", message="`ray_remote_args` is deprecated")
        results = slices.map(
            _SliceLabeller,
            fn_constructor_args=(job, cpus_per_worker),
            compute=pool,
            num_cpus=cpus_per_worker,
            num_gpus=1 if job.use_gpu else None,
            max_restarts=_MAX_RESTARTS,
            max_task_retries=_MAX_TASK_RETRIES,
        )
    try:
        for batch in results.iter_batches(batch_size=None, batch_format="pyarrow"):
            for kind, text in zip(batch["kind"].to_pylist(), batch["text"].to_pylist(), strict=True):
                if kind != SliceResult.__name__:
                    raise getattr(errors, kind)(text)
                yield SliceResult(**json.loads(text))
    except ray.exceptions.RayActorError as error:
        reason = str(error).strip().splitlines()[-1][:400]
        raise CatdogError(f"An actor must not die more than {_MAX_RESTARTS} times. Received: {reason}") from error


class _SliceLabeller:
    """What an actor runs: it labels and publishes a packed slice, and returns the result or the error.

    An error is returned and not raised, so that the command ends with its one line instead of Ray's traceback.

    An actor that was started again because it had died suspects the slices that it had in flight. If an image in one of
    them kills the process that decodes it, the actor goes on suspecting.
    """

    def __init__(self, job: Job, num_threads: int) -> None:
        import ray

        self._job = job
        self._num_threads = num_threads
        self._worker: Worker | None = None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Ray warns of a deprecated name that it uses itself
            is_reconstructed = ray.get_runtime_context().was_current_actor_reconstructed
        self._num_suspects = _MAX_IN_FLIGHT if is_reconstructed else 0

    def __call__(self, row: dict[str, Any]) -> dict[str, str]:
        try:
            if self._worker is None:
                self._worker = Worker(self._job, num_workers=self._num_threads)
            (result,) = self._worker.run([_unpack(row["slice"])], num_suspects=self._num_suspects)
            self._num_suspects = _MAX_IN_FLIGHT if result.errors.get("decoder_died") else max(0, self._num_suspects - 1)
        except CatdogError as error:
            return {"kind": type(error).__name__, "text": str(error)}
        return {"kind": SliceResult.__name__, "text": json.dumps(asdict(result))}


def _pack(piece: Slice) -> bytes:
    """A slice as compressed JSON."""
    return zlib.compress(json.dumps(asdict(piece)).encode(), level=1)


def _unpack(packed: bytes) -> Slice:
    """The slice that `_pack` packed."""
    fields = json.loads(zlib.decompress(packed))
    return Slice(**fields | {"files": [SourceFile(**file) for file in fields["files"]]})


def _wait_for_cpus(num_cpus: int) -> None:
    """Wait for a node that has room for an actor."""
    import ray

    deadline = time.monotonic() + _MAX_WAIT_S
    while (
        most := max((int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]), default=0)
    ) < num_cpus:
        if time.monotonic() > deadline:
            raise CatdogError(
                f"The cluster must have a node with a CPU for each of the --cpus-per-worker={num_cpus} of an actor. "
                f"Received: at most {most} within {_MAX_WAIT_S:g} s"
            )
        time.sleep(1)
