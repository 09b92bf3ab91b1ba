"""Which files of some directories are opened, by whatever process, as Linux tells (inotify)."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import select
import struct
import threading
from collections import Counter
from typing import Final

from catdog.bench.background import Background

logger = logging.getLogger(__name__)

_IN_OPEN: Final = 0x00000020
_IN_ISDIR: Final = 0x40000000
_IN_Q_OVERFLOW: Final = 0x00004000
_HEADER: Final = struct.Struct("iIII")
_BUFFER_BYTES: Final = 2**20
_POLL_MS: Final = 100


class Opened(Background):
    """Counts how often each file is opened, in a thread, for the length of a `with` block."""

    def __init__(self) -> None:
        super().__init__()
        self._has_overflowed = False
        """Whether Linux has dropped events, because more came than it holds."""

        self._libc = ctypes.CDLL(None, use_errno=True)
        self._descriptor = self._libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        if self._descriptor < 0:
            raise OSError(ctypes.get_errno(), "inotify_init1")
        self._directories: dict[int, str] = {}
        self._counts: Counter[str] = Counter()
        self._recent: set[str] = set()
        self._lock = threading.Lock()

    def watch(self, directory: str, known_as: str) -> None:
        """Count the files directly in a directory, also when it is renamed to `known_as`."""
        watched = self._libc.inotify_add_watch(self._descriptor, os.fsencode(directory), _IN_OPEN)
        if watched < 0:
            raise OSError(ctypes.get_errno(), "inotify_add_watch", directory)
        self._directories[watched] = known_as

    @property
    def num_opened(self) -> int:
        """How many times files were opened."""
        self._read()
        return self._counts.total()

    @property
    def num_opened_again(self) -> int:
        """How many times files were opened that had been opened before."""
        if self._has_overflowed:
            logger.warning(
                "More files were opened at a time than Linux counts: the figures of what is done again lack some"
            )
        return self.num_opened - len(self._counts)

    def take_recent(self) -> set[str]:
        """The files that were opened since the last call."""
        self._read()
        with self._lock:
            taken, self._recent = self._recent, set()
        return taken

    def _run(self) -> None:
        poll = select.poll()
        poll.register(self._descriptor, select.POLLIN)
        while not self._done.is_set():
            if poll.poll(_POLL_MS):
                self._read()

    def _close(self) -> None:
        self._read()
        os.close(self._descriptor)

    def _read(self) -> None:
        """Note all that Linux has to tell."""
        with self._lock, contextlib.suppress(BlockingIOError):
            while True:
                self._note(os.read(self._descriptor, _BUFFER_BYTES))

    def _note(self, events: bytes) -> None:
        paths, position = [], 0
        while position < len(events):
            watched, mask, _, length = _HEADER.unpack_from(events, position)
            position += _HEADER.size
            name = events[position : position + length].rstrip(b"\0")
            position += length
            self._has_overflowed |= bool(mask & _IN_Q_OVERFLOW)
            if name and not mask & _IN_ISDIR:
                paths.append(os.path.join(self._directories[watched], os.fsdecode(name)))
        self._counts.update(paths)
        self._recent.update(paths)
