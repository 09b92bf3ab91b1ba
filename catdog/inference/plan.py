"""The plan of a run: the images that are listed and not yet in the output, cut into slices.

DuckDB computes the plan, and spills to the local temporary directory. Python holds one slice of it at a time.

The sorted listing is cut after every uri with a certain hash, and where a slice would be longer than `MAX_SLICE_SIZE`.
A slice is what lies between two cuts, without the images that are done. A file that is added or removed therefore
changes only its own slice, and the next few if these have the maximal length.

The name of a part is a digest of the images that it will hold, and of what the output held of those that have no
version. A run that is killed and repeated thus publishes its rows under the same names. The plan is made while the run
holds the claim of its output, so that no other run labels the same images at the same time.

What a storage says of an image can be a fact of a moment: `PASSING_CODES` are tried again in every run. And an image
that has no version (its storage tells neither an ETag nor a time) is read again in every run. If the run finds of such
an image what the output holds, the image counts as already done, and its row stays as it is (`Slice.known`).
"""

import contextlib
import hashlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import duckdb

from catdog.inference.database import open_database
from catdog.inference.publish import KEY_COLUMNS, columns_of, list_parts, part_name, read_parts, spill_keys
from catdog.inference.sources import Listed, refuse_output_inside, spill_listing
from catdog.storage import SourceFile
from catdog.storage.manifests import Columns
from catdog.storage.patterns import Chosen

PASSING_CODES: Final = ("not_found", "permission_denied", "unreachable")
"""The error codes that tell of the storage at one moment, and nothing of the image. The next run tries it again."""

CONTENT_VERSION: Final = "sha256-"
"""How the `source_version` of an image begins that has no version in its storage: a digest of its bytes follows."""

SLICE_SIZE: Final = 512
"""Average distance between two hash cuts, in images: a second of work for a core or two, and a file of some 60 kB."""

MAX_SLICE_SIZE: Final = 2 * SLICE_SIZE
"""Largest number of images in a slice. One slice in seven is that long. The limit exists because at the end of a run
all workers wait for the last slice."""

_FETCH_ROWS: Final = 4096

# The members of an archive stay together, and so do the rows of a table: a slice opens one file instead of hundreds.
# Those of a tar archive come in their order, which the version tells: a compressed one is read from its beginning to
# its end.
_MEMBER: Final = "^(?:zip|tar|row)://(?:.*?::((?:zip|tar)://.*)|.*::(.*))$"
_ORDER: Final = (
    f"regexp_extract(uri, '{_MEMBER}', 1), regexp_extract(uri, '{_MEMBER}', 2), "
    "CASE WHEN starts_with(uri, 'tar://') THEN version END, uri, version"
)

# An archive may have two members of one name: there (uri, version) is an image. Elsewhere a file that is listed twice
# with two versions has changed in between, and the later version is the image.
_WORK: Final = f"""
CREATE TABLE work AS
WITH
wanted AS (
    SELECT uri, max(version) AS version, arg_max(num_bytes, version) AS num_bytes, count(*) AS num_listed
    FROM read_json(
        $listed, columns = {{uri: 'VARCHAR', version: 'VARCHAR', num_bytes: 'BIGINT'}}, hive_partitioning = false
    ) GROUP BY uri, CASE WHEN contains(uri, '::') THEN version END
),
done AS (
    SELECT uri, source_version AS version, status = 'ok' AS is_ok, error_code, part
    FROM read_parquet($done, hive_partitioning = false) WHERE model_id = $model_id
),
known AS (
    SELECT
        uri, version, bool_or(is_ok) AS is_ok, min(part) FILTER (NOT is_ok) AS error_part,
        min(error_code) FILTER (NOT is_ok) AS error_code
    FROM done GROUP BY ALL
),
unversioned AS (
    SELECT uri, min(part) FILTER (NOT is_ok AND (version = '' OR $retry_errors)) AS error_part
    FROM done SEMI JOIN (SELECT uri FROM wanted WHERE version = '') USING (uri) GROUP BY uri
),
contents AS (
    SELECT
        done.uri,
        list_sort(list(DISTINCT CASE WHEN done.version = '' THEN error_code ELSE done.version END)) AS known
    FROM done JOIN unversioned USING (uri)
    WHERE (starts_with(done.version, '{CONTENT_VERSION}') OR done.version = '')
        AND NOT ($retry_errors AND NOT is_ok AND part = error_part)
    GROUP BY done.uri
)
SELECT
    wanted.*,
    CASE WHEN wanted.version = '' THEN unversioned.error_part IS NOT NULL ELSE known.uri IS NOT NULL END AS is_known,
    CASE
        WHEN wanted.version = '' THEN unversioned.error_part
        WHEN NOT known.is_ok AND ($retry_errors OR known.error_code IN {PASSING_CODES}) THEN known.error_part
    END AS retried_part,
    list_filter(CASE
        WHEN wanted.version = '' THEN contents.known
        WHEN NOT known.is_ok AND NOT $retry_errors THEN [known.error_code]
    END, lambda x: x IS NOT NULL) AS known
FROM wanted LEFT JOIN known USING (uri, version) LEFT JOIN unversioned USING (uri) LEFT JOIN contents USING (uri)
"""

_COUNTS: Final = """
SELECT coalesce(sum(num_listed), 0)::BIGINT, count(*), count(*) FILTER (is_known AND retried_part IS NULL) FROM work
"""

_NEW: Final = f"""
SELECT uri, version, num_bytes, known, NOT is_known, md5_number_lower(uri) % {SLICE_SIZE} = 0
FROM work ORDER BY {_ORDER}
"""

_RETRIED: Final = f"""
SELECT retried_part, uri, version, num_bytes, known
FROM work WHERE retried_part IS NOT NULL ORDER BY retried_part, {_ORDER}
"""


@dataclass(frozen=True, kw_only=True)
class Slice:
    """The unit of work: images that are labelled by one worker and published together, as one part file.

    Attributes:
        part: name of the part file.
        files: the images to label, at least one, in the order of the rows in the part file.
        known: for each image, what the output holds of it: an error code, or versions that begin with
            `CONTENT_VERSION`. An image of which the worker finds one of these is already done.
        is_retry: whether the part file exists, and its rows of other images are to be kept.
    """

    part: str
    files: list[SourceFile]
    known: list[list[str]]
    is_retry: bool = False


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Numbers of images in a plan.

    Attributes:
        listed: all entries of the listing. What it passed over is counted elsewhere (`Listed.skipped`).
        duplicate: entries whose image was listed before.
        already_done: images that have a row in the output for the same version and model, unless they are tried again.
        to_label: all other images.
    """

    listed: int
    duplicate: int
    already_done: int
    to_label: int


class Plan:
    """The plan of one run. `open_plan` makes it.

    Attributes:
        listed: what the listing says besides the images.
        columns: the columns of the output's part files (`columns_of`).
        counts: numbers of images.
    """

    def __init__(
        self, database: duckdb.DuckDBPyConnection, model_id: str, listed: Listed, columns: tuple[str, ...]
    ) -> None:
        self._database = database
        self._model_id = model_id
        self.listed = listed
        self.columns = columns
        ((num_listed, wanted, already_done),) = self._query(_COUNTS)
        self.counts = Counts(
            listed=num_listed, duplicate=num_listed - wanted, already_done=already_done, to_label=wanted - already_done
        )

    def slices(self) -> Iterator[Slice]:
        """All slices, always in the same order. May be called more than once."""
        yield from self._new_slices()
        for part, rows in itertools.groupby(self._query(_RETRIED), key=lambda row: row[0]):
            files, known = [], []
            for _, uri, version, num_bytes, held in rows:
                files.append(SourceFile(uri, version, num_bytes))
                known.append(held or [])
            yield Slice(part=part, files=files, known=known, is_retry=True)

    def _new_slices(self) -> Iterator[Slice]:
        files: list[SourceFile] = []
        known: list[list[str]] = []
        length = 0
        for uri, version, num_bytes, held, is_new, is_last in self._query(_NEW):
            length += 1
            if is_new:
                files.append(SourceFile(uri, version, num_bytes))
                known.append(held or [])
            if is_last or length == MAX_SLICE_SIZE:
                if files:
                    yield self._slice(files, known)
                files, known, length = [], [], 0
        if files:
            yield self._slice(files, known)

    def _slice(self, files: list[SourceFile], known: list[list[str]]) -> Slice:
        digest = hashlib.blake2b(self._model_id.encode(), digest_size=16)
        for file, held in zip(files, known, strict=True):
            digest.update("\t".join([f"\n{file.uri}", file.version, *held]).encode())
        return Slice(part=part_name(digest.hexdigest()), files=files, known=known)

    def _query(self, sql: str) -> Iterator[Any]:
        with self._database.cursor() as cursor:
            cursor.execute(sql)
            while rows := cursor.fetchmany(_FETCH_ROWS):
                yield from rows


@contextlib.contextmanager
def open_plan(
    sources: Sequence[str],
    output: str,
    model_id: str,
    *,
    retry_errors: bool,
    chosen: Chosen | None = None,
    columns: Columns | None = None,
    allow_empty: bool = False,
) -> Iterator[Plan]:
    """Plan a run, and keep the plan for the length of a `with` block. Writes only temporary files on this machine.

    Args:
        sources: where the images are. An image that two sources list is a duplicate.
        output: directory of the part files.
        model_id: the model to label with.
        retry_errors: whether all images that failed are tried again, and not only those with `PASSING_CODES`.
        chosen: which of the files are labelled; None for all.
        columns: which columns of manifests hold what.
        allow_empty: whether there may be nothing to label.

    Raises:
        UsageError: there are no images, or the output lies within them.
        OutputRefusedError: the output holds something that predict did not write.
        StorageError: a storage failed.
    """
    refuse_output_inside(sources, output)
    parts = list_parts(output)
    with open_database() as (database, scratch):
        spilled, done = scratch / "listed.json.gz", scratch / "done.parquet"
        listed = spill_listing(spilled, sources, output, chosen or Chosen(), columns=columns, allow_empty=allow_empty)
        spill_keys(done, read_parts(output, parts, KEY_COLUMNS))
        parameters = {"listed": str(spilled), "done": str(done), "model_id": model_id, "retry_errors": retry_errors}
        database.execute(_WORK, parameters)
        for path in (spilled, done):
            path.unlink()
        yield Plan(database, model_id, listed, columns_of(output, parts))
