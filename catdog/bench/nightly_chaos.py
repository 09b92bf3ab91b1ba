"""`catdog bench nightly-chaos`: labelling that is killed over and over must end with the rows of an undisturbed run.

A collection of pictures grows, and `catdog predict` runs over it again and again, into one output. Its workers and its
drivers are killed at random moments, two runs are started at the same time over listings that overlap, and the output
is compacted meanwhile. All the while a reader reads the output. At the end `catdog predict` is run until it completes,
and once more into another output; the rows of both must be the same.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from dataclasses import dataclass
from typing import Any, ClassVar, Final

from catdog import scratch, storage
from catdog.bench.disturbing import Disturbance, Disturber, cluster
from catdog.bench.growing import Growing
from catdog.bench.opened import Opened
from catdog.bench.polling import Reader
from catdog.bench.record import Begun, BenchRecord, refuse_cluster
from catdog.config import BenchNightlyChaosConfig
from catdog.errors import BooksError, CatdogError
from catdog.inference import recount
from catdog.records import counted, plural
from catdog.storage.urls import is_local

PARTS: Final = ("images", "disturbed", "undisturbed")

POLL_S: Final = 0.1
"""How often the reader reads."""

NUM_ACTORS: Final = 2

_MAX_LAST_RUNS: Final = 5
"""The last runs are not disturbed any more. The first of them comes to its end, unless actors of the run before it are
still there."""

_COMPARED: Final = ("uri", "source_version", "image_id", "label", "prob_dog")


@dataclass(frozen=True, kw_only=True)
class BenchNightlyChaosRecord(BenchRecord):
    """What `nightly-chaos.json` holds."""

    file_name: ClassVar[str] = "nightly-chaos.json"

    command: str = "bench nightly-chaos"
    num_images: int
    num_runs: int
    ends: dict[str, int]
    """How runs of `catdog predict` ended → number: `done`; `killed`; `refused`, because another run was at work;
    `gave up`, because workers were killed too often; or something that none should."""

    num_kills: dict[str, int]
    """`worker` or `driver` → number of those that were killed."""

    kills_by_moment: dict[str, int]
    num_overlaps: int
    """How many times two runs were started at the same time."""

    compactions: dict[str, int]
    """How runs of `catdog compact` ended → number, as for `ends`. One is refused while a run plans."""

    most_under_way: int | None
    """Images that were opened and not yet published at a kill, at most. They are what a kill costs. None where it is
    not known, because the images do not lie on a local disk."""

    num_opened_again: int | None
    """How many times an image was opened that had been opened before, over all runs."""

    num_polls: int
    num_torn: int
    """How many times the reader met a file that it could not read."""

    num_twice: int
    """How many times the reader saw an image with two rows."""

    num_shrunk: int
    """How many times the reader saw fewer rows than before. While an output is compacted, it may."""

    num_missing: int
    """Rows of the undisturbed run that are not in the disturbed output."""

    num_extra: int
    """Rows in the disturbed output that are not the undisturbed run's."""

    differences: list[str]
    """What `catdog verify` says of the disturbed output, and what was torn."""

    disturbances: list[Disturbance]

    def summary(self) -> list[str]:
        """What was done, and what it did."""
        lines = [
            f"Labelled {self.num_images:,} images in {plural(self.num_runs, 'run')} ({self.config['executor']}), "
            f"in {self.duration_s:,.0f} s.",
            f"  killed      {counted(self.num_kills)}: {counted(self.kills_by_moment)}",
            f"  overlaps    {self.num_overlaps:,} times two runs at once",
            f"  runs        {counted(self.ends)}",
        ]
        if self.compactions:
            lines.append(f"  compacted   {counted(self.compactions)}")
        if self.most_under_way is not None and self.num_opened_again is not None:
            lines.append(
                f"  done again  at most {self.most_under_way:,} images under way at a kill; "
                f"{self.num_opened_again:,} images opened again, "
                f"{self.num_opened_again / max(1, sum(self.num_kills.values())):,.0f} per kill"
            )
        return [
            *lines,
            f"  reader      {self.num_polls:,} polls: {self.num_torn:,} torn files, {self.num_twice:,} images twice, "
            f"{self.num_shrunk:,} times fewer rows than before",
            f"  rows        {self.num_missing:,} missing, {self.num_extra:,} too many, "
            "against those of an undisturbed run",
            f"Chaos: {self.output}",
        ]


def bench_nightly_chaos(config: BenchNightlyChaosConfig) -> BenchNightlyChaosRecord:
    """Label a growing collection while runs are killed, compare with an undisturbed run, and write the record.

    Raises:
        UsageError: the images or the output cannot be used.
        BooksError: the rows differ, or a reader saw what none should.
        CatdogError: a run ended as none should.
    """
    refuse_cluster(BenchNightlyChaosRecord)
    begun = Begun(BenchNightlyChaosRecord, config)
    images, disturbed, undisturbed = begun.claim(PARTS)
    found = _label(config, images, disturbed, undisturbed)
    record = begun.publish(_record(begun, found, disturbed, undisturbed))
    check(record, is_complete=found.is_complete, calm=found.calm)
    return record


@dataclass(frozen=True, kw_only=True)
class _Labelled:
    """What has been labelled, and how."""

    num_images: int
    disturber: Disturber
    reader: Reader
    is_complete: bool
    calm: str
    num_opened_again: int | None


def _label(config: BenchNightlyChaosConfig, images: str, disturbed: str, undisturbed: str) -> _Labelled:
    """Label a collection while it grows and runs are killed, and then once more."""
    with contextlib.ExitStack() as stack:
        directory = stack.enter_context(scratch.directory("bench"))
        opened = stack.enter_context(Opened()) if is_local(images) else None
        growing = Growing(images, config.images, config.night_size, opened)
        arguments = _arguments(config, stack)
        reader = Reader(disturbed, POLL_S)
        disturber = Disturber(
            growing,
            disturbed,
            arguments,
            opened=opened,
            reader=reader,
            scratch=directory,
            seed=config.seed,
            has_actors=config.executor == "ray",
        )
        with reader:
            disturber.disturb(
                {
                    "worker": config.num_worker_kills,
                    "driver": config.num_driver_kills,
                    "overlap": config.num_overlaps,
                    "compaction": config.num_compactions,
                }
            )
            is_complete = disturber.complete(_MAX_LAST_RUNS)
        num_opened_again = None if opened is None else opened.num_opened_again
        return _Labelled(
            num_images=growing.num_pictures,
            disturber=disturber,
            reader=reader,
            is_complete=is_complete,
            calm=disturber.run_undisturbed(undisturbed),
            num_opened_again=num_opened_again,
        )


def _record(begun: Begun, found: _Labelled, disturbed: str, undisturbed: str) -> BenchNightlyChaosRecord:
    disturber, reader = found.disturber, found.reader
    missing, extra = _difference(disturbed, undisturbed)
    kinds = Counter(each.kind for each in disturber.done)
    kills = [each for each in disturber.done if each.kind in ("worker", "driver")]
    under_way = [each.num_under_way for each in kills if each.num_under_way is not None]
    return BenchNightlyChaosRecord(
        num_images=found.num_images,
        num_runs=disturber.ends.total(),
        ends=dict(disturber.ends.most_common()),
        num_kills={kind: kinds[kind] for kind in ("worker", "driver")},
        kills_by_moment=dict(Counter(each.moment for each in kills)),
        num_overlaps=kinds["overlap"],
        compactions=dict(disturber.compactions.most_common()),
        most_under_way=None if found.num_opened_again is None else max(under_way, default=0),
        num_opened_again=found.num_opened_again,
        num_polls=reader.num_polls,
        num_torn=len(reader.torn),
        num_twice=reader.num_twice,
        num_shrunk=reader.num_shrunk,
        num_missing=missing,
        num_extra=extra,
        differences=[*recount(disturbed).differences, *reader.torn],
        disturbances=disturber.done,
        **begun.common(),
    )


def _arguments(config: BenchNightlyChaosConfig, stack: contextlib.ExitStack) -> list[str]:
    """The flags of every run, but for the images and the output. With actors a cluster is started for them."""
    model = [] if config.model is None else ["--model", storage.absolute(config.model)]
    if config.executor == "inline":
        return ["--executor", "inline", *model]
    address = stack.enter_context(cluster(NUM_ACTORS))
    return ["--executor", "ray", "--ray-address", address, "--cpus-per-worker", "1", *model]


def _difference(disturbed: str, undisturbed: str) -> tuple[int, int]:
    """Number of rows that only the undisturbed output has, and of those that only the disturbed one has."""
    some, others = _rows(disturbed), _rows(undisturbed)
    return (others - some).total(), (some - others).total()


def _rows(output: str) -> Counter[tuple[Any, ...]]:
    found: Counter[tuple[Any, ...]] = Counter()
    for name in storage.list_names(output, ".parquet"):
        table = storage.read_parquet(storage.join(output, name), _COMPARED)
        found.update(zip(*(table[column].to_pylist() for column in _COMPARED), strict=True))
    return found


def check(record: BenchNightlyChaosRecord, *, is_complete: bool, calm: str) -> None:
    """Check that labelling withstood everything.

    Args:
        record: what was found.
        is_complete: whether the last run over the disturbed output came to its end.
        calm: how the undisturbed run ended.

    Raises:
        BooksError: rows were lost, doubled or torn.
        CatdogError: a run ended as none should.
    """
    if not is_complete or calm != "done":
        last = "undisturbed run" if is_complete else "last run over the disturbed output"
        raise CatdogError(f"the {last} must come to its end. Received: {record.ends}, {calm}")
    found = {
        name: getattr(record, name)
        for name in ("num_missing", "num_extra", "num_torn", "num_twice", "num_shrunk")
        if getattr(record, name) and not (name == "num_shrunk" and record.compactions)
    }
    if found or record.differences:
        raise BooksError(
            "the rows must be those of an undisturbed run, and a reader must never see a torn file, an image twice, or "
            f"fewer rows than before. Received: {found}; {'; '.join(record.differences[:3])}"
        )
    if unexpected := [end for end in (*record.ends, *record.compactions) if end.startswith("exit code")]:
        raise CatdogError(f"a run must end by itself, or say that another is at work. Received: {unexpected[0]}")
