"""The course of a training: accuracy and loss by epoch."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, PercentFormatter

from catdog.errors import UsageError
from catdog.report import style


def curves(history: Sequence[Mapping[str, float]]) -> bytes:
    """Draw accuracy and loss by epoch, for training and validation. A point marks the last epoch.

    Args:
        history: one row per epoch, with `epoch`, `train_loss`, `train_accuracy`, `val_loss` and `val_accuracy`.

    Raises:
        UsageError: the history is empty.
    """
    if not history:
        raise UsageError("training curves need at least one epoch. Received: none")
    last = history[-1]
    figure = style.new_figure(11, 4.4)
    accuracy, loss = figure.subplots(1, 2)
    _draw_panel(accuracy, history, "accuracy")
    style.set_titles(accuracy, "Accuracy", f"epoch {last['epoch']:.0f}: validation {last['val_accuracy']:.1%}")
    lowest = min(min(row["train_accuracy"], row["val_accuracy"]) for row in history)
    accuracy.set_ylim(max(0.0, np.ceil(lowest * 10 - 1) / 10), 1)
    accuracy.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    _draw_panel(loss, history, "loss")
    style.set_titles(loss, "Loss (cross-entropy)", f"epoch {last['epoch']:.0f}: validation {last['val_loss']:.3f}")
    loss.set_ylim(0, 1.05 * max(max(row["train_loss"], row["val_loss"]) for row in history) or 1)
    loss.legend(loc="upper right", facecolor="white", framealpha=1, edgecolor="white", labelcolor=style.INK)
    return style.png(figure)


def _draw_panel(axes: Axes, history: Sequence[Mapping[str, float]], name: str) -> None:
    """Draw the two curves of `accuracy` or `loss`."""
    epochs = [row["epoch"] for row in history]
    for split, label, colour in (("train", "training", style.GREY), ("val", "validation", style.BLUE)):
        values = [row[f"{split}_{name}"] for row in history]
        axes.plot(epochs, values, color=colour, linewidth=2, label=label, clip_on=False)
        axes.plot(epochs[-1], values[-1], "o", color=colour, markersize=7, clip_on=False)
    axes.set_xlim(epochs[0] - 0.5, epochs[-1] + 0.5)
    axes.set_xlabel("epoch", color=style.INK)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.grid(axis="y", color=style.FAINT, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(style.QUIET)
    axes.tick_params(colors=style.INK, length=0, pad=6)
