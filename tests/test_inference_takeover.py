"""Plans that are published before their work, and what a run takes over from one that died."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import fsspec
import pyarrow.parquet as pq
import pytest
from inference_case import answers, encoded_drawings, job_of, rows_of
from s3_server import S3Server

from catdog import cli, storage
from catdog.config import PredictConfig
from catdog.errors import StorageError
from catdog.inference import RunRecord, executors, predict, publish, verify
from catdog.inference.books import Books
from catdog.inference.draining import Drain
from catdog.inference.plan import INDEX_NAME, Plan, Slice, index, open_plan, planner
from catdog.inference.work import Worker
from catdog.labelling import Labeller
from catdog.schema import PLAN_SCHEMA

pytest_plugins = ["s3_server"]

pytestmark = pytest.mark.slow

SIZE = 4
"""Images in a slice here."""


class Killed(BaseException):
    """In the place of a SIGKILL: nothing is closed after it."""


@pytest.fixture(autouse=True)
def small_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planner, "SLICE_SIZE", SIZE)
    monkeypatch.setattr(index, "MIN_PARTS", 1)


@pytest.fixture(params=["local", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty place, on this disk and in a bucket."""
    if request.param == "local":
        return str(tmp_path)
    server: S3Server = request.getfixturevalue("s3")
    return server.new_bucket()


def fill(root: str, first: int, last: int) -> str:
    for number, picture in list(enumerate(encoded_drawings(last)))[first:]:
        storage.publish_bytes(f"{root}/photos/{number:03}.jpg", picture)
    return f"{root}/photos"


def run(root: str, model: str, **changes: Any) -> RunRecord:
    output = changes.pop("output", f"{root}/out")
    return predict(
        PredictConfig(
            images=f"{root}/photos", output=output, model=model, executor="inline", batch_size=SIZE, **changes
        )
    )


def plans_in(output: str) -> list[str]:
    return [name for name in storage.list_names(f"{output}/_runs") if ".plan-" in name]


def die_after(monkeypatch: pytest.MonkeyPatch, num_slices: int) -> None:
    """Let the next run die when so many slices are done, as if it were killed: it closes nothing."""
    original = Plan.slices

    def slices(self: Plan, *args: Any) -> Iterator[Slice]:
        parts: list[str] = []
        for piece in original(self, *args):
            if len(parts) == num_slices:
                while not all(storage.exists(f"{self.output}/{part}") for part in parts):
                    pass
                raise Killed
            parts.append(piece.part)
            yield piece

    monkeypatch.setattr(Plan, "slices", slices)
    monkeypatch.setattr(Plan, "close", lambda self, **_: self.stop())


def killed_run(root: str, model: str, num_slices: int, **changes: Any) -> None:
    with pytest.MonkeyPatch.context() as patch:
        die_after(patch, num_slices)
        with pytest.raises(Killed):
            run(root, model, **changes)


def labels(output: str) -> list[tuple[Any, ...]]:
    """What an output says of each image."""
    rows: list[tuple[Any, ...]] = []
    for name in storage.list_names(output, ".parquet"):
        for row in storage.read_parquet(f"{output}/{name}").to_pylist():
            rows.append(tuple(row[column] for column in ("uri", "source_version", "image_id", "label", "prob_dog")))
    return sorted(rows)


# A plan is published before its work, and closed after it.


def test_a_plan_is_there_before_the_first_part_and_gone_after_the_record(
    tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(str(tmp_path), 0, 10)
    output = f"{tmp_path}/out"
    found: list[Any] = []

    def look(*args: Any, original: Callable[..., Any] = executors.run, **kwargs: Any) -> Iterator[Any]:
        found.extend(storage.read_parquet(f"{output}/_runs/{name}") for name in plans_in(output))
        assert not list(Path(output).glob("part-*"))
        yield from original(*args, **kwargs)

    monkeypatch.setattr(executors, "run", look)
    record = run(str(tmp_path), model)
    (planned,) = found
    assert planned.schema.names == PLAN_SCHEMA.names
    assert planned.schema.metadata == PLAN_SCHEMA.metadata
    assert [Path(uri).name for uri in planned["uri"].to_pylist()] == [f"{number:03}.jpg" for number in range(10)]
    assert planned["position"].to_pylist() == [0, 1, 2, 3, 0, 1, 2, 3, 0, 1]
    assert sorted(set(planned["part"].to_pylist())) == record.parts
    assert plans_in(output) == []
    assert record.complete
    monkeypatch.undo()
    assert run(str(tmp_path), model).books.already_done == 10
    assert plans_in(output) == []


def test_a_dry_run_publishes_nothing(tmp_path: Path, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    images = fill(str(tmp_path), 0, 6)
    line = ["predict", "--images", images, "--output", f"{tmp_path}/out", "--model", model, "--dry-run"]
    assert cli.main(line) == 0
    assert json.loads(capsys.readouterr().out)["plan"]["num_slices"] == 2
    assert not (tmp_path / "out").exists()
    killed_run(str(tmp_path), model, 1)
    before = sorted(path for path in (tmp_path / "out").rglob("*"))
    assert cli.main(line) == 0
    plan = json.loads(capsys.readouterr().out)["plan"]
    assert (plan["listed"], plan["already_done"], plan["to_label"]) == (6, 4, 2)
    assert sorted(path for path in (tmp_path / "out").rglob("*")) == before


# Taking over.


def test_what_a_dead_run_left_is_done_as_it_had_planned_and_new_files_are_planned_beside(
    root: str, model: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    fill(root, 0, 14)
    killed_run(root, model, 2)
    (name,) = plans_in(f"{root}/out")
    planned = storage.read_parquet(f"{root}/out/_runs/{name}")
    storage.delete(f"{root}/photos/013.jpg")  # it was in the plan
    fill(root, 14, 20)
    record = run(root, model)
    assert set(planned["part"].to_pylist()) <= set(storage.list_names(f"{root}/out"))
    assert record.books == Books(listed=20, ok=11, error=1, already_done=8, duplicate=0)
    assert record.plans == [name.partition(".plan-")[0]]
    assert plans_in(f"{root}/out") == []
    said = f"6 planned images of runs that died ({record.plans[0]}) come first, whatever --images is now."
    assert caplog.text.count(said) == 1
    verify(f"{root}/out")
    caplog.clear()
    again = run(root, model)
    assert "come first" not in caplog.text
    assert (again.books.already_done, again.books.labelled) == (19, 0)


def test_a_worker_that_outlives_its_driver_makes_no_second_row(root: str, model: str) -> None:
    """It publishes a slice after another run has planned and listed new files, and before that run comes to it."""
    images, output = fill(root, 0, 10), f"{root}/out"
    killed_run(root, model, 1)
    planned = storage.read_parquet(f"{output}/_runs/{plans_in(output)[0]}")
    fill(root, 10, 13)
    with (
        storage.claimed(output, "predict") as claim,
        open_plan([images], output, planned["model_id"][0].as_py(), run_id="new") as plan,
    ):
        job = job_of(output, model, claim, run_id="new", own=plan.listed.own)
        slices = list(plan.slices())
        left = [piece for piece in slices if piece.part in planned["part"].to_pylist()]
        assert left
        with Worker(job_of(output, model, claim, run_id="dead", own=plan.listed.own), 1) as survivor:
            list(survivor.run(left[-1:]))
        with Worker(job, 1) as worker:
            results = {result.part: result for result in worker.run(slices)}
    late = results[left[-1].part]
    assert (late.already_done, late.is_published, late.errors) == (len(left[-1].files), False, {})
    assert len(labels(output)) == 13
    run(root, model)
    verify(output)
    undisturbed = run(root, model, output=f"{root}/undisturbed")
    assert undisturbed.books.ok == 13
    assert labels(output) == labels(f"{root}/undisturbed")


def test_an_answer_that_was_lost_does_not_lose_the_rows(
    tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store did what it was asked, and the request was tried again: then the part is there already."""
    fill(str(tmp_path), 0, 6)

    def create(url: str, table: Any, original: Callable[..., bool] = storage.create_parquet) -> bool:
        assert original(url, table)
        return original(url, table)

    monkeypatch.setattr(storage, "create_parquet", create)
    record = run(str(tmp_path), model)
    assert (record.books.ok, len(record.parts)) == (6, 2)
    verify(f"{tmp_path}/out")


def test_a_plan_of_another_model_is_left_alone(tmp_path: Path, model: str) -> None:
    from inference_case import save_model

    other = save_model(str(tmp_path / "other"), seed=1)
    fill(str(tmp_path), 0, 6)
    killed_run(str(tmp_path), model, 1)
    (name,) = plans_in(f"{tmp_path}/out")
    assert run(str(tmp_path), other).books.ok == 6
    assert plans_in(f"{tmp_path}/out") == [name]
    assert run(str(tmp_path), model).plans == [name.partition(".plan-")[0]]
    assert len(rows_of(tmp_path / "out")) == 12
    assert plans_in(f"{tmp_path}/out") == []


def test_a_damaged_plan_is_planned_anew(tmp_path: Path, model: str, caplog: pytest.LogCaptureFixture) -> None:
    fill(str(tmp_path), 0, 10)
    killed_run(str(tmp_path), model, 1)
    (name,) = plans_in(f"{tmp_path}/out")
    Path(tmp_path, "out", "_runs", name).write_bytes(b"PAR1 no more")
    record = run(str(tmp_path), model)
    assert record.books.listed == 10
    assert [each.message for each in caplog.records if "cannot be read; its images are planned anew" in each.message]
    assert verify(f"{tmp_path}/out").rows == 10


def test_an_error_in_this_process_closes_the_plan(tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(str(tmp_path), 0, 6)

    def failing(*args: Any, **kwargs: Any) -> NoReturn:
        raise StorageError("the storage must be there. Received: nothing")

    monkeypatch.setattr(executors, "run", failing)
    with pytest.raises(StorageError):
        run(str(tmp_path), model)
    assert not list((tmp_path / "out").rglob("*.parquet"))


# The index.


def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The parts that plans read from now on."""
    found: list[str] = []

    def read_parts(output: str, parts: list[str], *args: Any, original: Any = publish.read_parts, **kwargs: Any) -> Any:
        found.extend(parts)
        return original(output, parts, *args, **kwargs)

    monkeypatch.setattr(index, "read_parts", read_parts)
    return found


def test_a_part_is_read_once_and_again_only_when_it_was_replaced(
    root: str, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(root, 0, 10)
    storage.publish_bytes(f"{root}/photos/bad.jpg", b"\xff\xd8\xff")
    first = run(root, model)
    assert (len(first.parts), first.books.error) == (3, 1)
    read = opened(monkeypatch)
    run(root, model)
    assert sorted(read) == first.parts
    assert len(storage.list_names(f"{root}/out/{INDEX_NAME}")) == 1
    read.clear()
    run(root, model)
    assert read == []
    retried = run(root, model, retry_errors=True)
    assert (retried.books.error, read) == (1, [])
    assert run(root, model).books.already_done == 11
    assert read == retried.parts
    read.clear()
    assert run(root, model).books.already_done == 11
    assert read == []


@pytest.mark.parametrize("harm", ["lost", "damaged", "emptied"])
def test_an_index_that_is_gone_or_damaged_loses_nothing(
    tmp_path: Path, model: str, harm: str, caplog: pytest.LogCaptureFixture
) -> None:
    fill(str(tmp_path), 0, 10)
    run(str(tmp_path), model)
    run(str(tmp_path), model)
    (path,) = (tmp_path / "out" / INDEX_NAME).iterdir()
    match harm:
        case "lost":
            path.unlink()
        case "damaged":
            data = bytearray(path.read_bytes())
            data[len(data) // 3] ^= 1
            path.write_bytes(data)
        case "emptied":
            path.write_bytes(b"")
    assert run(str(tmp_path), model).books == Books(listed=10, ok=0, error=0, already_done=10, duplicate=0)
    warned = [each.message for each in caplog.records if "index is damaged" in each.message]
    assert len(warned) == (0 if harm == "lost" else 1)
    (again,) = (tmp_path / "out" / INDEX_NAME).iterdir()
    assert again.name == path.name


def test_a_part_that_was_deleted_does_not_count(tmp_path: Path, model: str) -> None:
    fill(str(tmp_path), 0, 8)
    first = run(str(tmp_path), model)
    run(str(tmp_path), model)
    (tmp_path / "out" / first.parts[0]).unlink()
    record = run(str(tmp_path), model)
    assert (record.books.already_done, record.books.ok) == (4, 4)
    assert len(rows_of(tmp_path / "out")) == 8


def test_files_of_the_index_stay_few(tmp_path: Path, model: str) -> None:
    for number in range(1, 12):
        fill(str(tmp_path), number - 1, number)
        run(str(tmp_path), model)
    names = list((tmp_path / "out" / INDEX_NAME).iterdir())
    assert 1 <= len(names) <= 4
    assert sum(pq.read_metadata(path).num_rows for path in names) == 10
    assert run(str(tmp_path), model).books.already_done == 11


# The same bytes with a new version.


def test_a_file_that_was_touched_is_not_labelled_anew_and_read_once(
    root: str, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(root, 0, 6)
    run(root, model)
    before = labels(f"{root}/out")
    if root.startswith("s3:"):  # an upload in parts gives another ETag
        touch_in_s3(f"{root}/photos/002.jpg")
    else:
        os.utime(f"{root}/photos/002.jpg", (1, 1))
    scored: list[int] = []

    def verdicts(self: Labeller, decoded: Any, original: Callable[..., Any] = Labeller._verdicts) -> Any:
        scored.append(len(decoded.pixels_BHWC))
        return original(self, decoded)

    monkeypatch.setattr(Labeller, "_verdicts", verdicts)
    record = run(root, model)
    assert record.books == Books(listed=6, ok=0, error=0, already_done=6, duplicate=0)
    assert scored == [0]
    assert record.parts == []
    assert labels(f"{root}/out") == before
    scored.clear()
    assert run(root, model).books.already_done == 6
    assert scored == []
    storage.publish_bytes(f"{root}/photos/002.jpg", encoded_drawings(9)[8])
    assert run(root, model).books.ok == 1
    assert len(labels(f"{root}/out")) == 7


def touch_in_s3(url: str) -> None:
    """Upload an object again, in one part of several, which gives it another ETag."""
    data = storage.read_bytes(url)
    fs = fsspec.filesystem("s3")
    bucket, _, key = url.partition("://")[2].partition("/")
    begun = fs.call_s3("create_multipart_upload", Bucket=bucket, Key=key)
    part = fs.call_s3("upload_part", Bucket=bucket, Key=key, UploadId=begun["UploadId"], PartNumber=1, Body=data)
    parts = {"Parts": [{"PartNumber": 1, "ETag": part["ETag"]}]}
    fs.call_s3("complete_multipart_upload", Bucket=bucket, Key=key, UploadId=begun["UploadId"], MultipartUpload=parts)


def test_what_was_remembered_goes_with_the_label(tmp_path: Path, model: str) -> None:
    fill(str(tmp_path), 0, 2)
    (part,) = run(str(tmp_path), model).parts
    os.utime(tmp_path / "photos" / "001.jpg", (1, 1))
    assert run(str(tmp_path), model).books.already_done == 2
    (tmp_path / "out" / part).unlink()
    assert run(str(tmp_path), model).books.ok == 2


# Stopping before the end.


def test_max_images_stops_at_the_image_and_the_next_runs_do_the_rest(tmp_path: Path, model: str) -> None:
    fill(str(tmp_path), 0, 13)
    record = run(str(tmp_path), model, max_images=6)
    assert record.books == Books(listed=13, ok=6, error=0, already_done=0, duplicate=0, remaining=7)
    assert not record.complete
    assert "7 listed images are not labelled yet" in record.summary()[-2]
    assert plans_in(f"{tmp_path}/out") == []
    assert run(str(tmp_path), model, max_images=6).books.already_done == 6
    last = run(str(tmp_path), model, max_images=6)
    assert (last.books.ok, last.complete) == (1, True)
    run(str(tmp_path), model, output=f"{tmp_path}/at-once", num_workers=2)
    assert answers(tmp_path / "out") == answers(tmp_path / "at-once")
    assert verify(f"{tmp_path}/out").rows == 13


def test_what_was_taken_over_and_is_left_stays_in_its_plan(tmp_path: Path, model: str) -> None:
    fill(str(tmp_path), 0, 20)
    killed_run(str(tmp_path), model, 1)
    before = plans_in(f"{tmp_path}/out")
    record = run(str(tmp_path), model, max_images=5)
    assert record.books == Books(listed=20, ok=8, error=0, already_done=4, duplicate=0, remaining=8)
    assert plans_in(f"{tmp_path}/out") == before
    rest = run(str(tmp_path), model)
    assert (rest.books.ok, rest.complete, rest.plans) == (8, True, record.plans)
    assert plans_in(f"{tmp_path}/out") == []


def test_a_deadline_that_comes_in_between_stops_the_run(
    tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(str(tmp_path), 0, 60)
    num_asked = 0

    def is_over(self: Drain) -> bool:
        nonlocal num_asked
        num_asked += 1
        self._is_deadline_over = num_asked > 12
        return self._is_deadline_over

    with monkeypatch.context() as patch:
        patch.setattr(Drain, "is_over", is_over)
        record = run(str(tmp_path), model, deadline="00:00")
    assert not record.complete
    assert 0 < record.books.remaining == 60 - record.books.ok < 60
    assert record.books.ok % SIZE == 0
    assert plans_in(f"{tmp_path}/out") == []
    assert run(str(tmp_path), model).books.already_done == record.books.ok
    assert verify(f"{tmp_path}/out").rows == 60
