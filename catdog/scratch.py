"""Temporary directories that do not outlive the process that made them, even if it is killed.

A directory `catdog-<name>-<random>` holds a file that its owner keeps locked. The kernel drops the lock when the owner
ends, however it ends, in whatever container or before whatever restart that was. Whoever makes the next directory
beside it removes those whose owners are gone. Only directories of this user, with such a file in them, are removed.
"""

import contextlib
import fcntl
import json
import logging
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from catdog.errors import UsageError

logger = logging.getLogger(__name__)

OWNER_NAME: Final = ".catdog-owner.json"
"""The file that the owner of a directory keeps locked. It says, for people, who that is."""

_PREFIX: Final = "catdog-"
_MAX_TRIES: Final = 10


@contextlib.contextmanager
def directory(name: str, *, parent: str | None = None) -> Iterator[str]:
    """Make a temporary directory for the length of a `with` block, and remove those of dead processes.

    Args:
        name: what it is for: `plan`, ...
        parent: where to make it; default: the system's directory for temporary files (`TMPDIR`).

    Raises:
        UsageError: there is no directory for temporary files.
    """
    parent = parent or base()
    remove_abandoned(parent)
    path, lock = _make(parent, name)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        os.close(lock)


def base() -> str:
    """The system's directory for temporary files.

    Raises:
        UsageError: there is none that this process may write to.
    """
    try:
        return tempfile.gettempdir()
    except FileNotFoundError as error:
        raise UsageError(
            "TMPDIR must name a directory with space in it that can be written to. "
            f"Received: {os.environ.get('TMPDIR', 'no TMPDIR')}: {error.strerror}"
        ) from error


def remove_abandoned(parent: str) -> None:
    """Remove the directories under `parent` whose owners are gone. What cannot be removed is left."""
    with contextlib.suppress(OSError), os.scandir(parent) as entries:
        for entry in entries:
            if entry.name.startswith(_PREFIX):
                with contextlib.suppress(OSError):
                    _remove_if_abandoned(entry)


def _remove_if_abandoned(entry: os.DirEntry[str]) -> None:
    if not entry.is_dir(follow_symlinks=False) or entry.stat(follow_symlinks=False).st_uid != os.getuid():
        return
    lock = os.open(os.path.join(entry.path, OWNER_NAME), os.O_RDWR | os.O_NOFOLLOW)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        logger.debug("Removing %s, whose owner is gone", entry.path)
        # The file goes last: a removal that is cut short can be repeated.
        for inner in os.scandir(entry.path):
            if inner.is_dir(follow_symlinks=False):
                shutil.rmtree(inner.path, ignore_errors=True)
            elif inner.name != OWNER_NAME:
                os.remove(inner.path)
        shutil.rmtree(entry.path, ignore_errors=True)
    finally:
        os.close(lock)


def _make(parent: str, name: str) -> tuple[str, int]:
    """A new directory, and the descriptor that holds its lock."""
    owner = {"pid": os.getpid(), "host": socket.gethostname(), "since": datetime.now(UTC).isoformat(timespec="seconds")}
    for _ in range(_MAX_TRIES):
        try:
            path = tempfile.mkdtemp(prefix=f"{_PREFIX}{name}-", dir=parent)
            file = os.path.join(path, OWNER_NAME)
            lock = os.open(file, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        except OSError as error:
            raise UsageError(
                "TMPDIR must name a directory with space in it that can be written to. "
                f"Received: {parent}: {error.strerror}"
            ) from error
        # Where there are no locks nobody ever finds the directory unlocked, and it is left for good.
        with contextlib.suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.exists(file):  # else another process found it before it was locked, and removed it
            with contextlib.suppress(OSError):
                os.write(lock, (json.dumps(owner) + "\n").encode())
            return path, lock
        os.close(lock)
    raise UsageError(f"temporary directories must not be removed while they are made. Received: {parent}")


def short_base(max_bytes: int) -> str:
    """A directory for temporary files whose path has at most so many bytes: for sockets, whose paths must be short.

    Raises:
        UsageError: there is none.
    """
    for path in (base(), "/tmp", "/var/tmp", "/dev/shm"):
        if len(os.fsencode(path)) <= max_bytes and os.access(path, os.W_OK | os.X_OK) and Path(path).is_dir():
            return path
    raise UsageError(f"TMPDIR must have at most {max_bytes} bytes in its path. Received: TMPDIR={base()}")
