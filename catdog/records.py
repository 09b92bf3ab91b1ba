"""What a command returns: a record that prints itself for people and serialises itself for programs.

Each command has a record class of its own beside the code that fills it. The names of the fields, in their order, are
the keys of the JSON that `--json` prints and that is saved beside the result.
"""

import dataclasses
from typing import Any, ClassVar


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
    """The base of all records."""

    failure_exit_code: ClassVar[int] = 1
    """What the command exits with where there is a complaint."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, in the order of the fields."""
        return dataclasses.asdict(self)

    def summary(self) -> list[str]:
        """The lines that the command prints for people."""
        raise TypeError(f"{type(self).__name__} must define summary()")

    def complaint(self) -> str | None:
        """Why a command that is done must not count as a success, as an error text; None where it counts as one."""
        return None


def percent(share: float) -> str:
    """`0.9876` as `98.76 %`."""
    return f"{100 * share:.2f} %"


def counted(counts: dict[str, int]) -> str:
    """Counts by name, as people read them.

    Example:
        >>> counted({"cat": 1200, "dog": 3})
        '1,200 cat, 3 dog'
    """
    return ", ".join(f"{count:,} {name}" for name, count in counts.items())


def rate(seconds: float, images_per_s: float) -> str:
    """`12.3` and `456` as `12.3 s, 456 images/s`."""
    return f"{seconds:,.1f} s, {images_per_s:,.0f} images/s"


def plural(number: int, noun: str) -> str:
    """`1` and `worker` as `1 worker`; `2` and `worker` as `2 workers`."""
    return f"{number:,} {noun}{'s' * (number != 1)}"
