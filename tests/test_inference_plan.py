"""The plan of a run: what is listed and not yet done, in slices that stay the same when a file is added."""

from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from catdog.errors import OutputRefusedError, UsageError
from catdog.inference.plan import MAX_SLICE_SIZE, SLICE_SIZE, Slice, open_plan
from catdog.inference.publish import list_parts, publish_part
from catdog.schema import PREDICTIONS_SCHEMA
from catdog.storage import SourceFile

MODEL = "m" * 64


def manifest(path: Path, uris: list[str]) -> str:
    pq.write_table(pa.table({"uri": uris}), path)
    return str(path)


def rows_of(files: list[SourceFile], *, errors: set[str] = frozenset(), model_id: str = MODEL) -> pa.Table:  # type: ignore[assignment]
    return pa.Table.from_pylist(
        [
            {
                "uri": file.uri,
                "source_version": file.version,
                "label": None if file.uri in errors else "cat",
                "status": "error" if file.uri in errors else "ok",
                "model_id": model_id,
                "run_id": "earlier",
                "predicted_at": datetime.now(UTC),
            }
            for file in files
        ],
        schema=PREDICTIONS_SCHEMA,
    )


def slices_of(images: str, output: Path, *, model_id: str = MODEL, retry_errors: bool = False) -> list[Slice]:
    with open_plan(images, str(output), model_id, retry_errors=retry_errors) as plan:
        slices = list(plan.slices())
        assert sum(len(piece.files) for piece in slices) == plan.counts.to_label
        assert slices == list(plan.slices())
        return slices


def uris_of(slices: list[Slice]) -> list[str]:
    return [file.uri for piece in slices for file in piece.files]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    directory = tmp_path / "images"
    directory.mkdir()
    for number in range(8):
        (directory / f"{number}.jpg").write_bytes(b"x" * number)
    return directory


def test_slices_cover_the_listing_once_in_order(tmp_path: Path) -> None:
    uris = [f"/nowhere/{number}.jpg" for number in range(6000)]
    slices = slices_of(manifest(tmp_path / "all.parquet", uris[::-1]), tmp_path / "out")
    assert uris_of(slices) == sorted(uris)
    assert 6000 / MAX_SLICE_SIZE <= len(slices) <= 4 * 6000 / SLICE_SIZE
    assert max(len(piece.files) for piece in slices) <= MAX_SLICE_SIZE
    assert len({piece.part for piece in slices}) == len(slices)


def test_a_new_file_leaves_the_other_slices_as_they_are(tmp_path: Path) -> None:
    uris = [f"/nowhere/{number}.jpg" for number in range(6000)]
    before = {piece.part for piece in slices_of(manifest(tmp_path / "a.parquet", uris), tmp_path / "out")}
    after = {
        piece.part
        for piece in slices_of(manifest(tmp_path / "b.parquet", [*uris, "/nowhere/1x.jpg"]), tmp_path / "out")
    }
    assert 1 <= len(before - after) <= 3  # more than one where a slice is as long as it may be
    assert len(before & after) >= len(before) - 3 >= 5


def test_members_of_one_archive_stay_together(tmp_path: Path) -> None:
    uris = [f"zip://{name}.jpg::/nowhere/{archive}.zip" for name in "cab" for archive in (2, 1)]
    (piece,) = slices_of(manifest(tmp_path / "all.parquet", uris), tmp_path / "out")
    assert [file.uri.rpartition("/")[2] for file in piece.files] == ["1.zip"] * 3 + ["2.zip"] * 3


def test_duplicates_count_and_are_labelled_once(tmp_path: Path, folder: Path) -> None:
    uris = [str(folder / "1.jpg"), str(folder / "2.jpg"), str(folder / "1.jpg"), str(folder / "1.jpg")]
    images = manifest(tmp_path / "all.parquet", uris)
    with open_plan(images, str(tmp_path / "out"), MODEL, retry_errors=False) as plan:
        assert (plan.counts.listed, plan.counts.duplicate, plan.counts.to_label) == (4, 2, 2)
        assert uris_of(list(plan.slices())) == uris[:2]


def test_only_what_is_new_or_changed_or_of_another_model_is_labelled(tmp_path: Path, folder: Path) -> None:
    output = tmp_path / "out"
    (piece,) = slices_of(str(folder), output)
    publish_part(str(output), piece.part, rows_of(piece.files), keep_others=False)
    assert slices_of(str(folder), output) == []
    assert slices_of(str(folder), output, model_id="other")[0].files == piece.files

    (folder / "3.jpg").write_bytes(b"changed")
    (folder / "new.jpg").write_bytes(b"new")
    (folder / "5.jpg").unlink()
    with open_plan(str(folder), str(output), MODEL, retry_errors=False) as plan:
        assert (plan.counts.listed, plan.counts.already_done, plan.counts.to_label) == (8, 6, 2)
        (again,) = plan.slices()
    assert [Path(file.uri).name for file in again.files] == ["3.jpg", "new.jpg"]
    assert again.part != piece.part


def test_retrying_errors_replaces_their_part_in_place(tmp_path: Path, folder: Path) -> None:
    output = tmp_path / "out"
    (piece,) = slices_of(str(folder), output)
    failed = {str(folder / "2.jpg"), str(folder / "4.jpg"), str(folder / "6.jpg")}
    publish_part(str(output), piece.part, rows_of(piece.files, errors=failed), keep_others=False)
    assert slices_of(str(folder), output) == []

    (folder / "6.jpg").write_bytes(b"changed: new work, and its old row stays")
    new, retried = slices_of(str(folder), output, retry_errors=True)
    assert uris_of([new]) == [str(folder / "6.jpg")]
    assert retried.is_retry
    assert retried.part == piece.part
    assert uris_of([retried]) == [str(folder / "2.jpg"), str(folder / "4.jpg")]

    publish_part(str(output), retried.part, rows_of(retried.files), keep_others=True)
    assert list_parts(str(output)) == [piece.part]
    rows = pq.read_table(output / piece.part)
    assert rows.schema.equals(PREDICTIONS_SCHEMA)
    assert rows["uri"].to_pylist() == [file.uri for file in piece.files]
    assert [row["uri"] for row in rows.to_pylist() if row["status"] == "error"] == [str(folder / "6.jpg")]


@pytest.mark.parametrize("name", ["holiday.txt", "part-1.parquet", "part-2.txt"])
def test_an_output_with_something_else_is_refused(tmp_path: Path, folder: Path, name: str) -> None:
    output = tmp_path / "out"
    output.mkdir()
    if name.endswith(".parquet"):
        pq.write_table(pa.table({"a": [1]}), output / name)
    else:
        (output / name).write_text("mine")
    with pytest.raises(OutputRefusedError, match=f"Received: .*{name}"):
        slices_of(str(folder), output)
    assert [path.name for path in output.iterdir()] == [name]


def test_an_output_of_only_hidden_names_is_taken(tmp_path: Path, folder: Path) -> None:
    output = tmp_path / "out"
    (output / "_runs").mkdir(parents=True)
    (output / ".part-1.parquet.tmp").write_bytes(b"left by a killed run")
    assert len(slices_of(str(folder), output)) == 1


def test_an_output_among_the_images_is_refused(folder: Path) -> None:
    with pytest.raises(UsageError, match="--output must not lie inside --images"):
        slices_of(str(folder), folder / "out")
