"""How far a training is: the chief tells it, and the driver logs it."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator, Sequence
from typing import Any, Final

from catdog.training.history import HistoryRow
from catdog.training.observers import Observer, Tick, WorkerInfo

logger = logging.getLogger(__name__)

PATIENCE_S: Final = 10.0
"""How long the end of a training waits for its last line to reach the driver."""


class Teller(Observer):
    """Hands every tick and every epoch's row to the driver, through the queue of `followed`.

    It waits for no answer: a training goes on, unheard, where the queue's actor is gone or cannot be reached.
    """

    def __init__(self, queue: Any, worker: WorkerInfo) -> None:
        del worker
        self._queue = queue
        self._told: list[Any] = []
        """The last call of the queue's actor, once there is one."""

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

    def _tell(self, item: Tick | HistoryRow) -> None:
        self._told = [self._queue.actor.put.remote(item)]


@contextlib.contextmanager
def followed() -> Iterator[Any]:
    """A queue for a `Teller`. What comes through it is logged."""
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
                if isinstance(item, Tick):
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
