"""`predict` in one process: its rows and books, what it labels again and what not, and what a crash leaves."""

import os
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from inference_case import (
    REVIEW_THRESHOLD,
    Relay,
    answers,
    archive,
    kill_after_first_part,
    photographs,
    rows_of,
    save_model,
)
from s3_server import S3Server

from catdog import storage
from catdog.config import PredictConfig
from catdog.errors import BooksError, BundleError, OutputRefusedError, StorageError, UsageError
from catdog.inference import RunRecord, Verification, plan_summary, predict, verify
from catdog.inference.books import Books
from catdog.schema import CLASS_NAMES, ERROR_CODES, PREDICTIONS_SCHEMA

pytest_plugins = ["s3_server"]

pytestmark = pytest.mark.slow

NUM_PHOTOS = 100
NUM_MEMBERS = 4000


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return photographs(tmp_path / "photos", NUM_PHOTOS)


def run(images: Path | str, output: Path | str, model: str, **changes: Any) -> RunRecord:
    return predict(PredictConfig(images=str(images), output=str(output), model=model, executor="inline", **changes))


def test_every_file_is_one_row_and_the_second_run_labels_nothing(photos: Path, tmp_path: Path, model: str) -> None:
    output = tmp_path / "out"
    record = run(photos, output, model)
    assert record.books == Books(listed=104, ok=100, error=4, already_done=0, duplicate=0)
    assert record.errors == {"empty_file": 1, "not_found": 1, "truncated": 1, "unsupported_format": 1}
    assert not record.failed_fraction_exceeded
    assert storage.read_json(str(output / "_runs" / f"{record.run_id}.json")) == record.to_dict()

    rows = rows_of(output)
    assert rows.schema.equals(PREDICTIONS_SCHEMA)
    assert rows["uri"].to_pylist() == sorted(str(path) for path in photos.iterdir())
    assert {"cat": 0, "dog": 0} | Counter(rows["label"].drop_null().to_pylist()) == record.labels
    assert set(rows["run_id"].to_pylist()) == {record.run_id}
    for row in rows.to_pylist():
        if row["status"] == "ok":
            dog = row["prob_dog"]
            assert row["label"] == CLASS_NAMES[dog >= 0.5]
            assert row["confidence"] == pytest.approx(max(dog, 1 - dog), rel=1e-6)
            assert row["needs_review"] == (row["confidence"] < REVIEW_THRESHOLD)
            assert row["review_reason"] == ("unsure" if row["needs_review"] else None)
            assert 150 <= min(row["width"], row["height"]) <= max(row["width"], row["height"]) < 260
            assert row["error_code"] is None
        else:
            nulls = ("label", "prob_dog", "confidence", "needs_review", "review_reason", "width")
            assert [row[name] for name in nulls] == [None] * 6
            assert row["error_code"] in ERROR_CODES
            assert row["error_message"]
    assert len(set(rows["prob_dog"].to_pylist())) > NUM_PHOTOS / 2

    again = run(photos, output, model)
    assert again.books == Books(listed=104, ok=0, error=0, already_done=104, duplicate=0)
    assert again.parts == []
    assert rows_of(output).equals(rows)
    assert verify(str(output)) == Verification(
        output=str(output),
        parts=len(record.parts),
        rows=104,
        ok=100,
        error=4,
        models=1,
        runs=2,
        rows_without_record=0,
        differences=[],
        unrelated=[],
    )


def test_a_changed_file_and_another_model_are_labelled_again_and_nothing_else(
    photos: Path, tmp_path: Path, model: str
) -> None:
    output = tmp_path / "out"
    run(photos, output, model)
    (photos / "letter.jpg").write_bytes((photos / "000.jpg").read_bytes())
    changed = run(photos, output, model)
    assert (changed.books.ok, changed.books.already_done) == (1, 103)

    other = save_model(str(tmp_path / "other"), seed=1)
    assert run(photos, output, other).books.already_done == 0
    assert run(photos, output, model).books.already_done == 104
    summary = verify(str(output))
    assert (summary.rows, summary.models) == (104 + 1 + 104, 2)


def test_errors_are_tried_again_when_asked(photos: Path, tmp_path: Path, model: str) -> None:
    output, flaky = tmp_path / "out", photos / "000.jpg"
    whole, status = flaky.read_bytes(), flaky.stat()

    def write(data: bytes) -> None:
        flaky.write_bytes(data)
        os.utime(flaky, ns=(status.st_atime_ns, status.st_mtime_ns))

    write(bytes(len(whole)))
    first = run(photos, output, model)
    write(whole)
    assert run(photos, output, model).books.already_done == 104
    again = run(photos, output, model, retry_errors=True, min_failures=4)
    assert again.books == Books(listed=104, ok=1, error=4, already_done=99, duplicate=0)
    assert again.failed_fraction_exceeded
    assert sorted(path.name for path in output.glob("part-*")) == first.parts
    assert verify(str(output)).ok == 100


def test_every_odd_file_is_a_row(shared_data: Path, tmp_path: Path, model: str) -> None:
    record = run(shared_data / "odd.zip", tmp_path / "out", model)
    assert record.books.listed == record.books.ok + record.books.error + record.books.skipped == 591
    assert 0 < record.books.skipped < 90  # licences and read-mes, files without a suffix, formats nobody has heard of
    assert record.books.ok > 350
    assert set(record.errors) <= set(ERROR_CODES)
    assert record.failed_fraction_exceeded


@pytest.mark.parametrize("what", ["missing", "empty", "damaged", "foreign", "inside"])
def test_bad_input_is_one_error_and_writes_nothing(photos: Path, tmp_path: Path, model: str, what: str) -> None:
    images, output, used = photos, tmp_path / "out", model
    expected: type[Exception] = UsageError
    match what:
        case "missing":
            images = tmp_path / "no-such-folder"
        case "empty":
            images = tmp_path / "empty"
            images.mkdir()
        case "damaged":
            used, expected = save_model(str(tmp_path / "damaged")), BundleError
            (tmp_path / "damaged" / "model.keras").write_bytes(b"damaged")
        case "foreign":
            output.mkdir()
            (output / "thesis.txt").write_text("mine")
            expected = OutputRefusedError
        case "inside":
            output = photos / "out"
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(expected, match="Received: "):
        run(images, output, used)
    assert sorted(tmp_path.rglob("*")) == before


def test_the_plan_needs_neither_ray_nor_tensorflow(photos: Path, tmp_path: Path, model: str) -> None:
    code = f"""
import sys
from dataclasses import asdict
from catdog.config import PredictConfig
from catdog.inference import plan_summary
print(asdict(plan_summary(PredictConfig(images={str(photos)!r}, output={str(tmp_path / "out")!r}, model={model!r}))))
print([name for name in ("ray", "tensorflow", "keras", "pandas") if name in sys.modules])
"""
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    summary, imported = map(eval, result.stdout.splitlines())
    assert summary["listed"] == summary["to_label"] == 104
    assert summary["executor"] == "inline"
    assert imported == []
    assert not (tmp_path / "out").exists()


def test_auto_takes_ray_where_there_is_a_cluster(
    photos: Path, tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = PredictConfig(images=str(photos), output=str(tmp_path / "out"), model=model)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert plan_summary(config).executor == "inline"
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    assert plan_summary(config).executor == "ray"


def test_killed_in_the_middle_the_same_command_again_labels_the_rest(tmp_path: Path, model: str) -> None:
    images, output = archive(tmp_path / "train.zip", NUM_MEMBERS), tmp_path / "out"
    code = f"""
from catdog.config import PredictConfig
from catdog.inference import predict
predict(PredictConfig(images={str(images)!r}, output={str(output)!r}, model={model!r}, executor="inline"))
"""
    kill_after_first_part(code, output)
    published = len(rows_of(output))
    assert 0 < published < NUM_MEMBERS
    record = run(images, output, model)
    assert record.books == Books(
        listed=NUM_MEMBERS, ok=NUM_MEMBERS - published, error=0, already_done=published, duplicate=0
    )
    assert verify(str(output)).rows == NUM_MEMBERS


@pytest.fixture
def bucket(s3: S3Server) -> str:
    return s3.new_bucket()


def test_an_outage_ends_the_run_and_the_next_one_completes_it(
    s3: S3Server,
    bucket: str,
    photos: Path,
    tmp_path: Path,
    model: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for path in photos.iterdir():
        if path.exists():
            storage.publish_bytes(f"{bucket}/photos/{path.name}", path.read_bytes())
    host, _, port = s3.endpoint.removeprefix("http://").partition(":")
    relay = Relay((host, int(port)))
    own_port = relay.server_address[1]
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{own_port}")
    monkeypatch.setenv("CATDOG_STORAGE_PATIENCE_S", "3")

    def break_in_the_middle() -> None:
        while relay.num_bytes < 400_000:
            pass
        relay.go_down()

    breaking = threading.Thread(target=break_in_the_middle)
    breaking.start()
    with pytest.raises(StorageError, match=bucket):
        run(f"{bucket}/photos", f"{bucket}/out", model, batch_size=8)
    breaking.join()

    relay = Relay((host, int(port)), own_port)
    record = run(f"{bucket}/photos", f"{bucket}/out", model)
    relay.go_down()
    assert (record.books.listed, record.books.error) == (103, 3)
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3.endpoint)
    assert verify(f"{bucket}/out").rows == 103


def test_verify_finds_an_image_that_was_labelled_twice(photos: Path, tmp_path: Path, model: str) -> None:
    output = tmp_path / "out"
    record = run(photos, output, model)
    (part,) = sorted(output.glob("part-*"))[:1]
    pq.write_table(pq.read_table(part).slice(0, 1), output / "part-twice.parquet")
    with pytest.raises(BooksError, match=r"at most one row .* Received: 2 of .* in part-.*, part-"):
        verify(str(output))
    (output / "part-twice.parquet").unlink()
    (output / record.parts[0]).rename(output / ".moved")
    with pytest.raises(BooksError, match=f"{record.parts[0]} is missing"):
        verify(str(output))
    (output / "part-cut.parquet").write_bytes((output / ".moved").read_bytes()[:-10])
    with pytest.raises(BooksError, match=r"part-cut\.parquet, which holds none"):
        verify(str(output))


def test_answers_do_not_depend_on_batches_and_threads(photos: Path, tmp_path: Path, model: str) -> None:
    run(photos, tmp_path / "a", model)
    run(photos, tmp_path / "b", model, batch_size=5, num_workers=3)
    assert answers(tmp_path / "a") == answers(tmp_path / "b")
