"""`catdog compare`: two outputs, and two models in one, whose differences are known."""

import html
import io
import json
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from catdog import cli, schema
from catdog.config import CompareConfig
from catdog.errors import UsageError
from catdog.inference.comparison import Comparison, compare
from catdog.inference.publish import publish_part

MODEL, OTHER = "a" * 64, "b" * 64
EVIL = "<script>alert(1)</script>"


def row(name: str, prob_dog: float | None, *, day: int = 1, model_id: str = MODEL, **changes: Any) -> dict[str, Any]:
    """A row of a photograph; an error where there is no probability."""
    is_ok = prob_dog is not None
    sure = None if prob_dog is None else max(prob_dog, 1 - prob_dog)
    found: dict[str, Any] = dict.fromkeys(schema.PREDICTIONS_SCHEMA.names)
    return (
        found
        | {
            "uri": name,
            "image_id": f"id of {name}",
            "source_version": "1",
            "label": None if prob_dog is None else schema.CLASS_NAMES[prob_dog >= 0.5],
            "prob_dog": prob_dog,
            "confidence": sure,
            "needs_review": None if sure is None else sure < 0.7,
            "status": "ok" if is_ok else "error",
            "error_code": None if is_ok else "truncated",
            "error_message": None if is_ok else f"cut {EVIL}",
            "num_bytes": 100,
            "model_id": model_id,
            "run_id": f"run {day}",
            "predicted_at": datetime(2026, 11, 1, tzinfo=UTC) + timedelta(days=day),
        }
        | changes
    )


def write(output: Path, rows: Sequence[dict[str, Any]], part: str = "part-1.parquet") -> str:
    publish_part(str(output), part, schema.table_of(rows, schema.PREDICTIONS_SCHEMA))
    return str(output)


@pytest.fixture
def outputs(tmp_path: Path) -> tuple[str, str]:
    picture = io.BytesIO()
    Image.new("RGB", (40, 30), "orange").save(picture, "JPEG")
    (tmp_path / "flip.jpg").write_bytes(picture.getvalue())
    flip = str(tmp_path / "flip.jpg")
    before = [
        row(flip, 0.125),
        row("same.jpg", 0.25),
        row("shift.jpg", 0.625),
        row("breaks.jpg", 0.75),
        row("mends.jpg", None),
        row("stays.jpg", None),
        row("only-before.jpg", 0.5),
    ]
    after = [
        row(flip, 0.875, day=2),
        row("same.jpg", 0.25, day=2),
        row("shift.jpg", 0.9375, day=2, image_id="other bytes"),
        row("breaks.jpg", None, day=2),
        row("mends.jpg", 0.0, day=2),
        row("stays.jpg", None, day=2),
        row(EVIL, 0.5, day=2),
    ]
    # An earlier row of an image that changed, and a part of its own.
    write(tmp_path / "after", [row("same.jpg", 0.75, source_version="0")], "part-0.parquet")
    return write(tmp_path / "before", before), write(tmp_path / "after", after)


def run(before: str, after: str | None = None, **changes: Any) -> Comparison:
    return compare(CompareConfig(before=before, after=after, **changes))


def test_every_difference_is_counted(outputs: tuple[str, str]) -> None:
    found = run(*outputs)
    assert found.both == 6
    assert found.flows == {
        "absent": {"dog": 1},
        "cat": {"cat": 1, "dog": 1},
        "dog": {"absent": 1, "dog": 1, "error": 1},
        "error": {"cat": 1, "error": 1},
    }
    assert (found.flips, found.new_errors, found.mended) == (1, 1, 1)
    assert (found.same_probability, found.shifted, found.content_changed) == (1, 2, 1)
    assert (found.only_before, found.only_after) == (1, 1)
    assert (found.review_added, found.review_dropped) == (0, 1)
    assert found.shift_quantiles["100 %"] == 0.75
    assert found.mean_confidence_shift == pytest.approx((0 + 0.3125 + 0) / 3, abs=1e-5)
    assert [each.uri for each in found.examples["only_after"]] == [EVIL]
    (flip,) = found.examples["flips"]
    assert (flip.before, flip.after, flip.prob_dog_before, flip.prob_dog_after) == ("cat", "dog", 0.125, 0.875)


def test_an_output_does_not_differ_from_itself(outputs: tuple[str, str], tmp_path: Path) -> None:
    copied = write(tmp_path / "copy", [row("same.jpg", 0.25), row("x.jpg", None)])
    again = write(tmp_path / "again", [row("same.jpg", 0.25), row("x.jpg", None)])
    found = run(copied, again)
    assert (found.both, found.flips, found.shifted, found.new_errors, found.only_before) == (2, 0, 0, 0, 0)
    assert found.shift_quantiles["100 %"] == 0


def test_two_models_in_one_output(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [row("1.jpg", 0.25), row("2.jpg", 0.75), row("1.jpg", 0.75, model_id=OTHER, day=3)]
    output = write(tmp_path / "out", rows)
    found = run(output)
    assert (found.model_before, found.model_after) == (MODEL, OTHER)
    assert (found.flips, found.only_before) == (1, 1)
    turned = run(output, model_after="aaa")
    assert (turned.model_before, turned.model_after, turned.only_after) == (OTHER, MODEL, 1)
    with pytest.raises(UsageError, match=r"^--model-after must be the beginning of one of .* Received: .*=c$"):
        run(output, model_after="c")
    single = write(tmp_path / "single", [row("1.jpg", 0.25)])
    assert cli.main(["compare", single]) == 2
    assert "AFTER must name a second output" in capsys.readouterr().err


def test_images_that_moved_are_found_by_their_bytes(tmp_path: Path) -> None:
    before = write(tmp_path / "before", [row("old/1.jpg", 0.25, image_id="one"), row("gone.jpg", None, image_id=None)])
    after = write(tmp_path / "after", [row("new/1.jpg", 0.25, image_id="one")])
    assert run(before, after).both == 0
    found = run(before, after, by="image_id")
    assert (found.both, found.same_probability, found.only_before) == (1, 1, 0)


def test_the_page_shows_the_differences(outputs: tuple[str, str], tmp_path: Path) -> None:
    page = tmp_path / "compare.html"
    found = run(*outputs, output=str(page))
    assert found.page == str(page)
    text = page.read_text()
    assert text.count("data:image/jpeg") == 1  # of the pictures, only the one that flipped is there
    assert "could not be read again" in text
    assert "cat 87.5 % → dog 87.5 %" in text.replace("\N{NO-BREAK SPACE}", " ")
    assert html.escape(EVIL) in text
    assert "<script" not in text


def test_the_command_prints_a_summary_or_a_record(outputs: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["compare", *outputs]) == 0
    out = capsys.readouterr().out
    assert "  flips    1: 1 cat → dog (16.67 % of both)" in out
    assert "  error    breaks.jpg: truncated" in out
    assert cli.main(["compare", *outputs, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["flips"] == 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"before": " "}, "BEFORE must be a path or a URL"),
        ({"before": "a", "after": ""}, "AFTER must be a path or a URL"),
        ({"before": "a", "output": "page"}, "--output must be a file whose name ends with .html"),
    ],
)
def test_bad_usage_is_one_clear_error(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        CompareConfig(**fields)


def test_an_output_without_predictions_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"^OUTPUT must hold predictions\. Received: .*, which holds none$"):
        run(str(tmp_path / "nothing"))
