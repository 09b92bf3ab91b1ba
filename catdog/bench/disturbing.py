"""Runs `catdog predict` as real processes, night after night, and kills them and their workers at random moments."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import numpy as np

from catdog import storage
from catdog.bench import tree
from catdog.bench.growing import Growing
from catdog.bench.opened import Opened
from catdog.bench.polling import Reader
from catdog.bench.runs import STUCK_S, Run

logger = logging.getLogger(__name__)

Kind = Literal["worker", "driver", "overlap", "compaction"]
Moment = Literal["starting", "labelling", "between"]

_POLL_S: Final = 0.01

_LONGEST_DELAY_S: Final = 3.0
"""A kill comes at a random instant of so many seconds after the start of the run, or after the last kill, ..."""

_MOST_OPENED: Final = 1024
"""... or, every second time, when a random number of images up to this one has been opened: a slice's largest size."""

_ACTOR: Final = "_SliceLabeller"
"""Stands in the name of the process of an actor."""


@dataclass(frozen=True, kw_only=True)
class Disturbance:
    """A kill, two runs that were started at the same time, or a compaction."""

    kind: Kind
    moment: Moment
    """Of a kill: before the first image was opened since the kill before; while opened images were not yet published;
    or in between."""

    num_under_way: int | None
    """Images that all workers had opened, and not yet published, at a kill: they are opened again. None where it is not
    known, because the images do not lie on a local disk."""


class Disturber:
    """Starts runs and kills them.

    Attributes:
        done: what was done.
        ends: how runs ended → how many did.
        compactions: the same of compactions.
    """

    def __init__(
        self,
        growing: Growing,
        output: str,
        arguments: Sequence[str],
        *,
        opened: Opened | None,
        reader: Reader,
        scratch: str,
        seed: int,
        has_actors: bool,
    ) -> None:
        self.done: list[Disturbance] = []
        self.ends: Counter[str] = Counter()
        self.compactions: Counter[str] = Counter()
        self._growing, self._output, self._arguments = growing, output, arguments
        self._opened, self._reader, self._scratch = opened, reader, scratch
        self._has_actors = has_actors
        self._rng = np.random.default_rng(seed)
        self._runs: list[Run] = []
        self._num_runs = 0

    def disturb(self, counts: dict[Kind, int]) -> None:
        """Do so much of everything, in a random order."""
        kinds: list[Kind] = [kind for kind, count in counts.items() for _ in range(count)]
        self._rng.shuffle(kinds)
        actions: dict[Kind, Callable[[], bool]] = {
            "worker": self._kill_worker,
            "driver": self._kill_driver,
            "overlap": self._overlap,
            "compaction": self._compact,
        }
        try:
            for number, kind in enumerate(kinds):
                while not actions[kind]():
                    pass
                logger.info("%d of %d: %s", number + 1, len(kinds), self.done[-1])
            self._finish()
        finally:
            for run in self._runs:
                run.kill()

    def complete(self, max_runs: int) -> bool:
        """Run until a run comes to its end; whether one does."""
        for _ in range(max_runs):
            run = self._start(self._growing.nights)
            run.process.wait()
            self.ends[run.end] += 1
            if run.end == "done":
                return True
        return False

    def run_undisturbed(self, output: str) -> str:
        """How a single run over everything ends."""
        run = self._start(self._growing.nights, output)
        run.process.wait()
        return run.end

    def _start(self, places: Sequence[str], output: str | None = None) -> Run:
        images = [argument for place in places for argument in ("--images", place)]
        return self._run("predict", *images, "--output", output or self._output, *self._arguments)

    def _run(self, *arguments: str) -> Run:
        self._num_runs += 1
        return Run(arguments, Path(self._scratch, f"run-{self._num_runs:04d}.log"))

    def _kill_worker(self) -> bool:
        run = self._running()
        if not self._wait_moment(run):
            return False
        workers = self._workers(run)
        if not workers:
            return False
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(self._rng.choice(workers)), signal.SIGKILL)
            self._note("worker")
            return True
        return False

    def _kill_driver(self) -> bool:
        run = self._running()
        if not self._wait_moment(run) or not run.kill():
            return False
        self._note("driver")
        if self._rng.random() < 0.5:  # its actors may live on while the next run lists new files
            self._growing.add_night()
            self._runs.append(self._start(self._growing.nights))
        return True

    def _overlap(self) -> bool:
        self._finish()
        self._add_nights()
        nights = self._growing.nights
        some = [night for night in nights[:-1] if self._rng.random() < 0.5]
        first = self._start(nights)
        time.sleep(float(self._rng.uniform(0, 0.2)))
        second = self._start([nights[-1], *some])
        self._runs = [first, second]
        self.done.append(Disturbance(kind="overlap", moment="starting", num_under_way=None))
        return True

    def _compact(self) -> bool:
        """Compact beside a run, as long as it takes, or until it is killed at a random instant."""
        if not self._wait_moment(self._running()) or not self._reader.num_rows:
            return False
        compaction = self._run("compact", self._output)
        try:
            compaction.process.wait(
                STUCK_S if self._rng.random() < 0.5 else float(self._rng.uniform(0, _LONGEST_DELAY_S))
            )
        except subprocess.TimeoutExpired:
            compaction.kill()
        self.compactions[compaction.end] += 1
        self.done.append(Disturbance(kind="compaction", moment="between", num_under_way=None))
        return True

    def _running(self) -> Run:
        """A run that is under way."""
        self._reap()
        if not self._runs:
            self._add_nights()
            self._runs.append(self._start(self._growing.nights))
        return self._runs[int(self._rng.integers(len(self._runs)))]

    def _add_nights(self) -> None:
        """Add a night, unless a night's work is left."""
        while self._growing.num_pictures - self._reader.num_rows < self._growing.night_size:
            self._growing.add_night()

    def _wait_moment(self, run: Run) -> bool:
        """Wait for a random moment of a run; whether it comes before the run ends."""
        due_at = time.monotonic() + float(self._rng.uniform(0, _LONGEST_DELAY_S))
        due_opened = None
        if self._opened is not None and self._rng.random() < 0.5:
            due_opened = self._opened.num_opened + int(self._rng.integers(1, _MOST_OPENED))
        while run.process.poll() is None and not run.is_stuck:
            if self._opened is not None and due_opened is not None:
                if self._opened.num_opened >= due_opened:
                    return True
            elif time.monotonic() >= due_at:
                return True
            time.sleep(_POLL_S)
        self._reap()
        return False

    def _workers(self, run: Run) -> list[int]:
        """The processes that label for a run. Of actors, those of all runs on the cluster."""
        if not self._has_actors:
            return tree.children(run.process.pid)
        return [pid for pid in tree.descendants(os.getpid()) if _ACTOR in _command_line(pid)]

    def _note(self, kind: Kind) -> None:
        """Note a kill."""
        moment: Moment = "labelling"
        num_under_way = None
        if self._opened is not None:
            recent = self._opened.take_recent()
            num_under_way = len(recent - self._published()) if recent else 0
            moment = "labelling" if num_under_way else "between" if recent else "starting"
        self.done.append(Disturbance(kind=kind, moment=moment, num_under_way=num_under_way))

    def _published(self) -> set[str]:
        parts = storage.list_names(self._output, ".parquet")
        return {
            uri
            for part in parts
            for uri in storage.read_parquet(storage.join(self._output, part), ["uri"])["uri"].to_pylist()
        }

    def _reap(self) -> None:
        """Note how the runs ended that have. One that is stuck is ended."""
        for run in list(self._runs):
            if run.is_stuck:
                run.process.kill()
                run.process.wait()
            if run.process.poll() is not None:
                self.ends[run.end] += 1
                self._runs.remove(run)

    def _finish(self) -> None:
        """Wait for the runs that are under way."""
        while self._runs:
            self._reap()
            time.sleep(_POLL_S)


def _command_line(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path("/proc", str(pid), "cmdline").read_text().replace("\0", " ")
    return ""


@contextlib.contextmanager
def cluster(num_cpus: int) -> Iterator[str]:
    """A Ray cluster on this machine, for the length of a `with` block. Gives its address."""
    from catdog.ray_session import connect

    with connect(None, min_cpus=num_cpus):
        import ray

        yield ray.get_runtime_context().gcs_address
