"""Figures: the course of a training, a confusion matrix, a reliability diagram, and sheets of photographs.

Every function returns the bytes of a PNG, and the same bytes for the same input. Each figure is an object of its own:
nothing here uses `pyplot`, whose state the whole process shares.
"""

from catdog.report.confusion_matrix import confusion
from catdog.report.grids import GridItem, Section, Tile, predictions_grid, sheet
from catdog.report.reliability_diagram import reliability
from catdog.report.training_curves import curves

__all__ = ["GridItem", "Section", "Tile", "confusion", "curves", "predictions_grid", "reliability", "sheet"]
