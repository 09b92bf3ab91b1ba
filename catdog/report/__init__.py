"""Figures: the course of a training, a confusion matrix, a reliability diagram, sheets of photographs, and a search.

Every function returns the bytes of a PNG, and `search_page` those of an HTML file; the same bytes for the same input.
Each figure is an object of its own: nothing here uses `pyplot`, whose state the whole process shares.
"""

from catdog.report.confusion_matrix import confusion
from catdog.report.grids import GridItem, Section, Tile, predictions_grid, sheet
from catdog.report.reliability_diagram import reliability
from catdog.report.search_page import SearchPage, TrialRow, search_page
from catdog.report.training_curves import curves

__all__ = [
    "GridItem",
    "SearchPage",
    "Section",
    "Tile",
    "TrialRow",
    "confusion",
    "curves",
    "predictions_grid",
    "reliability",
    "search_page",
    "sheet",
]
