"""Bulk prediction: labels what is new in a collection of images, and publishes Parquet predictions.

The modules, in the order in which a run needs them: `plan` finds what is new and cuts it into slices, `executors` hand
the slices to workers, `work` labels them, `publish` writes their rows, and `books` checks that no image was lost.
"""

import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime

from catdog import bundle, storage
from catdog.config import PredictConfig
from catdog.inference import books, executors
from catdog.inference.books import RunRecord, Verification, verify
from catdog.inference.plan import open_plan
from catdog.inference.work import Job

__all__ = ["PlanSummary", "RunRecord", "Verification", "plan_summary", "predict", "verify"]


def predict(config: PredictConfig) -> RunRecord:
    """Label what is new in a collection. The run record is written last.

    Raises:
        UsageError: there are no images, or the output cannot be used. Nothing was written.
        BundleError: the model cannot be used. Nothing was written.
        StorageError: a storage failed. What was published stays, and the same command does the rest.
        BooksError: an image was lost or counted twice.
    """
    started, started_at = time.monotonic(), datetime.now(UTC)
    output = storage.absolute(config.output)
    job = Job(
        model=None if config.model is None else storage.absolute(config.model),
        model_id=bundle.load(config.model).model_id,
        output=output,
        run_id=books.new_run_id(started_at),
        batch_size=config.batch_size,
        engine=config.engine,
        use_gpu=config.use_gpu,
    )
    with open_plan(storage.absolute(config.images), output, job.model_id, retry_errors=config.retry_errors) as plan:
        planned = time.monotonic()
        executor = executors.chosen(config.executor, config.ray_address)
        ledger = books.Ledger(plan.counts)
        if plan.counts.to_label:
            results = executors.run(executor, job, plan.slices(), config.num_workers, config.ray_address)
            ledger.enter(results)
    done = time.monotonic()
    durations_s = {"plan": planned - started, "label": done - planned, "total": done - started}
    record = ledger.close(config, job, executor=executor, started_at=started_at, durations_s=durations_s)
    storage.publish_json(storage.join(output, books.RUNS_NAME, f"{job.run_id}.json"), record.to_dict())
    return record


@dataclass(frozen=True, kw_only=True)
class PlanSummary:
    """What `predict` would do."""

    listed: int
    """Number of images listed. This and the next three are those of `catdog.inference.plan.Counts`."""

    duplicate: int
    already_done: int
    to_label: int
    num_slices: int
    executor: str
    """`inline` or `ray`."""

    model_id: str


def plan_summary(config: PredictConfig) -> PlanSummary:
    """Plan a run of `predict`, without Ray, without loading the model, and without writing anything.

    Raises the errors of `predict`.
    """
    _, model_id = bundle.read_card(config.model)
    images, output = storage.absolute(config.images), storage.absolute(config.output)
    with open_plan(images, output, model_id, retry_errors=config.retry_errors) as plan:
        return PlanSummary(
            **asdict(plan.counts),
            num_slices=sum(1 for _ in plan.slices()),
            executor=executors.chosen(config.executor, config.ray_address),
            model_id=model_id,
        )
