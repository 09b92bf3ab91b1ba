"""Labelling on a cluster: one Ray Data job, whose actors label the slices of a plan.

The slices stream through the job. A thread of the driver takes them from the plan and lays them on a desk, which is an
actor; a task of the job reads them from there; the actors of a pool label them; and the driver takes the results. The
number of slices that are under way is bounded, so that neither the driver nor the cluster ever holds the plan. (A Ray
Data job that is made from a list holds all of it to its end.)

When the plan is at its end, and actors are idle, they are given the slices that take too long
(`catdog.inference.handout`). When every slice has a result, the actors that are still busy with a double are killed.
"""

import asyncio
import contextlib
import json
import logging
import math
import threading
import time
import warnings
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any, Final

import pyarrow as pa
import ray
import ray.data
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasource, ReadTask

from catdog import errors, ray_internals
from catdog.errors import CatdogError
from catdog.inference.handout import Handout
from catdog.inference.plan import Slice
from catdog.inference.ray_figures import Figures
from catdog.inference.sources import Root
from catdog.inference.work import Job, SliceResult, Worker
from catdog.storage import SourceFile

logger = logging.getLogger(__name__)

_MAX_RESTARTS: Final = 3
"""How many times an actor that died is started again. Ray Data's default is for ever. The loss of its node is no death
of an actor."""

_MAX_TASK_RETRIES: Final = -1
"""A slice is tried again as long as its actor is started again. Ray gives a slice to the actors of a lost node once a
second until it notices the loss, which takes it some 15 s, and each time counts."""

_MAX_IN_FLIGHT: Final = 2
"""How many slices an actor is given at a time, so that it has the next one when it is done with one."""

_WAITING: Final = 16
"""How many slices wait for an actor, beside as many again as the actors have. The pool grows while some wait."""

_MAX_CPUS_PER_ACTOR: Final = 8
"""So many threads one Python process keeps busy with labelling. More would wait for each other where only one of them
can run Python at a time, and save little memory: a node of 64 CPUs holds 8 models."""

_LEAST_USED: Final = 0.85
"""Share of the CPUs that actors can take at all, which they must take at least. A larger actor fits fewer nodes."""

_REFILL: Final = 0.75
"""When so much of the room is taken, it is filled again. Slices then come to the desk in groups."""

_NUM_AT_ONCE: Final = 16
"""Largest number of slices that come to the desk at once."""

_NOT_DONE: Final = "not done"
"""In the place of the name of an error: the run was over before an actor began the slice."""

_CHECK_S: Final = 0.5
"""How often the driver asks what was begun, and looks for late slices once all are given out."""


def run(
    job: Job,
    slices: Iterable[Slice],
    num_workers: int | None,
    num_cpus: int,
    *,
    num_slices: int | None = None,
    is_over: Callable[[], bool] = bool,
    take_back: Callable[[int], object] = bool,
) -> Generator[SliceResult]:
    """Label and publish slices on the Ray that this process has joined. Yields the result of each as it is done.

    Args:
        job: what to label with, and where to publish.
        slices: the slices of the plan. A thread takes them.
        num_workers: largest number of actors; None for as many as the cluster has room for at the time.
        num_cpus: number of CPUs of an actor, and of its decoding threads.
        num_slices: number of the slices, if it is known. More actors than that are not started.
        is_over: whether no further slice is to be begun (`draining`). Slices that wait for an actor are not done then.
        take_back: is told the number of images of each slice that was not done.

    Raises:
        CatdogError: a worker raised it, or actors died too often.
    """
    most_actors = min(num_workers or math.inf, num_slices or math.inf)
    handout = Handout()
    desk = _start_desk()
    feeder = _Feeder(slices, handout, desk, num_cpus, is_over)
    feeder.start()
    try:
        rows = _dataset(job, desk, most_actors, num_cpus)
        # With batches fetched ahead, a result would wait for the next one.
        batches = rows.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0)
        yield from _results(batches, handout, take_back)
    except ray.exceptions.RayActorError as error:
        reason = str(error).strip().splitlines()[-1][:400]
        raise CatdogError(f"An actor must not die more than {_MAX_RESTARTS} times. Received: {reason}") from error
    finally:
        handout.stop()
        feeder.join()
        ray.kill(desk)
    if feeder.failure is not None:
        raise feeder.failure


def _results(batches: Any, handout: Handout, take_back: Callable[[int], object]) -> Iterator[SliceResult]:
    """The first result of every slice. To close the batches kills the actors that still have something to do."""
    with contextlib.closing(iter(batches)) as remaining:
        for batch in remaining:
            for row in batch.to_pylist():
                if handout.finish(row["number"], row["worker"], row["took_s"], time.monotonic()):
                    if row["kind"] == _NOT_DONE:
                        take_back(int(row["text"]))
                    elif row["kind"] == SliceResult.__name__:
                        yield SliceResult(**json.loads(row["text"]))
                    else:
                        raise getattr(errors, row["kind"])(row["text"])
            if handout.has_only_doubles():
                return


def _dataset(job: Job, desk: Any, most_actors: float, num_cpus: int) -> ray.data.Dataset:
    """The Ray Data job: the rows that its actors make of the slices on the desk."""
    context = ray.data.DataContext.get_current().copy()
    ray_internals.quiet_ray_data(context)
    context.max_consecutive_actor_init_deaths = _MAX_RESTARTS
    context.target_max_block_size = 1  # every row goes on at once
    # An idle actor is kept, to do what a slow one does not. It goes when the run ends, or its node.
    context.autoscaling_config.actor_pool_util_downscaling_threshold = -1.0
    num_free = sum(cpus // num_cpus for cpus, _ in ray_internals.free_resources())
    # No other operator of the job takes CPUs, so the pool may take all. It begins with those that are free, grows when
    # CPUs come, and shrinks when they go.
    pool = ray.data.ActorPoolStrategy(
        min_size=1,
        initial_size=int(max(1, min(num_free, most_actors))),
        max_size=None if math.isinf(most_actors) else int(most_actors),
        max_tasks_in_flight_per_actor=_MAX_IN_FLIGHT,
    )
    with ray.data.DataContext.current(context), warnings.catch_warnings():
        # Ray deprecates options that are not parameters of `map`, but the two for restarts have no parameters yet.
        warnings.filterwarnings("ignore", message="`ray_remote_args` is deprecated")
        slices = ray.data.read_datasource(
            _SlicesOnDesk(desk), override_num_blocks=1, num_cpus=0, label_selector=_this_node()
        )
        return slices.map(
            _SliceLabeller,
            fn_constructor_args=(job, num_cpus, desk),
            compute=pool,
            num_cpus=num_cpus,
            num_gpus=1 if job.use_gpu else None,
            max_restarts=_MAX_RESTARTS,
            max_task_retries=_MAX_TASK_RETRIES,
        )


def _this_node() -> dict[str, str]:
    """What selects the node of the driver. What dies with it needs no life of its own."""
    return {"ray.io/node-id": ray.get_runtime_context().get_node_id()}


def _room(num_cpus: int) -> int:
    """How many slices may be under way at a time in the cluster as it is now."""
    num_actors = int(ray.cluster_resources().get("CPU", 0)) // num_cpus
    return 2 * _MAX_IN_FLIGHT * num_actors + _WAITING


def _start_desk() -> Any:
    """An actor on the node of the driver. It is sent its class whole, and so starts without importing catdog."""

    class Desk:
        """Here the slices lie until the job takes them, and here workers say that they begin one."""

        def __init__(self) -> None:
            self._slices: list[dict[str, Any] | None] = []
            self._has_slices = asyncio.Event()
            self._begun: list[tuple[int, str, float]] = []
            self._ever_begun: set[int] = set()
            self._is_closed = False

        async def put(self, slices: Sequence[dict[str, Any] | None]) -> None:
            """Lay down slices; None is the end."""
            self._slices += slices
            self._has_slices.set()

        async def take(self) -> Sequence[dict[str, Any] | None]:
            """Take all slices that are there, as soon as there are any."""
            await self._has_slices.wait()
            taken, self._slices = self._slices, []
            self._has_slices.clear()
            return taken

        async def begin(self, number: int, worker: str) -> bool:
            """Note that a worker begins a slice. Whether it may. What one worker has begun, another may do, too."""
            if self._is_closed and number not in self._ever_begun:
                return False
            self._ever_begun.add(number)
            self._begun.append((number, worker, time.monotonic()))
            return True

        async def close(self) -> None:
            """Let no worker begin a slice that none has begun yet."""
            self._is_closed = True

        async def begun(self) -> Sequence[tuple[int, str, float]]:
            """(number, worker, time) of what was begun since the last call. The driver has the same clock."""
            begun, self._begun = self._begun, []
            return begun

    return ray.remote(Desk).options(num_cpus=0, label_selector=_this_node()).remote()


class _Feeder(threading.Thread):
    """Lays the slices on the desk, then those that are late once more, and at last the end."""

    def __init__(
        self, slices: Iterable[Slice], handout: Handout, desk: Any, num_cpus: int, is_over: Callable[[], bool]
    ) -> None:
        super().__init__(name="catdog-feeder", daemon=True)
        self._is_over = is_over
        self._is_closed = False
        self._slices = slices
        self._handout = handout
        self._desk = desk
        self._num_cpus = num_cpus
        self.failure: Exception | None = None

    def run(self) -> None:
        try:
            self._give_all()
            while not self._handout.wait(_CHECK_S):
                self._note_begun()
                if not self._closes():
                    self._put(self._doubles())
            self._put([None])
        except Exception as error:  # of the plan, or of the desk: the driver raises it
            self.failure = error
            with contextlib.suppress(ray.exceptions.RayError):  # without the desk the job fails by itself
                self._put([None])

    def _give_all(self) -> None:
        room = _room(self._num_cpus)
        rows: list[dict[str, Any]] = []
        for piece in self._slices:
            if len(rows) == _NUM_AT_ONCE or not self._handout.is_below(room):
                self._put(rows)
                rows = []
            if not self._handout.is_below(room):
                while not self._handout.is_below(_REFILL * room, _CHECK_S):
                    self._note_begun()
                    self._closes()
                room = _room(self._num_cpus)
            if self._handout.is_stopped:
                return
            packed = _pack(piece)
            number = self._handout.give(packed, len(piece.files), time.monotonic())
            rows.append({"number": number, "slice": packed, "is_double": False})
        self._put(rows)
        self._handout.all_given(time.monotonic())

    def _doubles(self) -> list[dict[str, Any]]:
        late = self._handout.late(time.monotonic())
        for number, _ in late:
            logger.warning("Slice %d of the plan takes long: another actor does it, too", number)
        return [{"number": number, "slice": packed, "is_double": True} for number, packed in late]

    def _closes(self) -> bool:
        """Whether the run is over. The desk is told."""
        if not self._is_closed and self._is_over():
            self._is_closed = True
            ray.get(self._desk.close.remote())
        return self._is_closed

    def _put(self, rows: Sequence[dict[str, Any] | None]) -> None:
        if rows:
            ray.get(self._desk.put.remote(rows))

    def _note_begun(self) -> None:
        for number, worker, begun in ray.get(self._desk.begun.remote()):
            self._handout.begin(number, worker, begun)


class _SlicesOnDesk(Datasource):  # type: ignore[misc]
    """The slices on the desk, up to their end. One task reads them all, each when the job has room for it."""

    def __init__(self, desk: Any) -> None:
        super().__init__()
        self._desk = desk

    def estimate_inmemory_data_size(self) -> int | None:
        return None

    def get_read_tasks(self, *_arguments: Any, **_options: Any) -> list[ReadTask]:
        desk = self._desk

        def read() -> Iterator[pa.Table]:
            while True:
                for row in ray.get(desk.take.remote()):
                    if row is None:
                        return
                    yield pa.Table.from_pylist([row])

        metadata = BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None)
        return [ReadTask(read, metadata)]


class _SliceLabeller:
    """What an actor runs: it labels and publishes a packed slice, and gives the result or the error.

    An error is given and not raised, so that the command ends with its one line instead of Ray's traceback. The model
    loads while the first slice is on its way.

    An actor that was started again because it had died suspects the slices that it had in flight. If an image in one of
    them kills the process that decodes it, the actor goes on suspecting. And it suspects a slice that another worker
    takes long for: that one may have died of it.
    """

    def __init__(self, job: Job, num_threads: int, desk: Any) -> None:
        self._desk = desk
        self._loading = ThreadPoolExecutor(1).submit(Worker, job, num_threads, may_have_double=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Ray warns of a deprecated name that it uses itself
            is_reconstructed = ray.get_runtime_context().was_current_actor_reconstructed
        self._num_suspects = _MAX_IN_FLIGHT if is_reconstructed else 0
        self._id = ray.get_runtime_context().get_actor_id()
        self._figures = Figures()

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        try:
            worker = self._loading.result()
            piece = _unpack(row["slice"])
            if not self._may_begin(row["number"]):
                return done_row(row["number"], self._id, 0.0, _NOT_DONE, str(len(piece.files)))
            begun = time.monotonic()
            num_suspects = max(self._num_suspects, int(row["is_double"]))
            (result,) = worker.run([piece], num_suspects=num_suspects)
            self._figures.add(result)
            self._num_suspects = _MAX_IN_FLIGHT if result.errors.get("decoder_died") else max(0, self._num_suspects - 1)
        except CatdogError as error:
            return done_row(row["number"], self._id, 0.0, type(error).__name__, str(error))
        took_s = time.monotonic() - begun
        return done_row(row["number"], self._id, took_s, SliceResult.__name__, json.dumps(asdict(result)))

    def _may_begin(self, number: int) -> bool:
        with contextlib.suppress(ray.exceptions.RayError):  # the desk is gone with the driver
            return bool(ray.get(self._desk.begin.remote(number, self._id)))
        return True


def done_row(number: int, worker: str, took_s: float, kind: str, text: str) -> dict[str, Any]:
    """What an actor gives for a slice.

    Args:
        number: number of the slice.
        worker: the actor.
        took_s: how long the actor had it.
        kind: `SliceResult`, the name of an error, or `_NOT_DONE`.
        text: the result as JSON, the text of the error, or the number of images.
    """
    return {"number": number, "worker": worker, "took_s": took_s, "kind": kind, "text": text}


def _pack(piece: Slice) -> bytes:
    """A slice as compressed JSON."""
    return zlib.compress(json.dumps(asdict(piece)).encode(), level=1)


def _unpack(packed: bytes) -> Slice:
    """The slice that `_pack` packed."""
    fields = json.loads(zlib.decompress(packed))
    roots = tuple(Root(path=root["path"], witnesses=tuple(root["witnesses"])) for root in fields["roots"])
    return Slice(**fields | {"files": [SourceFile(**file) for file in fields["files"]], "roots": roots})


def fitting_cpus(nodes: Sequence[tuple[int, int]], *, use_gpu: bool) -> int:
    """How many CPUs an actor should have: as many as one model serves well, unless much of the cluster would be idle.

    Args:
        nodes: numbers of CPUs and of GPUs that each node has.
        use_gpu: whether an actor needs a GPU.
    """

    def used(num_cpus: int) -> int:
        if use_gpu:
            return sum(min(cpus // num_cpus, gpus) for cpus, gpus in nodes)
        return sum(cpus // num_cpus * num_cpus for cpus, _ in nodes)

    choices = range(1, _MAX_CPUS_PER_ACTOR + 1)
    least = max(map(used, choices)) * (1 if use_gpu else _LEAST_USED)
    return max(num_cpus for num_cpus in choices if used(num_cpus) >= least)


def chosen_cpus(*, use_gpu: bool) -> int:
    """How many CPUs an actor gets in this cluster: so many that those which are free now, or else all, are used."""
    free = ray_internals.free_resources()
    if not any(cpus for cpus, _ in free):
        free = ray_internals.all_resources()
    return fitting_cpus(free, use_gpu=use_gpu)
