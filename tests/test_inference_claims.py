"""One run at a time in an output of `predict`, on machines that all see the same output and the same images."""

import dataclasses
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from inference_case import job_of, photographs, rows_of

from catdog import inference, storage
from catdog.config import PredictConfig
from catdog.errors import ClaimLostError, OutputClaimedError, StorageError
from catdog.inference import RunRecord, plan_summary, predict, verify
from catdog.inference.plan import open_plan
from catdog.inference.sources import Root
from catdog.inference.work import Worker

pytestmark = pytest.mark.slow


def config_of(images: Path | str, output: Path, model: str, **changes: Any) -> PredictConfig:
    return PredictConfig(images=str(images), output=str(output), model=model, executor="inline", **changes)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return photographs(tmp_path / "photos", 20)


def test_a_second_run_learns_who_holds_the_output(photos: Path, tmp_path: Path, model: str) -> None:
    output = tmp_path / "out"
    with (
        storage.claimed(str(output), "predict"),
        pytest.raises(OutputClaimedError, match=r"must not be in use .* held by `catdog predict`"),
    ):
        predict(config_of(photos, output, model))
    assert not output.exists()
    assert predict(config_of(photos, output, model)).books.ok == 20


def test_of_two_runs_started_together_one_labels_and_no_image_has_two_rows(
    photos: Path, tmp_path: Path, model: str
) -> None:
    """Over different listings, whose slices have different names."""
    output, more = tmp_path / "out", tmp_path / "more"
    shutil.copytree(photos, more, symlinks=True)
    results: list[RunRecord | Exception] = []

    def run(*images: Path) -> None:
        try:
            sources = tuple(map(str, images))
            results.append(predict(PredictConfig(images=sources, output=str(output), model=model, executor="inline")))
        except OutputClaimedError as error:
            results.append(error)

    threads = [threading.Thread(target=run, args=images) for images in ((photos,), (photos, more))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(type(result).__name__ for result in results) == ["OutputClaimedError", "RunRecord"]
    predict(config_of(photos, output, model))
    assert verify(str(output)).rows == len(rows_of(output)) in (24, 48)


def test_a_plan_needs_no_claim(photos: Path, tmp_path: Path, model: str) -> None:
    output = tmp_path / "out"
    with storage.claimed(str(output), "predict"):
        assert plan_summary(config_of(photos, output, model)).to_label == 24


@pytest.mark.parametrize("what", ["gone", "of another run", "unreadable"])
def test_a_worker_whose_claim_is_lost_publishes_nothing(photos: Path, tmp_path: Path, model: str, what: str) -> None:
    output = tmp_path / "out"
    with (
        storage.claimed(str(output), "predict") as claim,
        open_plan([str(photos)], str(output), "x", retry_errors=False) as plan,
        Worker(job_of(output, model, claim), 1) as worker,
    ):
        results = worker.run(plan.slices())
        match what:
            case "gone":
                Path(claim.url).unlink()
            case "of another run":
                storage.publish_json(claim.url, storage.read_json(claim.url) | {"owner": "another"})
            case "unreadable":
                Path(claim.url).write_bytes(b"\x00")
        with pytest.raises(ClaimLostError, match="must hold the claim of its --output to its end"):
            next(results)
    assert list(output.glob("part-*")) == []


def test_a_run_whose_claim_is_lost_writes_no_record(
    photos: Path, tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    close = inference.books.Ledger.close

    def close_and_lose(self: Any, *args: Any, **kwargs: Any) -> RunRecord:
        (claim,) = output.glob(".catdog-claim-*")
        claim.rename(output / ".catdog-claim-9.json")
        return close(self, *args, **kwargs)

    monkeypatch.setattr(inference.books.Ledger, "close", close_and_lose)
    with pytest.raises(ClaimLostError, match="was taken over"):
        predict(config_of(photos, output, model))
    assert list(output.glob("_runs/*.json")) == []


# What a worker sees.


def test_a_worker_that_does_not_see_the_output_is_one_error(tmp_path: Path, model: str) -> None:
    with storage.claimed(str(tmp_path / "out"), "predict") as claim:
        job = job_of(tmp_path / "out", model, claim)
        elsewhere = dataclasses.replace(job, claim_url=str(tmp_path / "elsewhere" / Path(claim.url).name))
        with pytest.raises(StorageError, match=r"every node must see the same --output\. Received: .*elsewhere.* on "):
            Worker(elsewhere, 1)
        storage.publish_json(elsewhere.claim_url, {"owner": "an earlier run of that node"})
        with pytest.raises(StorageError, match="every node must see the same --output"):
            Worker(elsewhere, 1)


def test_a_worker_that_does_not_see_the_images_is_one_error(photos: Path, tmp_path: Path, model: str) -> None:
    with storage.claimed(str(tmp_path / "out"), "predict") as claim:
        with open_plan([str(photos)], str(tmp_path / "out"), "x", retry_errors=False) as plan:
            (root,) = plan.listed.roots
        assert root == Root(path=str(photos), witnesses=(f"{photos}/000.jpg", f"{photos}/letter.jpg"))
        shutil.rmtree(photos)
        photos.mkdir()  # as a mount point is there without its mount
        with pytest.raises(
            StorageError,
            match=r"every node must see the same --images\. Received: .*/000\.jpg and .*letter\.jpg missing",
        ):
            Worker(job_of(tmp_path / "out", model, claim, roots=(root,)), 1)


@pytest.mark.parametrize("kind", ["directory", "glob", "archive", "manifest"])
def test_images_that_vanish_with_their_place_are_no_rows(photos: Path, tmp_path: Path, model: str, kind: str) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    images, place = str(photos), photos
    match kind:
        case "glob":
            images = f"{photos}/*.jpg"
        case "archive":
            images = shutil.make_archive(str(tmp_path / "all"), "zip", photos)
            place = Path(images)
        case "manifest":
            images = str(tmp_path / "all.parquet")
            pq.write_table(pa.table({"uri": [str(path) for path in sorted(photos.glob("*.jpg"))]}), images)
    output = tmp_path / "out"
    with (
        storage.claimed(str(output), "predict") as claim,
        open_plan([images], str(output), "x", retry_errors=False) as plan,
        Worker(job_of(output, model, claim, roots=plan.listed.roots), 1) as worker,
    ):
        place.rename(tmp_path / "unmounted")
        if kind != "archive":
            place.mkdir()
        with pytest.raises(StorageError, match=r"must stay where they are during a run\. Received: .* is gone"):
            list(worker.run(plan.slices()))
    assert list(output.glob("part-*")) == []


def test_one_file_that_vanishes_is_a_row(photos: Path, tmp_path: Path, model: str) -> None:
    output = tmp_path / "out"
    with (
        storage.claimed(str(output), "predict") as claim,
        open_plan([str(photos)], str(output), "x", retry_errors=False) as plan,
        Worker(job_of(output, model, claim, roots=plan.listed.roots), 1) as worker,
    ):
        (photos / "007.jpg").unlink()
        results = list(worker.run(plan.slices()))
    assert sum(result.errors.get("not_found", 0) for result in results) == 2
    assert sum(sum(result.labels.values()) for result in results) == 19


NODE = """
import sys
from pathlib import Path
from catdog.errors import CatdogError
from catdog.inference.work import Job, Worker
job = Job(**eval(sys.argv[1], {"Root": __import__("catdog.inference.sources").inference.sources.Root}))
try:
    Worker(job, 1)
except CatdogError as error:
    print(error)
"""


def test_a_node_without_the_mount_is_one_error(photos: Path, tmp_path: Path, model: str) -> None:
    """A process in a mount namespace of its own, in which something else lies over the images."""
    unshare = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    try:
        subprocess.run([*unshare, f"mount -t tmpfs none {photos}"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs namespaces of users and mounts")
    output = tmp_path / "out"
    with (
        storage.claimed(str(output), "predict") as claim,
        open_plan([str(photos)], str(output), "x", retry_errors=False) as plan,
    ):
        job = job_of(output, model, claim, roots=plan.listed.roots)
        fields = repr({field.name: getattr(job, field.name) for field in dataclasses.fields(job)})
        for hidden, message in ((photos, "same --images"), (output, "same --output")):
            command = [
                *unshare,
                f'mount -t tmpfs none {hidden} && exec "$0" -c "$1" "$2"',
                sys.executable,
                NODE,
                fields,
            ]
            said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            assert message in said
            assert str(hidden) in said
