"""What a person looks at while a model is trained: `history.csv`, `curves.png`, TensorBoard's events."""

from __future__ import annotations

import contextlib
import csv
import io
import tempfile
from pathlib import Path
from typing import Final

from catdog import report, storage

HISTORY_NAME: Final = "history.csv"
CURVES_NAME: Final = "curves.png"
TENSORBOARD_DIRECTORY: Final = "tensorboard"

Row = dict[str, float]
"""What is known of an epoch: `epoch`, from 1, losses, accuracies, the learning rate, and where the seconds went."""


class Recorder:
    """Keeps the files up to date. A context manager; open in one worker of the group."""

    def __init__(self, output: str) -> None:
        self._output = output
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Recorder:
        """Open an event file."""
        import tensorflow as tf

        self._local = Path(self._stack.enter_context(tempfile.TemporaryDirectory()))
        self._writer = tf.summary.create_file_writer(str(self._local))
        self._stack.callback(self._writer.close)
        return self

    def __exit__(self, *_exception: object) -> None:
        """Close it."""
        self._stack.close()

    def record(self, history: list[Row]) -> None:
        """Publish the history, its curves, and its last row's events."""
        for name, data in history_files(history).items():
            storage.publish_bytes(storage.join(self._output, name), data)
        row = history[-1]
        self.scalars({f"epoch/{name}": value for name, value in row.items() if name != "epoch"}, step=int(row["epoch"]))

    def scalars(self, values: Row, *, step: int) -> None:
        """Publish TensorBoard's events for these values."""
        import tensorflow as tf

        with self._writer.as_default(step=step):
            for name, value in values.items():
                tf.summary.scalar(name, value)
        self._writer.flush()
        for path in self._local.iterdir():
            storage.publish_file(storage.join(self._output, TENSORBOARD_DIRECTORY, path.name), str(path))


def history_files(history: list[Row]) -> dict[str, bytes]:
    """File name → content of what shows the history."""
    return {HISTORY_NAME: history_csv(history), CURVES_NAME: report.curves(history)}


def history_csv(history: list[Row]) -> bytes:
    """The history as CSV, a row per epoch."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(history[0]), lineterminator="\n")
    writer.writeheader()
    for row in history:
        writer.writerow({name: int(value) if name == "epoch" else f"{value:.6g}" for name, value in row.items()})
    return text.getvalue().encode()
