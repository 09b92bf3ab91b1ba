"""Bulk prediction: a collection of images to Parquet predictions, of which only what is new is labelled.

`plan` says what there is to do, `executors` have it done by `label` and `publish`, and `books` closes the books.
"""

import contextlib
import logging
import time
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any, Final, Literal

from catdog import bundle, ray_session, storage
from catdog.config import PredictConfig
from catdog.inference import books, executors
from catdog.inference.books import verify
from catdog.inference.plan import Plan, open_plan

__all__ = ["plan_summary", "predict", "verify"]

logger = logging.getLogger(__name__)

_LOG_EVERY_S: Final = 10.0


def predict(config: PredictConfig) -> dict[str, Any]:
    """Label what is new in a collection, and write the run record, last.

    Returns:
        The run record (`catdog.inference.books.run_record`).

    Raises:
        UsageError: there are no images, or the output cannot be used; nothing is written.
        BundleError: the model cannot be used; nothing is written.
        StorageError: a storage failed. What was published stays, and the same command again does the rest.
        BooksError: an image was lost or counted twice.
    """
    started, started_at = time.monotonic(), datetime.now(UTC)
    run_id = books.new_run_id(started_at)
    model_id = bundle.load(config.model).model_id
    executor = _executor(config)
    ledger = books.Ledger()
    with _plan(config, model_id) as plan:
        planned = time.monotonic()
        counts = plan.counts
        logger.info(
            "Listed %d images: %d to label, %d already done, %d duplicates",
            *(counts.listed, counts.to_label, counts.already_done, counts.duplicate),
        )
        if counts.to_label:
            job = executors.Job(
                model=None if config.model is None else storage.absolute(config.model),
                model_id=model_id,
                output=storage.absolute(config.output),
                run_id=run_id,
                batch_size=config.batch_size,
                engine=config.engine,
            )
            _label(config, job, executor, plan, ledger)
    done = time.monotonic()
    record = books.run_record(
        config,
        run_id=run_id,
        model_id=model_id,
        executor=executor,
        started_at=started_at,
        durations_s={"plan": planned - started, "label": done - planned, "total": done - started},
        books=ledger.close(counts),
        ledger=ledger,
    )
    storage.publish_json(storage.join(storage.absolute(config.output), books.RUNS_NAME, f"{run_id}.json"), record)
    return record


def plan_summary(config: PredictConfig) -> dict[str, Any]:
    """What `predict` would do, in numbers. Starts no Ray, loads no model, writes nothing. Errors as `predict`."""
    _, model_id = bundle.read_card(config.model)
    with _plan(config, model_id) as plan:
        return {
            **asdict(plan.counts),
            "num_slices": sum(1 for _ in plan.slices()),
            "executor": _executor(config),
            "model_id": model_id,
        }


def _plan(config: PredictConfig, model_id: str) -> contextlib.AbstractContextManager[Plan]:
    images, output = storage.absolute(config.images), storage.absolute(config.output)
    return open_plan(images, output, model_id, retry_errors=config.retry_errors)


def _executor(config: PredictConfig) -> Literal["inline", "ray"]:
    if config.executor != "auto":
        return config.executor
    return "ray" if ray_session.cluster_address(config.ray_address) else "inline"


def _label(config: PredictConfig, job: executors.Job, executor: str, plan: Plan, ledger: books.Ledger) -> None:
    if executor == "ray":
        results = executors.run_ray(job, plan.slices(), config.num_workers, config.ray_address)
    else:
        results = executors.run_inline(job, plan.slices(), config.num_workers)
    started = logged = time.monotonic()
    with contextlib.closing(results):
        for result in results:
            ledger.add(result)
            now = time.monotonic()
            if now - logged > _LOG_EVERY_S:
                logged = now
                rate = ledger.num_labelled / (now - started)
                logger.info(
                    "Labelled %d of %d images, %.0f per second", ledger.num_labelled, plan.counts.to_label, rate
                )
