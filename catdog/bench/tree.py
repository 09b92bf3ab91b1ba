"""Measures a command with all the processes that it starts: seconds, memory, and CPU seconds.

The processes are found in `/proc`, some times per second: the command, its children, and theirs. One that was seen once
is watched to its end, also if whoever started it has ended, as Ray's daemons may.

- Memory is the proportional set size (PSS): a page that several processes share is divided among them. Linux computes
  it by walking through page tables, so that it is looked up less often than the CPU time.
- CPU seconds are what each process had used when it was last seen. What processes use between two looks, in their last
  moment, is lost, unless it is the command itself, or was waited for by it: these are counted to the end.
"""

from __future__ import annotations

import contextlib
import math
import os
import select
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from catdog.bench import processes

CPU_INTERVAL_S: Final = 0.1
MEMORY_INTERVAL_S: Final = 0.5

_TICKS_PER_S: Final = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, kw_only=True)
class Usage:
    """What a command used, from its start to its exit."""

    exit_code: int
    wall_s: float
    started_at: float
    """Seconds since the epoch."""

    cpu_s: float
    """Of all processes."""

    peak_memory_bytes: int
    """The largest sum of the processes' PSS that was seen, and at least the largest RSS that one of them had."""

    log_tail: str
    """The end of what the command wrote to stdout and stderr."""


@dataclass(frozen=True)
class _Stat:
    parent: int
    started_ticks: int
    cpu_s: float


def measure(
    command: Sequence[str], log: Path, *, variables: Mapping[str, str] | None = None, timeout_s: float = math.inf
) -> Usage:
    """Run a command to its end. If this is interrupted, or the command leaves processes behind, they are stopped.

    Args:
        command: the command line.
        log: local file for what it writes.
        variables: of its environment, beside those of `processes.environment`.
        timeout_s: after so many seconds the command is killed.
    """
    started_at, started = time.time(), time.perf_counter()
    process = processes.start(command, log, variables)
    tree = _Tree(process.pid)
    try:
        exit_code, own_cpu_s, wall_s = _watch(process, tree, started, timeout_s)
    except BaseException:
        processes.stop(process)
        raise
    finally:
        tree.stop_the_rest()
    return Usage(
        exit_code=exit_code,
        wall_s=wall_s,
        started_at=started_at,
        cpu_s=max(own_cpu_s, tree.cpu_s),
        peak_memory_bytes=tree.peak_memory_bytes,
        log_tail=processes.tail(log.read_text(errors="replace")),
    )


def _watch(process: subprocess.Popen[bytes], tree: _Tree, started: float, timeout_s: float) -> tuple[int, float, float]:
    """The exit code, the CPU seconds of the command and of what it waited for, and the seconds that it took."""
    next_cpu = next_memory = started
    ended = os.pidfd_open(process.pid)
    try:
        while True:
            now = time.perf_counter()
            if now >= started + timeout_s:
                process.kill()
            if now >= next_cpu:
                tree.look()
                next_cpu = now + CPU_INTERVAL_S
            if now >= next_memory:
                tree.weigh()
                next_memory = now + MEMORY_INTERVAL_S
            if _is_readable(ended, max(0.0, next_cpu - time.perf_counter())):
                wall_s = time.perf_counter() - started
                _, status, usage = os.wait4(process.pid, 0)
                process.returncode = os.waitstatus_to_exitcode(status)
                tree.look()
                tree.peak_memory_bytes = max(tree.peak_memory_bytes, 1024 * usage.ru_maxrss)  # if it was short
                return process.returncode, usage.ru_utime + usage.ru_stime, wall_s
    finally:
        os.close(ended)


def _is_readable(descriptor: int, timeout_s: float) -> bool:
    """Whether a descriptor of a process says within this time that the process has ended."""
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(1000 * timeout_s))


class _Tree:
    """A process and its descendants."""

    def __init__(self, root: int) -> None:
        self._seen: dict[tuple[int, int], float] = {}
        """(process, when it started) → CPU seconds when it was last seen."""

        self._root = root
        self._alive: set[int] = set()
        self.peak_memory_bytes = 0

    @property
    def cpu_s(self) -> float:
        """Of all processes that were ever seen."""
        return sum(self._seen.values())

    def look(self) -> None:
        """See who is there, and how much CPU time each has used."""
        stats = _stats()
        alive = {pid for pid in {self._root, *self._alive} if pid in stats and self._is_ours(pid, stats[pid])}
        children: dict[int, list[int]] = {}
        for pid, stat in stats.items():
            children.setdefault(stat.parent, []).append(pid)
        waiting = list(alive)
        while waiting:
            new = [pid for pid in children.get(waiting.pop(), []) if pid not in alive]
            alive.update(new)
            waiting += new
        for pid in alive:
            self._seen[pid, stats[pid].started_ticks] = stats[pid].cpu_s
        self._alive = alive

    def _is_ours(self, pid: int, stat: _Stat) -> bool:
        """Whether this is the process that was seen, not a later one of the same number."""
        return not self._seen or (pid, stat.started_ticks) in self._seen

    def weigh(self) -> None:
        """See how much memory the processes that were there when last looked at have."""
        self.peak_memory_bytes = max(self.peak_memory_bytes, sum(map(_pss_bytes, self._alive)))

    def stop_the_rest(self) -> None:
        """Stop what is still there: gently, then with SIGKILL."""
        deadline = time.monotonic() + processes.STOP_TIMEOUT_S
        sent = signal.SIGTERM
        self.look()
        while self._alive:
            for pid in self._alive:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, sent)
            time.sleep(CPU_INTERVAL_S)
            if time.monotonic() > deadline:
                sent = signal.SIGKILL
            self.look()


def _stats() -> dict[int, _Stat]:
    """By process. Those that have ended, but were not waited for, are left out."""
    found = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError):
                state, *fields = Path("/proc", name, "stat").read_text().rpartition(") ")[2].split()
                if state not in "ZX":
                    cpu_s = (int(fields[10]) + int(fields[11])) / _TICKS_PER_S
                    found[int(name)] = _Stat(int(fields[0]), int(fields[18]), cpu_s)
    return found


def _pss_bytes(pid: int) -> int:
    with contextlib.suppress(OSError):
        for line in Path("/proc", str(pid), "smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return 1024 * int(line.split()[1])
    return 0


def children(parent: int) -> list[int]:
    """The living processes that a process started."""
    return [pid for pid, stat in _stats().items() if stat.parent == parent]


def descendants(root: int) -> list[int]:
    """The living processes that a process started, and those that they started."""
    stats = _stats()
    found = [root]
    for pid in found:
        found += [child for child, stat in stats.items() if stat.parent == pid]
    return found[1:]
