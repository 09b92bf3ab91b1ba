"""The listing of a run, in chunks that go to local files: labelling begins while the listing goes on."""

import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, Full, Queue
from typing import Final, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from catdog.schema import table_of_columns, versioned
from catdog.storage import SourceFile, outages

T = TypeVar("T")

FIRST_SIZE: Final = 20_000
"""Number of entries in the first chunk. Each further one has `GROWTH` times as many, up to `MAX_SIZE`."""

MAX_SIZE: Final = 400_000
"""So many entries, and what the output holds of them, fit into the memory of the database several times."""

GROWTH: Final = 4

FIRST_S: Final = 5.0
"""A chunk also ends after some time, if its listing is slow: the first after so many seconds, each further one after
`GROWTH` times as many, up to `MAX_S`."""

MAX_S: Final = 60.0

_ROWS_IN_MEMORY: Final = 20_000

_POLL_S: Final = 0.1

LISTED_SCHEMA: Final = versioned(
    "listed", 1, [pa.field("uri", pa.string()), pa.field("version", pa.string()), pa.field("num_bytes", pa.int64())]
)


@dataclass(frozen=True)
class Chunk:
    """A piece of a listing, in a local file of `LISTED_SCHEMA`."""

    path: Path
    is_last: bool


def chunks(files: Iterable[SourceFile], directory: Path, stop: threading.Event) -> Iterator[Chunk]:
    """Write a listing to local files, until `stop` is set. Whoever takes a chunk removes its file.

    The last chunk may be empty.
    """
    remaining = iter(files)
    size, seconds = FIRST_SIZE, FIRST_S
    number, is_last = 0, False
    while not is_last:
        path = directory / f"listed-{number}.parquet"
        is_last = _write(path, remaining, size, time.monotonic() + seconds, stop)
        yield Chunk(path, is_last)
        number += 1
        size, seconds = min(GROWTH * size, MAX_SIZE), min(GROWTH * seconds, MAX_S)


def _write(path: Path, files: Iterator[SourceFile], size: int, deadline: float, stop: threading.Event) -> bool:
    """Write up to so many files of a listing. Whether the listing has ended."""
    uris: list[str] = []
    versions: list[str] = []
    sizes: list[int] = []
    num_written = 0

    with pq.ParquetWriter(path, LISTED_SCHEMA, compression="snappy") as writer:

        def flush() -> int:
            writer.write_table(table_of_columns([uris, versions, sizes], LISTED_SCHEMA))
            num = len(uris)
            for column in (uris, versions, sizes):
                column.clear()
            return num

        for file in files:
            if stop.is_set():
                break
            uris.append(file.uri)
            versions.append(file.version)
            sizes.append(file.num_bytes)
            if len(uris) == _ROWS_IN_MEMORY:
                num_written += flush()
            if num_written + len(uris) >= size or time.monotonic() > deadline:
                flush()
                return False
        flush()
        return True


def ahead(items: Iterator[T], stop: threading.Event) -> Iterator[T]:
    """The items of an iterator, which a thread takes ahead, one at a time. It ends early when `stop` is set."""
    queue: Queue[tuple[T | None, BaseException | None]] = Queue(1)

    def put(item: T | None, error: BaseException | None = None) -> None:
        while not stop.is_set():
            try:
                queue.put((item, error), timeout=_POLL_S)
                return
            except Full:
                continue

    def take() -> None:
        with outages.stoppable(stop):
            try:
                for item in items:
                    if stop.is_set():
                        return
                    put(item)
                put(None)
            except BaseException as error:  # the one who iterates raises it
                put(None, error)

    threading.Thread(target=take, name="catdog-lister", daemon=True).start()
    while not stop.is_set():
        try:
            item, error = queue.get(timeout=_POLL_S)
        except Empty:
            continue
        if error is not None:
            raise error
        if item is None:
            return
        yield item
