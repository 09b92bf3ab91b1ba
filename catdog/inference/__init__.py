"""Bulk prediction: labels what is new in a collection of images, and publishes Parquet predictions.

The modules, in the order in which a run needs them: `sources` lists the images, `plan` finds what is new, cuts it into
slices and publishes them, `executors` hand the slices to workers, `draining` says when to stop, `work` labels the
slices, `publish` writes their rows, and `books` checks that no image was lost. `verification` recounts what an output
holds.
"""

import contextlib
import logging
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Literal

from catdog import bundle, failpoints, storage
from catdog.config import PredictConfig
from catdog.errors import ClaimLostError
from catdog.inference import books, executors, morning
from catdog.inference.aftermath import followed
from catdog.inference.books import RunRecord
from catdog.inference.compaction import paused
from catdog.inference.draining import Drain
from catdog.inference.plan import Plan, open_plan
from catdog.inference.publish import refuse_foreign
from catdog.inference.sources import refuse_output_inside
from catdog.inference.verification import Verification, recount, run_verify, verify
from catdog.inference.work import Job, SliceResult
from catdog.storage.manifests import Columns
from catdog.storage.patterns import Chosen

__all__ = ["PlanSummary", "RunRecord", "Verification", "plan_summary", "predict", "recount", "run_verify", "verify"]

logger = logging.getLogger(__name__)


def predict(config: PredictConfig) -> RunRecord:
    """Label what is new in a collection. The run record is written last.

    In the main thread, the first Ctrl-C or SIGTERM drains the run (`catdog.inference.draining`): it publishes what it
    has begun, writes its record, and then the signal does what it would have done.

    Raises:
        UsageError: there are no images, or the output cannot be used. Nothing was written, if that was found before the
            first images were listed (`sources.listed`).
        OutputClaimedError: another run is at work in the output. Nothing was written.
        BundleError: the model cannot be used. Nothing was written.
        ClaimLostError: another run took over the output.
        StorageError: a storage failed. What was published stays, and the same command does the rest.
        BooksError: an image was lost or counted twice.
    """
    return followed(config, _run)


def _run(config: PredictConfig) -> tuple[RunRecord, Drain]:
    """Run `predict`, but for what follows it."""
    started, started_at = time.monotonic(), datetime.now(UTC)
    sources = [storage.absolute(url, keep_slash=True) for url in config.sources]
    output = storage.absolute(config.output)
    model = bundle.load(config.model)
    refuse_output_inside(sources, output)
    refuse_foreign(output)
    drain = Drain(config.deadline)
    run_id = books.new_run_id(started_at)
    with (
        storage.claimed(output, "predict") as claim,
        _plan(config, sources, output, model.model_id, run_id=run_id, check=claim.check) as plan,
    ):
        planned = time.monotonic()
        job = Job(
            model=None if config.model is None else storage.absolute(config.model),
            model_id=model.model_id,
            output=output,
            claim_url=claim.url,
            claim_owner=claim.owner,
            roots=plan.roots,
            own=plan.listed.own,
            columns=plan.columns,
            is_after_death=claim.is_after_death,
            run_id=run_id,
            batch_size=config.batch_size,
            engine=config.engine,
            use_gpu=config.use_gpu,
        )
        executor = executors.chosen(config.executor, config.ray_address)
        ledger = books.Ledger(plan)
        try:
            if plan.num_slices:
                ledger.enter(_labelled(config, executor, job, model, plan, drain))
            plan.stop()
        except ClaimLostError:
            raise  # whoever has the claim now has taken over the plan, too
        except BaseException:
            if executor == "inline":  # the workers were threads of this process, and are gone
                plan.close(is_complete=False)
            raise
        done = time.monotonic()
        durations_s = {"plan": planned - started, "label": done - planned, "total": done - started}
        nights = morning.earlier_nights(output, job.model_id)
        record = ledger.close(
            config,
            job,
            executor=executor,
            started_at=started_at,
            durations_s=durations_s,
            calibration_error=morning.calibration_error(model.card),
            earlier=nights,
        )
        claim.check()
        with failpoints.step("record"):
            storage.publish_json(storage.join(output, books.RUNS_NAME, f"{job.run_id}.json"), record.to_dict())
        plan.close(is_complete=record.complete)
        morning.publish_metrics(output, record, is_killed=drain.reason not in (None, "deadline"))
        morning.publish_report(config, output, record, ledger.findings, nights, plan.listed.first_skipped)
    if not record.complete:
        logger.warning("%s", record.what_remains())
    return record, drain


def _labelled(
    config: PredictConfig,
    executor: Literal["inline", "ray"],
    job: Job,
    model: bundle.Bundle,
    plan: Plan,
    drain: Drain,
) -> Generator[SliceResult]:
    """Label the slices of a plan. Yields the result of each."""
    results = executors.run(
        executor, job, model, plan, drain, config.num_workers, config.cpus_per_worker, config.ray_address
    )
    with contextlib.closing(results):
        for result in results:
            plan.note_same(result.same)
            yield result


def _plan(
    config: PredictConfig,
    sources: Sequence[str],
    output: str,
    model_id: str,
    *,
    run_id: str | None = None,
    check: Callable[[], object] = bool,
) -> contextlib.AbstractContextManager[Plan]:
    return open_plan(
        sources,
        output,
        model_id,
        retry_errors=config.retry_errors,
        chosen=Chosen(include=config.include, exclude=config.exclude),
        columns=Columns(uri=config.uri_column),
        allow_empty=config.allow_empty,
        run_id=run_id,
        max_images=config.max_images,
        check=check,
        settled=contextlib.nullcontext if run_id is None else partial(paused, output),
    )


@dataclass(frozen=True, kw_only=True)
class PlanSummary:
    """What `predict` would do."""

    listed: int
    """Number of files found: the sum of the next four numbers, which the books of the run will have."""

    duplicate: int
    already_done: int
    to_label: int
    skipped: int
    num_slices: int
    executor: str
    """`inline` or `ray`."""

    model_id: str


def plan_summary(config: PredictConfig) -> PlanSummary:
    """Plan a run of `predict`, without Ray, without loading the model, and without writing anything.

    Raises the errors of `predict`.
    """
    _, model_id = bundle.read_card(config.model)
    sources = [storage.absolute(url, keep_slash=True) for url in config.sources]
    output = storage.absolute(config.output)
    with _plan(config, sources, output, model_id) as plan:
        plan.wait()
        num_skipped = sum(plan.listed.skipped.values())
        counts = asdict(plan.counts)
        return PlanSummary(
            **counts | {"listed": counts["listed"] + num_skipped},
            skipped=num_skipped,
            num_slices=plan.num_slices,
            executor=executors.chosen(config.executor, config.ray_address),
            model_id=model_id,
        )
