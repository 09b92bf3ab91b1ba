"""The plan of a run: what is listed and not yet done, in slices of new images."""

import tempfile
from collections.abc import Callable, Collection
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from catdog import storage
from catdog.errors import OutputRefusedError, UsageError
from catdog.inference import publish
from catdog.inference.plan import SLICE_SIZE, Slice, open_plan
from catdog.inference.publish import list_parts, part_name, publish_part
from catdog.inference.verification import recount
from catdog.schema import PREDICTIONS_SCHEMA
from catdog.storage import Listing, SourceFile

MODEL = "m" * 64


def manifest(path: Path, uris: list[str]) -> str:
    pq.write_table(pa.table({"uri": uris}), path)
    return str(path)


def listing_of(*files: SourceFile) -> Callable[..., Listing]:
    """In the place of `list_images`: a listing of these files."""

    def list_images(url: str, **_: object) -> Listing:
        listing = Listing()
        listing.begin(iter(files))
        return listing

    return list_images


def rows_of(
    files: list[SourceFile], *, errors: Collection[str] = (), code: str = "truncated", model_id: str = MODEL
) -> pa.Table:
    return pa.Table.from_pylist(
        [
            {
                "uri": file.uri,
                "source_version": file.version,
                **(
                    {"status": "error", "error_code": code}
                    if file.uri in errors
                    else {"status": "ok", "label": "cat", "prob_dog": 0.1, "confidence": 0.9, "needs_review": False}
                ),
                "model_id": model_id,
                "run_id": "earlier",
                "predicted_at": datetime.now(UTC),
            }
            for file in files
        ],
        schema=PREDICTIONS_SCHEMA,
    )


def slices_of(images: str, output: Path, *, model_id: str = MODEL, retry_errors: bool = False) -> list[Slice]:
    with open_plan([images], str(output), model_id, retry_errors=retry_errors) as plan:
        slices = list(plan.slices())
        assert sum(len(piece.files) for piece in slices) == plan.counts.to_label == plan.num_begun
        assert plan.num_slices == len(slices)
        assert plan.is_listed
        return slices


def uris_of(slices: list[Slice]) -> list[str]:
    return [file.uri for piece in slices for file in piece.files]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Eight images."""
    directory = tmp_path / "images"
    directory.mkdir()
    for number in range(8):
        (directory / f"{number}.jpg").write_bytes(b"x" * number)
    return directory


def test_slices_cover_the_listing_once_in_order(tmp_path: Path) -> None:
    uris = [f"/nowhere/{number}.jpg" for number in range(6000)]
    slices = slices_of(manifest(tmp_path / "all.parquet", uris[::-1]), tmp_path / "out")
    assert uris_of(slices) == sorted(uris)
    assert [len(piece.files) for piece in slices] == [SLICE_SIZE] * (6000 // SLICE_SIZE) + [6000 % SLICE_SIZE]
    assert len({piece.part for piece in slices}) == len(slices)


def test_few_new_images_among_many_make_few_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [SourceFile(f"/nowhere/{number:05}.jpg", "1", 1) for number in range(8000)]
    output = tmp_path / "out"
    monkeypatch.setattr(storage, "list_images", listing_of(*(each for at, each in enumerate(files) if at % 8)))
    for piece in slices_of("/nowhere", output):
        publish_part(str(output), piece.part, rows_of(piece.files))
    monkeypatch.setattr(storage, "list_images", listing_of(*files))
    slices = slices_of("/nowhere", output)
    assert [len(piece.files) for piece in slices] == [SLICE_SIZE, 1000 - SLICE_SIZE]
    assert uris_of(slices) == [file.uri for file in files[::8]]


@pytest.mark.parametrize(("is_large", "most"), [(False, 16), (True, 4)])
def test_few_part_files_are_held_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_large: bool, most: int
) -> None:
    names = [part_name(f"{number:032x}") for number in range(40)]
    for name in names:
        publish_part(str(tmp_path), name, rows_of([SourceFile(f"/nowhere/{name}.jpg", "1", 1)]))
    begun: list[str] = []
    read_part = publish._read_part

    def counted(*args: Any, **options: Any) -> Any:
        begun.append(args[1])
        return read_part(*args, **options)

    monkeypatch.setattr(publish, "_read_part", counted)
    parts = publish.read_parts(str(tmp_path), names, ["uri"], large=names if is_large else ())
    for number, (name, rows) in enumerate(parts):
        assert rows["uri"].to_pylist() == [f"/nowhere/{name}.jpg"]
        assert len(begun) <= number + 1 + most
    assert sorted(begun) == names


def test_members_of_one_archive_stay_together(tmp_path: Path) -> None:
    uris = [f"zip://{name}.jpg::/nowhere/{archive}.zip" for name in "cab" for archive in (2, 1)]
    (piece,) = slices_of(manifest(tmp_path / "all.parquet", uris), tmp_path / "out")
    assert [file.uri.rpartition("/")[2] for file in piece.files] == ["1.zip"] * 3 + ["2.zip"] * 3


def test_duplicates_count_and_are_labelled_once(tmp_path: Path, folder: Path) -> None:
    uris = [str(folder / "1.jpg"), str(folder / "2.jpg"), str(folder / "1.jpg"), str(folder / "1.jpg")]
    images = manifest(tmp_path / "all.parquet", uris)
    with open_plan([images], str(tmp_path / "out"), MODEL, retry_errors=False) as plan:
        assert (plan.counts.listed, plan.counts.duplicate, plan.counts.to_label) == (4, 2, 2)
        assert uris_of(list(plan.slices())) == uris[:2]


def test_only_what_is_new_or_changed_or_of_another_model_is_labelled(tmp_path: Path, folder: Path) -> None:
    output = tmp_path / "out"
    (piece,) = slices_of(str(folder), output)
    publish_part(str(output), piece.part, rows_of(piece.files))
    assert slices_of(str(folder), output) == []
    assert slices_of(str(folder), output, model_id="other")[0].files == piece.files

    (folder / "3.jpg").write_bytes(b"changed")
    (folder / "new.jpg").write_bytes(b"new")
    (folder / "5.jpg").unlink()
    with open_plan([str(folder)], str(output), MODEL, retry_errors=False) as plan:
        assert (plan.counts.listed, plan.counts.already_done, plan.counts.to_label) == (8, 6, 2)
        (again,) = plan.slices()
    assert [Path(file.uri).name for file in again.files] == ["3.jpg", "new.jpg"]
    assert again.part != piece.part


def test_retrying_errors_replaces_their_part_in_place(tmp_path: Path, folder: Path) -> None:
    output = tmp_path / "out"
    (piece,) = slices_of(str(folder), output)
    failed = {str(folder / "2.jpg"), str(folder / "4.jpg"), str(folder / "6.jpg")}
    publish_part(str(output), piece.part, rows_of(piece.files, errors=failed))
    assert slices_of(str(folder), output) == []

    (folder / "6.jpg").write_bytes(b"changed: new work, and its old row stays")
    new, retried = slices_of(str(folder), output, retry_errors=True)
    assert uris_of([new]) == [str(folder / "6.jpg")]
    assert retried.is_retry
    assert retried.part == piece.part
    assert uris_of([retried]) == [str(folder / "2.jpg"), str(folder / "4.jpg")]

    replaced = [(file.uri, file.version) for file in retried.files]
    publish_part(str(output), retried.part, rows_of(retried.files), replaced=replaced)
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


# Temporary directories whose names look like Hive's partitions.


@pytest.mark.parametrize("name", ["uri=x", "status=ok", "model_id=abc", "version=3", "source_version=1", "part=p"])
def test_the_name_of_the_temporary_directory_changes_nothing(
    tmp_path: Path, folder: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    (tmp_path / name).mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / name))
    (piece,) = slices_of(str(folder), output)
    assert [Path(file.uri).name for file in piece.files] == [f"{number}.jpg" for number in range(8)]
    failed = {piece.files[3].uri}
    publish_part(str(output), piece.part, rows_of(piece.files, errors=failed))
    assert slices_of(str(folder), output) == []
    (again,) = slices_of(str(folder), output, retry_errors=True)
    assert again.files == [piece.files[3]]
    assert (recount(str(output)).rows, recount(str(output)).error) == (8, 1)


# Several sources.


def test_several_sources_are_one_plan(tmp_path: Path, folder: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "9.jpg").write_bytes(b"9")
    names = manifest(tmp_path / "some.parquet", [str(folder / "1.jpg"), str(folder / "gone.jpg")])
    sources = [str(folder), str(other), f"{folder}/[0-2].jpg", names]
    with open_plan(sources, str(tmp_path / "out"), MODEL, retry_errors=False) as plan:
        assert (plan.counts.listed, plan.counts.duplicate, plan.counts.to_label) == (8 + 1 + 3 + 2, 3 + 1, 10)
        uris = uris_of(list(plan.slices()))
    assert uris == sorted({*map(str, folder.iterdir()), str(other / "9.jpg"), str(folder / "gone.jpg")})


@pytest.mark.parametrize("bad", ["missing", "empty"])
def test_each_source_must_have_images(tmp_path: Path, folder: Path, bad: str) -> None:
    (tmp_path / "empty").mkdir()
    with (
        pytest.raises(UsageError, match=f"Received: --images={tmp_path}/{bad}"),
        open_plan([str(folder), str(tmp_path / bad)], str(tmp_path / "out"), MODEL, retry_errors=False),
    ):
        pass


# The output among the images.


@pytest.mark.parametrize("spelled", ["directory", "glob", "link", "dots", "manifest"])
def test_an_output_among_the_images_is_refused_however_it_is_spelled(
    tmp_path: Path, folder: Path, spelled: str
) -> None:
    output = folder / "predictions"
    images = str(folder)
    match spelled:
        case "glob":
            images = f"{folder}/**"
        case "link":
            (tmp_path / "link").symlink_to(folder)
            images = str(tmp_path / "link")
        case "dots":
            images = f"{folder}/../{folder.name}"
        case "manifest":
            output.mkdir()
            publish_part(str(output), "part-x.parquet", rows_of([SourceFile("a.jpg", "1", 1)]))
            images = manifest(tmp_path / "all.parquet", [str(folder / "1.jpg"), str(output / "part-x.parquet")])
    with pytest.raises(UsageError, match="--output must not lie inside --images"):
        slices_of(images, output)


# Facts of a moment.


@pytest.mark.parametrize("code", ["not_found", "permission_denied", "unreachable", "truncated"])
def test_facts_of_a_moment_are_tried_again(tmp_path: Path, folder: Path, code: str) -> None:
    output = tmp_path / "out"
    (piece,) = slices_of(str(folder), output)
    publish_part(str(output), piece.part, rows_of(piece.files, errors={piece.files[3].uri}, code=code))
    again = slices_of(str(folder), output)
    if code == "truncated":
        assert again == []
    else:
        assert again == [Slice(part=piece.part, files=[piece.files[3]], known=[[code]], is_retry=True)]
    (asked,) = slices_of(str(folder), output, retry_errors=True)
    assert (asked.files, asked.known) == ([piece.files[3]], [[]])


# Images without a version.

UNSEEN = SourceFile("https://example.org/a.jpg", "", 0)


def versioned(version: str) -> SourceFile:
    return SourceFile(UNSEEN.uri, version, 0)


def test_an_image_without_a_version_is_read_in_every_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "out"
    monkeypatch.setattr(storage, "list_images", listing_of(UNSEEN))
    (first,) = slices_of("https://example.org", output)
    assert (first.files, first.known) == ([UNSEEN], [[]])
    publish_part(str(output), first.part, rows_of([versioned("sha256-aa")]))
    (second,) = slices_of("https://example.org", output)
    assert (second.files, second.known, second.is_retry) == ([UNSEEN], [["sha256-aa"]], False)
    assert slices_of("https://example.org", output) == [second]
    publish_part(str(output), second.part, rows_of([versioned("sha256-bb")]))
    (third,) = slices_of("https://example.org", output)
    assert third.known == [["sha256-aa", "sha256-bb"]]
    assert len({first.part, second.part, third.part}) == 3
    assert slices_of("https://example.org", output, model_id="other")[0].known == [[]]


def test_an_image_without_a_version_that_failed_is_tried_again_in_its_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    monkeypatch.setattr(storage, "list_images", listing_of(UNSEEN))
    (first,) = slices_of("https://example.org", output)
    publish_part(str(output), first.part, rows_of([UNSEEN], errors={UNSEEN.uri}, code="unreachable"))
    (second,) = slices_of("https://example.org", output)
    assert second == Slice(part=first.part, files=[UNSEEN], known=[["unreachable"]], is_retry=True)
    publish_part(str(output), second.part, rows_of([versioned("sha256-aa")]), replaced=[(UNSEEN.uri, "")])
    rows = pq.read_table(output / first.part)
    assert (rows["source_version"].to_pylist(), rows["status"].to_pylist()) == (["sha256-aa"], ["ok"])

    failed = rows_of([versioned("sha256-bb")], errors={UNSEEN.uri}, code="truncated")
    publish_part(str(output), "part-other.parquet", failed)
    (third,) = slices_of("https://example.org", output)
    assert (third.known, third.is_retry) == ([["sha256-aa", "sha256-bb"]], False)
    (asked,) = slices_of("https://example.org", output, retry_errors=True)
    assert asked == Slice(part="part-other.parquet", files=[UNSEEN], known=[["sha256-aa"]], is_retry=True)


# An archive that has a name twice.


def test_two_members_of_one_name_are_two_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "out"
    uri = "zip://cat.jpg::/nowhere/all.zip"
    twins = [SourceFile(uri, "00000001-3", 3), SourceFile(uri, "00000002-3", 3)]
    monkeypatch.setattr(storage, "list_images", listing_of(*twins, twins[0]))
    (piece,) = slices_of("/nowhere/all.zip", output)
    assert piece.files == twins
    with open_plan(["/nowhere/all.zip"], str(output), MODEL, retry_errors=False) as plan:
        assert (plan.counts.listed, plan.counts.duplicate) == (3, 1)
    publish_part(str(output), piece.part, rows_of([twins[1]], errors={uri}))
    rest, retried = slices_of("/nowhere/all.zip", output, retry_errors=True)
    assert (rest.files, retried.files) == ([twins[0]], [twins[1]])
    publish_part(str(output), piece.part, rows_of(twins), replaced=[(uri, twins[1].version)])
    assert pq.read_table(output / piece.part)["source_version"].to_pylist() == [twin.version for twin in twins]


def test_a_file_that_changed_between_two_listings_is_one_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "list_images", listing_of(SourceFile("/a.jpg", "1", 3), SourceFile("/a.jpg", "2", 5)))
    (piece,) = slices_of("/nowhere", tmp_path / "out")
    assert piece.files == [SourceFile("/a.jpg", "2", 5)]
