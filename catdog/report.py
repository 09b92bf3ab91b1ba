"""Figures: the course of a training, a confusion matrix, a reliability diagram, photographs and what was made of them.

Every function returns the bytes of a PNG: the same bytes for the same input. They draw on figures of their own, with no
state shared through `pyplot`. Training draws its curves here, evaluation the rest.
"""

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator, PercentFormatter, StrMethodFormatter
from PIL import ImageOps

from catdog import images, metrics
from catdog.errors import UsageError

_INK: Final = "#1f2933"
_QUIET: Final = "#7b8794"
_FAINT: Final = "#e4e7eb"
_TRAINING: Final = "#9aa5b1"
_VALIDATION: Final = "#1565a7"
_RIGHT: Final = "#2b7a3d"
_WRONG: Final = "#c02b2b"
_TITLE: Final[dict[str, Any]] = {"color": _INK, "fontsize": 12, "fontweight": "bold", "pad": 12}
_SUBTITLE: Final[dict[str, Any]] = {"color": _VALIDATION, "fontsize": 11, "pad": 12}

_SHARE_TICKS: Final = (0.0001, 0.001, 0.01, 0.1, 0.5, 0.9, 0.99, 0.999, 0.9999)
"""Of the axes of a reliability diagram, which end at the first and the last."""
_NUM_BARS: Final = 36

_NUM_COLUMNS: Final = 6
_TILE_PX: Final = 220
_GAP_PX: Final = 20
_CAPTION_PX: Final = 50
_HEADER_PX: Final = 46
_MARGIN_PX: Final = 28


@dataclass(frozen=True, slots=True, kw_only=True)
class GridItem:
    """A photograph and what was made of it."""

    image: bytes
    """The encoded image."""

    label: str
    """The class it is said to be of."""

    predicted_label: str
    """The class that the model gives it."""

    confidence: float
    """The model's probability of `predicted_label`."""

    @property
    def is_right(self) -> bool:
        """Whether label and prediction agree."""
        return self.label == self.predicted_label


def curves(history: Sequence[Mapping[str, float]]) -> bytes:
    """Accuracy and loss by epoch, training and validation, with the last epoch's marked.

    Args:
        history: a row per epoch with `epoch`, `train_loss`, `train_accuracy`, `val_loss` and `val_accuracy`.
    """
    if not history:
        raise UsageError("training curves need at least one epoch. Received: none")
    last = history[-1]
    figure = Figure(figsize=(11, 4.4), dpi=150, layout=_layout(), facecolor="white")
    accuracy, loss = figure.subplots(1, 2)
    _curve_panel(accuracy, history, "accuracy")
    accuracy.set_title("Accuracy", loc="left", **_TITLE)
    accuracy.set_title(f"epoch {last['epoch']:.0f}: validation {last['val_accuracy']:.1%}", loc="right", **_SUBTITLE)
    lowest = min(min(row["train_accuracy"], row["val_accuracy"]) for row in history)
    accuracy.set_ylim(max(0.0, np.ceil(lowest * 10 - 1) / 10), 1)
    accuracy.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    _curve_panel(loss, history, "loss")
    loss.set_title("Loss (cross-entropy)", loc="left", **_TITLE)
    loss.set_title(f"epoch {last['epoch']:.0f}: validation {last['val_loss']:.3f}", loc="right", **_SUBTITLE)
    loss.set_ylim(0, 1.05 * max(max(row["train_loss"], row["val_loss"]) for row in history) or 1)
    loss.legend(loc="upper right", facecolor="white", framealpha=1, edgecolor="white", labelcolor=_INK)
    return _png(figure)


def _curve_panel(axes: Axes, history: Sequence[Mapping[str, float]], name: str) -> None:
    """Both curves of a quantity; a point marks the last epoch."""
    epochs = [row["epoch"] for row in history]
    for split, label, colour in (("train", "training", _TRAINING), ("val", "validation", _VALIDATION)):
        values = [row[f"{split}_{name}"] for row in history]
        axes.plot(epochs, values, color=colour, linewidth=2, label=label, clip_on=False)
        axes.plot(epochs[-1], values[-1], "o", color=colour, markersize=7, clip_on=False)
    axes.set_xlim(epochs[0] - 0.5, epochs[-1] + 0.5)
    axes.set_xlabel("epoch", color=_INK)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.grid(axis="y", color=_FAINT, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(_QUIET)
    axes.tick_params(colors=_INK, length=0, pad=6)


def confusion(matrix: npt.ArrayLike, class_names: Sequence[str]) -> bytes:
    """A confusion matrix, each cell with its number of images and its share of the true class.

    Args:
        matrix: counts, rows true class, columns predicted class.
        class_names: in the order of rows and columns.
    """
    counts = np.asarray(matrix)
    if counts.shape != (len(class_names), len(class_names)) or not counts.sum():
        raise UsageError(
            f"a confusion matrix must have a row and a column per class, and an image. Received: {counts.tolist()}"
        )
    totals = counts.sum(axis=1)
    shares = counts / np.maximum(totals, 1)[:, np.newaxis]

    figure = Figure(figsize=(5.8, 5.4), dpi=150, layout=_layout(), facecolor="white")
    axes = figure.subplots()
    axes.pcolormesh(shares, cmap="Blues", vmin=0, vmax=1.15, edgecolors="white", linewidth=3)
    axes.set(xlim=(0, len(class_names)), ylim=(len(class_names), 0), aspect="equal")
    for row, column in np.ndindex(counts.shape):
        colour = "white" if shares[row, column] > 0.5 else _INK
        style: dict[str, Any] = {"ha": "center", "color": colour}
        axes.text(column + 0.5, row + 0.5, f"{counts[row, column]:,}", va="bottom", fontsize=22, **style)
        axes.text(column + 0.5, row + 0.54, f"{shares[row, column]:.1%}", va="top", fontsize=12, **style)
    centres = np.arange(len(class_names)) + 0.5
    axes.set_xticks(centres, class_names)
    axes.set_yticks(centres, [f"{name}\n{total:,}" for name, total in zip(class_names, totals, strict=True)])
    axes.set_xlabel("predicted", color=_QUIET, fontsize=11)
    axes.set_ylabel("labelled", color=_QUIET, fontsize=11)
    axes.tick_params(colors=_INK, length=0, labelsize=12)
    axes.spines[:].set_visible(False)
    num_right, num_images = np.trace(counts), counts.sum()
    axes.set_title(f"{num_right / num_images:.1%} right: {num_right:,} of {num_images:,} images", loc="left", **_TITLE)
    return _png(figure)


def reliability(labels_B: npt.ArrayLike, prob_dog_by_title: Mapping[str, npt.ArrayLike]) -> bytes:
    """Of the images that are said to be dogs with some probability, the share that are: a panel per way to say it.

    A point is a bin of `catdog.metrics.calibration_bins`, with Wilson's 95 % interval of its share; below are the
    numbers of images. Both axes are logarithmic in the odds, p / (1 - p), since most probabilities lie near 0 and 1.
    On them a temperature turns the points around the middle: where they climb more slowly than the diagonal, the model
    is surer than it should be. What lies beyond an end of an axis is drawn at that end, a point hollow.

    Args:
        labels_B: true classes, 0 or 1.
        prob_dog_by_title: per panel its title, and the probability of class 1 of each image, in the labels' order.

    Raises:
        UsageError: there is no panel, or labels and probabilities make no sense to `catdog.metrics`.
    """
    if not prob_dog_by_title:
        raise UsageError("a reliability diagram needs at least one panel. Received: none")
    num_panels = len(prob_dog_by_title)
    figure = Figure(figsize=(0.6 + 5.2 * num_panels, 6.6), dpi=150, layout=_layout(), facecolor="white")
    grid = figure.subplots(2, num_panels, squeeze=False, sharex=True, sharey="row", height_ratios=(4, 1))
    for (points, bars), (title, prob_dog_B) in zip(grid.T, prob_dog_by_title.items(), strict=True):
        error = metrics.expected_calibration_error(labels_B, prob_dog_B)
        points.set_title(title, loc="left", **_TITLE)
        points.set_title(f"ECE {error:.4f}", loc="right", **_SUBTITLE)
        _reliability_panel(points, np.asarray(labels_B), np.asarray(prob_dog_B, dtype=np.float64))
        low, *_, high = _log_odds(_SHARE_TICKS).tolist()
        bars.hist(
            _log_odds(prob_dog_B), bins=_NUM_BARS, range=(low, high), color=_TRAINING, edgecolor="white", linewidth=0.6
        )
        bars.set_xlabel("probability of dog", color=_INK)
        bars.yaxis.set_major_locator(MaxNLocator(3, integer=True))
        bars.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        for axes in (points, bars):
            axes.grid(color=_FAINT, linewidth=0.8)
            axes.set_axisbelow(True)
            axes.spines[:].set_visible(False)
            axes.tick_params(colors=_INK, length=0, pad=6, labelsize=9)
    grid[0, 0].set_ylabel("share of dogs", color=_INK)
    grid[1, 0].set_ylabel("images", color=_INK)
    note = f"up to {metrics.NUM_CALIBRATION_BINS} bins of equally many images,\n95% intervals; hollow: beyond the axis"
    grid[0, -1].text(0.98, 0.03, note, transform=grid[0, -1].transAxes, ha="right", color=_QUIET, fontsize=9)
    return _png(figure)


def _reliability_panel(axes: Axes, labels_B: npt.NDArray[np.int64], prob_dog_B: npt.NDArray[np.float64]) -> None:
    """The points with their intervals, and the diagonal on which they should lie."""
    ticks = _log_odds(_SHARE_TICKS)
    low, *_, high = ticks.tolist()
    axes.plot([low, high], [low, high], color=_QUIET, linewidth=1, linestyle=(0, (2, 3)))
    bins_B = metrics.calibration_bins(prob_dog_B)
    for index in np.unique(bins_B):
        in_bin_B = bins_B == index
        share = metrics.proportion(int(labels_B[in_bin_B].sum()), int(in_bin_B.sum()), "there are no images")
        mean = float(prob_dog_B[in_bin_B].mean())
        inside = all(_SHARE_TICKS[0] <= value <= _SHARE_TICKS[-1] for value in (mean, share["value"]))
        x, y = _log_odds([mean, share["value"]])
        axes.vlines(x, *_log_odds(share["ci95"]), color=_VALIDATION, linewidth=1.5, alpha=0.55, clip_on=False)
        face = _VALIDATION if inside else "white"
        axes.plot(x, y, "o", color=_VALIDATION, markerfacecolor=face, markersize=7, clip_on=False, zorder=3)
    labels = [f"{100 * share:g}%" for share in _SHARE_TICKS]
    axes.set_xticks(ticks, labels)
    axes.set_yticks(ticks, labels)
    axes.set(xlim=(low, high), ylim=(low, high))


def _log_odds(probs: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """log(p / (1 - p)), cut off at the ends of the axes."""
    clipped = np.clip(np.asarray(probs, dtype=np.float64), _SHARE_TICKS[0], _SHARE_TICKS[-1])
    log_odds: npt.NDArray[np.float64] = np.log(clipped) - np.log1p(-clipped)
    return log_odds


def predictions_grid(items: Sequence[GridItem], title: str = "") -> bytes:
    """Photographs with predicted label and confidence, right and wrong ones told apart by mark, colour and caption.

    Args:
        items: in reading order, as many as there shall be on one sheet.
        title: a line above them.
    """
    if not items:
        raise UsageError("a grid of predictions needs at least one photograph. Received: none")
    num_rows = math.ceil(len(items) / _NUM_COLUMNS)
    top = _MARGIN_PX + (_HEADER_PX if title else 0)
    width = 2 * _MARGIN_PX + _NUM_COLUMNS * (_TILE_PX + _GAP_PX) - _GAP_PX
    height = top + num_rows * (_TILE_PX + _CAPTION_PX + _GAP_PX) - _GAP_PX + _MARGIN_PX

    figure = Figure(figsize=(width / 100, height / 100), dpi=100, facecolor="white")
    # One set of axes over the whole figure, whose coordinates are pixels.
    axes = figure.add_axes((0, 0, 1, 1), frameon=False, xticks=[], yticks=[])
    if title:
        axes.text(_MARGIN_PX, _MARGIN_PX, title, va="top", color=_INK, fontsize=15, fontweight="bold")
    for position, item in enumerate(items):
        row, column = divmod(position, _NUM_COLUMNS)
        left = _MARGIN_PX + column * (_TILE_PX + _GAP_PX)
        _draw_tile(axes, item, left, top + row * (_TILE_PX + _CAPTION_PX + _GAP_PX))
    axes.set(xlim=(0, width), ylim=(height, 0), aspect="auto")
    return _png(figure)


def _draw_tile(axes: Axes, item: GridItem, left: int, top: int) -> None:
    """The whole photograph in a square, framed, with its mark and caption below."""
    colour = _RIGHT if item.is_right else _WRONG
    picture = ImageOps.pad(images.open_upright(item.image), (_TILE_PX, _TILE_PX), color="#f1f3f5")
    axes.imshow(np.asarray(picture), extent=(left, left + _TILE_PX, top + _TILE_PX, top), interpolation="nearest")
    axes.add_patch(Rectangle((left, top), _TILE_PX, _TILE_PX, fill=False, edgecolor=colour, linewidth=3))
    line = top + _TILE_PX + 20
    style: dict[str, Any] = {"va": "center", "color": colour, "fontweight": "bold"}
    axes.text(left - 2, line, "✓" if item.is_right else "✗", fontsize=18, **style)
    axes.text(left + 24, line, f"{item.predicted_label} {item.confidence:.1%}", fontsize=12.5, **style)
    if not item.is_right:
        axes.text(left + 24, line + 20, f"labelled {item.label}", va="center", color=_INK, fontsize=11)


def _layout() -> ConstrainedLayoutEngine:
    return ConstrainedLayoutEngine(w_pad=0.14, h_pad=0.14)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    # Without the name of the software that drew it, whose version would change the bytes.
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
