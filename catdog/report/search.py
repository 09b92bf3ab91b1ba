"""The page of a search for settings: one HTML file that needs no other, in light and dark."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

WIDTH: Final = 1160
"""Of a figure, in the units of its SVG, as the other sizes here."""

_HEIGHT: Final = 380
_TOP: Final = 46
_BOTTOM: Final = 340
_LEFT: Final = 60
_RIGHT: Final = 1100

_NUM_SHADES: Final = 5
"""Colours of the trials, from the best fifth to the worst."""

_CHANCE: Final = math.log(2)
"""Log loss of a model that knows nothing. What is worse is drawn at the edge."""


@dataclass(frozen=True, kw_only=True)
class TrialRow:
    """A trial, as the page shows it."""

    number: int
    status: str
    settings: Mapping[str, float]
    num_epochs: int
    val_log_loss: float | None
    val_accuracy: float | None
    started_s: float
    duration_s: float
    error: str | None

    @property
    def ended_s(self) -> float:
        """Seconds of the search at which the trial ended."""
        return self.started_s + self.duration_s


@dataclass(frozen=True, kw_only=True)
class SearchPage:
    """What the page says."""

    arch: str
    num_epochs: int
    settings: Mapping[str, bool]
    """What is searched, and whether by its logarithm."""

    rows: Sequence[TrialRow]
    best: int | None
    """Number of the best trial."""

    recipe: int | None
    """Number of the trial with the network's own settings."""

    command_line: str


def search_page(page: SearchPage) -> bytes:
    """Draw the trials of a search: as parallel coordinates, the best so far against time, and as a table.

    Returns:
        One HTML file, in UTF-8, that asks for nothing else. The same page always gives the same bytes.
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("catdog.report", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["spelt"] = spelt
    shades = _shades(page.rows)
    by_loss = sorted(page.rows, key=lambda row: (row.val_log_loss is None, row.val_log_loss or 0.0, row.number))
    found = {row.number: row for row in page.rows}
    return (
        environment.get_template("search_page.html.j2")
        .render(
            page=page,
            best=None if page.best is None else found[page.best],
            recipe=None if page.recipe is None else found[page.recipe],
            rows=by_loss,
            has_errors=any(row.error for row in page.rows),
            shades=shades,
            width=WIDTH,
            height=_HEIGHT,
            top=_TOP,
            bottom=_BOTTOM,
            axes=_axes(page),
            lines=_lines(page, shades),
            course=_course(page),
        )
        .encode()
    )


def spelt(value: float | None) -> str:
    """A number in a few digits; a dash where there is none.

    Example:
        >>> [spelt(value) for value in (0.00012, 150.0, None)]
        ['0.00012', '150', '–']
    """
    return "–" if value is None else f"{value:.4g}"


@dataclass(frozen=True, kw_only=True)
class _Scale:
    """From numbers to places along an axis."""

    low: float
    high: float
    log: bool

    def place(self, value: float) -> float:
        """From 0, for the lowest number, to 1."""
        low, high, found = (math.log(each) if self.log else each for each in (self.low, self.high, value))
        return 0.5 if high <= low else min(max((found - low) / (high - low), 0.0), 1.0)


def _scale(values: Sequence[float], *, log: bool = False) -> _Scale:
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    return _Scale(low=low, high=high, log=log and low > 0)


def _losses(rows: Sequence[TrialRow]) -> list[float]:
    """Every validation log loss, those that are worse than chance as if they were chance."""
    return [min(row.val_log_loss, _CHANCE) for row in rows if row.val_log_loss is not None]


def _shades(rows: Sequence[TrialRow]) -> dict[int, int]:
    """Number of a trial → its colour: 0 for the best fifth."""
    ranked = sorted((row.val_log_loss, row.number) for row in rows if row.val_log_loss is not None)
    return {number: rank * _NUM_SHADES // len(ranked) for rank, (_, number) in enumerate(ranked)}


def _scales(page: SearchPage) -> dict[str, _Scale]:
    """Of each axis of the parallel coordinates: the settings, and last the loss."""
    found = {name: _scale([row.settings[name] for row in page.rows], log=log) for name, log in page.settings.items()}
    return found | {"log loss": _scale(_losses(page.rows))}


def _places(page: SearchPage) -> dict[str, float]:
    """Where each axis stands."""
    names = [*page.settings, "log loss"]
    step = (_RIGHT - _LEFT) / max(1, len(names) - 1)
    return {name: round(_LEFT + index * step, 1) for index, name in enumerate(names)}


def _axes(page: SearchPage) -> list[dict[str, Any]]:
    scales, places = _scales(page), _places(page)
    return [
        {
            "x": places[name],
            "name": name.replace("_", " "),
            "low": spelt(scale.low),
            "high": spelt(scale.high),
        }
        for name, scale in scales.items()
    ]


def _height(place: float) -> float:
    return round(_BOTTOM - place * (_BOTTOM - _TOP), 1)


def _lines(page: SearchPage, shades: Mapping[int, int]) -> list[dict[str, Any]]:
    """The lines of the trials, the best ones last, so that they lie on top."""
    scales, places = _scales(page), _places(page)
    lines = []
    for row in sorted(page.rows, key=lambda row: (row.number == page.best, -shades.get(row.number, _NUM_SHADES))):
        points = [(places[name], _height(scales[name].place(value))) for name, value in row.settings.items()]
        if row.val_log_loss is not None:
            points.append((places["log loss"], _height(scales["log loss"].place(row.val_log_loss))))
        lines.append({"number": row.number, "points": " ".join(f"{x},{y}" for x, y in points), "title": _title(row)})
    return lines


def _title(row: TrialRow) -> str:
    """What a trial's mark says when one points at it."""
    result = "failed" if row.val_log_loss is None else f"log loss {row.val_log_loss:.4f}"
    settings = ", ".join(f"{name} {spelt(value)}" for name, value in row.settings.items())
    return f"trial {row.number}, {row.status}: {result}; {settings}"


def _course(page: SearchPage) -> dict[str, Any]:
    """The best so far against time: marks for the trials, the steps of the best, and the ticks of both axes."""
    rows = sorted((row for row in page.rows if row.val_log_loss is not None), key=lambda row: row.ended_s)
    time = _Scale(low=0.0, high=max((row.ended_s for row in rows), default=1.0) or 1.0, log=False)
    loss = _scale(_losses(rows))

    def at(seconds: float, value: float) -> tuple[float, float]:
        return round(_LEFT + time.place(seconds) * (_RIGHT - _LEFT), 1), _height(loss.place(value))

    marks = [
        {"number": row.number, "x": x, "y": y, "whole": row.status == "ok", "title": _title(row)}
        for row in rows
        for x, y in [at(row.ended_s, row.val_log_loss or 0.0)]
    ]
    whole = [row for row in rows if row.status == "ok"] or rows
    bests = list(itertools.accumulate((row.val_log_loss or 0.0 for row in whole), min))
    steps: list[tuple[float, float]] = []
    for row, best in zip(whole, bests, strict=True):
        x, y = at(row.ended_s, best)
        steps += [(x, steps[-1][1] if steps else y), (x, y)]
    if steps:
        steps.append((_RIGHT, steps[-1][1]))
    return {
        "marks": marks,
        "steps": " ".join(f"{x},{y}" for x, y in steps),
        "times": [
            {"x": round(_LEFT + place * (_RIGHT - _LEFT), 1), "text": _duration(place * time.high)} for place in _TICKS
        ],
        "losses": [
            {"y": _height(place), "text": f"{loss.low + place * (loss.high - loss.low):.3f}"} for place in _TICKS
        ],
        "left": _LEFT,
        "right": _RIGHT,
    }


_TICKS: Final = (0.0, 0.25, 0.5, 0.75, 1.0)


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
