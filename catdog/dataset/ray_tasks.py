"""Numbered tasks as a Ray Data job."""

import logging
from collections.abc import Callable, Iterator
from typing import Any, Final

import pyarrow as pa

from catdog import errors

_MAX_BLOCKS: Final = 10_000
"""Ray tasks per job; with more numbers than that, a task takes several of them, one after the other."""

_RESULT_SCHEMA: Final = pa.schema([("error", pa.string()), ("message", pa.string()), ("table", pa.binary())])
"""What a task hands back: a table as an Arrow stream, or our own error. Raised, Ray would log the error with a page of
traceback, and put its own words to it."""


def run(function: Callable[..., pa.Table], num_tasks: int, **arguments: Any) -> Iterator[pa.Table]:
    """Call `function(number, **arguments)` on the cluster for the numbers up to `num_tasks`; its tables, as they come.

    Raises:
        CatdogError: the one that the function raised.
    """
    import ray.data

    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)  # warns that progress bars are off
    results = ray.data.range(num_tasks, override_num_blocks=min(num_tasks, _MAX_BLOCKS)).map_batches(
        _call, batch_size=1, batch_format="pyarrow", fn_kwargs={"function": function, "arguments": arguments}
    )
    for batch in results.iter_batches(batch_size=None, batch_format="pyarrow"):
        for result in batch.to_pylist():
            if result["error"] is not None:
                raise getattr(errors, result["error"])(result["message"])
            with pa.ipc.open_stream(result["table"]) as stream:
                yield stream.read_all()


def _call(batch: pa.Table, function: Callable[..., pa.Table], arguments: dict[str, Any]) -> Iterator[pa.Table]:
    for number in batch["id"].to_pylist():
        result: dict[str, str | bytes]
        try:
            result = {"table": _to_bytes(function(number, **arguments))}
        except errors.CatdogError as error:
            result = {"error": type(error).__name__, "message": str(error)}
        yield pa.Table.from_pylist([result], schema=_RESULT_SCHEMA)


def _to_bytes(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    data: bytes = sink.getvalue().to_pybytes()
    return data
