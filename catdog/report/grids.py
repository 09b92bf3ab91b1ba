"""Sheets of photographs: rows of pictures with captions below them and headings above them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import ImageOps

from catdog import images
from catdog.errors import UsageError
from catdog.report import style

NUM_COLUMNS: Final = 6

_TILE_PX: Final = 220
_GAP_PX: Final = 20
_CAPTION_PX: Final = 50
_HEADER_PX: Final = 46
_MARGIN_PX: Final = 28
_PX_PER_INCH: Final = 100

_RIGHT: Final = "#2b7a3d"
_WRONG: Final = "#c02b2b"
_BESIDE_PICTURE: Final = "#f1f3f5"


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """A photograph on a sheet, with its caption."""

    image: bytes
    """The encoded image. The whole of it is shown, upright."""

    caption: str
    """The line below the picture."""

    note: str = ""
    """A second line, below the caption."""

    mark: str = ""
    """A character in front of the caption. It says what the colour says, to those who cannot tell the colours apart."""

    colour: str | None = None
    """The colour of a frame around the picture, of the mark and of the caption. None draws no frame."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """Tiles that belong together."""

    tiles: Sequence[Tile]
    """The tiles, in reading order."""

    heading: str = ""
    """A line above the tiles."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GridItem:
    """A photograph, its label, and what the model predicts."""

    image: bytes
    """The encoded image."""

    label: str
    """The class that the dataset gives to the photograph."""

    predicted_label: str
    """The class that the model gives to the photograph."""

    confidence: float
    """The model's probability of `predicted_label`."""

    @property
    def is_right(self) -> bool:
        """Whether label and prediction agree."""
        return self.label == self.predicted_label


def predictions_grid(items: Sequence[GridItem], title: str = "") -> bytes:
    """Draw photographs with predicted label and confidence. Mark, colour and caption tell right from wrong.

    Args:
        items: the photographs, in reading order. All of them are shown.
        title: a line above them.

    Raises:
        UsageError: there are no items.
        ImageError: a photograph cannot be decoded.
    """
    if not items:
        raise UsageError("a grid of predictions needs at least one photograph. Received: none")
    tiles = [
        Tile(
            image=item.image,
            caption=f"{item.predicted_label} {item.confidence:.1%}",
            note="" if item.is_right else f"labelled {item.label}",
            mark="✓" if item.is_right else "✗",
            colour=_RIGHT if item.is_right else _WRONG,
        )
        for item in items
    ]
    return sheet([Section(tiles=tiles)], title)


def sheet(sections: Sequence[Section], title: str = "") -> bytes:
    """Draw sections of photographs, one below the other, `NUM_COLUMNS` photographs in a row.

    Args:
        sections: the sections, from top to bottom.
        title: a line above them.

    Raises:
        ImageError: a photograph cannot be decoded.
    """
    figure = Figure(dpi=_PX_PER_INCH, facecolor="white")
    # These axes cover the whole figure, so their coordinates are pixels of the PNG, from the top left corner.
    axes = figure.add_axes((0, 0, 1, 1), frameon=False, xticks=[], yticks=[])
    top = _MARGIN_PX
    if title:
        axes.text(_MARGIN_PX, top, title, va="top", color=style.INK, fontsize=15, fontweight="bold")
        top += _HEADER_PX
    for section in sections:
        if section.heading:
            axes.text(_MARGIN_PX, top, section.heading, va="top", color=style.INK, fontsize=13, fontweight="bold")
            top += _HEADER_PX
        for start in range(0, len(section.tiles), NUM_COLUMNS):
            for column, tile in enumerate(section.tiles[start : start + NUM_COLUMNS]):
                _draw_tile(axes, tile, _MARGIN_PX + column * (_TILE_PX + _GAP_PX), top)
            top += _TILE_PX + _CAPTION_PX + _GAP_PX
    width = 2 * _MARGIN_PX + NUM_COLUMNS * (_TILE_PX + _GAP_PX) - _GAP_PX
    height = top - _GAP_PX + _MARGIN_PX
    figure.set_size_inches(width / _PX_PER_INCH, height / _PX_PER_INCH)
    axes.set(xlim=(0, width), ylim=(height, 0), aspect="auto")
    return style.png(figure)


def _draw_tile(axes: Axes, tile: Tile, left: int, top: int) -> None:
    """Draw the photograph in a square, and its mark, caption and note below."""
    picture = ImageOps.pad(images.open_upright(tile.image), (_TILE_PX, _TILE_PX), color=_BESIDE_PICTURE)
    axes.imshow(np.asarray(picture), extent=(left, left + _TILE_PX, top + _TILE_PX, top), interpolation="nearest")
    if tile.colour:
        axes.add_patch(Rectangle((left, top), _TILE_PX, _TILE_PX, fill=False, edgecolor=tile.colour, linewidth=3))
    line = top + _TILE_PX + 20
    if tile.mark:
        axes.text(left - 2, line, tile.mark, va="center", color=tile.colour, fontsize=18, fontweight="bold")
        left += 24
    weight = "bold" if tile.colour else "normal"
    axes.text(left, line, tile.caption, va="center", color=tile.colour or style.QUIET, fontsize=12.5, fontweight=weight)
    if tile.note:
        axes.text(left, line + 20, tile.note, va="center", color=style.INK, fontsize=11)
