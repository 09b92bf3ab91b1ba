"""What all figures have in common: colours, titles, and the PNG in which they end."""

import io
from typing import Final

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

INK: Final = "#1f2933"
QUIET: Final = "#7b8794"
FAINT: Final = "#e4e7eb"
GREY: Final = "#9aa5b1"
BLUE: Final = "#1565a7"


def new_figure(width_inches: float, height_inches: float) -> Figure:
    """An empty figure of 150 pixels per inch, laid out so that no text is cut off or overlaps another."""
    layout = ConstrainedLayoutEngine(w_pad=0.14, h_pad=0.14)
    return Figure(figsize=(width_inches, height_inches), dpi=150, layout=layout, facecolor="white")


def set_titles(axes: Axes, title: str, key_figure: str = "") -> None:
    """Write a title above the left end of the axes, and the number to remember above the right end."""
    axes.set_title(title, loc="left", color=INK, fontsize=12, fontweight="bold", pad=12)
    axes.set_title(key_figure, loc="right", color=BLUE, fontsize=11, pad=12)


def png(figure: Figure) -> bytes:
    """The figure as an encoded PNG."""
    buffer = io.BytesIO()
    # Matplotlib would write its name and version into the file, and a new version would change the bytes.
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
