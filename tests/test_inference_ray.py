"""`predict` as a Ray Data job: the same rows as in one process, whatever is killed."""

import os
import signal
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from inference_case import answers, archive, descendants, is_alive, job_of, kill_after_first_part, photographs

from catdog import ray_session, storage
from catdog.config import PredictConfig
from catdog.errors import BundleError, CatdogError, StorageError
from catdog.inference import RunRecord, executors, predict, ray_job, verify
from catdog.inference.books import Books
from catdog.inference.plan import Slice
from catdog.inference.work import SliceResult

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
    assert not list((tmp_path / "out").glob("*.parquet"))


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
            list(ray_job.run(job, [Slice(part="part-x.parquet", files=[], known=[])], None, 1))


def exported_by_ray() -> list[str]:
    """The lines that Ray's nodes give to Prometheus."""
    import ray

    lines = []
    for node in ray.nodes():
        url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        with urllib.request.urlopen(url, timeout=10) as answer:
            lines += answer.read().decode().splitlines()
    return lines


@pytest.mark.usefixtures("embedded_ray")
def test_actors_count_for_rays_dashboard() -> None:
    import ray

    def count() -> None:
        from catdog.inference.ray_figures import Figures

        result = SliceResult(
            part="part-x.parquet",
            is_retry=False,
            is_published=True,
            already_done=0,
            labels={"cat": 3},
            errors={"truncated": 2},
            needs_review=1,
            num_bytes=1,
            decode_s=1.5,
            score_s=2.5,
            engine="says",
            publish_s=0.0,
        )
        Figures().add(result)
        time.sleep(30)  # Ray exports every few seconds, and forgets processes that have ended

    counting = ray.remote(count).options(num_cpus=0).remote()
    expected = {('Outcome="ok"', 3.0), ('Outcome="error"', 2.0), ('Stage="decode"', 1.5), ('Stage="score"', 2.5)}
    found: set[tuple[str, float]] = set()
    deadline = time.monotonic() + 120
    while not expected <= found and time.monotonic() < deadline:
        for line in exported_by_ray():
            if line.startswith(("ray_catdog_images_total{", "ray_catdog_stage_seconds_total{")):
                found |= {(tag, float(line.rpartition(" ")[2])) for tag, _ in expected if tag in line}
        time.sleep(0.2)
    ray.cancel(counting, force=True)
    assert expected <= found


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
