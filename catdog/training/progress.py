"""How far a training is: the chief tells it, and the driver logs it and counts what is done again."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from catdog.records import plural
from catdog.training.history import HistoryRow
from catdog.training.observers import Observer, Tick, WorkerInfo

logger = logging.getLogger(__name__)

PATIENCE_S: Final = 10.0
"""How long the end of a training waits for its last line to reach the driver."""


STEP_INTERVAL_S: Final = 0.2
"""The least time between two steps that the driver is told of. Each costs it a remote call."""


@dataclass(frozen=True)
class Started:
    """A group of workers is ready to go on from a training of `step` steps."""

    step: int
    num_workers: int


@dataclass(frozen=True)
class Stepped:
    """`step` steps are done."""

    step: int


class Tally:
    """Counts the steps that were taken, and were taken again by the next group of workers.

    Of the last steps of a group that was killed, those of its last `STEP_INTERVAL_S` may be missing.
    """

    def __init__(self) -> None:
        self.num_repeated_steps = 0
        self._reached = 0

    def heed(self, item: Started | Stepped) -> None:
        """Take note of how far the training is."""
        if isinstance(item, Started):
            lost = max(0, self._reached - item.step)
            if lost:
                logger.warning(
                    "%s going on from step %d: %s must be done again",
                    plural(item.num_workers, "worker"),
                    item.step,
                    plural(lost, "step"),
                )
            self.num_repeated_steps += lost
            self._reached = item.step
        self._reached = max(self._reached, item.step)


class Teller(Observer):
    """Hands its steps, every tick and every epoch's row to the driver, through the queue of `followed`.

    It waits for no answer: a training goes on, unheard, where the queue's actor is gone or cannot be reached.
    """

    def __init__(self, queue: Any, worker: WorkerInfo) -> None:
        self._num_workers = worker.num_workers
        self._queue = queue
        self._next_step_at = 0.0
        self._told: list[Any] = []
        """The last call of the queue's actor, once there is one."""

    def started(self, step: int) -> None:
        """Tell where this group begins."""
        self._tell(Started(step, self._num_workers))

    def stepped(self, step: int) -> None:
        """Tell the step, unless one was told just now."""
        if (now := time.monotonic()) >= self._next_step_at:
            self._next_step_at = now + STEP_INTERVAL_S
            self._tell(Stepped(step))

    def ticked(self, tick: Tick) -> None:
        """Tell it."""
        self._tell(tick)

    def epoch_done(self, history: Sequence[HistoryRow]) -> None:
        """Tell the last row."""
        self._tell(history[-1])

    def close(self) -> None:
        """Wait until the last item has arrived; the driver stops listening when the workers have ended."""
        import ray

        if self._told:
            ray.wait(self._told, timeout=PATIENCE_S)

    def _tell(self, item: Started | Stepped | Tick | HistoryRow) -> None:
        self._told = [self._queue.actor.put.remote(item)]


@contextlib.contextmanager
def followed(tally: Tally) -> Iterator[Any]:
    """A queue for a `Teller`. What comes through it is logged, and counted in `tally`."""
    import ray
    from ray.exceptions import RayActorError
    from ray.util.queue import Queue
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    # On the driver's own node: a training does not outlive that one anyway.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    queue = Queue(actor_options={"num_cpus": 0, "scheduling_strategy": here})

    def follow() -> None:
        with contextlib.suppress(RayActorError):
            while (item := queue.get()) is not None:
                if isinstance(item, Started | Stepped):
                    tally.heed(item)
                elif isinstance(item, Tick):
                    logger.info("%s", item)
                else:
                    logger.info(
                        "Epoch %(epoch)d: train loss %(train_loss).4f, accuracy %(train_accuracy).4f; "
                        "val loss %(val_loss).4f, accuracy %(val_accuracy).4f; "
                        "%(images_per_s).0f images/s, %(seconds).0f s",
                        item,
                    )

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield queue
    finally:
        with contextlib.suppress(RayActorError):
            queue.put(None)
        thread.join()
        queue.shutdown()
