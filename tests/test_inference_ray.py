"""`predict` as a Ray Data job: the same rows as in one process, whatever is killed."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from inference_case import answers, archive, descendants, is_alive, job_of, kill_after_first_part, photographs

from catdog import bundle, ray_session, storage
from catdog.config import PredictConfig
from catdog.errors import BundleError, CatdogError, StorageError
from catdog.inference import RunRecord, executors, predict, verify
from catdog.inference.books import Books
from catdog.inference.plan import Slice

pytestmark = pytest.mark.slow

NUM_MEMBERS = 4000


@pytest.fixture(scope="module")
def embedded_ray() -> Iterator[None]:
    with ray_session.connect(None):
        yield


def run(images: Path, output: Path, model: str, executor: Any = "ray", **changes: Any) -> RunRecord:
    return predict(PredictConfig(images=str(images), output=str(output), model=model, executor=executor, **changes))


def test_a_cluster_without_cpus_is_one_error(tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    monkeypatch.setattr(executors, "_MAX_WAIT_S", 1.0)
    images = photographs(tmp_path / "photos", 3)
    ray.init(address="local", num_cpus=0, include_dashboard=False, log_to_driver=False)
    try:
        with pytest.raises(CatdogError, match=r"the --cpus-per-worker=1 of an actor\. Received: at most 0 within 1 s"):
            run(images, tmp_path / "out", model)
    finally:
        ray.shutdown()
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("embedded_ray")
def test_rows_are_those_of_one_process(tmp_path: Path, model: str) -> None:
    images = photographs(tmp_path / "photos", 300)
    record = run(images, tmp_path / "ray", model)
    assert record.books == Books(listed=304, ok=300, error=4, already_done=0, duplicate=0)
    inline = run(images, tmp_path / "inline", model, executor="inline")
    assert record.parts == inline.parts
    assert answers(tmp_path / "ray") == answers(tmp_path / "inline")
    assert run(images, tmp_path / "broad", model, cpus_per_worker=2).books == record.books
    assert answers(tmp_path / "broad") == answers(tmp_path / "inline")

    again = run(images, tmp_path / "ray", model)
    assert again.books == Books(listed=304, ok=0, error=0, already_done=304, duplicate=0)
    retried = run(images, tmp_path / "ray", model, retry_errors=True)
    assert retried.books == Books(listed=304, ok=0, error=4, already_done=300, duplicate=0)
    assert answers(tmp_path / "ray") == answers(tmp_path / "inline")


@pytest.mark.usefixtures("embedded_ray")
def test_an_actors_error_is_the_jobs_error(tmp_path: Path, model: str) -> None:
    images = photographs(tmp_path / "photos", 20)
    (tmp_path / "a-file").write_text("no directory")
    with pytest.raises(StorageError, match=r"a-file/out cannot be written"):
        run(images, tmp_path / "a-file" / "out", model)

    output = tmp_path / "out"
    with storage.claimed(str(output), "predict") as claim:
        job = job_of(output, model, claim, model_id="x")
        with pytest.raises(BundleError, match="must not change during a run"):
            list(
                executors.run(
                    "ray", job, bundle.load(model), [Slice(part="part-x.parquet", files=[], known=[])], None, 1, None
                )
            )


@pytest.mark.usefixtures("embedded_ray")
def test_a_killed_actor_loses_nothing(tmp_path: Path, model: str) -> None:
    output = tmp_path / "out"
    killed: list[int] = []

    def kill_one() -> None:
        while not list(output.glob("part-*.parquet")):
            time.sleep(0.01)
        actors = [pid for pid, line in descendants(os.getpid()).items() if "_SliceLabeller" in line]
        os.kill(actors[0], signal.SIGKILL)
        killed.append(actors[0])

    killer = threading.Thread(target=kill_one, daemon=True)
    killer.start()
    record = run(archive(tmp_path / "train.zip", NUM_MEMBERS), output, model)
    killer.join()
    assert len(killed) == 1
    assert record.books == Books(listed=NUM_MEMBERS, ok=NUM_MEMBERS, error=0, already_done=0, duplicate=0)
    assert verify(str(output)).rows == NUM_MEMBERS


def test_a_killed_driver_leaves_whole_parts_and_no_actors(tmp_path: Path, model: str) -> None:
    images, output = archive(tmp_path / "train.zip", NUM_MEMBERS), tmp_path / "out"
    code = f"""
from catdog.config import PredictConfig
from catdog.inference import predict
predict(PredictConfig(images={str(images)!r}, output={str(output)!r}, model={model!r}, executor="ray"))
"""
    family: dict[int, str] = {}

    def driver(pid: int) -> int:
        family.update(descendants(pid))
        return pid

    kill_after_first_part(code, output, victim=driver)
    actors = [pid for pid, line in family.items() if "_SliceLabeller" in line]
    assert actors
    deadline = time.monotonic() + 60
    while any(is_alive(pid) for pid in actors):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    published = verify(str(output)).rows
    assert 0 < published < NUM_MEMBERS
    record = run(images, output, model, executor="inline")
    assert (record.books.ok, record.books.already_done) == (NUM_MEMBERS - published, published)
    assert verify(str(output)).rows == NUM_MEMBERS
