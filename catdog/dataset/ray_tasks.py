"""Numbered tasks as a Ray Data job."""

import functools
import logging
from collections.abc import Callable, Iterator
from typing import Any, Final

import pyarrow as pa

from catdog.errors import CatdogError

MAX_BLOCKS: Final = 10_000
"""Ray tasks per job; with more numbers than that, a task takes several of them, one after the other."""


def run(function: Callable[..., Iterator[pa.Table]], num_tasks: int, **arguments: Any) -> Iterator[pa.Table]:
    """Call `function` on the cluster for the numbers from 0 to `num_tasks`, in the column `id` of a batch; its tables.

    Raises:
        CatdogError: the one that the function raised.
    """
    import ray.data
    from ray.exceptions import RayError

    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)  # warns that progress bars are off
    numbers = ray.data.range(num_tasks, override_num_blocks=min(num_tasks, MAX_BLOCKS))
    tables = numbers.map_batches(functools.partial(function, **arguments), batch_size=1, batch_format="pyarrow")
    try:
        yield from tables.iter_batches(batch_size=None, batch_format="pyarrow")
    except RayError as error:
        # Ray's error is an instance of the worker's class too, but holds its traceback as the message.
        cause: object = error
        while isinstance(cause, RayError):
            cause = getattr(cause, "cause", None)
        if isinstance(cause, CatdogError):
            raise cause from None
        raise
