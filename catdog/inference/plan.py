"""The plan of a run: the images that are listed and not yet in the output, cut into slices.

DuckDB computes the plan, and spills to the local temporary directory. Python never holds more than one slice of it.

The sorted listing is cut after every uri with a certain hash, and where a slice would be longer than `MAX_SLICE_SIZE`.
A slice is what lies between two cuts, without the images that are done. A file that is added or removed therefore
changes only its own slice, and the next few if these have the maximal length.

The name of a part is a digest of the images that it will hold. A run that is killed and repeated, or started twice from
the same state, thus publishes the same rows under the same names. Only two simultaneous runs over different listings
may both label an image, which `catdog.inference.verify` finds.
"""

import contextlib
import gzip
import hashlib
import itertools
import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import duckdb

from catdog import storage
from catdog.errors import UsageError
from catdog.inference.publish import KEY_COLUMNS, list_parts, part_name, read_parts, spill_keys
from catdog.storage import SourceFile

SLICE_SIZE: Final = 512
"""Average distance between two hash cuts, in images: a second of work for a core or two, and a file of some 60 kB."""

MAX_SLICE_SIZE: Final = 2 * SLICE_SIZE
"""Largest number of images in a slice. One slice in seven is that long. The limit exists because at the end of a run
all workers wait for the last slice."""

_MEMORY_LIMIT: Final = "1GB"
_FETCH_ROWS: Final = 4096

# The members of an archive stay together, so that a slice opens one archive instead of hundreds.
_ORDER: Final = "regexp_extract(uri, '^zip://.*::(.*)$', 1), uri"

_WORK: Final = """
CREATE TABLE work AS
WITH
wanted AS (
    SELECT uri, max(version) AS version, arg_max(num_bytes, version) AS num_bytes, count(*) AS num_listed
    FROM read_json($listed, columns = {uri: 'VARCHAR', version: 'VARCHAR', num_bytes: 'BIGINT'}) GROUP BY uri
),
known AS (
    SELECT
        uri, source_version AS version,
        bool_or(status = 'ok') AS is_ok, min(part) FILTER (status = 'error') AS error_part
    FROM read_parquet($done) WHERE model_id = $model_id GROUP BY ALL
)
SELECT
    wanted.*,
    known.uri IS NOT NULL AS is_known,
    CASE WHEN $retry_errors AND NOT is_ok THEN error_part END AS retried_part
FROM wanted LEFT JOIN known USING (uri, version)
"""

_COUNTS: Final = """
SELECT coalesce(sum(num_listed), 0)::BIGINT, count(*), count(*) FILTER (is_known AND retried_part IS NULL) FROM work
"""

_NEW: Final = f"""
SELECT uri, version, num_bytes, NOT is_known, md5_number_lower(uri) % {SLICE_SIZE} = 0 FROM work ORDER BY {_ORDER}
"""

_RETRIED: Final = f"""
SELECT retried_part, uri, version, num_bytes FROM work WHERE retried_part IS NOT NULL ORDER BY retried_part, {_ORDER}
"""


@dataclass(frozen=True, kw_only=True)
class Slice:
    """The unit of work: images that are labelled by one worker and published together, as one part file.

    Attributes:
        part: name of the part file.
        files: the images to label, at least one, in the order of the rows in the part file.
        is_retry: whether the part file exists, and its rows of other images are to be kept.
    """

    part: str
    files: list[SourceFile]
    is_retry: bool = False


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Numbers of images in a plan.

    Attributes:
        listed: all entries of the listing.
        duplicate: entries whose uri was listed before.
        already_done: images that have a row in the output for the same version and model, unless they are retried.
        to_label: all other images.
    """

    listed: int
    duplicate: int
    already_done: int
    to_label: int


class Plan:
    """The plan of one run. `open_plan` makes it."""

    def __init__(self, database: duckdb.DuckDBPyConnection, model_id: str) -> None:
        self._database = database
        self._model_id = model_id
        ((listed, wanted, already_done),) = self._query(_COUNTS)
        self.counts = Counts(
            listed=listed, duplicate=listed - wanted, already_done=already_done, to_label=wanted - already_done
        )

    def slices(self) -> Iterator[Slice]:
        """All slices, always in the same order. May be called more than once."""
        yield from self._new_slices()
        for part, rows in itertools.groupby(self._query(_RETRIED), key=lambda row: row[0]):
            yield Slice(part=part, files=[SourceFile(*row[1:]) for row in rows], is_retry=True)

    def _new_slices(self) -> Iterator[Slice]:
        files: list[SourceFile] = []
        length = 0
        for uri, version, num_bytes, is_new, is_last in self._query(_NEW):
            length += 1
            if is_new:
                files.append(SourceFile(uri, version, num_bytes))
            if is_last or length == MAX_SLICE_SIZE:
                if files:
                    yield self._slice(files)
                files, length = [], 0
        if files:
            yield self._slice(files)

    def _slice(self, files: list[SourceFile]) -> Slice:
        digest = hashlib.blake2b(self._model_id.encode(), digest_size=16)
        for file in files:
            digest.update(f"\n{file.uri}\t{file.version}".encode())
        return Slice(part=part_name(digest.hexdigest()), files=files)

    def _query(self, sql: str) -> Iterator[Any]:
        with self._database.cursor() as cursor:
            cursor.execute(sql)
            while rows := cursor.fetchmany(_FETCH_ROWS):
                yield from rows


@contextlib.contextmanager
def open_plan(images: str, output: str, model_id: str, *, retry_errors: bool) -> Iterator[Plan]:
    """Plan a run, and keep the plan for the length of a `with` block. Writes only temporary files on this machine.

    Raises:
        UsageError: there are no images, or the output lies within them.
        OutputRefusedError: the output holds something that predict did not write.
        StorageError: a storage failed.
    """
    if (output + "/").startswith(images.rstrip("/") + "/"):
        raise UsageError(f"--output must not lie inside --images. Received: --images={images} --output={output}")
    parts = list_parts(output)
    with open_database() as (database, scratch):
        listed, done = scratch / "listed.json.gz", scratch / "done.parquet"
        _spill_listing(listed, images)
        spill_keys(done, read_parts(output, parts, KEY_COLUMNS))
        parameters = {"listed": str(listed), "done": str(done), "model_id": model_id, "retry_errors": retry_errors}
        database.execute(_WORK, parameters)
        for spilled in (listed, done):
            spilled.unlink()
        yield Plan(database, model_id)


def _spill_listing(path: Path, images: str) -> None:
    """Write the listing to a local file."""
    # This is JSON, because making an Arrow table from Python values imports pandas, which takes half a second.
    with gzip.open(path, "wt", compresslevel=1) as spilled:
        for file in storage.list_images(images):
            row = {"uri": file.uri, "version": file.version, "num_bytes": file.num_bytes}
            spilled.write(json.dumps(row) + "\n")


@contextlib.contextmanager
def open_database() -> Iterator[tuple[duckdb.DuckDBPyConnection, Path]]:
    """An empty database in memory, and the temporary directory to which it spills, for the length of a `with` block."""
    with tempfile.TemporaryDirectory(prefix="catdog-plan-") as scratch:
        settings: dict[str, str | bool | int | float | list[str]] = {
            "memory_limit": _MEMORY_LIMIT,
            "temp_directory": scratch,
            "preserve_insertion_order": False,
            "python_enable_replacements": False,  # they would import pandas, too
        }
        with duckdb.connect(config=settings) as database:
            yield database, Path(scratch)
