"""Figures and pages: the course of a training, a confusion matrix, a reliability diagram, sheets of photographs, a
search, a run of `predict`, and what differs between two outputs.

The figures are the bytes of a PNG, the pages those of an HTML file; the same bytes for the same input. Each figure is
an object of its own: nothing here uses `pyplot`, whose state the whole process shares.

A name is imported when it is asked for: the figures need Matplotlib, and the pages of labelling need nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from catdog.report.confusion_matrix import confusion
    from catdog.report.differences import ComparisonPage, comparison_page
    from catdog.report.grids import GridItem, Section, Tile, predictions_grid, sheet
    from catdog.report.morning import RunPage, run_page
    from catdog.report.reliability_diagram import reliability
    from catdog.report.search import SearchPage, TrialRow, search_page
    from catdog.report.training_curves import curves

__all__ = [
    "ComparisonPage",
    "GridItem",
    "RunPage",
    "SearchPage",
    "Section",
    "Tile",
    "TrialRow",
    "comparison_page",
    "confusion",
    "curves",
    "predictions_grid",
    "reliability",
    "run_page",
    "search_page",
    "sheet",
]

_MODULES: Final = {
    "confusion_matrix": ("confusion",),
    "differences": ("ComparisonPage", "comparison_page"),
    "grids": ("GridItem", "Section", "Tile", "predictions_grid", "sheet"),
    "reliability_diagram": ("reliability",),
    "morning": ("RunPage", "run_page"),
    "search": ("SearchPage", "TrialRow", "search_page"),
    "training_curves": ("curves",),
}
"""Module → the names that this package has from it."""


def __getattr__(name: str) -> Any:
    for module, names in _MODULES.items():
        if name in names:
            found: Any = getattr(importlib.import_module(f"catdog.report.{module}"), name)
            return found
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
