"""The Ray Data job of `predict`: how slices stream through it, and what becomes of those that a slow worker has."""

import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import ray.cloudpickle
from inference_case import answers, archive, descendants, encoded_drawings, is_alive, job_of, rows_of
from ray_case import small_ray

from catdog import storage
from catdog.config import PredictConfig
from catdog.errors import StorageError
from catdog.inference import handout, predict, ray_job, verify
from catdog.inference.books import Books
from catdog.inference.draining import Drain
from catdog.inference.plan import Slice, planner
from catdog.inference.publish import part_name
from catdog.inference.work import SliceResult, Worker
from catdog.storage import SourceFile

pytestmark = pytest.mark.slow

logger = logging.getLogger(__name__)

NUM_MEMBERS = 1500


@pytest.fixture(scope="module", autouse=True)
def ray_of_this_module() -> Iterator[None]:
    with small_ray(num_cpus=8):
        yield


NUM_WORKERS = 8
NUM_SLICES = 64
SLICE_S = 0.5
SLOW_SLICE_S = 20 * SLICE_S


class SimulatedLabeller:
    """Takes its time and labels nothing. It begins when all actors are there, of which one is slow."""

    def __init__(self, job: Any, _num_threads: int, desk: Any) -> None:
        self._id = ray.get_runtime_context().get_actor_id()
        self._job = job
        self._desk = desk
        Path(job.directory, self._id).touch()

    def _slice_s(self) -> float:
        while len(there := sorted(os.listdir(self._job.directory))) < self._job.num_workers:
            time.sleep(0.01)
        slow_one, *_ = there
        return float(self._job.slow_slice_s if slow_one == self._id else self._job.slice_s)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        slice_s = self._slice_s()
        self._desk.begin.remote(row["number"], self._id)
        time.sleep(slice_s)
        nothing: dict[str, Any] = {field.name: 0 for field in fields(SliceResult)}
        text = json.dumps(nothing | {"part": str(row["number"])})
        return ray_job.done_row(row["number"], self._id, slice_s, SliceResult.__name__, text)


@pytest.fixture
def simulated(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Actors that simulate the work. They do not know this module, so that the class is sent to them whole."""
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    monkeypatch.setattr(ray_job, "_SliceLabeller", SimulatedLabeller)
    yield
    ray.cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


def simulated_job(directory: Path, num_workers: int, slice_s: float, slow_slice_s: float) -> Any:
    """What `SimulatedLabeller` takes for a job."""
    directory.mkdir()
    return SimpleNamespace(
        directory=str(directory), num_workers=num_workers, slice_s=slice_s, slow_slice_s=slow_slice_s, use_gpu=False
    )


def slices_of(num_slices: int, num_images: int = 500) -> Iterator[Slice]:
    files = [SourceFile("x", "v", 1)] * num_images
    for number in range(num_slices):
        yield Slice(part=str(number), files=files, known=[[]] * num_images)


def is_gone_soon(pid: int) -> bool:
    """Whether a process ends within half a minute."""
    deadline = time.monotonic() + 30
    while is_alive(pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    return not is_alive(pid)


# One stream of slices.


@pytest.mark.usefixtures("simulated")
def test_slices_stream_through_one_job_and_few_are_under_way(tmp_path: Path) -> None:
    num_taken = num_done = most = 0

    def counted() -> Iterator[Slice]:
        nonlocal num_taken, most
        for piece in slices_of(1000, num_images=1):
            num_taken += 1
            most = max(most, num_taken - num_done)
            yield piece

    parts = []
    for result in ray_job.run(simulated_job(tmp_path / "job", 2, 0, 0), counted(), 2, 4):
        num_done += 1
        parts.append(int(result.part))
    assert sorted(parts) == list(range(1000))
    assert most <= ray_job._room(4) + 2


@pytest.mark.usefixtures("simulated")
def test_an_error_of_the_plan_is_the_jobs_error(tmp_path: Path) -> None:
    def broken() -> Iterator[Slice]:
        yield from slices_of(100, num_images=1)
        raise StorageError("the plan must be read to its end. Received: nothing")

    with pytest.raises(StorageError, match="the plan must be read"):
        list(ray_job.run(simulated_job(tmp_path / "job", 2, 0, 0), broken(), 2, 4))


@pytest.mark.usefixtures("simulated")
def test_who_stops_taking_results_leaves_no_actor_and_no_thread(tmp_path: Path) -> None:
    results = ray_job.run(simulated_job(tmp_path / "job", 2, 0.1, 60.0), slices_of(1000), 2, 4)
    next(results)
    actors = [pid for pid, line in descendants(os.getpid()).items() if "SimulatedLabeller" in line]
    assert len(actors) == 2
    results.close()
    assert all(is_gone_soon(pid) for pid in actors)
    assert "catdog-feeder" not in [thread.name for thread in threading.enumerate()]


@pytest.mark.parametrize(
    ("nodes", "use_gpu", "num_cpus"),
    [
        ([(1, 0)], False, 1),
        ([(2, 0)], False, 2),
        ([(6, 0)], False, 6),
        ([(12, 0)], False, 6),
        ([(64, 0)], False, 8),
        ([(64, 0), (1, 0)], False, 8),
        ([(64, 0), (0, 0), (4, 0), (4, 0), (4, 0), (4, 0)], False, 4),
        ([(1, 0)] * 5, False, 1),
        ([(64, 8)], True, 8),
        ([(16, 4), (4, 1)], True, 4),
    ],
)
def test_an_actor_gets_what_the_nodes_have_and_one_model_serves(
    nodes: list[tuple[int, int]], use_gpu: bool, num_cpus: int
) -> None:
    assert ray_job.fitting_cpus(nodes, use_gpu=use_gpu) == num_cpus


# A worker that is slow.


def test_a_worker_that_stands_still_is_not_waited_for(
    tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planner, "SLICE_SIZE", 50)
    monkeypatch.setattr(handout, "MIN_LATE_S", 1.0)
    images, output = archive(tmp_path / "train.zip", NUM_MEMBERS), tmp_path / "out"
    stopped: list[int] = []

    def stop_one() -> None:
        while not list(output.glob("part-*.parquet")):
            time.sleep(0.01)
        actors = [pid for pid, line in descendants(os.getpid()).items() if "_SliceLabeller" in line]
        os.kill(actors[0], signal.SIGSTOP)
        stopped.append(actors[0])

    other = threading.Thread(target=stop_one)
    other.start()
    try:
        record = predict(
            PredictConfig(
                images=str(images), output=str(output), model=model, executor="ray", num_workers=2, cpus_per_worker=1
            )
        )
    finally:
        other.join()
        is_gone = is_gone_soon(stopped[0])
        if not is_gone:
            os.kill(stopped[0], signal.SIGKILL)
    assert record.books == Books(listed=NUM_MEMBERS, ok=NUM_MEMBERS, error=0, already_done=0, duplicate=0)
    assert verify(str(output)).rows == NUM_MEMBERS
    assert is_gone
    predict(PredictConfig(images=str(images), output=str(tmp_path / "inline"), model=model, executor="inline"))
    assert answers(output) == answers(tmp_path / "inline")


# A run that stops before its end.


def test_a_run_that_is_drained_publishes_what_actors_have_begun_and_counts_what_remains(
    tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planner, "SLICE_SIZE", 20)
    images, output = archive(tmp_path / "train.zip", NUM_MEMBERS), tmp_path / "out"
    config = PredictConfig(images=str(images), output=str(output), model=model, executor="ray", cpus_per_worker=1)

    def is_over(self: Drain) -> bool:
        self._is_deadline_over = len(list(output.glob("part-*.parquet"))) >= 3
        return self._is_deadline_over

    with monkeypatch.context() as patch:
        patch.setattr(Drain, "is_over", is_over)
        record = predict(config)
    assert not record.complete
    assert record.books.error == 0
    assert 60 <= record.books.ok == NUM_MEMBERS - record.books.remaining < NUM_MEMBERS
    assert verify(str(output)).rows == record.books.ok
    assert not list(output.glob("_runs/*.plan-*"))
    rest = predict(config)
    assert (rest.complete, rest.books.ok) == (True, record.books.remaining)
    assert verify(str(output)).rows == NUM_MEMBERS


@pytest.mark.parametrize("is_retry", [False, True])
def test_what_one_worker_has_published_stays(tmp_path: Path, model: str, is_retry: bool) -> None:
    """The second worker finds the photograph gone, which would be an error."""
    images, output = tmp_path / "photos", tmp_path / "out"
    images.mkdir()
    for number, picture in enumerate(encoded_drawings(3)):
        (images / f"{number}.jpg").write_bytes(picture)
    with storage.claimed(str(output), "predict") as claim:
        listed = [SourceFile(str(path), "v", path.stat().st_size) for path in sorted(images.iterdir())]
        first, rest = listed[:1], listed[1:]
        part = part_name("x")
        if is_retry:
            with Worker(job_of(output, model, claim, run_id="old"), 1) as worker:
                list(worker.run([Slice(part=part, files=first, known=[[]])]))
        job = job_of(output, model, claim, run_id="new")
        files = rest if is_retry else listed
        piece = Slice(part=part, files=files, known=[[] for _ in files], is_retry=is_retry)
        with Worker(job, 1, may_have_double=True) as one, Worker(job, 1, may_have_double=True) as two:
            (done,) = one.run([piece])
            rows = rows_of(output)
            (images / "2.jpg").unlink()
            (again,) = two.run([piece])
    assert done.errors == {}
    assert sum(done.labels.values()) == len(files)
    stays = ("part", "is_published", "already_done", "labels", "errors", "needs_review", "num_bytes")
    assert [asdict(again)[name] for name in stays] == [asdict(done)[name] for name in stays]
    assert rows_of(output).equals(rows)
    assert len(rows) == len(listed)


def simulated_s(directory: Path, slow_slice_s: float) -> float:
    """How long the workers take for the slices, from the first result on."""
    started, parts = None, []
    job = simulated_job(directory, NUM_WORKERS, SLICE_S, slow_slice_s)
    for result in ray_job.run(job, slices_of(NUM_SLICES), NUM_WORKERS, 1):
        started = started or time.monotonic()
        parts.append(result.part)
    assert started is not None
    assert sorted(map(int, parts)) == list(range(NUM_SLICES))
    return time.monotonic() - started


@pytest.mark.usefixtures("simulated")
def test_a_slow_worker_of_eight_costs_little(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`pytest -o log_cli=true --log-cli-level=INFO` shows the times."""
    monkeypatch.setattr(handout, "MIN_LATE_S", 1.0)
    all_fast_s = simulated_s(tmp_path / "fast", SLICE_S)
    with_s = simulated_s(tmp_path / "with", SLOW_SLICE_S)
    monkeypatch.setattr(handout, "MAX_ATTEMPTS", 1)
    without_s = simulated_s(tmp_path / "without", SLOW_SLICE_S)
    logger.info(
        "%d slices of %g s for %d workers: %.1f s. If one takes %g s for each: %.1f s. If others do them, too: %.1f s",
        *(NUM_SLICES, SLICE_S, NUM_WORKERS, all_fast_s, SLOW_SLICE_S, without_s, with_s),
    )
    assert with_s < without_s - SLOW_SLICE_S / 2
