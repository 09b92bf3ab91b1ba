"""The morning report: three nights in one output, what their reports say, and that no text in them is HTML."""

import html
import io
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from inference_case import encoded_drawings
from PIL import Image

from catdog import storage
from catdog.config import PredictConfig
from catdog.inference import RunRecord, morning, predict
from catdog.inference.findings import CONFIDENCE_EDGES
from catdog.inference.thumbnails import thumbnails

pytestmark = pytest.mark.slow

EVIL = "<script>alert(1)<&script>.jpg"
NUM_DRAWINGS = 70


def grey(number: int) -> bytes:
    """A picture in which there is nothing to see, unlike all drawings."""
    buffer = io.BytesIO()
    Image.new("RGB", (64, 48), (number, number, number)).save(buffer, "JPEG", comment=b"secret comment")
    return buffer.getvalue()


class Output:
    """An output after some nights."""

    def __init__(self, directory: Path, model: str) -> None:
        self.images, self.output = directory / "images", directory / "predictions"
        self.config = PredictConfig(images=str(self.images), output=str(self.output), model=model, executor="inline")
        self.images.mkdir()
        self.records: list[RunRecord] = []

    def night(self, **changes: Any) -> None:
        self.records.append(predict(PredictConfig(**{**vars(self.config), **changes})))

    def report(self, night: int) -> str:
        return (self.output / "_runs" / f"{self.records[night].run_id}.html").read_text()

    def words(self, night: int) -> str:
        """What a person reads."""
        body = self.report(night).partition("<body>")[2]
        return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", body)).split())


@pytest.fixture(scope="module")
def nights(tmp_path_factory: pytest.TempPathFactory, model: str) -> Iterator[Output]:
    """New files, a broken one and one with an evil name; then a changed file and a mended one; then other pictures."""
    made = Output(tmp_path_factory.mktemp("nights"), model)
    drawings = encoded_drawings(NUM_DRAWINGS + 2)
    for number, picture in enumerate(drawings[:NUM_DRAWINGS]):
        (made.images / f"{number:03}.jpg").write_bytes(picture)
    (made.images / EVIL).write_bytes(drawings[NUM_DRAWINGS])
    (made.images / "broken.jpg").write_bytes(drawings[0][:900])
    (made.images / "letter.jpg").write_text("</code><img src=x onerror=alert(2)>")
    (made.images / "Thumbs.db").write_bytes(b"\xd0\xcf\x11\xe0")
    made.night()
    (made.images / "001.jpg").write_bytes(drawings[NUM_DRAWINGS + 1])
    made.night(retry_errors=True)
    for number in range(80):
        (made.images / f"grey{number}.jpg").write_bytes(grey(3 * number))
    made.night()
    yield made
    shutil.rmtree(made.output)


def test_the_record_holds_what_later_nights_compare_with(nights: Output) -> None:
    first = nights.records[0]
    assert tuple(first.confidence_edges) == CONFIDENCE_EDGES
    assert {name: sum(counts) for name, counts in first.confidence.items()} == first.labels
    saved = json.loads((nights.output / "_runs" / f"{first.run_id}.json").read_text())
    assert saved["confidence"] == first.confidence
    expected = saved["expected_accuracy"]
    low, high = expected["ci95"]
    assert 0.5 <= low < expected["value"] < high <= 1
    assert sum(first.review_reasons.values()) == first.needs_review


def test_the_first_night_has_nothing_to_compare_with(nights: Output) -> None:
    words = nights.words(0)
    assert words.startswith("71 images labelled, ")
    assert "The run is complete, and the books close" in words
    assert "74 listed = 71 ok + 2 error + 0 already done + 0 duplicate + 1 skipped" in words
    assert "Nothing to compare with: it is the first night of this output." in words
    assert "2 images cannot be used as they are." in words
    assert "--retry-errors" in words
    assert "truncated" in words
    assert f"not_an_image 1 {nights.images}/Thumbs.db" in words
    assert nights.records[0].drift == []


def test_the_second_night_has_a_changed_file_and_tries_the_errors_again(nights: Output) -> None:
    assert nights.words(1).startswith("1 image labelled, ")
    assert "74 listed = 1 ok + 2 error + 70 already done + 0 duplicate + 1 skipped" in nights.words(1)
    assert "Too few images to look for drift" in nights.words(1)


def test_the_third_night_finds_the_planted_drift(nights: Output) -> None:
    record = nights.records[2]
    assert record.drift
    assert record.drift[0].endswith(".")
    words = nights.words(2)
    assert "These images are not like those of earlier nights." in words
    assert "it may be too good" in words
    assert all(text in words for text in record.drift)
    assert any(line.startswith("  drift") for line in record.summary())


def test_a_run_that_stops_early_says_what_remains(nights: Output, tmp_path: Path) -> None:
    output = Output(tmp_path, nights.config.model or "")
    for number in range(3):
        (output.images / f"{number}.jpg").write_bytes(grey(number))
    output.night(max_images=1)
    record = output.records[0]
    assert record.books.remaining
    words = output.words(0)
    assert f"The run was stopped before its end: {record.what_remains()}." in words
    assert f"{record.books.remaining} remaining" in words
    assert "Label what remains." in words


def test_what_is_not_listed_any_more_is_missed(nights: Output, tmp_path: Path) -> None:
    """As a camera whose mount is lost: its folder is empty, and the books close without it."""
    output = Output(tmp_path, nights.config.model or "")
    for camera in range(3):
        (output.images / str(camera)).mkdir()
        for number in range(8):
            (output.images / str(camera) / f"{number}.jpg").write_bytes(grey(8 * camera + number))
    output.night()
    for path in (output.images / "2").iterdir():
        path.unlink()
    output.night()
    assert output.records[0].missing == []
    (text,) = output.records[1].missing
    assert text.startswith("Only 16 images listed; the last nights had 24. ")
    words = output.words(1)
    assert text in words
    assert "Find out what is missing" in words
    assert f"  missing  {text}" in output.records[1].summary()


def test_no_text_is_html(nights: Output) -> None:
    report = nights.report(0)
    assert "<script" not in report
    assert "<img src=x" not in report
    assert html.escape(EVIL) in report or "alert(1)" not in report
    assert "onerror" not in re.sub(r"&lt;.*?&gt;", "", report)


def test_a_report_asks_for_nothing_else(nights: Output) -> None:
    for night in range(3):
        report = nights.report(night)
        assert set(re.findall(r"(?:src|href|url)\s*[=(]\s*[\"']?([a-z]*:)", report)) <= {"data:"}
        assert 'http-equiv="Content-Security-Policy" content="default-src \'none\'' in html.unescape(report)


def test_the_photographs_are_few_and_small(nights: Output) -> None:
    pictures = re.findall(r'src="data:image/jpeg;base64,([^"]*)"', nights.report(2))
    assert 0 < len(pictures) <= 24
    assert len(nights.report(2)) < 400_000


def test_a_photograph_that_is_gone_is_left_out(nights: Output) -> None:
    example: Any = {"uri": str(nights.images / "000.jpg"), "source_version": "", "num_bytes": None}
    there, gone, far = thumbnails(
        [example, example | {"uri": "/nowhere/1.jpg"}, example | {"uri": "http://127.0.0.1:9/1.jpg"}], patience_s=1.0
    )
    assert there is not None
    assert max(Image.open(io.BytesIO(there)).size) == 160
    assert gone is far is None


def test_a_thumbnail_keeps_nothing_of_the_file_but_its_pixels(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(grey(7))
    (made,) = thumbnails([{"uri": str(tmp_path / "a.jpg"), "source_version": "", "num_bytes": None}])  # type: ignore[typeddict-item]
    assert made is not None
    assert b"secret" not in made


def test_a_report_that_cannot_be_written_is_a_warning(
    nights: Output, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    publish = storage.publish_bytes

    def refuse(url: str, data: bytes) -> None:
        if url.endswith(".html"):
            raise OSError("no room for https://me:password@host/x")
        publish(url, data)

    monkeypatch.setattr(storage, "publish_bytes", refuse)
    record = predict(nights.config)
    assert record.books.already_done
    assert "The report could not be written: no room for https://***@host/x" in caplog.text


def test_a_damaged_record_of_an_earlier_night_is_passed_over(nights: Output) -> None:
    (nights.output / "_runs" / "19700101T000000.000000Z-00000000.json").write_text("{")
    found = morning.earlier_nights(str(nights.output), nights.records[0].model_id)
    assert [night.run_id for night in found] == [record.run_id for record in reversed(nights.records)]


def test_secrets_of_urls_stand_in_no_report() -> None:
    config = PredictConfig(images="s3://key:secret@bucket/new", output="out dir", min_failures=9)
    assert morning.command_line(config) == (
        "catdog predict --images 's3://***@bucket/new' --output 'out dir' --min-failures 9"
    )
