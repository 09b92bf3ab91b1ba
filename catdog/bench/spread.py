"""A figure that was measured in several rounds."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Spread:
    """A figure, over the rounds."""

    median: float
    min: float
    max: float

    def __str__(self) -> str:
        """`2.51 (2.43 to 2.60)`."""
        return f"{self.median:.2f} ({self.min:.2f} to {self.max:.2f})"


def spread(values: Sequence[float]) -> Spread:
    """The spread of at least one value."""
    return Spread(median=statistics.median(values), min=min(values), max=max(values))
