"""The executors, which label the slices of a plan: the threads of this process, or the actors of a Ray Data job.

Both run the same `Worker` over the same slices, and the rows of a slice do not depend on the executor.
"""

import time
from collections.abc import Callable, Generator
from typing import Final, Literal

from catdog import ray_session
from catdog.bundle import Bundle
from catdog.config import Executor
from catdog.errors import CatdogError
from catdog.inference.draining import Drain
from catdog.inference.plan import Plan
from catdog.inference.work import MAX_UNDER_WAY, Job, SliceResult, Worker

_MAX_WAIT_S: Final = 20.0
"""Longest wait for a cluster to have any CPU at all."""

after_publishing: Callable[[], object] = bool
"""Is called each time the threads of this process have published a part. The command line sets it."""


def chosen(executor: Executor, ray_address: str | None) -> Literal["inline", "ray"]:
    """The executor to use. `auto` means `ray` if there is a cluster to run on, else `inline`."""
    if executor != "auto":
        return executor
    is_cluster = ray_address != "local" if ray_address else bool(ray_session.cluster_address(None))
    return "ray" if is_cluster else "inline"


def run(
    executor: Literal["inline", "ray"],
    job: Job,
    model: Bundle,
    plan: Plan,
    drain: Drain,
    num_workers: int | None,
    cpus_per_worker: int | None,
    ray_address: str | None,
) -> Generator[SliceResult]:
    """Label and publish slices. Yields the result of each as it is done.

    Args:
        executor: `inline` to label on the threads of this process, or `ray` to label in a Ray Data job, whose actors
            label whole slices.
        job: what to label with, and where to publish.
        model: the job's bundle, which this process has verified. Actors load it for themselves.
        plan: whose slices are labelled.
        drain: says when no further slice is begun. Signals drain the run as soon as it labels.
        num_workers: number of decoding threads (`inline`) or largest number of actors (`ray`); None for one per core of
            this machine, or as many as the cluster has room for at the time.
        cpus_per_worker: number of CPUs of an actor, and of its decoding threads; None for as many as the nodes have,
            but no more than one model serves well.
        ray_address: address of the cluster, as for `catdog.ray_session.connect`.

    Raises:
        CatdogError: a worker raised it, or actors died too often, or the cluster has no CPU.
    """
    if executor == "inline":
        with Worker(job, num_workers, model) as worker, drain.on_signals():
            slices = plan.slices(drain.is_over)
            for result in worker.run(slices, num_suspects=MAX_UNDER_WAY if job.is_after_death else 0):
                if result.is_published:
                    after_publishing()
                yield result
        return
    with ray_session.connect(ray_address):
        from catdog.inference import ray_job

        _wait_for_cpus(cpus_per_worker or 1)
        num_cpus = cpus_per_worker or ray_job.chosen_cpus(use_gpu=job.use_gpu)
        with drain.on_signals():  # Ray has handlers of its own, which it sets when it is joined
            slices = plan.slices(drain.is_over)
            yield from ray_job.run(
                job,
                slices,
                num_workers,
                num_cpus,
                num_slices=plan.num_slices if plan.is_listed else None,
                is_over=drain.is_over,
                take_back=plan.take_back,
            )


def _wait_for_cpus(num_cpus: int) -> None:
    """Wait for a node that has room for an actor."""
    import ray

    deadline = time.monotonic() + _MAX_WAIT_S
    while (
        most := max((int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]), default=0)
    ) < num_cpus:
        if time.monotonic() > deadline:
            raise CatdogError(
                f"The cluster must have a node with a CPU for each of the --cpus-per-worker={num_cpus} of an actor. "
                f"Received: at most {most} within {_MAX_WAIT_S:g} s"
            )
        time.sleep(1)
