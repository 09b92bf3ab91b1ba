"""What goes on in a thread while a bench does something else."""

from __future__ import annotations

import abc
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self


class Background(abc.ABC):
    """Runs in a thread for the length of a `with` block. An error of the thread is raised at the end of the block."""

    def __init__(self) -> None:
        self._done = threading.Event()
        """The block has ended, and `_run` must."""

        self._pool = ThreadPoolExecutor(1, thread_name_prefix=f"catdog-{type(self).__name__.lower()}")
        self._running: Future[None] | None = None

    def __enter__(self) -> Self:
        self._running = self._pool.submit(self._run)
        return self

    def __exit__(
        self, error: type[BaseException] | None, _error: BaseException | None, _traceback: TracebackType | None
    ) -> None:
        self._done.set()
        self._pool.shutdown()
        self._close()
        if self._running is not None and error is None:
            self._running.result()

    @abc.abstractmethod
    def _run(self) -> None:
        """Do it until `_done` is set."""

    def _close(self) -> None:  # noqa: B027 - most have nothing to close
        """Finish when the thread has ended."""
