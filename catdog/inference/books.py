"""The books of a run, which say where every image went, and the run record."""

import contextlib
import logging
import math
import secrets
from collections import Counter
from collections.abc import Generator, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from typing import Any, ClassVar, Final

from catdog import provenance, records
from catdog.config import PredictConfig
from catdog.errors import BooksError, StorageError
from catdog.inference import drift, findings
from catdog.inference.findings import CONFIDENCE_EDGES
from catdog.inference.missing import missing
from catdog.inference.plan import PASSING_CODES, Plan
from catdog.inference.progress import Progress
from catdog.inference.publish import RUNS_NAME
from catdog.inference.work import Job, SliceResult
from catdog.metrics import Estimate

logger = logging.getLogger(__name__)

__all__ = ["RUNS_NAME", "Books", "Ledger", "RunRecord", "new_run_id"]

DENIED_IMAGES: Final = 256
"""If a run cannot get at any of so many images, which are its first, it stops: their storage is closed to it."""


def new_run_id(now: datetime) -> str:
    """A unique name for a run. Names sort by time."""
    return f"{now.astimezone(UTC):%Y%m%dT%H%M%S.%fZ}-{secrets.token_hex(4)}"


@dataclass(frozen=True, kw_only=True)
class Books:
    """Where the images of a run went. The books balance if `listed` is the sum of the other numbers."""

    listed: int
    ok: int
    error: int
    already_done: int
    duplicate: int
    """Entries of the listing whose image was listed before."""

    skipped: int = 0
    """Things that the listing passed over: files that are no images, a directory that may not be read, ..."""

    remaining: int = 0
    """Images that were listed and not labelled, because the run was drained, or had labelled `--max-images`."""

    def check(self, whose: str = "") -> None:
        """Raise `BooksError` unless the books balance. The message begins with `whose`."""
        parts = (self.ok, self.error, self.already_done, self.duplicate, self.skipped, self.remaining)
        if self.listed != sum(parts) or min(parts) < 0:
            raise BooksError(
                f"{whose}listed must be ok + error + already_done + duplicate + skipped, and in a run that was stopped "
                f"+ remaining. Received: {asdict(self)}"
            )

    @property
    def labelled(self) -> int:
        """Number of rows that the run wrote."""
        return self.ok + self.error

    def __str__(self) -> str:
        return (
            f"{self.listed:,} listed = {self.ok:,} ok + {self.error:,} error "
            f"+ {self.already_done:,} already done + {self.duplicate:,} duplicate + {self.skipped:,} skipped"
            + (f" + {self.remaining:,} remaining" if self.remaining else "")
        )


@dataclass(frozen=True, kw_only=True)
class RunRecord(records.Record):
    """What a run of `predict` did: the content of `_runs/<run_id>.json`."""

    run_id: str
    output: str
    model_id: str
    executor: str
    books: Books
    labels: dict[str, int]
    """`cat` or `dog` → number of rows of this run."""

    needs_review: int
    """Number of rows of this run that a person should review."""

    errors: dict[str, int]
    """Error code → number of rows of this run."""

    failed_fraction: float
    """Share of errors among the rows of this run."""

    failed_fraction_exceeded: bool
    """Whether more images failed than `--max-failed-fraction` and `--min-failures` allow."""

    skipped: dict[str, int]
    """Reason → number of things that the listing passed over: `not_an_image`, a directory that may not be read, ..."""

    parts: list[str]
    """Names of the part files that this run wrote."""

    num_bytes: int
    """Size of the images that this run read."""

    engines: dict[str, int]
    """Engine and number format → number of labels: `{"tensorflow bfloat16": 1200}`."""

    started_at: str
    durations_s: dict[str, float]
    """`plan`, `label` or `total` → seconds."""

    thread_s: dict[str, float]
    """`decode`, `score` or `publish` → seconds, summed over all threads."""

    images_per_s: float
    config: dict[str, Any]
    versions: dict[str, str]
    host: provenance.Host

    # What follows is not in the records of older catdogs.

    confidence_edges: list[float] = field(default_factory=list)
    """Edges of the bins of `confidence`."""

    confidence: dict[str, list[int]] = field(default_factory=dict)
    """`cat` or `dog` → number of rows of this run in each bin of their confidence."""

    review_reasons: dict[str, int] = field(default_factory=dict)
    """Review reason → number of rows of this run."""

    expected_accuracy: Estimate | None = None
    """Share of the labels that are right if the model is calibrated for these photographs, without those that show
    neither animal (`Ledger.expected_accuracy`); None if nothing was labelled."""

    drift: list[str] = field(default_factory=list)
    """How this run's rows differ from those of earlier runs, a sentence each."""

    missing: list[str] = field(default_factory=list)
    """What the listing may lack, a sentence each: folders that could not be read, images that were there before."""

    replaced: dict[str, int] | None = None
    """Earlier run → number of its rows, all of them errors, that rows of this run replace; under an empty name, how
    many rows of this run may have replaced some, and nobody knows whose. None in the records of older catdogs."""

    checksum: str | None = None
    """Of all labels of this run (`Findings.checksum`), in hex. `catdog verify` computes it anew."""

    is_listed: bool = True
    """Whether the listing came to its end."""

    complete: bool = True
    """Whether the listing came to its end, and nothing that it listed remains."""

    plans: list[str] = field(default_factory=list)
    """The runs that died, and whose plans this run took over."""

    def summary(self) -> list[str]:
        """The numbers of labels and errors, and the books."""
        if self.books.labelled:
            took = records.rate(self.durations_s["total"], self.images_per_s)
            head = f"Labelled {self.books.labelled:,} images in {took} ({self.executor})."
        elif self.books.already_done and self.complete:
            head = "Nothing to label: everything listed is labelled already."
        elif not self.complete:
            head = "Stopped before anything was labelled."
        else:
            head = "Nothing to label: no image was found."
        return [
            head,
            f"  labels   {records.counted(self.labels)}; {self.needs_review:,} need review",
            *(f"  missing  {text}" for text in self.missing),
            *(f"  drift    {text}" for text in self.drift),
            *([f"  errors   {records.counted(self.errors)}"] if self.errors else []),
            *([f"  skipped  {records.counted(self.skipped)}"] if self.skipped else []),
            f"  books    {self.books}",
            *([] if self.complete else [f"  stopped  {self.what_remains()}"]),
            f"Predictions: {self.output} (run {self.run_id})",
        ]

    def what_remains(self) -> str:
        """What a run has left that is not complete."""
        least = "" if self.is_listed else "at least "
        return f"{least}{self.books.remaining:,} listed images are not labelled yet: the same command does the rest"

    failure_exit_code: ClassVar[int] = 3

    def complaint(self) -> str | None:
        """The error text if more images failed than the configuration allows."""
        if not self.failed_fraction_exceeded:
            return None
        return (
            f"--max-failed-fraction allows {self.config['max_failed_fraction']:g} of the images to fail"
            f"{self._minimum()}. "
            f"Received: {self.books.error} of {self.books.labelled} failed"
        )

    def _minimum(self) -> str:
        minimum = self.config["min_failures"]
        has_effect = minimum > 1 and self.config["max_failed_fraction"]
        return f", and --min-failures {minimum - 1} in any case" if has_effect else ""


def _is_exceeded(books: Books, config: PredictConfig) -> bool:
    """Whether more images failed than the configuration allows."""
    if config.max_failed_fraction == 0:
        return books.error > 0
    return books.error >= config.min_failures and books.error > config.max_failed_fraction * books.labelled


class Ledger:
    """Adds up the results of a run's slices, and closes its books."""

    def __init__(self, plan: Plan) -> None:
        """Open the books of a run with this plan, which may still grow."""
        self._plan = plan
        self._has_logged_plan = False
        self._already_done = 0
        self.parts: list[str] = []
        self.labels: Counter[str] = Counter(cat=0, dog=0)
        self.errors: Counter[str] = Counter()
        self.needs_review = 0
        self.num_bytes = 0
        self.thread_s: Counter[str] = Counter()
        self.engines: Counter[str] = Counter()
        self.findings = findings.nothing()
        self.replaced: Counter[str] = Counter()
        self._log_plan()

    def _log_plan(self) -> None:
        """Log the numbers of the plan once, when the listing has ended."""
        if self._plan.is_listed and not self._has_logged_plan:
            self._has_logged_plan = True
            counts, num_skipped = self._plan.counts, sum(self._plan.listed.skipped.values())
            logger.info(
                "Listed %d images: %d to label, %d already done, %d duplicates; %d things skipped",
                *(counts.listed, counts.to_label, counts.already_done, counts.duplicate, num_skipped),
            )

    def enter(self, results: Generator[SliceResult]) -> None:
        """Add the results of slices as they come, and show how far the run is."""
        with contextlib.closing(results), Progress(self.total, details=self.stages) as progress:
            for result in results:
                self._add(result)
                num_errors = sum(result.errors.values())
                progress.add(sum(result.labels.values()) + num_errors + result.already_done, num_errors)
                self._refuse_closed_storage(result)
                self._log_plan()

    def stages(self) -> str:
        """How long each stage takes, over all threads."""
        num = self.labels.total() + self.errors.total()
        took = (
            ", ".join(f"{stage} {1000 * seconds / num:.1f}" for stage, seconds in self.thread_s.items()) if num else ""
        )
        return f"{took} ms per image" if took else ""

    def total(self) -> tuple[int | None, bool]:
        """How many images there are to try, as far as that is known, and whether that is all."""
        return self._plan.counts.to_label, self._plan.is_listed

    def _refuse_closed_storage(self, result: SliceResult) -> None:
        """Raise `StorageError` if the run has got at none of the images that it tried first."""
        num_denied = sum(self.errors[code] for code in PASSING_CODES)
        if not result.is_retry and DENIED_IMAGES <= num_denied == self.labels.total() + self.errors.total():
            raise StorageError(
                "the storage of --images must give some of the images that it lists. "
                f"Received: {records.counted(dict(self.errors))} of the first {num_denied} images"
            )

    def _add(self, result: SliceResult) -> None:
        self._already_done += result.already_done
        if result.is_published:
            self.parts.append(result.part)
        self.labels.update(result.labels)
        self.errors.update(result.errors)
        self.needs_review += result.needs_review
        self.num_bytes += result.num_bytes
        self.engines[result.engine] += sum(result.labels.values())
        if result.findings is not None:
            findings.add(self.findings, result.findings)
        self.replaced.update(result.replaced)
        for stage in ("decode", "score", "publish"):
            self.thread_s[stage] += getattr(result, f"{stage}_s")

    def close(
        self,
        config: PredictConfig,
        job: Job,
        *,
        executor: str,
        started_at: datetime,
        durations_s: dict[str, float],
        calibration_error: float = 0.0,
        earlier: Sequence[drift.Night] = (),
    ) -> RunRecord:
        """Close the books, and return the run record.

        Args:
            config: the configuration of the run.
            job: what its workers were told.
            executor: where it labelled.
            started_at: when it began.
            durations_s: how long each stage took.
            calibration_error: how far off the model's probabilities may be on average (`expected_accuracy`).
            earlier: the nights to compare with.

        Raises:
            BooksError: the books do not balance, or a slice was labelled twice.
        """
        counts, skipped = self._plan.counts, self._plan.listed.skipped
        num_skipped = sum(skipped.values())
        books = Books(
            listed=counts.listed + num_skipped,
            ok=self.labels.total(),
            error=self.errors.total(),
            already_done=counts.already_done + self._already_done,
            duplicate=counts.duplicate,
            skipped=num_skipped,
            remaining=counts.to_label - self._plan.num_begun,
        )
        books.check()
        if len(set(self.parts)) != len(self.parts):
            raise BooksError(f"every part must be written once. Received: {Counter(self.parts).most_common(1)}")
        failed_fraction = books.error / books.labelled if books.labelled else 0.0
        record = RunRecord(
            run_id=job.run_id,
            output=provenance.redact(config.output),
            model_id=job.model_id,
            executor=executor,
            books=books,
            labels=dict(self.labels),
            needs_review=self.needs_review,
            errors=dict(sorted(self.errors.items())),
            failed_fraction=failed_fraction,
            failed_fraction_exceeded=_is_exceeded(books, config),
            skipped=skipped,
            parts=sorted(self.parts),
            num_bytes=self.num_bytes,
            engines=dict(self.engines),
            started_at=started_at.isoformat(timespec="seconds"),
            durations_s=_rounded(durations_s),
            thread_s=_rounded(self.thread_s),
            images_per_s=round(books.labelled / durations_s["label"], 1) if books.labelled else 0.0,
            config=provenance.configuration(config),
            versions=provenance.versions(),
            host=provenance.host(),
            confidence_edges=list(CONFIDENCE_EDGES),
            confidence=self.findings["confidence"],
            review_reasons=dict(sorted(self.findings["review_reasons"].items())),
            expected_accuracy=self.expected_accuracy(calibration_error),
            replaced={run: count for run, count in sorted(self.replaced.items()) if count},
            checksum=f"{self.findings['checksum']:016x}",
            is_listed=self._plan.is_listed,
            complete=self._plan.is_listed and not books.remaining,
            plans=self._plan.taken_from,
        )
        tonight = drift.night_of(record.to_dict())
        return replace(
            record,
            drift=[shift.text for shift in drift.compare(tonight, earlier).drifted],
            missing=missing(tonight, earlier, skipped, self._plan.listed.first_skipped),
        )

    def expected_accuracy(self, calibration_error: float) -> Estimate | None:
        """The share of the labels that are right, if the model is calibrated, with a 95 % interval.

        A calibrated model is right with a probability that is its confidence. So the number of right labels is expected
        to be the sum of the confidences, as in NannyML's confidence-based performance estimation (CBPE) and as in the
        average confidence of Guillory et al., "Predicting with Confidence on Unseen Distributions", ICCV 2021. The
        interval has room for chance, whose variance is the sum of c (1 - c), and for the calibration error.

        Args:
            calibration_error: how far off the model's probabilities may be on average, as measured in validation.
        """
        num = self.findings["judged"]
        if not num:
            return None
        value = self.findings["confidence_sum"] / num
        half = 1.96 * math.sqrt(self.findings["confidence_variance"]) / num + calibration_error
        ci95 = [round(max(value - half, 0.0), 6), round(min(value + half, 1.0), 6)]
        return Estimate(value=round(value, 6), ci95=ci95)


def _rounded(seconds: dict[str, float] | Counter[str]) -> dict[str, float]:
    return {stage: round(value, 3) for stage, value in seconds.items()}
