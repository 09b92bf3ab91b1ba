"""Rounds, in each of which everything is measured once, and a figure over the rounds."""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Spread:
    """A figure, over the rounds."""

    median: float
    min: float
    max: float

    def __str__(self) -> str:
        """`2.51 (2.43 to 2.60)`."""
        return f"{self.median:.2f} ({self.min:.2f} to {self.max:.2f})"

    def in_percent(self) -> str:
        """`98.7 % (97.5 to 99.1)`."""
        return f"{100 * self.median:.1f} % ({100 * self.min:.1f} to {100 * self.max:.1f})"


def spread(values: Sequence[float]) -> Spread:
    """The spread of at least one value."""
    return Spread(median=statistics.median(values), min=min(values), max=max(values))


def in_turn(steps: Iterable[T], number: int) -> list[T]:
    """The steps of a round, in reverse order in every other round: what else the machine does falls on all alike.

    Example:
        >>> [in_turn("abc", number) for number in range(2)]
        [['a', 'b', 'c'], ['c', 'b', 'a']]
    """
    return list(steps)[:: -1 if number % 2 else 1]
