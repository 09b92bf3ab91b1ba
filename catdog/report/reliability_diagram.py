"""A reliability diagram: whether probabilities are as high as the shares of dogs that they promise.

Shapes: `B` images. `labels_B` holds the true class of each image, 0 (cat) or 1 (dog), and `prob_dog_B` its probability
of class 1, in the same order.
"""

from collections.abc import Mapping
from typing import Final

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

from catdog import metrics
from catdog.errors import UsageError
from catdog.metrics import FloatArray, IntArray
from catdog.report import style

_TICKS: Final = (0.0001, 0.001, 0.01, 0.1, 0.5, 0.9, 0.99, 0.999, 0.9999)
"""Probabilities that the axes name. The axes end at the first and the last of them."""

_NUM_BARS: Final = 36


def reliability(labels_B: npt.ArrayLike, prob_dog_by_title: Mapping[str, npt.ArrayLike]) -> bytes:
    """Draw, for each range of `prob_dog`, the share of images in it that are dogs.

    There is a panel for every set of probabilities. A point is a bin of `catdog.metrics.calibration_bins`; a line
    through it shows Wilson's 95 % interval of the share. Below the points, bars show the numbers of images.

    Both axes are linear in the log odds, log(p / (1 - p)), because most probabilities lie near 0 or 1. On such axes
    another temperature turns the points around the middle. Where the points rise less steeply than the diagonal, the
    model is more confident than it should be. What lies beyond the end of an axis is drawn at that end; the point is
    then hollow.

    Args:
        labels_B: true classes, 0 or 1.
        prob_dog_by_title: title of a panel → probability of class 1 of each image.

    Raises:
        UsageError: there is no panel, or `catdog.metrics` refuses the labels or the probabilities.
    """
    if not prob_dog_by_title:
        raise UsageError("a reliability diagram needs at least one panel. Received: none")
    num_panels = len(prob_dog_by_title)
    figure = style.new_figure(0.6 + 5.2 * num_panels, 6.6)
    grid = figure.subplots(2, num_panels, squeeze=False, sharex=True, sharey="row", height_ratios=(4, 1))
    for (points, bars), (title, prob_dog_B) in zip(grid.T, prob_dog_by_title.items(), strict=True):
        error = metrics.expected_calibration_error(labels_B, prob_dog_B)
        style.set_titles(points, title, f"ECE {error:.4f}")
        _draw_points(points, np.asarray(labels_B), np.asarray(prob_dog_B, dtype=np.float64))
        _draw_bars(bars, prob_dog_B)
        for axes in (points, bars):
            axes.grid(color=style.FAINT, linewidth=0.8)
            axes.set_axisbelow(True)
            axes.spines[:].set_visible(False)
            axes.tick_params(colors=style.INK, length=0, pad=6, labelsize=9)
    grid[0, 0].set_ylabel("share of dogs", color=style.INK)
    grid[1, 0].set_ylabel("images", color=style.INK)
    note = f"up to {metrics.NUM_CALIBRATION_BINS} bins of equally many images,\n95% intervals; hollow: beyond the axis"
    grid[0, -1].text(0.98, 0.03, note, transform=grid[0, -1].transAxes, ha="right", color=style.QUIET, fontsize=9)
    return style.png(figure)


def _draw_points(axes: Axes, labels_B: IntArray, prob_dog_B: FloatArray) -> None:
    """Draw the points with their intervals, and the diagonal on which they should lie."""
    ticks = _log_odds(_TICKS)
    low, *_, high = ticks.tolist()
    axes.plot([low, high], [low, high], color=style.QUIET, linewidth=1, linestyle=(0, (2, 3)))
    bins_B = metrics.calibration_bins(prob_dog_B)
    for index in np.unique(bins_B):
        in_bin_B = bins_B == index
        share = metrics.share(int(labels_B[in_bin_B].sum()), int(in_bin_B.sum()))
        mean = float(prob_dog_B[in_bin_B].mean())
        is_inside = all(_TICKS[0] <= value <= _TICKS[-1] for value in (mean, share["value"]))
        x, y = _log_odds([mean, share["value"]])
        axes.vlines(x, *_log_odds(share["ci95"]), color=style.BLUE, linewidth=1.5, alpha=0.55, clip_on=False)
        face = style.BLUE if is_inside else "white"
        axes.plot(x, y, "o", color=style.BLUE, markerfacecolor=face, markersize=7, clip_on=False, zorder=3)
    names = [f"{100 * tick:g}%" for tick in _TICKS]
    axes.set_xticks(ticks, names)
    axes.set_yticks(ticks, names)
    axes.set(xlim=(low, high), ylim=(low, high))


def _draw_bars(axes: Axes, prob_dog_B: npt.ArrayLike) -> None:
    """Draw how many images have which probability."""
    low, *_, high = _log_odds(_TICKS).tolist()
    axes.hist(
        _log_odds(prob_dog_B), bins=_NUM_BARS, range=(low, high), color=style.GREY, edgecolor="white", linewidth=0.6
    )
    axes.set_xlabel("probability of dog", color=style.INK)
    axes.yaxis.set_major_locator(MaxNLocator(3, integer=True))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))


def _log_odds(probs: npt.ArrayLike) -> FloatArray:
    """log(p / (1 - p)) of probabilities, after those beyond the ends of the axes are moved to the ends."""
    clipped = np.clip(np.asarray(probs, dtype=np.float64), _TICKS[0], _TICKS[-1])
    log_odds: FloatArray = np.log(clipped) - np.log1p(-clipped)
    return log_odds
