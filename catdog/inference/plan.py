"""What a run has to do: what is listed, minus what the output holds already, cut into slices.

The set operations are DuckDB's, which spills to the local temporary directory: Python never holds more than one slice
of the listing.

A slice is a stretch of the sorted listing that ends where the hash of a uri says so, less the images that are done.
Where it ends depends on that one uri alone: files that come or go leave the other slices as they are. The part's name
is the digest of what it will hold, so that a run that was killed and repeated, or started twice from the same state,
publishes the same rows under the same names. What that does not cover is two runs at once over listings that differ:
they may both label an image; `catdog verify` tells.
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
"""Images per slice, on average: a second of work for a core or two, and a file of some 60 kB."""

MAX_SLICE_SIZE: Final = 2 * SLICE_SIZE
"""Where a slice ends at the latest, which one in seven does: at the end of a run, workers wait for the last slice."""

_MEMORY_LIMIT: Final = "1GB"
_FETCH_ROWS: Final = 4096

# Members of one archive stay together, so that a slice opens one archive rather than hundreds.
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
    """A unit of work, and of commit.

    Attributes:
        part: name of the file that its rows are published as.
        files: what to label, at least one, in the order of the part's rows.
        is_retry: the part is there already, and its rows of other files stay.
    """

    part: str
    files: list[SourceFile]
    is_retry: bool = False


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Of images.

    Attributes:
        listed: everything that the listing gave.
        duplicate: the same uri listed once more.
        already_done: in the output, for this version and this model.
        to_label: the rest.
    """

    listed: int
    duplicate: int
    already_done: int
    to_label: int


class Plan:
    """The work of one run. Made by `open_plan`."""

    def __init__(self, database: duckdb.DuckDBPyConnection, model_id: str) -> None:
        self._database = database
        self._model_id = model_id
        ((listed, wanted, already_done),) = self._query(_COUNTS)
        self.counts = Counts(
            listed=listed, duplicate=listed - wanted, already_done=already_done, to_label=wanted - already_done
        )

    def slices(self) -> Iterator[Slice]:
        """All slices, in a fixed order. May be called again."""
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
    """List, subtract what is done, and count. Writes nothing but temporary files on this machine.

    Raises:
        UsageError: there are no images, or the output lies among them.
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
    # Not as an Arrow table: making one from Python values imports pandas, which takes half a second.
    with gzip.open(path, "wt", compresslevel=1) as spilled:
        for file in storage.list_images(images):
            row = {"uri": file.uri, "version": file.version, "num_bytes": file.num_bytes}
            spilled.write(json.dumps(row) + "\n")


@contextlib.contextmanager
def open_database() -> Iterator[tuple[duckdb.DuckDBPyConnection, Path]]:
    """A database in memory, and a temporary directory that takes what does not fit, and what is spilled on purpose."""
    with tempfile.TemporaryDirectory(prefix="catdog-plan-") as scratch:
        settings: dict[str, str | bool | int | float | list[str]] = {
            "memory_limit": _MEMORY_LIMIT,
            "temp_directory": scratch,
            "preserve_insertion_order": False,
            "python_enable_replacements": False,  # which import pandas, too
        }
        with duckdb.connect(config=settings) as database:
            yield database, Path(scratch)
