"""How far a training is: told by its first worker, logged by the driver."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

from catdog.training.recorder import Row

logger = logging.getLogger(__name__)

INTERVAL_S: Final = 10.0
"""Between two lines within an epoch."""


@dataclass(frozen=True, kw_only=True)
class Tick:
    """Somewhere in an epoch."""

    epoch: int
    """From 1."""

    num_epochs: int
    step: int
    """Of the epoch, from 1."""

    steps_per_epoch: int
    loss: float
    """Mean of the epoch so far; of the first worker's images."""

    images_per_s: float
    eta_s: float

    def __str__(self) -> str:
        """One line."""
        return (
            f"Epoch {self.epoch}/{self.num_epochs}, step {self.step}/{self.steps_per_epoch}: "
            f"loss {self.loss:.4f}; {self.images_per_s:,.0f} images/s, {duration(self.eta_s)} left"
        )


def duration(seconds: float) -> str:
    """`45 s`, `12 min` or `3 h 05 min`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02} min"


class Teller:
    """The first worker's side: a tick every `INTERVAL_S`, a row after every epoch."""

    def __init__(self, queue: Any) -> None:
        self._queue = queue
        self._told = time.monotonic()

    def is_due(self) -> bool:
        """Whether it is time for a tick."""
        return time.monotonic() - self._told >= INTERVAL_S

    def tell(self, item: Tick | Row) -> None:
        """Hand it to the driver. Without the queue's actor the training goes on, unheard."""
        from ray.exceptions import RayActorError

        with contextlib.suppress(RayActorError):
            self._queue.put(item)
        self._told = time.monotonic()


@contextlib.contextmanager
def followed() -> Iterator[Any]:
    """A queue for a `Teller`, whose items are logged as they come."""
    import ray
    from ray.exceptions import RayActorError
    from ray.util.queue import Queue
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    # On the driver's own node, which must not be lost anyway.
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
