"""Cutting a stream of items into portions that are bounded both in number and in bytes."""

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

ItemT = TypeVar("ItemT")


def portions(
    items: Iterable[ItemT], weigh: Callable[[ItemT], tuple[int, int]], max_rows: int, max_bytes: int
) -> Iterator[list[ItemT]]:
    """Cut items into portions, in order. A portion ends as soon as it reaches one of the two limits.

    Args:
        items: what to cut into portions.
        weigh: a function that returns (rows, bytes) of an item.
        max_rows: number of rows at which a portion ends. Its last item may go beyond.
        max_bytes: number of bytes at which a portion ends. Its last item may go beyond.

    Example:
        >>> list(portions([5, 5, 9, 1], lambda size: (1, size), max_rows=2, max_bytes=9))
        [[5, 5], [9], [1]]
    """
    portion: list[ItemT] = []
    num_rows = num_bytes = 0
    for item in items:
        rows, size = weigh(item)
        portion.append(item)
        num_rows += rows
        num_bytes += size
        if num_rows >= max_rows or num_bytes >= max_bytes:
            yield portion
            portion, num_rows, num_bytes = [], 0, 0
    if portion:
        yield portion
