"""What a later run of `predict` does with what earlier runs left, and what `verify` says of an output."""

import json
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from inference_case import answers, encoded_drawings, rows_of

from catdog import cli, storage
from catdog.config import PredictConfig
from catdog.errors import BooksError, ImageError, OutputRefusedError, StorageError
from catdog.inference import RunRecord, predict, recount, verify
from catdog.inference.books import Books
from catdog.storage import Listing, SourceFile

pytestmark = pytest.mark.slow


def run(images: Path | str, output: Path, model: str, **changes: Any) -> RunRecord:
    return predict(PredictConfig(images=str(images), output=str(output), model=model, executor="inline", **changes))


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    directory = tmp_path / "photos"
    directory.mkdir()
    for number, picture in enumerate(encoded_drawings(6)):
        (directory / f"{number}.jpg").write_bytes(picture)
    return directory


def manifest(path: Path, uris: Iterable[Path | str]) -> Path:
    pq.write_table(pa.table({"uri": [str(uri) for uri in uris]}), path)
    return path


class Web:
    """A storage that has no versions, in the place of `list_images` and `read_sources`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, contents: dict[str, bytes | ImageError]) -> None:
        self.version = ""
        self.contents = {f"https://example.org/{name}": content for name, content in contents.items()}
        monkeypatch.setattr(storage, "list_images", self.list_images)
        monkeypatch.setattr(storage, "read_sources", self.read_sources)

    def list_images(self, url: str, **_: object) -> Listing:
        listing = Listing()
        listing.begin(SourceFile(uri, self.version, 0) for uri in self.contents)
        return listing

    def read_sources(
        self, uris: Collection[str], *_: object, own: Collection[str] | None = None
    ) -> Iterable[bytes | ImageError]:
        return iter([self.contents[uri] for uri in uris])


# Facts of a moment.


def test_what_was_missing_is_labelled_once_it_is_there_again(photos: Path, tmp_path: Path, model: str) -> None:
    output, away = tmp_path / "out", tmp_path / "away.jpg"
    (photos / "2.jpg").rename(away)
    (photos / "2.jpg").symlink_to(away)
    listed = manifest(tmp_path / "all.parquet", sorted(photos.iterdir()))
    away.rename(tmp_path / "hidden.jpg")
    assert run(listed, output, model).errors == {"not_found": 1}
    before = rows_of(output)
    again = run(listed, output, model)
    assert again.books == Books(listed=6, ok=0, error=0, already_done=6, duplicate=0)
    assert not again.failed_fraction_exceeded
    assert rows_of(output).equals(before)
    (tmp_path / "hidden.jpg").rename(away)
    assert run(listed, output, model).books.ok == 1
    assert verify(str(output)).differences == []


@pytest.mark.parametrize("code", ["permission_denied", "unreachable"])
def test_what_was_denied_is_labelled_in_its_part_in_the_next_run(
    tmp_path: Path, model: str, code: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = encoded_drawings(2)
    web = Web(monkeypatch, {"1.jpg": one, "2.jpg": ImageError(code, "not now")})
    first = run("https://example.org", tmp_path / "out", model)
    assert first.errors == {code: 1}
    assert run("https://example.org", tmp_path / "out", model).books.already_done == 2
    web.contents["https://example.org/2.jpg"] = two
    record = run("https://example.org", tmp_path / "out", model)
    assert (record.books.ok, record.books.already_done, record.parts) == (1, 1, first.parts)
    assert [row["status"] for row in answers(tmp_path / "out")] == ["ok", "ok"]
    assert verify(str(tmp_path / "out")).rows == 2


def test_what_is_denied_again_keeps_its_row_when_another_image_of_its_part_is_not(
    tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = encoded_drawings(2)
    denied = ImageError("permission_denied", "not now")
    web = Web(monkeypatch, {"1.jpg": one, "2.jpg": denied, "3.jpg": denied})
    monkeypatch.setattr(web, "version", "v1")
    first = run("https://example.org", tmp_path / "out", model)
    web.contents["https://example.org/2.jpg"] = two
    second = run("https://example.org", tmp_path / "out", model)
    assert (second.books.ok, second.books.already_done, second.replaced) == (1, 2, {first.run_id: 1})
    assert [row["status"] for row in answers(tmp_path / "out")] == ["ok", "ok", "error"]
    assert verify(str(tmp_path / "out")).rows == 3


@pytest.mark.parametrize("code", ["not_found", "permission_denied"])
def test_a_storage_that_gives_nothing_ends_the_run_early(
    tmp_path: Path, model: str, code: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    web = Web(monkeypatch, {f"{number}.jpg": ImageError(code, "closed") for number in range(1200)})
    with pytest.raises(StorageError, match=rf"must give some of the images .* Received: \d+ {code} of the first \d+"):
        run("https://example.org", tmp_path / "out", model)
    assert not list((tmp_path / "out").glob("_runs/*"))
    (picture,) = encoded_drawings(1)
    web.contents = dict.fromkeys(web.contents, picture)
    assert run("https://example.org", tmp_path / "out", model, batch_size=512).books.ok == 1200
    assert verify(str(tmp_path / "out")).rows == 1200


# Images without a version.


def test_an_image_without_a_version_is_compared_by_its_bytes(
    tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two, three = encoded_drawings(3)
    web = Web(monkeypatch, {"1.jpg": one, "2.jpg": two, "bad.jpg": b"Dear cat,"})
    output = tmp_path / "out"
    assert run("https://example.org", output, model).books == Books(
        listed=3, ok=2, error=1, already_done=0, duplicate=0
    )
    first = rows_of(output).to_pylist()
    for row in first:
        assert row["source_version"] == "sha256-" + row["image_id"][:32]
    again = run("https://example.org", output, model)
    assert (again.books.already_done, again.parts) == (3, [])
    web.contents["https://example.org/2.jpg"] = three
    changed = run("https://example.org", output, model)
    assert (changed.books.ok, changed.books.already_done) == (1, 2)
    web.contents["https://example.org/2.jpg"] = two  # as it was at first
    assert run("https://example.org", output, model).books.already_done == 3
    rows = rows_of(output).to_pylist()
    assert len(rows) == 4
    assert all(row in rows for row in first)
    assert run("https://example.org", output, model, retry_errors=True).books.error == 1
    assert verify(str(output)).rows == 4


# An archive that has a name twice, and an address where nobody listens.


def test_two_members_of_one_name_are_two_rows(tmp_path: Path, model: str) -> None:
    one, two, three = encoded_drawings(3)
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as opened, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zipfile warns of a name that it writes twice
        for name, picture in (("cat.jpg", one), ("dog.jpg", two), ("cat.jpg", three)):
            opened.writestr(name, picture)
    output = tmp_path / "out"
    record = run(tmp_path / "all.zip", output, model)
    assert record.books == Books(listed=3, ok=3, error=0, already_done=0, duplicate=0)
    rows = rows_of(output).to_pylist()
    assert Counter(row["uri"] for row in rows) == {
        f"zip://cat.jpg::{tmp_path}/all.zip": 2,
        f"zip://dog.jpg::{tmp_path}/all.zip": 1,
    }
    assert len({row["source_version"] for row in rows}) == 3
    assert len({row["image_id"] for row in rows}) == 3
    separate = tmp_path / "separate"
    separate.mkdir()
    for number, picture in enumerate((one, two, three)):
        (separate / f"{number}.jpg").write_bytes(picture)
    run(separate, tmp_path / "one-by-one", model)
    expected = {row["image_id"]: row["prob_dog"] for row in rows_of(tmp_path / "one-by-one").to_pylist()}
    assert {row["image_id"]: row["prob_dog"] for row in rows} == expected
    again = run(tmp_path / "all.zip", output, model)
    assert (again.books.already_done, again.parts) == (3, [])
    assert verify(str(output)).rows == 3


def test_images_on_a_dead_host_are_rows(photos: Path, tmp_path: Path, model: str, capsys: Any) -> None:
    dead = [f"http://127.0.0.1:1/{number}.jpg" for number in range(2)]
    listed = manifest(tmp_path / "all.parquet", [*sorted(photos.glob("*.jpg")), *dead])
    for allowed, exit_code in (("0.5", 0), ("0.1", 3)):
        output = tmp_path / f"out-{exit_code}"
        line = ["predict", "--images", str(listed), "--output", str(output), "--model", model, "--executor", "inline"]
        assert cli.main([*line, "--min-failures", "2", "--max-failed-fraction", allowed]) == exit_code
        out, err = capsys.readouterr()
        assert "  errors   2 unreachable" in out
        assert "8 listed = 6 ok + 2 error + 0 already done + 0 duplicate" in out
        assert ("--max-failed-fraction allows 0.1" in err) == (exit_code == 3)
        failed = {row["uri"]: row["error_code"] for row in rows_of(output).to_pylist() if row["status"] == "error"}
        assert failed == dict.fromkeys(dead, "unreachable")
        assert verify(str(output)).rows == 8


# Verifying.


@pytest.fixture
def output(photos: Path, tmp_path: Path, model: str) -> Path:
    run(photos, tmp_path / "out", model)
    (photos / "letter.jpg").write_text("Dear cat,")
    run(photos, tmp_path / "out", model)
    return tmp_path / "out"


def rewrite(part: Path, change: Callable[[list[dict[str, Any]]], object]) -> None:
    table = pq.read_table(part)
    rows = table.to_pylist()
    change(rows)
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), part)


def part_of(output: Path, num_rows: int) -> Path:
    (part,) = (path for path in output.glob("part-*") if pq.read_metadata(path).num_rows == num_rows)
    return part


def test_verify_prints_what_it_counts(output: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (output / "notes.txt").write_text("mine")
    assert cli.main(["verify", str(output)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"Verified {output}: 7 rows = 6 ok + 1 error.",
        "  2 parts, 1 model, 2 runs",
        "  unrelated, not judged: notes.txt",
    ]
    assert cli.main(["verify", str(output), "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert (record["rows"], record["differences"], record["unrelated"]) == (7, [], ["notes.txt"])


def test_verify_names_every_difference(photos: Path, output: Path, capsys: pytest.CaptureFixture[str]) -> None:
    big, small = part_of(output, 6), part_of(output, 1)
    rewrite(big, lambda rows: [rows[0].update(label=None), rows[1].update(run_id="of-a-stopped-run"), rows.pop()])
    pq.write_table(pq.read_table(big).slice(2, 1), output / "part-twice.parquet")
    (output / "part-cut.parquet").write_bytes(small.read_bytes()[:-10])
    (output / "_runs" / "broken.json").write_text("{")
    first, second = sorted(output.glob("_runs/2*.json"))
    second.write_text(second.read_text().replace('"listed": 7', '"listed": 8'))
    small.unlink()

    assert cli.main(["verify", str(output), "--json"]) == 1
    out, err = capsys.readouterr()
    differences = json.loads(out)["differences"]
    assert err.splitlines()[-1].startswith("error: the files of an output must agree with its run records. Received: ")
    for expected in (
        "part-cut.parquet, which holds none",
        "in part-twice.parquet" if big.name > "part-twice" else f"in {big.name}, part-twice.parquet",
        f"the row of {photos}/0.jpg in {big.name} is neither, or both",
        "broken.json: a run record must be whole",
        f"{second.name}: listed must be ok + error + already_done + duplicate",
        f"{second.name}: every part that a run wrote must be there. Received: {small.name} is missing",
        f"{first.name}: the labels of a run must be those of its record. Received: 5 ok, ",
    ):
        assert sum(expected in text for text in differences) == 1, expected
    assert len(differences) == 7
    assert recount(str(output)).rows_without_record == 1
    with pytest.raises(BooksError, match=r"broken\.json.*"):
        verify(str(output))


@pytest.mark.parametrize("what", ["missing", "empty", "foreign"])
def test_verify_needs_predictions(tmp_path: Path, capsys: pytest.CaptureFixture[str], what: str) -> None:
    place = tmp_path / what
    if what != "missing":
        place.mkdir()
    if what == "foreign":
        (place / "thesis.txt").write_text("mine")
    assert cli.main(["verify", str(place)]) == 2
    message = f"error: OUTPUT must hold predictions. Received: {place}, which holds none\n"
    assert capsys.readouterr().err == message
    with pytest.raises(OutputRefusedError):
        recount(str(place))


def test_a_retried_error_is_no_difference(output: Path, photos: Path, model: str) -> None:
    run(photos, output, model, retry_errors=True)
    assert recount(str(output)).differences == []
