"""`catdog bench startup`: how long one photograph takes from the shell, and where each second goes.

Every round runs `catdog predict` inline and on an embedded Ray, a Python that imports only the libraries without which
nothing could be labelled and written, and a Python that does nothing, each as a process of its own, in turns.
"""

from __future__ import annotations

import logging
import re
import statistics
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ClassVar, Final

from catdog import scratch, storage
from catdog.bench import folders, processes, tree
from catdog.bench.record import Begun, BenchRecord
from catdog.bench.rounds import Spread, in_turn, spread
from catdog.config import BenchStartupConfig
from catdog.errors import CatdogError

NUM_PACKAGES: Final = 10
"""Packages that take the longest to import, of which the record tells."""

FLOOR: Final = "import numpy, PIL.Image, pyarrow.parquet, fsspec"
EXECUTORS: Final = ("inline", "ray")
PARTS: Final = ("decode", "score", "publish")
PROGRAMS: Final = {"floor": FLOOR, "interpreter": "pass"}

_IMPORT: Final = re.compile(r"^import time: +(\d+) \| +\d+ \| +([\w.]+)$")

logger = logging.getLogger(__name__)

Stages = dict[str, float]
"""Stage → seconds. See `BenchStartupRecord`."""


@dataclass(frozen=True, kw_only=True)
class BenchStartupRecord(BenchRecord):
    """What `startup.json` holds.

    The stages of a run, in their order, from the start of the process to its exit. Each is a median over the rounds:

    - `interpreter`: a Python that does nothing.
    - `imports`: from there to the beginning of the job: the modules of the command, and the reading of its flags.
    - `plan`: the bundle is verified, and the images are listed.
    - `model`: what labelling takes before, between and after the next three: the engine's library is imported and the
      model is loaded and checked; on Ray, Ray is started and stopped, too.
    - `decode`, `score`, `publish`: the photograph is read and decoded, and the model computed; the part file is
      written.
    - `exit`: the run record is written, and the process ends.
    """

    file_name: ClassVar[str] = "startup.json"

    command: str = "bench startup"
    seconds: dict[str, Spread]
    """Of `inline`, `ray`, `floor` and `interpreter`: whole processes."""

    inline_by_floor: Spread
    """Seconds of inline, as a multiple of those of the floor in the same round."""

    floor: str
    """The program that is the floor."""

    stages: dict[str, Stages]
    """Of `inline` and `ray`."""

    outside_labelling_s: dict[str, float]
    """Of `inline` and `ray`: all stages but `decode` and `score`."""

    import_s: dict[str, float]
    """Package → seconds of its own modules' imports, in one run of inline, the slowest first."""

    rounds: list[dict[str, float]]

    def summary(self) -> list[str]:
        """The seconds, and where they go."""
        lines = [f"Labelled one photograph, {len(self.rounds):,} times, in {self.duration_s:,.0f} s."]
        lines += [f"  {name:12}{each!s:24} s" for name, each in self.seconds.items()]
        lines.append(f"  {'inline ÷':12}{self.inline_by_floor!s:24} of {self.floor}")
        for name, stages in self.stages.items():
            parts = ", ".join(f"{stage} {seconds:.2f}" for stage, seconds in stages.items())
            lines.append(f"  {name:12}{parts}; outside labelling {self.outside_labelling_s[name]:.2f} s")
        packages = ", ".join(f"{name} {seconds:.2f}" for name, seconds in self.import_s.items())
        return [*lines, f"  {'imports':12}{packages} s", f"Bench: {self.output}"]


def bench_startup(config: BenchStartupConfig) -> BenchStartupRecord:
    """Measure, and write `startup.json`.

    Raises:
        UsageError: there is no photograph, or the output holds something else.
        CatdogError: a process failed.
    """
    begun = Begun(BenchStartupRecord, config)
    with scratch.directory("bench") as directory:
        photograph = storage.absolute(config.images) if config.images else _drawing(directory)
        next(iter(storage.list_images(photograph)))  # refuse what is not there
        bench = _Bench(config, photograph, directory)
        rounds, stages = [], []
        for number in range(config.rounds):
            seconds, found = bench.run_round(number)
            rounds.append(seconds)
            stages.append(found)
            logger.info("Round %d of %d: inline %.2f s", number + 1, config.rounds, seconds["inline"])
        import_s = bench.import_s()
    record = BenchStartupRecord(
        seconds={name: spread([each[name] for each in rounds]) for name in rounds[0]},
        inline_by_floor=spread([each["inline"] / each["floor"] for each in rounds]),
        floor=FLOOR,
        stages={
            name: {stage: statistics.median(each[name][stage] for each in stages) for stage in stages[0][name]}
            for name in EXECUTORS
        },
        outside_labelling_s={
            name: statistics.median(
                each[name] - found[name]["decode"] - found[name]["score"]
                for each, found in zip(rounds, stages, strict=True)
            )
            for name in EXECUTORS
        },
        import_s=import_s,
        rounds=rounds,
        **begun.common(),
    )
    return begun.publish(record)


def _drawing(directory: str) -> str:
    """The path of a drawn photograph."""
    from catdog import drawings

    path = Path(directory, "cat.jpg")
    drawings.draw("cat", [0]).save(path, quality=90)
    return str(path)


class _Bench:
    """The processes."""

    def __init__(self, config: BenchStartupConfig, photograph: str, directory: str) -> None:
        self._config, self._photograph, self._directory = config, photograph, directory
        self._num_runs = 0

    def run_round(self, number: int) -> tuple[dict[str, float], dict[str, Stages]]:
        """The seconds of each process, and the stages of ours."""
        seconds, starts = {}, {}
        names = [*EXECUTORS, *PROGRAMS]
        for name in in_turn(names, number):
            if name in PROGRAMS:
                usage = self._run([sys.executable, "-c", PROGRAMS[name]])
            else:
                usage, record = self._predict(name)
                starts[name] = (usage, record)
            seconds[name] = usage.wall_s
        found = {name: stages(*starts[name], seconds["interpreter"]) for name in EXECUTORS}
        return {name: seconds[name] for name in names}, found

    def import_s(self) -> dict[str, float]:
        """Package → seconds of its imports, those of a run of inline."""
        log = Path(self._directory, "imports")
        self._predict("inline", log=log)
        return packages(log.read_text(errors="replace").splitlines())

    def _predict(self, executor: str, *, log: Path | None = None) -> tuple[tree.Usage, dict[str, Any]]:
        self._num_runs += 1
        output = str(Path(self._directory, f"output-{self._num_runs}"))
        flags = ["--images", self._photograph, "--output", output, "--executor", executor]
        # TensorFlow is imported in silence, unless the command is verbose.
        verbose = [] if log is None else ["--verbose"]
        usage = self._run(processes.catdog("predict", *flags, *verbose, model=self._config.model), log)
        return usage, folders.run_record(output)

    def _run(self, command: Sequence[str], log: Path | None = None) -> tree.Usage:
        # Python inherits what the variable says, which an option would not be if the command ran in a child.
        profile = {} if log is None else {"PYTHONPROFILEIMPORTTIME": "1"}
        usage = tree.measure(command, log or Path(self._directory, "log"), variables=profile)
        if usage.exit_code:
            raise CatdogError(f"a process must succeed. Received: exit code {usage.exit_code}: {usage.log_tail}")
        return usage


def stages(usage: tree.Usage, record: dict[str, Any], interpreter_s: float) -> Stages:
    """The stages of a run of `catdog predict`. They sum up to the seconds of its process."""
    began = datetime.strptime(record["run_id"].partition("-")[0], "%Y%m%dT%H%M%S.%fZ").replace(tzinfo=UTC)
    before_s = began.timestamp() - usage.started_at
    durations_s, thread_s = record["durations_s"], {stage: record["thread_s"][stage] for stage in PARTS}
    return {
        "interpreter": interpreter_s,
        "imports": before_s - interpreter_s,
        "plan": durations_s["plan"],
        "model": durations_s["label"] - sum(thread_s.values()),
        **thread_s,
        "exit": usage.wall_s - before_s - durations_s["total"],
    }


def packages(lines: Sequence[str]) -> dict[str, float]:
    """Package → seconds of its own modules' imports, of what `-X importtime` writes; the slowest packages first.

    Example:
        >>> packages(["import time:    1000 |  9000 |   numpy.linalg", "import time:  500 | 500 | numpy"])
        {'numpy': 0.0015}
    """
    microseconds: Counter[str] = Counter()
    for line in lines:
        if found := _IMPORT.match(line):
            microseconds[found[2].partition(".")[0]] += int(found[1])
    return {name: number / 1e6 for name, number in microseconds.most_common(NUM_PACKAGES)}
