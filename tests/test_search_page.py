"""The page of a search: one file, which needs no other, and says what each trial came to."""

import re
from html.parser import HTMLParser
from typing import Any

import pytest

from catdog.report import SearchPage, TrialRow, search_page


def row(number: int, status: str = "ok", **changes: Any) -> TrialRow:
    fields: dict[str, Any] = {
        "number": number,
        "status": status,
        "settings": {"learning_rate": 10.0 ** -(number + 1), "image_size": 150},
        "num_epochs": 3,
        "val_log_loss": 0.3 + number / 10,
        "val_accuracy": 0.8,
        "started_s": 10.0 * number,
        "duration_s": 20.0,
        "error": None,
    }
    return TrialRow(**(fields | changes))


ROWS = [
    row(0),
    row(1, "stopped", num_epochs=1),
    row(2, "error", val_log_loss=None, val_accuracy=None, error="<b>the loss & all</b>", num_epochs=0),
    row(3, val_log_loss=17.0),
]


def page(rows: list[TrialRow], **changes: Any) -> str:
    fields: dict[str, Any] = {
        "arch": "cnn",
        "num_epochs": 3,
        "settings": {"learning_rate": True, "image_size": False},
        "rows": rows,
        "best": 0,
        "recipe": 3,
        "command_line": "catdog train --data 'a & b'",
    }
    return search_page(SearchPage(**(fields | changes))).decode()


class Outline(HTMLParser):
    """The elements of a page, and the text in its cells."""

    VOID = ("meta", "line")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.cells: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag == "td":
            self.cells.append("")
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "td":
            self.cells[-1] += data


def test_the_page_shows_every_trial_and_is_one_file() -> None:
    text = page(ROWS)
    outline = Outline(text)
    assert outline.open == []
    lines = [attrs for tag, attrs in outline.elements if tag == "polyline" and "data-trial" in attrs]
    assert {line["data-trial"] for line in lines} == {"0", "1", "2", "3"}
    assert lines[-1]["data-trial"] == "0"  # the best lies on top
    assert [attrs["data-trial"] for tag, attrs in outline.elements if tag == "tr" and attrs] == ["0", "1", "3", "2"]
    assert sum(tag == "circle" for tag, _ in outline.elements) == 3
    assert "<b>the loss & all</b>" in outline.cells
    assert "<b>" not in text
    assert not re.search(r"https?://|src=|@import|url\(", text)
    assert text == page(ROWS)


def test_what_is_worse_than_chance_is_drawn_at_the_edge() -> None:
    outline = Outline(page(ROWS))
    heights = {attrs["data-trial"]: float(attrs["cy"] or 0) for tag, attrs in outline.elements if tag == "circle"}
    assert heights["3"] < heights["1"] < heights["0"]
    assert min(heights.values()) >= 46
    assert max(heights.values()) <= 340


@pytest.mark.parametrize("rows", [[], [ROWS[2]], [ROWS[0]]])
def test_a_search_that_has_just_begun_has_a_page(rows: list[TrialRow]) -> None:
    best = 0 if rows == [ROWS[0]] else None
    text = page(rows, best=best, recipe=None)
    assert ("No trial has come to a result yet" in text) == (best is None)
    assert "nan" not in text
