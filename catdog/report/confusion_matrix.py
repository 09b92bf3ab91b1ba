"""A confusion matrix: how many images of each class the model takes for which class."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from catdog.errors import UsageError
from catdog.report import style


def confusion(matrix: npt.ArrayLike, class_names: Sequence[str]) -> bytes:
    """Draw a confusion matrix. Each cell shows its number of images and their share of the true class.

    Args:
        matrix: numbers of images: a row per true class, a column per predicted class.
        class_names: the names of the classes, in the order of the rows and columns.

    Raises:
        UsageError: the matrix has another shape, or holds no image.
    """
    counts = np.asarray(matrix)
    if counts.shape != (len(class_names), len(class_names)) or not counts.sum():
        raise UsageError(
            f"a confusion matrix must have a row and a column per class, and an image. Received: {counts.tolist()}"
        )
    totals = counts.sum(axis=1)
    shares = counts / np.maximum(totals, 1)[:, np.newaxis]

    figure = style.new_figure(5.8, 5.4)
    axes = figure.subplots()
    axes.pcolormesh(shares, cmap="Blues", vmin=0, vmax=1.15, edgecolors="white", linewidth=3)
    axes.set(xlim=(0, len(class_names)), ylim=(len(class_names), 0), aspect="equal")
    for row, column in np.ndindex(counts.shape):
        colour = "white" if shares[row, column] > 0.5 else style.INK
        for text, below, va, size in (
            (f"{counts[row, column]:,}", 0.5, "bottom", 22),
            (f"{shares[row, column]:.1%}", 0.54, "top", 12),
        ):
            axes.text(column + 0.5, row + below, text, ha="center", va=va, color=colour, fontsize=size)
    centres = np.arange(len(class_names)) + 0.5
    axes.set_xticks(centres, class_names)
    axes.set_yticks(centres, [f"{name}\n{total:,}" for name, total in zip(class_names, totals, strict=True)])
    axes.set_xlabel("predicted", color=style.QUIET, fontsize=11)
    axes.set_ylabel("labelled", color=style.QUIET, fontsize=11)
    axes.tick_params(colors=style.INK, length=0, labelsize=12)
    axes.spines[:].set_visible(False)
    num_right, num_images = np.trace(counts), counts.sum()
    style.set_titles(axes, f"{num_right / num_images:.1%} right: {num_right:,} of {num_images:,} images")
    return style.png(figure)
