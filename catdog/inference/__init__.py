"""Bulk prediction: labels what is new in a collection of images, and publishes Parquet predictions.

The modules, in the order in which a run needs them: `sources` lists the images, `plan` finds what is new and cuts it
into slices, `executors` hand the slices to workers, `work` labels them, `publish` writes their rows, and `books` checks
that no image was lost. `verification` recounts what an output holds.
"""

import contextlib
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime

from catdog import bundle, storage
from catdog.config import PredictConfig
from catdog.inference import books, executors, morning
from catdog.inference.aftermath import followed
from catdog.inference.books import RunRecord
from catdog.inference.plan import Plan, open_plan
from catdog.inference.publish import list_parts
from catdog.inference.sources import refuse_output_inside
from catdog.inference.verification import Verification, recount, run_verify, verify
from catdog.inference.work import Job
from catdog.storage.manifests import Columns
from catdog.storage.patterns import Chosen

__all__ = ["PlanSummary", "RunRecord", "Verification", "plan_summary", "predict", "recount", "run_verify", "verify"]


@followed
def predict(config: PredictConfig) -> RunRecord:
    """Label what is new in a collection. The run record is written last.

    Raises:
        UsageError: there are no images, or the output cannot be used. Nothing was written.
        OutputClaimedError: another run is at work in the output. Nothing was written.
        BundleError: the model cannot be used. Nothing was written.
        ClaimLostError: another run took over the output.
        StorageError: a storage failed. What was published stays, and the same command does the rest.
        BooksError: an image was lost or counted twice.
    """
    started, started_at = time.monotonic(), datetime.now(UTC)
    sources = [storage.absolute(url, keep_slash=True) for url in config.sources]
    output = storage.absolute(config.output)
    model = bundle.load(config.model)
    refuse_output_inside(sources, output)
    list_parts(output)
    with (
        storage.claimed(output, "predict") as claim,
        _plan(config, sources, output, model.model_id) as plan,
    ):
        planned = time.monotonic()
        job = Job(
            model=None if config.model is None else storage.absolute(config.model),
            model_id=model.model_id,
            output=output,
            claim_url=claim.url,
            claim_owner=claim.owner,
            roots=plan.listed.roots,
            own=plan.listed.own,
            columns=plan.columns,
            is_after_death=claim.is_after_death,
            run_id=books.new_run_id(started_at),
            batch_size=config.batch_size,
            engine=config.engine,
            use_gpu=config.use_gpu,
        )
        executor = executors.chosen(config.executor, config.ray_address)
        ledger = books.Ledger(plan.counts, plan.listed.skipped)
        if plan.counts.to_label:
            results = executors.run(
                executor, job, model, plan.slices(), config.num_workers, config.cpus_per_worker, config.ray_address
            )
            ledger.enter(results)
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
        storage.publish_json(storage.join(output, books.RUNS_NAME, f"{job.run_id}.json"), record.to_dict())
        morning.publish_metrics(output, record)
        morning.publish_report(config, output, record, ledger.findings, nights)
    return record


def _plan(
    config: PredictConfig, sources: Sequence[str], output: str, model_id: str
) -> contextlib.AbstractContextManager[Plan]:
    return open_plan(
        sources,
        output,
        model_id,
        retry_errors=config.retry_errors,
        chosen=Chosen(include=config.include, exclude=config.exclude),
        columns=Columns(uri=config.uri_column),
        allow_empty=config.allow_empty,
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
        num_skipped = sum(plan.listed.skipped.values())
        counts = asdict(plan.counts)
        return PlanSummary(
            **counts | {"listed": counts["listed"] + num_skipped},
            skipped=num_skipped,
            num_slices=sum(1 for _ in plan.slices()),
            executor=executors.chosen(config.executor, config.ray_address),
            model_id=model_id,
        )
