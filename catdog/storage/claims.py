"""One run at a time in an output: a run claims the output, and a second run learns who holds it.

A claim is a file `.catdog-claim-<number>.json` directly under the output. The run that creates the file with the number
after the highest one there holds the output: of many runs that try, only one can create it. The holder renews the file
every `HEARTBEAT_S`. Another run passes over a dead holder's claim, by creating the next number:

- The holder is a process of this machine (and of this PID namespace) that is gone: at once.
- Otherwise: when the file has not been renewed for `EXPIRY_S` by the clock of the one who waits. The clocks of two
  machines are never compared.

What is promised where:

| storage | how a file is created by one of many | promise |
|---|---|---|
| local disk, NFS | a hard link, or exclusive open where there are no hard links; no locks | one holder |
| S3 and others with conditional writes | `If-None-Match: *` | one holder |
| other object stores | written, and read again after `SETTLE_S` | one holder, unless a write takes longer than that |

A holder that was cut off from its storage for longer than `EXPIRY_S` may lose its claim. The holder notices at its next
renewal, or when it calls `check`.
"""

import contextlib
import json
import logging
import os
import re
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from catdog import failpoints
from catdog.errors import ClaimLostError, OutputClaimedError, StorageError
from catdog.provenance import redact
from catdog.storage import outages
from catdog.storage.filesystems import attempt, describe, filesystem
from catdog.storage.listing import exists, list_all_names
from catdog.storage.publishing import create_object, delete, publish_bytes
from catdog.storage.reading import read_bytes
from catdog.storage.urls import absolute, is_local, join, local_path

logger = logging.getLogger(__name__)

HEARTBEAT_S: Final = 10.0
"""Seconds between two renewals of a claim."""

EXPIRY_S: Final = 60.0
"""Seconds without a renewal after which a claim counts as that of a dead run."""

SETTLE_S: Final = 2.0
"""Seconds after which a store without conditional writes must show the last of several writes."""

_POLL_S: Final = 1.0

_RELEASE_PATIENCE_S: Final = 5.0

_mine: set[str] = set()
"""The owners of the claims that this process holds, or tries to get."""

_MAX_TRIES: Final = 20
_PREFIX: Final = ".catdog-claim-"
_NAME: Final = re.compile(re.escape(_PREFIX) + r"(\d+)\.json")


@dataclass(frozen=True, kw_only=True)
class Holder:
    """Who holds a claim, as its file says."""

    owner: str
    """Random; unlike that of any other run."""

    command: str
    since: str
    """When the claim was made, by the holder's clock."""

    host: str
    pid: int
    process: str
    """Identifies a process among all that run, or ran, on any machine: boot, PID namespace, PID and start time; empty
    where the system does not tell."""

    renewals: int = 0

    def __str__(self) -> str:
        """For the one who is refused."""
        return f"`catdog {self.command}` (process {self.pid} on {self.host}, since {self.since})"


class Claim:
    """A claim that is held. `claimed` makes one."""

    def __init__(self, output: str, number: int, holder: Holder, *, is_after_death: bool) -> None:
        self.is_after_death = is_after_death
        """Whether the run before, in this output, died or lost its storage before its end."""

        self._output = output
        self._number = number
        self._holder = holder
        self._is_lost = False
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="catdog-claim", daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        """The file. It is there as long as the claim is held."""
        return join(self._output, _name(self._number))

    @property
    def owner(self) -> str:
        """What the file says of its owner, unlike that of any other run."""
        return self._holder.owner

    def check(self) -> None:
        """Raise `ClaimLostError` if another run has taken over the output.

        The output is not listed for this: it may hold millions of files. Who takes over creates the next number first.
        """
        is_taken_over = exists(join(self._output, _name(self._number + 1))) or not is_held(self.url, self.owner)
        if self._is_lost or is_taken_over:
            self._is_lost = True
            raise ClaimLostError(
                f"a run must hold the claim of its --output to its end. Received: {redact(self._output)} was taken over"
            )

    def release(self) -> None:
        """Stop renewing the claim, and remove it. If the storage does not let us, the claim expires by itself."""
        self._released.set()
        self._thread.join()
        _mine.discard(self._holder.owner)
        try:
            delete(self.url, patience_s=_RELEASE_PATIENCE_S)
        except StorageError as error:
            logger.warning("The claim of the output could not be removed, and will expire: %s", error)

    def _renew(self) -> None:
        with outages.stoppable(self._released):
            while not self._released.wait(HEARTBEAT_S):
                try:
                    self.check()
                    self._holder = replace(self._holder, renewals=self._holder.renewals + 1)
                    publish_bytes(self.url, _encoded(self._holder))
                except ClaimLostError as error:
                    logger.error("%s", error)
                    return
                except StorageError as error:  # it may pass; a run that cannot reach its output ends by itself
                    if not self._released.is_set():
                        logger.warning("The claim of the output could not be renewed: %s", error)


@contextlib.contextmanager
def claimed(output: str, command: str) -> Iterator[Claim]:
    """Hold an output for the length of a `with` block.

    Args:
        output: directory or prefix. A local directory is made if there is none, and removed if it stays empty.
        command: what to tell others of the holder: `train`, ...

    Raises:
        OutputClaimedError: another run holds the output.
        StorageError: the storage failed, or does not let us write.
    """
    output = absolute(output)
    made = _make_directories(output)
    try:
        with failpoints.step("claim"):
            claim = _acquire(output, command)
        try:
            yield claim
        finally:
            claim.release()
    finally:
        for directory in made:
            with contextlib.suppress(OSError):  # it holds something now
                os.rmdir(directory)


def holder(output: str) -> Holder | None:
    """Who holds an output; None where nobody does who lives. It may take a minute to tell (`EXPIRY_S`)."""
    numbers = _numbers(absolute(output))
    return _living_holder(absolute(output), numbers[-1]) if numbers else None


def is_held(url: str, owner: str) -> bool:
    """Whether the file of a claim is there and names this owner. For workers, which have no `Claim`."""
    found = _read(url)
    return found is not None and found.owner == owner


def _make_directories(output: str) -> list[str]:
    """Make a local directory, and those above it that are missing; those that were made, the innermost first."""
    if not is_local(output):
        return []
    missing = []
    output = local_path(output)
    directory = output
    while not os.path.isdir(directory) and os.path.dirname(directory) != directory:
        missing.append(directory)
        directory = os.path.dirname(directory)
    try:
        os.makedirs(output, exist_ok=True)
    except OSError as error:
        raise StorageError(f"{redact(output)} cannot be written: {error.strerror}") from error
    return missing


def _acquire(output: str, command: str) -> Claim:
    ours = Holder(
        owner=uuid.uuid4().hex,
        command=command,
        since=datetime.now(UTC).isoformat(timespec="seconds"),
        host=socket.gethostname(),
        pid=os.getpid(),
        process=_process(os.getpid()),
    )
    _mine.add(ours.owner)  # before others can see it
    for _ in range(_MAX_TRIES):
        numbers = _numbers(output)
        if numbers and (holder := _living_holder(output, numbers[-1])) is not None:
            raise OutputClaimedError(
                "--output must not be in use by another run: wait for its end, or take another --output. "
                f"Received: --output={redact(output)}, held by {holder}"
            )
        number = numbers[-1] + 1 if numbers else 1
        if not _create(join(output, _name(number)), ours):
            continue  # somebody was faster
        there = _numbers(output)
        if there[-1] != number:  # whoever made the higher one did not see ours
            delete(join(output, _name(number)))
            continue
        for lower in there[:-1]:
            delete(join(output, _name(lower)))
        return Claim(output, number, ours, is_after_death=bool(numbers))
    raise StorageError(f"{redact(output)} could not be claimed: others kept coming in between")


def _living_holder(output: str, number: int) -> Holder | None:
    """The holder of a claim; None where it is dead, or has released the claim. Waits until that is certain."""
    url = join(output, _name(number))
    first = _read(url)
    if first is None:
        return None
    if first.process and _same_namespace(first.process):
        if first.pid == os.getpid() and first.owner not in _mine:
            return None  # this process, or a dead one that had its number, could not remove it
        return first if _process(first.pid) == first.process else None
    logger.info("The output is held by %s; looking for a sign of life for up to %.0f s", first, EXPIRY_S)
    deadline = time.monotonic() + EXPIRY_S
    while time.monotonic() < deadline:
        time.sleep(_POLL_S)
        if (now := _read(url)) is None:
            return None
        if now != first:
            return now
    return None


def _create(url: str, holder: Holder) -> bool:
    """Create a claim's file; whether it is ours in the end."""
    data = _encoded(holder)
    if is_local(url):
        return _create_local(local_path(url), data)

    def put() -> bool:
        return create_object(*filesystem(url), data)

    try:
        is_put = attempt(url, put)
    except FileNotFoundError as error:
        raise StorageError(f"{redact(url)}: there is no such bucket: {describe(error)}") from error
    if not is_put:
        return is_held(url, holder.owner)  # an answer may have been lost
    if attempt(url, put):  # the store heeds no conditions: the last of all writers holds the claim
        time.sleep(SETTLE_S)
    return is_held(url, holder.owner)


def _create_local(path: str, data: bytes) -> bool:
    temporary = f"{path}.{uuid.uuid4().hex}.tmp"
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(temporary, path)
        except FileExistsError:
            return False
        except OSError:  # no hard links here
            try:
                with open(path, "xb") as file:
                    file.write(data)
            except FileExistsError:
                return False
        return True
    except OSError as error:
        raise StorageError(f"{redact(path)} cannot be written: {error.strerror}") from error
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.remove(temporary)


def _name(number: int) -> str:
    return f"{_PREFIX}{number}.json"


def _numbers(output: str) -> list[int]:
    """The numbers of the claims that are there, ascending."""
    names = list_all_names(output, _PREFIX)
    return sorted(int(match[1]) for name in names if (match := _NAME.fullmatch(name)))


def _encoded(holder: Holder) -> bytes:
    return (json.dumps(asdict(holder), indent=2) + "\n").encode()


def _read(url: str) -> Holder | None:
    """What a claim's file says; None where there is none. One that cannot be understood is another version's."""
    try:
        data = read_bytes(url)
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        return Holder(**json.loads(data))
    except (ValueError, TypeError):
        return Holder(owner=data.hex(), command="?", since="?", host="?", pid=0, process="")


def _process(pid: int) -> str:
    """The identity of a process of this machine; empty if it does not live, or if there is no `/proc` to tell."""
    try:
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return "" if state == "Z" else f"{_namespace()} {pid} {rest[18]}"
    except OSError:
        return ""


def _namespace() -> str:
    """This boot of this machine, and the PID namespace of this process."""
    return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"


def _same_namespace(process: str) -> bool:
    try:
        return process.rsplit(" ", 2)[0] == _namespace()
    except OSError:
        return False
