"""Keeps what a person looks at while a model is trained: `history.csv`, `curves.png`, TensorBoard's events."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from catdog import scratch, storage
from catdog.errors import StorageError
from catdog.training.history import HistoryRow, history_files
from catdog.training.observers import Observer, Tick, WorkerInfo

TENSORBOARD_DIRECTORY: Final = "tensorboard"

PATIENCE_S: Final = 30.0
"""How long the end of a training waits for the last upload."""


class Recorder(Observer):
    """Publishes the history and TensorBoard's events in the training's output.

    The worker only writes a local file. A thread uploads what there is, so that a slow storage holds up no step.
    """

    def __init__(self, worker: WorkerInfo) -> None:
        self._output = worker.output
        self._history: Sequence[HistoryRow] = ()
        self._num_published = 0
        """Epochs in the history that was published last."""

        self._closing = contextlib.ExitStack()
        self._local = self._closing.enter_context(scratch.directory("recorder"))
        self._writer: Any = None
        self._uploads = Background(self._upload)

    def ticked(self, tick: Tick) -> None:
        """Publish the loss and the speed."""
        self._write({"train/loss": tick.loss, "train/images_per_s": tick.images_per_s}, step=tick.steps_done)
        self._uploads.request()

    def epoch_done(self, history: Sequence[HistoryRow]) -> None:
        """Publish the history, and its last row's events."""
        self._history = tuple(history)
        row = history[-1]
        self._write({f"epoch/{name}": value for name, value in row.items() if name != "epoch"}, step=int(row["epoch"]))
        self._uploads.request()

    def finishing(self) -> None:
        """Let the uploads end: the bundle holds the history's files, too.

        Where the wait is too short, an older history may yet replace the bundle's; the upload after it repairs that,
        since the whole history gives the very bytes of the bundle's files.
        """
        self._uploads.wait(PATIENCE_S)

    def close(self) -> None:
        """Upload what is left, and end the thread."""
        try:
            self._uploads.close(PATIENCE_S)
        finally:
            if self._writer is not None:
                self._writer.close()
            self._closing.close()

    def _write(self, values: Mapping[str, float], *, step: int) -> None:
        import tensorflow as tf

        if self._writer is None:  # not before TensorFlow has joined the group of workers
            self._writer = tf.summary.create_file_writer(self._local)
        with self._writer.as_default(step=step):
            for name, value in values.items():
                tf.summary.scalar(name, value)
        self._writer.flush()

    def _upload(self) -> None:
        history = self._history
        if len(history) > self._num_published:
            for name, data in history_files(history).items():
                storage.publish_bytes(storage.join(self._output, name), data)
            self._num_published = len(history)
        for path in Path(self._local).glob("events.*"):
            storage.publish_file(storage.join(self._output, TENSORBOARD_DIRECTORY, path.name), str(path))


class Background:
    """Calls a function in a thread of its own, once for all the requests that come while it runs."""

    def __init__(self, function: Callable[[], None]) -> None:
        self._function = function
        self._changed = threading.Condition()
        self._is_requested = self._is_running = self._is_closed = False
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="catdog-background", daemon=True)
        self._thread.start()

    def request(self) -> None:
        """Have the function called soon. Raises what its last call raised, if nobody has heard of that yet."""
        with self._changed:
            self._is_requested = True
            self._changed.notify_all()
            self._raise_error()

    def wait(self, timeout_s: float) -> None:
        """Wait until every request is answered. Raises what the last call raised.

        Raises:
            StorageError: that takes longer than `timeout_s`.
        """
        with self._changed:
            is_done = self._changed.wait_for(lambda: not (self._is_requested or self._is_running), timeout_s)
            self._raise_error()
        if not is_done:
            raise StorageError(f"an upload must end within {timeout_s:g} s. Received: one that takes longer")

    def close(self, timeout_s: float) -> None:
        """The same as `wait`, and end the thread. A call that takes longer is left to end by itself."""
        try:
            self.wait(timeout_s)
        finally:
            with self._changed:
                self._is_closed = True
                self._changed.notify_all()

    def _raise_error(self) -> None:
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._is_requested or self._is_closed)
                if not self._is_requested:
                    return
                self._is_requested, self._is_running = False, True
            error = None
            try:
                self._function()
            except Exception as raised:  # told at the next request
                error = raised
            with self._changed:
                self._is_running, self._error = False, error or self._error
                self._changed.notify_all()
