"""What is known of each trial, one file for each, published while the search runs.

`OUTPUT/trials/00003.json` holds trial 3: its settings as soon as it starts, a row for each epoch that it has done, and
in the end what became of it. A search that was killed reads these files, and goes on.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from catdog import storage
from catdog.tuning.space import Params

DIRECTORY: Final = "trials"

Status = Literal["running", "ok", "stopped", "cut", "error"]
"""What became of a trial:

- `running`: it is on its way, or was when the search was killed;
- `ok`: it trained all epochs;
- `stopped`: it fell behind the others, and was stopped early;
- `cut`: the hours were over;
- `error`: it failed.
"""

FINISHED: Final = ("ok", "stopped", "error")
"""Trials that the same command again does not repeat."""

_NAME: Final = re.compile(r"(\d{5,})\.json")

EpochRow = dict[str, float]
"""`epoch`, from 1, `train_loss`, `val_log_loss`, `val_accuracy`, and `at_s`: seconds since the search began."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A training with settings of its own."""

    number: int
    """From 0, in the order in which the trials started."""

    params: Params
    """What the search varies, as it was suggested; a trial trains with its rounded values."""

    status: Status = "running"
    epochs: Sequence[EpochRow] = ()
    started_s: float
    """Seconds since the search began, without those in which it did not run."""

    finished_s: float | None = None
    error: str | None = None

    @property
    def last(self) -> EpochRow | None:
        """The last epoch; None if there is none yet."""
        return self.epochs[-1] if self.epochs else None

    @property
    def seen_s(self) -> float:
        """When something was last heard of the trial, in seconds since the search began."""
        return max(self.finished_s or 0.0, self.started_s, *(row["at_s"] for row in self.epochs))


class Journal:
    """The trials of an output."""

    def __init__(self, output: str, claim: storage.Claim | None = None) -> None:
        """Read what earlier runs left.

        Args:
            output: of the search.
            claim: of the output. Nothing is written when it is lost.
        """
        self._directory = storage.join(output, DIRECTORY)
        self._claim = claim
        self._trials = {trial.number: trial for trial in self._read()}

    @property
    def trials(self) -> list[Trial]:
        """All of them, by number."""
        return [self._trials[number] for number in sorted(self._trials)]

    @property
    def unfinished(self) -> list[Trial]:
        """Trials that were on their way when the search was killed, or its hours were over."""
        return [trial for trial in self.trials if trial.status not in FINISHED]

    def write(self, trial: Trial) -> None:
        """Publish what is known of a trial.

        Raises:
            ClaimLostError: another run has taken over the output.
            StorageError: the storage failed.
        """
        if self._claim is not None:
            self._claim.check()
        storage.publish_json(storage.join(self._directory, f"{trial.number:05}.json"), dataclasses.asdict(trial))
        self._trials[trial.number] = trial

    def _read(self) -> Iterable[Trial]:
        for name in storage.list_names(self._directory, ".json"):
            if _NAME.fullmatch(name):
                found: dict[str, Any] = storage.read_json(storage.join(self._directory, name))
                yield Trial(**found)


def best_of(trials: Iterable[Trial]) -> Trial | None:
    """The trial with the lowest validation log loss: of those that trained all epochs, or else of all."""
    measured = [trial for trial in trials if trial.status != "error" and trial.last is not None]
    whole = [trial for trial in measured if trial.status == "ok"]
    return min(whole or measured, key=lambda trial: trial.epochs[-1]["val_log_loss"], default=None)
