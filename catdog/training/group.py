"""A group of training workers on Ray Train, started again when they fail."""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Callable
from typing import Any, Final

import ray
import ray.train
from ray.train.tensorflow import TensorflowTrainer
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback

from catdog import bundle, storage
from catdog.config import TrainConfig
from catdog.errors import CatdogError, TrainingError
from catdog.training import checkpoint
from catdog.training.loop import Plan

logger = logging.getLogger(__name__)

TrainLoop = Callable[[dict[str, Any]], None]
"""What every worker runs."""

RESOURCES_TIMEOUT_S: Final = 10
"""For nodes that are just joining the cluster."""

RESIZE_INTERVAL_S: Final = 60.0
"""How often a training with fewer workers than asked for looks for room for more of them."""


class _Trainer(TensorflowTrainer):  # type: ignore[misc]
    def _register_sigint_handler(self, controller: object) -> None:
        """Leave Ctrl-C as it is, and so to who called: Ray's own way ends the process, with exit code 1."""

    def _create_default_callbacks(self) -> list[object]:
        """But for those that have nothing to do: each has a process, and every process of Ray costs a little.

        There are no Ray datasets. And who is to notice a controller's death asks Ray's dashboard for it: where
        there is none, that waits ten seconds for an answer before a group of workers can end.
        """
        left_out = [DatasetsCallback]
        if not ray._private.worker.get_dashboard_url():
            left_out.append(PlacementGroupCleanerCallback)
        return [each for each in super()._create_default_callbacks() if not isinstance(each, tuple(left_out))]


def run(plan: Plan, train_loop: TrainLoop, scratch: str) -> None:
    """Run the workers, again from the last checkpoint when they fail, as long as that leads any further."""
    config = plan.config
    num_workers = config.num_workers
    num_failures, reached = 0, checkpoint.latest_step(config.output)
    while True:
        trainer = _Trainer(
            train_loop,
            train_loop_config={"plan": plan},
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
                storage_path=scratch,
                failure_config=ray.train.FailureConfig(max_failures=0, controller_failure_limit=0),
            ),
        )
        try:
            trainer.fit()
        except ray.exceptions.RayActorError as error:  # Ray keeps the workers' CPUs until this process has ended
            raise TrainingError(
                "the controller of the workers must live; the same command again goes on from the last checkpoint. "
                "Received: it died"
            ) from error
        except ray.train.TrainingFailedError as error:
            if (ours := _own_error(error)) is not None:
                raise ours from error  # it would come again
            if storage.exists(storage.join(config.output, bundle.CARD_NAME)):
                return  # nothing was left to do
            failure = TrainingError(f"the training workers must finish. Received: {_text(error)}")
            step = checkpoint.latest_step(config.output)
            num_failures, reached = (num_failures + 1 if step == reached else 1), step
            if num_failures > config.max_failures:
                raise failure from error
            logger.warning("%s. Going on from the last checkpoint (restart %d)", failure, num_failures)
        else:
            return


def check_resources(config: TrainConfig) -> None:
    """Refuse what this cluster cannot hold; Ray would wait for it for ever."""
    deadline = time.monotonic() + RESOURCES_TIMEOUT_S
    while (lack := _lack(config)) is not None:
        if time.monotonic() > deadline:
            raise TrainingError(f"the cluster must have {lack}")
        time.sleep(1)


def _lack(config: TrainConfig) -> str | None:
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


def _resources_per_worker(config: TrainConfig) -> dict[str, int]:
    return {"CPU": config.cpus_per_worker, **({"GPU": 1} if config.use_gpu else {})}


def _own_error(error: Exception) -> CatdogError | None:
    """The error of ours that a worker raised, if one did; the others then failed because of it."""
    for failure in getattr(error, "worker_failures", {}).values():
        cause: BaseException | None = failure
        while cause is not None and not isinstance(cause, CatdogError):
            # Ray wraps what a worker raised, in more than one way.
            cause = getattr(cause, "_base_exc", None) or getattr(cause, "cause", None) or cause.__cause__
        if cause is not None:
            return cause
    return None


def _text(error: Exception) -> str:
    """What went wrong, in a line. Of a worker that died Ray tells at length what kills workers."""
    failures = getattr(error, "worker_failures", {})
    died = (
        rank
        for rank, failure in failures.items()
        if isinstance(getattr(failure, "health_check_failure", None), ray.exceptions.RayActorError)
    )
    if (rank := next(died, None)) is not None:
        return f"worker {rank} died"
    return " ".join(str(next(iter(failures.values()), error)).split())[-500:]
