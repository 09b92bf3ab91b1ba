"""How far a run is: the bar on a terminal, lines elsewhere, and slices that take too long."""

import io
import logging
import time

import pytest

from catdog.inference import progress
from catdog.inference.plan import Slice
from catdog.inference.progress import Progress, State, Watch
from catdog.storage import SourceFile

CLEAR = "\r\x1b[2K"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def wait_for(condition: object) -> None:
    deadline = time.monotonic() + 20
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.005)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_BAR_INTERVAL_S", 0.01)


def test_a_bar_is_drawn_on_a_terminal_and_cleared(quick: None) -> None:
    terminal = Terminal()
    with Progress(lambda: (400, True), terminal) as shown:
        shown.add(100, 3)
        wait_for(lambda: "100 of 400 images (25 %)" in terminal.getvalue())
    drawn = terminal.getvalue()
    assert "██████░░░░░░░░░░░░░░░░░░ 100 of 400 images (25 %)" in drawn
    assert "3 errors" in drawn
    assert drawn.endswith(CLEAR)
    assert max(len(line) for line in drawn.split(CLEAR)) < 80
    assert "\n" not in drawn


def test_a_line_of_the_log_does_not_hit_the_bar(quick: None) -> None:
    terminal = Terminal()
    handler = logging.StreamHandler(terminal)
    logging.getLogger().addHandler(handler)
    try:
        with Progress(lambda: (400, True), terminal):
            wait_for(lambda: "of 400" in terminal.getvalue())
            logging.getLogger("catdog").warning("something happened")
        assert f"{CLEAR}something happened\n" in terminal.getvalue()
        assert handler.filters == []
    finally:
        logging.getLogger().removeHandler(handler)


def test_elsewhere_there_are_plain_lines(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(progress, "LOG_INTERVAL_S", 0.0)
    caplog.set_level(logging.INFO, logger="catdog")
    stream = io.StringIO()
    with Progress(lambda: (None, False), stream, details=lambda: "decode 1.0 ms per image") as shown:
        shown.add(7, 0)
        wait_for(lambda: caplog.messages)
    assert stream.getvalue() == ""
    assert caplog.messages[0].startswith("Labelled 7 images, ")
    assert "\x1b" not in caplog.text
    assert "left" not in caplog.text
    assert caplog.messages[0].endswith("no errors; decode 1.0 ms per image")


def test_the_total_may_grow_while_the_listing_goes_on() -> None:
    known = [(1000, False), (2000, True)]
    shown = Progress(lambda: known[0], io.StringIO())
    shown.add(500, 0)
    assert "500 of 1,000 images listed so far" in shown.state().text()
    assert "left" not in shown.state().text()
    known.pop(0)
    assert "500 of 2,000 images (25 %)" in shown.state().text()
    assert "left" in shown.state().text()


@pytest.mark.parametrize("num", [0, 5, 10**9])
def test_more_may_be_done_than_is_known(num: int) -> None:
    state = State(done=10, total=num, is_final=True, errors=0, images_per_s=0.0)
    assert len(state.bar(80)) <= 79
    assert state.fraction <= 1


def test_what_a_worker_of_this_process_has_labelled_shows_before_its_slice_is_done() -> None:
    watch = Watch()
    watch.add(1000)
    shown = Progress(lambda: (400, True), io.StringIO())
    watch.add(64)
    assert shown.state().done == 64
    shown.add(60, 0)
    assert shown.state().done == 64
    shown.add(60, 0)
    assert shown.state().done == 120
    watch.close()


def piece(part: str, num: int = 10) -> Slice:
    files = [SourceFile(f"s3://me:secret@bucket/{part}/{number}.jpg", "1", 1) for number in range(num)]
    return Slice(part=part, files=files, known=[[]] * num)


def test_a_slow_slice_is_named_with_its_first_image(caplog: pytest.LogCaptureFixture) -> None:
    watch = Watch(slow_s=0.02, check_s=0.01)
    watch.begin(piece("a"), lambda: False)
    wait_for(lambda: caplog.messages)
    watch.close()
    assert caplog.messages[0].startswith("A slice of 10 images is being labelled for 0 s now, its first image is s3://")
    assert "secret" not in caplog.text


def test_a_slice_is_named_again_only_when_it_has_taken_twice_as_long() -> None:
    watch = Watch(slow_s=60.0, check_s=1000.0)
    begun = time.monotonic()
    watch.begin(piece("a"), lambda: True)
    watch.begin(piece("b"), lambda: False)
    watch.end("b")
    named = [(took, what) for after in (50, 61, 90, 130, 200) for _, took, what in watch.slow(begun + after)]
    assert [round(took) for took, _ in named] == [61, 130]
    assert {what for _, what in named} == {"is being published"}
    watch.end("a")
    assert list(watch.slow(begun + 1000)) == []
    watch.close()


def test_a_slice_is_not_slow_where_all_are() -> None:
    watch = Watch(slow_s=60.0, check_s=1000.0)
    watch._s_per_image.extend([10.0] * 5)
    begun = time.monotonic()
    watch.begin(piece("a"), lambda: False)
    assert list(watch.slow(begun + 200)) == []
    assert len(list(watch.slow(begun + 400))) == 1
    watch.close()
