"""What people bring to `predict`: cameras' folders, archives of every kind, quiet nights; and the books of it."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
from inference_case import photographs, rows_of
from storage_case import make_zip

from catdog.config import PredictConfig
from catdog.errors import UsageError
from catdog.inference import plan_summary, predict, recount, verify
from catdog.inference.books import Books, RunRecord

pytestmark = pytest.mark.slow

NUM_PHOTOS = 12


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder of photographs only."""
    folder = photographs(tmp_path / "photos", NUM_PHOTOS)
    for path in folder.iterdir():
        if not path.stem.isdecimal():
            path.unlink()
    return folder


def run(images: Path | str | tuple[str, ...], output: Path, model: str, **changes: Any) -> RunRecord:
    where = images if isinstance(images, tuple) else str(images)
    return predict(PredictConfig(images=where, output=str(output), model=model, executor="inline", **changes))


def test_a_cameras_folder_is_a_healthy_night(photos: Path, tmp_path: Path, model: str) -> None:
    for name, data in {"Thumbs.db": b"\xd0\xcf", "000.xmp": b"<x>", "1.MP4": b"\0\0\0\x18ftypmp42"}.items():
        (photos / name).write_bytes(data)
    record = run(photos, tmp_path / "out", model, max_failed_fraction=0.0)
    assert record.books == Books(listed=15, ok=12, error=0, already_done=0, duplicate=0, skipped=3)
    assert record.skipped == {"not_an_image": 3}
    assert not record.failed_fraction_exceeded
    assert "  books    15 listed = 12 ok + 0 error + 0 already done + 0 duplicate + 3 skipped" in record.summary()
    assert len(rows_of(tmp_path / "out")) == 12
    again = run(photos, tmp_path / "out", model)
    assert again.books == Books(listed=15, ok=0, error=0, already_done=12, duplicate=0, skipped=3)
    assert verify(str(tmp_path / "out")).runs == 2
    config = PredictConfig(images=str(photos), output=str(tmp_path / "out"), model=model, executor="inline")
    summary = plan_summary(config)
    assert (summary.listed, summary.already_done, summary.skipped) == (15, 12, 3)


def test_verify_compares_the_books_with_what_was_skipped(photos: Path, tmp_path: Path, model: str) -> None:
    (photos / "Thumbs.db").write_bytes(b"x")
    record = run(photos, tmp_path / "out", model)
    path = tmp_path / "out" / "_runs" / f"{record.run_id}.json"
    changed = record.to_dict()
    changed["books"]["skipped"] += 1
    path.write_text(json.dumps(changed))
    first, second = recount(str(tmp_path / "out")).differences
    assert "listed must be ok + error + already_done + duplicate + skipped" in first
    assert second.endswith("the books must count what was skipped. Received: 2; the record says 1")


def test_a_file_that_is_named_outright_is_a_row(tmp_path: Path, photos: Path, model: str) -> None:
    (tmp_path / "notes.xmp").write_text("no image")
    record = run((str(tmp_path / "notes.xmp"), str(photos / "000.jpg")), tmp_path / "out", model)
    assert record.books == Books(listed=2, ok=1, error=1, already_done=0, duplicate=0)
    assert record.errors == {"unsupported_format": 1}


@pytest.mark.parametrize(
    ("num_bad", "num_good", "changes", "fails"),
    [
        (1, 2, {}, False),
        (4, 0, {}, False),
        (5, 0, {}, True),
        (5, 10, {}, True),
        (1, 2, {"min_failures": 1}, True),
        (1, 2, {"max_failed_fraction": 0.0}, True),
        (5, 10, {"max_failed_fraction": 0.5}, False),
    ],
)
def test_how_many_images_may_fail(
    photos: Path, tmp_path: Path, model: str, num_bad: int, num_good: int, changes: dict[str, Any], fails: bool
) -> None:
    for number, path in enumerate(sorted(photos.iterdir())):
        if number >= num_good:
            path.unlink()
    for number in range(num_bad):
        (photos / f"bad-{number}.jpg").write_bytes(b"no image")
    record = run(photos, tmp_path / "out", model, **changes)
    assert record.books.error == num_bad
    assert record.failed_fraction_exceeded == fails
    assert (record.complaint() is None) != fails


def test_include_and_exclude(photos: Path, tmp_path: Path, model: str) -> None:
    output = tmp_path / "out"
    assert run(photos, output, model, include=("00[1-3].{jpg,png}",), exclude=("002.*",)).books.listed == 2
    assert run(photos, output, model).books.already_done == 2
    with pytest.raises(UsageError, match=r"must leave some files to label. Received: none of the 12 files"):
        run(photos, output, model, include=("*.gif",))
    assert run(photos, output, model, include=("*.gif",), allow_empty=True).books.listed == 0


def test_a_quiet_night(tmp_path: Path, photos: Path, model: str) -> None:
    (tmp_path / "new").mkdir()
    with pytest.raises(UsageError, match="--images must hold at least one file"):
        run(tmp_path / "new", tmp_path / "out", model)
    with pytest.raises(UsageError, match="--images must exist"):
        run(tmp_path / "nwe", tmp_path / "out", model, allow_empty=True)
    record = run(tmp_path / "new", tmp_path / "out", model, allow_empty=True)
    assert record.books == Books(listed=0, ok=0, error=0, already_done=0, duplicate=0)
    assert record.summary()[0] == "Nothing to label: no image was found."
    assert verify(str(tmp_path / "out")).runs == 1
    (tmp_path / "new" / "Thumbs.db").write_bytes(b"x")
    with pytest.raises(
        UsageError, match=r"^--images must hold at least one image, unless --allow-empty .*: 1 files, n"
    ):
        run(tmp_path / "new", tmp_path / "out", model)
    assert run(tmp_path / "new", tmp_path / "out", model, allow_empty=True).books.skipped == 1


def tar_of(folder: Path, mode: str) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:  # type: ignore[call-overload]
        for path in sorted(folder.iterdir(), reverse=True):
            archive.add(path, path.name)
    return buffer.getvalue()


def test_the_same_photographs_in_every_kind_of_archive(photos: Path, tmp_path: Path, model: str) -> None:
    plain = rows_by_name(run(photos, tmp_path / "plain", model), tmp_path / "plain")
    files = {path.name: path.read_bytes() for path in photos.iterdir()}
    archives = tmp_path / "archives"
    archives.mkdir()
    (archives / "a.zip").write_bytes(make_zip({"train.zip": make_zip(files)}, 8))
    (archives / "b.tar").write_bytes(tar_of(photos, "w"))
    (archives / "c.tar.gz").write_bytes(tar_of(photos, "w:gz"))
    (archives / "broken.tar").write_bytes(tar_of(photos, "w")[:5000])
    (archives / "notes.txt").write_text("x")
    record = run(archives, tmp_path / "out", model)
    cut = record.books.ok - 3 * NUM_PHOTOS
    assert record.books == Books(
        listed=3 * NUM_PHOTOS + cut + record.books.error + 1,
        ok=3 * NUM_PHOTOS + cut,
        error=record.books.error,
        already_done=0,
        duplicate=0,
        skipped=1,
    )
    assert record.books.error >= 1
    rows = rows_of(tmp_path / "out").to_pylist()
    for row in rows:
        if row["status"] == "ok":
            name = row["uri"].partition("::")[0].partition("://")[2]
            assert (row["image_id"], row["prob_dog"]) == plain[name]
    (broken,) = [row for row in rows if row["uri"] == str(archives / "broken.tar")]
    assert broken["error_code"] == "decode_failed"
    assert "A .tar must be a readable archive" in broken["error_message"]
    again = run(archives, tmp_path / "out", model)
    assert again.books.already_done == record.books.ok + record.books.error
    verify(str(tmp_path / "out"))


def rows_by_name(record: RunRecord, output: Path) -> dict[str, tuple[str, float]]:
    assert record.books.ok == NUM_PHOTOS
    return {Path(row["uri"]).name: (row["image_id"], row["prob_dog"]) for row in rows_of(output).to_pylist()}
