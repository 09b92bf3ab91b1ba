"""Running numbered tasks as a Ray Data job."""

from collections.abc import Callable, Iterator
from typing import Any, Final

import pyarrow as pa

from catdog import errors, ray_internals

_MAX_BLOCKS: Final = 10_000
"""Largest number of Ray tasks of a job. If there are more numbers, each Ray task runs several, one after the other."""

_RESULT_SCHEMA: Final = pa.schema([("error", pa.string()), ("message", pa.string()), ("table", pa.binary())])
"""What a task hands back: a table, as an Arrow stream, or the class and message of a `CatdogError`. If a task raised
the error, Ray would log a page of traceback, and wrap the error in one of its own."""


def run(function: Callable[..., pa.Table], num_tasks: int, **arguments: Any) -> Iterator[pa.Table]:
    """Call `function(number, **arguments)` on the cluster for each number below `num_tasks`.

    Yields the tables that the calls return, as they come.

    Raises:
        CatdogError: a call raised it.
    """
    import ray.data

    ray_internals.quiet_ray_data(ray.data.DataContext.get_current())
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
    """Call the function for the numbers of a batch, one row of `_RESULT_SCHEMA` each."""
    for number in batch["id"].to_pylist():
        result: dict[str, str | bytes]
        try:
            result = {"table": _to_bytes(function(number, **arguments))}
        except errors.CatdogError as error:
            result = {"error": type(error).__name__, "message": str(error)}
        yield pa.Table.from_pylist([result], schema=_RESULT_SCHEMA)


def _to_bytes(table: pa.Table) -> bytes:
    """The table as an Arrow stream."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    data: bytes = sink.getvalue().to_pybytes()
    return data
