"""A group of training workers on Ray Train, started again when they fail."""

from __future__ import annotations

import functools
import logging
import time
import uuid
from collections.abc import Sequence
from typing import Final

import ray
import ray.train

from catdog import architectures, bundle, provenance, ray_internals, scratch, storage
from catdog.dataset.reading import DatasetInfo
from catdog.errors import CatdogError, StorageError, TrainingError
from catdog.schema import CLASS_NAMES
from catdog.training import checkpoint, decoding, progress
from catdog.training.loop import Briefing, train_loop
from catdog.training.observers import ObserverFactory
from catdog.training.progress import Teller
from catdog.training.recorder import Recorder
from catdog.training.request import Request, ResolvedTrainConfig

logger = logging.getLogger(__name__)

RESOURCES_TIMEOUT_S: Final = 10
"""How long to wait for nodes that are just joining the cluster."""

RESIZE_INTERVAL_S: Final = 60.0
"""How often a training with fewer workers than asked for looks for room for more of them."""


PAUSES_S: Final = (5.0, 20.0, 60.0)
"""How long to wait before the first, the second and every later restart in a row after a storage has failed."""


def run(request: Request, *, in_memory: bool | None, observers: Sequence[ObserverFactory]) -> int:
    """Have a group of workers train, until the output holds the model.

    Args:
        request: what to train.
        in_memory: hold the decoded images in the object store, or stream them; None: whatever fits.
        observers: what watches every worker.

    Returns:
        The number of steps that were done again.

    Raises:
        StorageError: a storage kept failing.
        TrainingError: the workers kept failing, or the cluster cannot hold them.
    """
    config, info = request.config, request.info
    check_resources(config)
    if config.weights == "none" and config.from_ is None and architectures.architecture(config.arch).has_backbone:
        logger.warning("%s is made to be fine-tuned: from random weights it learns badly", config.arch)
    train, val = decoding.sources(info, config.image_size, in_memory=in_memory)
    tally = progress.Tally()
    with progress.followed(tally) as queue, scratch.directory("train") as bookkeeping:
        briefing = Briefing(
            config=config,
            steps_per_epoch=info.num_images("train") // config.batch_size,
            train=train,
            val=val,
            class_weights=class_weights(config, info),
            claim_url=request.claim.url,
            weights=None if request.weights is None else ray.put(request.weights),
            card={
                "data_digest": info.digest,
                "parent_model_id": config.from_id,
                "pretrained_weights": architectures.weights_source(config.arch, config.weights),
                "versions": provenance.versions(),
            },
            observers=tuple(observers),
            chief_observers=(Recorder, functools.partial(Teller, queue)),
        )
        _run_until_done(briefing, bookkeeping)
    return tally.num_repeated_steps


def class_weights(config: ResolvedTrainConfig, info: DatasetInfo) -> tuple[float, float]:
    """The weight of an image of each class in the loss. Their mean over the training images is 1."""
    if config.class_weights == "none":
        return 1.0, 1.0
    num_cats, num_dogs = (info.counts["train"][name] for name in CLASS_NAMES)
    total = num_cats + num_dogs
    return total / (2 * num_cats), total / (2 * num_dogs)


def _run_until_done(briefing: Briefing, bookkeeping: str) -> None:
    """Run the workers, and when they fail run them again from the last checkpoint, as long as that leads any further.

    Args:
        briefing: what every worker is told.
        bookkeeping: a local directory, for Ray Train.
    """
    config = briefing.config
    num_workers = config.num_workers
    num_failures, reached = 0, checkpoint.latest_step(config.output)
    while True:
        trainer = ray_internals.tensorflow_trainer(
            train_loop,
            train_loop_config={"briefing": briefing},
            scaling_config=ray.train.ScalingConfig(
                num_workers=num_workers if config.min_workers is None else (config.min_workers, num_workers),
                use_gpu=config.use_gpu,
                resources_per_worker=_resources_per_worker(config),
                elastic_resize_monitor_interval_s=RESIZE_INTERVAL_S,
            ),
            # Checkpoints are our own (catdog.training.checkpoint), and so are the restarts, which Ray Train would count
            # over the whole training: it keeps only its bookkeeping here.
            run_config=ray.train.RunConfig(
                name=f"catdog-{uuid.uuid4().hex[:8]}",
                storage_path=bookkeeping,
                failure_config=ray.train.FailureConfig(max_failures=0, controller_failure_limit=0),
            ),
        )
        try:
            trainer.fit()
        except ray.exceptions.RayActorError as error:
            # No restart: Ray keeps the workers' CPUs until this process has ended.
            raise TrainingError(
                "the controller of the workers must live; the same command again goes on from the last checkpoint. "
                "Received: it died"
            ) from error
        except ray.train.TrainingFailedError as error:
            failure = _own_error(error)
            if failure is not None and not isinstance(failure, StorageError):
                raise failure from error  # a restart would end in the same error
            is_done, step = _state_of(config.output, reached)
            if is_done:
                return  # the workers failed when they were done
            if failure is None and ray_internals.is_out_of_memory(error):
                failure = _out_of_memory(config)
                if step == reached:
                    raise failure from error  # a restart would need as much
            failure = failure or TrainingError(f"the training workers must finish. Received: {_text(error)}")
            num_failures, reached = (num_failures + 1 if step == reached else 1), step
            if num_failures > config.max_failures:
                raise failure from error
            logger.warning("%s. Going on from the last checkpoint (restart %d)", failure, num_failures)
            if isinstance(failure, StorageError):
                time.sleep(PAUSES_S[min(num_failures, len(PAUSES_S)) - 1])
        else:
            return


def _state_of(output: str, reached: int) -> tuple[bool, int]:
    """Whether the output holds the model, and the step of its newest checkpoint.

    Args:
        output: of the training.
        reached: the step to return where the storage does not answer.
    """
    try:
        return storage.exists(storage.join(output, bundle.CARD_NAME)), checkpoint.latest_step(output)
    except StorageError:
        return False, reached


def _out_of_memory(config: ResolvedTrainConfig) -> TrainingError:
    return TrainingError(
        "the training workers must fit in the memory of their nodes; lower --batch-size, --image-size or "
        f"--num-workers. Received: memory ran out with --batch-size={config.batch_size} "
        f"--image-size={config.image_size} --num-workers={config.num_workers}"
    )


def check_resources(config: ResolvedTrainConfig) -> None:
    """Refuse a training that this cluster cannot hold: Ray would wait for ever.

    Raises:
        TrainingError: the cluster lacks resources.
    """
    deadline = time.monotonic() + RESOURCES_TIMEOUT_S
    while (lack := _lack(config)) is not None:
        if time.monotonic() > deadline:
            raise TrainingError(f"the cluster must have {lack}")
        time.sleep(1)


def _lack(config: ResolvedTrainConfig) -> str | None:
    """What the cluster must have, and what it has instead; None if it can hold the training."""
    num_workers = config.min_workers or config.num_workers
    each = _resources_per_worker(config)
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    have = {name: sum(node.get(name, 0) for node in nodes) for name in each}
    needed = {name: num_workers * number + (name == "CPU") for name, number in each.items()}
    if lacking := [name for name, number in needed.items() if number > have[name]]:
        return (
            f"{', '.join(f'{needed[name]} {name}s' for name in lacking)} "
            f"for {num_workers} workers and what feeds them. "
            f"Received: {', '.join(f'{have[name]:g} {name}s' for name in lacking)}"
        )
    room = sum(min(int(node.get(name, 0) // number) for name, number in each.items()) for node in nodes)
    if room < num_workers:
        wanted = ", ".join(f"{number} {name}s" for name, number in each.items())
        sizes = "; ".join(", ".join(f"{node.get(name, 0):g} {name}s" for name in each) for node in nodes)
        return f"nodes with {wanted} for each of {num_workers} workers. Received: nodes with {sizes}"
    return None


def _resources_per_worker(config: ResolvedTrainConfig) -> dict[str, int]:
    return {"CPU": config.cpus_per_worker, **({"GPU": 1} if config.use_gpu else {})}


def _own_error(error: Exception) -> CatdogError | None:
    """The catdog error that a worker raised, if one did: rather one that will come again than a storage's.

    The other workers then failed because of it.
    """
    failures = getattr(error, "worker_failures", {}).values()
    ours = [cause for each in failures for cause in ray_internals.causes(each) if isinstance(cause, CatdogError)]
    return min(ours, key=lambda cause: isinstance(cause, StorageError), default=None)


def _text(error: Exception) -> str:
    """What went wrong, in one line. Of a worker that died, Ray says at length what kills workers."""
    failures = getattr(error, "worker_failures", {})
    for rank, failure in failures.items():
        if ray_internals.is_lost_worker(failure):
            return f"worker {rank} died"
    return " ".join(str(next(iter(failures.values()), error)).split())[-500:]
