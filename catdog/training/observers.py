"""What watches a training, step by step, and cannot disturb it.

An observer lives in a training worker, and is told there what the worker does. The driver gives the training factories
of observers; each worker makes observers of its own with them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from catdog.provenance import one_line
from catdog.training.history import HistoryRow

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class WorkerInfo:
    """What an observer is told of the worker that it watches."""

    rank: int
    """From 0. Worker 0 is the chief, and the only one that writes to the output."""

    num_workers: int
    output: str
    """The training's output directory, a URL."""


@dataclass(frozen=True, kw_only=True)
class Tick:
    """How far a training is, somewhere in an epoch."""

    epoch: int
    """From 1."""

    num_epochs: int
    step: int
    """Steps done of this epoch."""

    steps_per_epoch: int
    loss: float
    """Mean loss of this worker's images in the epoch so far."""

    images_per_s: float
    eta_s: float
    """Seconds to the end of the training."""

    @property
    def steps_done(self) -> int:
        """Steps done of the whole training."""
        return (self.epoch - 1) * self.steps_per_epoch + self.step

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


class Observer:
    """Watches one worker of a training. Its methods do nothing: override those that you want to hear of.

    The worker waits until a method returns. A method that raises is called again at the next event.
    """

    def started(self, step: int) -> None:
        """The worker is ready to go on from a training of `step` steps."""

    def stepped(self, step: int) -> None:
        """The worker has taken one more step; `step` are done."""

    def ticked(self, tick: Tick) -> None:
        """Some seconds have passed within an epoch."""

    def saving(self, step: int) -> None:
        """The chief begins to save the checkpoint of `step` steps. The other workers save nothing."""

    def saved(self, step: int) -> None:
        """The checkpoint of `step` steps is saved."""

    def epoch_done(self, history: Sequence[HistoryRow]) -> None:
        """An epoch is done and saved; `history` has a row for each epoch so far."""

    def finishing(self) -> None:
        """Every step is done. The chief writes the model bundle next."""

    def close(self) -> None:
        """The worker is about to end, with or without a model. Nothing comes after this."""


ObserverFactory = Callable[[WorkerInfo], Observer]
"""Makes the observer of a worker. It is pickled on its way from the driver to the workers."""


class Observers(Observer):
    """Many observers as one that never raises: what an observer raises is logged, once per observer."""

    def __init__(self, factories: Iterable[ObserverFactory], worker: WorkerInfo) -> None:
        self._failed: set[int] = set()
        """Of which observers, by their `id`, an error has been logged."""

        self._observers: list[Observer] = []
        for factory in factories:
            try:
                self._observers.append(factory(worker))
            except Exception as error:
                self._complain(factory, error)

    def started(self, step: int) -> None:
        """Tell each observer."""
        self._tell(lambda observer: observer.started(step))

    def stepped(self, step: int) -> None:
        """Tell each observer."""
        self._tell(lambda observer: observer.stepped(step))

    def ticked(self, tick: Tick) -> None:
        """Tell each observer."""
        self._tell(lambda observer: observer.ticked(tick))

    def saving(self, step: int) -> None:
        """Tell each observer."""
        self._tell(lambda observer: observer.saving(step))

    def saved(self, step: int) -> None:
        """Tell each observer."""
        self._tell(lambda observer: observer.saved(step))

    def epoch_done(self, history: Sequence[HistoryRow]) -> None:
        """Tell each observer."""
        self._tell(lambda observer: observer.epoch_done(history))

    def finishing(self) -> None:
        """Tell each observer."""
        self._tell(lambda observer: observer.finishing())

    def close(self) -> None:
        """Tell each observer."""
        self._tell(lambda observer: observer.close())

    def _tell(self, event: Callable[[Observer], None]) -> None:
        for observer in self._observers:
            try:
                event(observer)
            except Exception as error:
                self._complain(observer, error)

    def _complain(self, source: object, error: Exception) -> None:
        if id(source) not in self._failed:
            self._failed.add(id(source))
            made_by = getattr(source, "func", source)  # a factory may be a `functools.partial`
            name = getattr(made_by, "__name__", type(source).__name__)
            logger.warning("%s failed; the training goes on: %s", name, one_line(error))
