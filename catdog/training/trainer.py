"""The driver of a training: checks, Ray Data pipelines, the trainer around the workers' loop, the record."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any, Final

from catdog import __version__, architectures, bundle, storage
from catdog.config import TrainConfig, to_dict
from catdog.dataset import reading
from catdog.errors import CatdogError, OutputRefusedError, TrainingError, UsageError
from catdog.ray_session import connect
from catdog.schema import CLASS_NAMES

logger = logging.getLogger(__name__)

CONFIG_NAME: Final = "train.json"
"""The configuration, written first: it makes the output ours, and says what may be resumed there."""

_NOT_THE_RESULT: Final = ("output", "num_workers", "cpus_per_worker", "use_gpu", "max_failures", "ray_address")
"""Fields that may differ when a run is resumed: they change where and how fast it computes, not what."""


_LIBRARIES: Final = ("keras", "numpy", "pillow", "ray", "tensorflow")


def train(config: TrainConfig) -> dict[str, Any]:
    """Train a model, or go on with a training that was cut short, and write its bundle.

    Returns:
        The run record: `model_id`, `output`, the best epoch's metrics, `epochs_trained`, `wall_seconds`, `resumed`.

    Raises:
        UsageError: the data cannot be trained on as configured, or the output holds something else.
        TrainingError: the workers kept failing, or the cluster cannot hold them.
    """
    started = time.monotonic()
    config = resolve(
        dataclasses.replace(config, data=storage.absolute(config.data), output=storage.absolute(config.output))
    )
    info = reading.load_info(config.data)
    _check_data(config, info)
    fingerprint = _fingerprint(config, info.digest)
    resumed = _claim_output(config, fingerprint)
    if storage.exists(storage.join(config.output, bundle.CARD_NAME)):
        logger.info("%s holds this very model already", config.output)
    else:
        _run(config, info)
    card, model_id = bundle.read_card(config.output)
    return {
        "command": "train",
        "output": config.output,
        "model_id": model_id,
        "arch": config.arch,
        "resumed": resumed,
        "wall_seconds": round(time.monotonic() - started, 1),
        **{name: card[name] for name in ("metrics", "best_epoch", "epochs_trained", "training_seconds", "precision")},
        "config": to_dict(config),
    }


def resolve(config: TrainConfig) -> TrainConfig:
    """Fill what was left to the architecture's recipe, and check the result.

    Raises:
        UsageError: an unknown architecture, or values that do not go together.
    """
    recipe = architectures.architecture(config.arch).recipe
    defaults = {
        name: getattr(recipe, name)
        for name in ("epochs", "batch_size", "image_size", "learning_rate")
        if getattr(config, name) is None
    }
    return dataclasses.replace(config, **defaults)


def _check_data(config: TrainConfig, info: reading.DatasetInfo) -> None:
    for split in ("train", "val"):
        for name in CLASS_NAMES:
            if info.counts[split][name] == 0:
                raise UsageError(f"training needs images of both classes in {split}. Received: no {name} in {info.url}")
    num_train = info.num_images("train")
    if config.batch_size is not None and config.batch_size > num_train:
        raise UsageError(
            f"--batch-size must be at most the number of training images, {num_train}. "
            f"Received: --batch-size={config.batch_size}"
        )


def _fingerprint(config: TrainConfig, data_digest: str) -> str:
    """Of everything that decides the result."""
    fields = {name: value for name, value in to_dict(config).items() if name not in (*_NOT_THE_RESULT, "data")}
    encoded = json.dumps({"config": fields, "data": data_digest}, sort_keys=True)
    return hashlib.sha256(encoded.encode()).hexdigest()


def _claim_output(config: TrainConfig, fingerprint: str) -> bool:
    """Make the output ours. Returns whether it was already."""
    storage.refuse_foreign_output(config.output, (CONFIG_NAME,))
    url = storage.join(config.output, CONFIG_NAME)
    if storage.exists(url):
        found = storage.read_json(url)
        if found["fingerprint"] != fingerprint:
            raise OutputRefusedError(
                "--output must be empty, or hold a training with the same configuration and data. "
                f"Received: {config.output} with {_difference(found, config)}"
            )
        return True
    storage.publish_json(url, {"fingerprint": fingerprint, "config": to_dict(config)})
    return False


def _difference(found: dict[str, Any], config: TrainConfig) -> str:
    ours = to_dict(config)
    differing = [
        f"{name}={value!r} instead of {ours.get(name)!r}"
        for name, value in found["config"].items()
        if name not in _NOT_THE_RESULT and value != ours.get(name)
    ]
    return ", ".join(differing) or "other data"


def _run(config: TrainConfig, info: reading.DatasetInfo) -> None:
    num_cpus = config.num_workers * config.cpus_per_worker
    # Training workers hold their CPUs for good; the tasks that decode for them need some of their own.
    with (
        connect(config.ray_address, min_cpus=num_cpus + (os.cpu_count() or 1)),
        tempfile.TemporaryDirectory() as scratch,
    ):
        import ray.train
        from ray.train.tensorflow import TensorflowTrainer

        from catdog.training import feed, loop

        _check_resources(config)
        image_size, batch_size = loop.resolved(config.image_size), loop.resolved(config.batch_size)
        num_images = info.num_images("train") + info.num_images("val")
        share = info.num_images("train") // config.num_workers
        with _progress() as progress:
            plan = loop.Plan(
                config=config,
                steps_per_epoch=share // (batch_size // config.num_workers),
                in_memory=feed.fits_in_memory(num_images, image_size, *_memory(ray.nodes())),
                card={
                    "data_digest": info.digest,
                    "versions": {"catdog": __version__, **{name: version(name) for name in _LIBRARIES}},
                },
                progress=progress,
            )
            trainer = TensorflowTrainer(
                loop.train_loop,
                train_loop_config={"plan": plan},
                scaling_config=ray.train.ScalingConfig(
                    num_workers=config.num_workers,
                    use_gpu=config.use_gpu,
                    resources_per_worker={"CPU": config.cpus_per_worker, **({"GPU": 1} if config.use_gpu else {})},
                ),
                # Checkpoints are our own (catdog.training.checkpoint): Ray Train keeps only its bookkeeping here.
                run_config=ray.train.RunConfig(
                    name=f"catdog-{uuid.uuid4().hex[:8]}",
                    storage_path=scratch,
                    failure_config=ray.train.FailureConfig(max_failures=config.max_failures),
                ),
                datasets={split: feed.decoded(info, split, image_size) for split in ("train", "val")},
                dataset_config=feed.SplitOnce(),
            )
            try:
                trainer.fit()
            except ray.train.TrainingFailedError as error:
                raise _cause(error) from error


def _check_resources(config: TrainConfig) -> None:
    """Refuse at once what this cluster can never hold; Ray would wait for it for ever."""
    import ray

    have = ray.cluster_resources()
    for name, needed in (
        ("CPU", config.num_workers * config.cpus_per_worker + 1),
        ("GPU", config.num_workers if config.use_gpu else 0),
    ):
        if needed > have.get(name, 0):
            raise TrainingError(
                f"the cluster must have {needed} {name}s for {config.num_workers} workers and what feeds them. "
                f"Received: {have.get(name, 0):g} {name}s"
            )


def _memory(nodes: list[dict[str, Any]]) -> tuple[float, int]:
    """(smallest node's memory in bytes, number of nodes)."""
    sizes = [node["Resources"].get("memory", 0.0) for node in nodes if node["Alive"]]
    return min(sizes), len(sizes)


def _cause(error: Exception) -> CatdogError:
    """The workers' own error where it is one of ours, else a `TrainingError` that quotes it."""
    failures = list(getattr(error, "worker_failures", {}).values())
    for failure in failures:
        cause: BaseException | None = failure
        while cause is not None and not isinstance(cause, CatdogError):
            # Ray wraps what a worker raised, and what a Ray Data task raised for it, each in a way of its own.
            cause = getattr(cause, "_base_exc", None) or getattr(cause, "cause", None) or cause.__cause__
        if cause is not None:
            return cause
    text = " ".join(str(failures[0] if failures else error).split())
    return TrainingError(f"the training workers must finish. Received: {text[-500:]}")


@contextlib.contextmanager
def _progress() -> Iterator[Any]:
    """A queue whose rows of history are logged as they come. An error that comes is raised at the end."""
    from ray.util.queue import Queue

    queue = Queue(actor_options={"num_cpus": 0})
    errors: list[TrainingError] = []

    def follow() -> None:
        while (item := queue.get()) is not None:
            if isinstance(item, TrainingError):
                errors.append(item)
            else:
                logger.info(
                    "Epoch %(epoch)d: train loss %(train_loss).4f, accuracy %(train_accuracy).4f; "
                    "val loss %(val_loss).4f, accuracy %(val_accuracy).4f; %(seconds).0f s",
                    item,
                )

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield queue
    finally:
        queue.put(None)
        thread.join()
        queue.shutdown()
    if errors:
        raise errors[0]
