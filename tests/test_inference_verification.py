"""`catdog verify`: whatever is changed in an output or in its records is named, and nothing else is."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from inference_case import encoded_drawings

from catdog import cli
from catdog.config import PredictConfig
from catdog.inference import predict, recount

pytestmark = pytest.mark.slow

NUM_DRAWINGS = 40


class Output:
    """An output of two runs, and what may be done to it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def parts(self) -> list[Path]:
        return sorted(self.path.glob("part-*.parquet"))

    def part_with(self, holds: Callable[[dict[str, Any]], bool]) -> tuple[Path, list[dict[str, Any]], int]:
        """The first part that has such a row: its path, its rows, and which one it is."""
        for path in self.parts():
            rows = pq.read_table(path).to_pylist()
            for index, row in enumerate(rows):
                if holds(row):
                    return path, rows, index
        raise LookupError("no such row")

    def rewrite(self, path: Path, rows: list[dict[str, Any]]) -> None:
        pq.write_table(pa.Table.from_pylist(rows, schema=pq.read_schema(path)), path)

    def change(self, holds: Callable[[dict[str, Any]], bool], **changes: Any) -> None:
        path, rows, index = self.part_with(holds)
        rows[index].update(changes)
        self.rewrite(path, rows)

    def record(self, number: int = 0) -> Path:
        return sorted(self.path.glob("_runs/*.json"))[number]

    def say(self, **changes: Any) -> None:
        """Put other values into the first record."""
        path = self.record()
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the model that comes with catdog: it calls some drawings cats and some dogs, and is unsure of others."""
    directory = tmp_path_factory.mktemp("verified")
    images, output = directory / "images", directory / "predictions"
    images.mkdir()
    drawings = encoded_drawings(NUM_DRAWINGS)
    for number, picture in enumerate(drawings):
        (images / f"{number}.jpg").write_bytes(picture)
    for name in ("letter.jpg", "note.jpg"):
        (images / name).write_text("Dear cat,")
    config = PredictConfig(images=str(images), output=str(output), executor="inline")
    predict(config)
    (images / "note.jpg").write_bytes(drawings[0])
    (images / "new.jpg").write_bytes(drawings[1])
    predict(config)
    predict(PredictConfig(**{**vars(config), "retry_errors": True}))
    return output


@pytest.fixture
def output(made: Path, tmp_path: Path) -> Output:
    return Output(Path(shutil.copytree(made, tmp_path / "predictions")))


def is_ok(row: dict[str, Any]) -> bool:
    return bool(row["status"] == "ok")


def is_cat(row: dict[str, Any]) -> bool:
    return bool(row["label"] == "cat")


def is_error(row: dict[str, Any]) -> bool:
    return not is_ok(row)


def delete_label(output: Output) -> None:
    path, rows, index = output.part_with(is_ok)
    del rows[index]
    output.rewrite(path, rows)


def delete_error(output: Output) -> None:
    path, rows, index = output.part_with(is_error)
    del rows[index]
    output.rewrite(path, rows)


def double_row(output: Output) -> None:
    path, rows, index = output.part_with(is_ok)
    output.rewrite(path, [*rows, rows[index]])


def double_row_elsewhere(output: Output) -> None:
    path, _, index = output.part_with(is_error)
    pq.write_table(pq.read_table(path).slice(index, 1), output.path / "part-twice.parquet")


def flip_label(output: Output) -> None:
    _, rows, index = output.part_with(is_cat)
    row = rows[index]
    output.change(is_cat, label="dog", prob_dog=1 - row["prob_dog"])


def flip_label_alone(output: Output) -> None:
    output.change(lambda row: is_cat(row) and row["confidence"] > 0.51, label="dog")


def nudge_probability(output: Output) -> None:
    _, rows, index = output.part_with(lambda row: is_cat(row) and 0.51 < row["confidence"] < 0.999)
    prob_dog = rows[index]["prob_dog"] - 2e-6
    output.change(lambda row: row["uri"] == rows[index]["uri"], prob_dog=prob_dog, confidence=1 - prob_dog)


def other_image(output: Output) -> None:
    output.change(is_ok, image_id="0" * 64)


def other_uri(output: Output) -> None:
    output.change(is_ok, uri="/elsewhere/1.jpg")


def clear_review(output: Output) -> None:
    output.change(lambda row: bool(row["needs_review"]), needs_review=False, review_reason=None)


def other_error(output: Output) -> None:
    output.change(is_error, error_code="truncated")


def lose_part(output: Output) -> None:
    output.parts()[0].unlink()


def lose_record(output: Output) -> None:
    output.record().unlink()


def break_record(output: Output) -> None:
    output.record().write_text("[1]")


DAMAGE: list[tuple[Callable[[Output], None], list[str]]] = [
    (delete_label, ["the labels of a run must be those of its record"]),
    (delete_error, ["an error must stay until a later run replaces it"]),
    (double_row, ["must have at most one row", "the labels of a run must be those of its record"]),
    (double_row_elsewhere, ["must have at most one row", "a run must not have more errors"]),
    (flip_label, ["the labels of a run must be those of its record"]),
    (flip_label_alone, ["a row must be a label or an error", "the labels of a run must be those of its record"]),
    (nudge_probability, ["the labels of a run must be those that it wrote"]),
    (other_image, ["the labels of a run must be those that it wrote"]),
    (other_uri, ["the labels of a run must be those that it wrote"]),
    (clear_review, ["the rows that need review must be those of the record"]),
    (other_error, ["the errors of a run must be those of its record"]),
    (lambda output: output.say(needs_review=0), ["the rows that need review must be those of the record"]),
    (lambda output: output.say(labels={"cat": 1, "dog": 2}), ["the labels of a run must be those of its record"]),
    (lambda output: output.say(errors={"truncated": 9}), ["the books must count the errors", "the errors of a run"]),
    (lambda output: output.say(skipped={"not_an_image": 1}), ["the books must count what was skipped"]),
    (lambda output: output.say(checksum="0" * 16), ["the labels of a run must be those that it wrote"]),
    (lambda output: output.say(parts=["part-none.parquet"]), ["every part that a run wrote must be there"]),
    (break_record, ["a run record must be whole"]),
]


def test_nothing_is_wrong_with_what_predict_wrote(output: Output) -> None:
    found = recount(str(output.path))
    assert found.differences == []
    assert (found.ok, found.error, found.runs) == (NUM_DRAWINGS + 2, 2, 3)


@pytest.mark.parametrize(("damage", "expected"), DAMAGE)
def test_every_damage_is_named(
    damage: Callable[[Output], None], expected: list[str], output: Output, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(output)
    assert cli.main(["verify", str(output.path)]) == 1
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  difference: ")]
    assert len(lines) >= len(expected)
    for text in expected:
        assert any(text in line for line in lines), (text, lines)


def test_a_lost_part_is_named_with_what_it_held(output: Output) -> None:
    lose_part(output)
    differences = recount(str(output.path)).differences
    assert any("every part that a run wrote must be there" in text for text in differences)
    assert len(differences) > 1


def test_a_lost_record_is_rows_without_one(output: Output) -> None:
    lose_record(output)
    found = recount(str(output.path))
    assert found.differences == []
    assert found.rows_without_record > 0


def test_a_record_of_an_older_catdog_is_no_difference(output: Output) -> None:
    new = ("confidence_edges", "confidence", "review_reasons", "expected_accuracy", "drift", "replaced", "checksum")
    for path in output.path.glob("_runs/*.json"):
        record = json.loads(path.read_text())
        path.write_text(json.dumps({key: value for key, value in record.items() if key not in new}))
    assert recount(str(output.path)).differences == []
