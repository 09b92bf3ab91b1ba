"""The history of a training: what is known of each epoch, as a table and as curves."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from typing import Final

HISTORY_NAME: Final = "history.csv"
CURVES_NAME: Final = "curves.png"

HistoryRow = dict[str, float]
"""What is known of an epoch: `epoch`, from 1, losses, accuracies, the learning rate, and where the seconds went."""


def best_row(history: Sequence[HistoryRow]) -> HistoryRow:
    """The row of the epoch with the lowest validation loss; of several the first."""
    return min(history, key=lambda row: row["val_loss"])


def history_files(history: Sequence[HistoryRow]) -> dict[str, bytes]:
    """The files that show a history: name → content. The same history always gives the same bytes."""
    from catdog import report

    return {HISTORY_NAME: history_csv(history), CURVES_NAME: report.curves(history)}


def history_csv(history: Sequence[HistoryRow]) -> bytes:
    """A history as CSV, with a row per epoch."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(history[0]), lineterminator="\n")
    writer.writeheader()
    for row in history:
        writer.writerow({name: int(value) if name == "epoch" else f"{value:.6g}" for name, value in row.items()})
    return text.getvalue().encode()
