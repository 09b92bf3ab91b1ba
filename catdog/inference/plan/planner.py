"""The planner: what is listed, less what is done, in slices. DuckDB computes it, a chunk of the listing at a time.

All tables are in the memory of the database, which spills to the local temporary directory:

    chunk     the entries of the chunk, each image once
    held      what the output holds of their uris
    work      the chunk, with what is known of each image
    seen      keys of all images that were listed so far
    taken     keys of the images of slices that were taken over
    carried   new images that are less than a slice, and wait for the next chunk
    retried   images that failed, with the parts that have their rows
"""

from pathlib import Path
from typing import Any, Final

import duckdb

from catdog.inference import database as db
from catdog.inference.plan.chunks import Chunk
from catdog.inference.plan.published import OpenPlan, PublishedPlans
from catdog.inference.plan.slices import PASSING_CODES, SLICE_SIZE, Counts
from catdog.schema import PLAN_SCHEMA

MEMORY_LIMIT: Final = "400MB"
"""Of the database. It leaves room for Python and for the listing in one GiB."""

_GROUP_ROWS: Final = 20_480

# The members of an archive stay together, and so do the rows of a table: a slice opens one file instead of hundreds.
# Those of a tar archive come in their order, which the version tells: a compressed one is read from its beginning to
# its end.
_MEMBER: Final = "^(?:zip|tar|row)://(?:.*?::((?:zip|tar)://.*)|.*::(.*))$"
_ORDER: Final = (
    f"CASE WHEN contains(uri, '::') THEN regexp_extract(uri, '{_MEMBER}', 1) ELSE '' END, "
    f"CASE WHEN contains(uri, '::') THEN regexp_extract(uri, '{_MEMBER}', 2) ELSE '' END, "
    "CASE WHEN starts_with(uri, 'tar://') THEN version END, uri, version"
)

# An archive may have two members of one name: there (uri, version) is an image. Elsewhere a file that is listed twice
# with two versions has changed in between, and is one image: the later version if both are in one chunk, else that
# which came first, since a worker may have it already. Keys are 128 bits of MD5.
_VERSION_KEY: Final = "md5_number(concat_ws(chr(1), uri, version))"
_IMAGE_KEY: Final = f"CASE WHEN contains(uri, '::') THEN {_VERSION_KEY} ELSE md5_number(uri) END"

_TABLES: Final = """
CREATE TABLE seen (key UHUGEINT);
CREATE TABLE taken (key UHUGEINT);
CREATE TABLE carried (uri VARCHAR, version VARCHAR, num_bytes BIGINT, known VARCHAR[]);
CREATE TABLE retried (part VARCHAR, uri VARCHAR, version VARCHAR, num_bytes BIGINT, known VARCHAR[]);
"""

_CHUNK: Final = f"""
CREATE OR REPLACE TABLE chunk AS
WITH entries AS (SELECT *, {_IMAGE_KEY} AS key FROM {{listed}})
SELECT any_value(uri) AS uri, max(version) AS version, arg_max(num_bytes, version) AS num_bytes, key
FROM entries ANTI JOIN seen USING (key) GROUP BY key
"""

_HELD: Final = """
CREATE OR REPLACE TABLE held AS
FROM done SEMI JOIN chunk USING (uri) WHERE uri BETWEEN {first} AND {last}
"""

# A remembered version, whose part is "", counts as long as there is a label of the same bytes.
_FORGET: Final = """
DELETE FROM held WHERE part = '' AND NOT EXISTS (
    FROM held AS label
    WHERE label.uri = held.uri AND label.content = held.content AND label.error_code IS NULL AND label.part <> ''
)
"""

_WORK: Final = f"""
CREATE OR REPLACE TABLE work AS
WITH
known AS (
    SELECT
        uri, version, bool_or(error_code IS NULL) AS is_ok, min(part) FILTER (error_code IS NOT NULL) AS error_part,
        min(error_code) AS error_code
    FROM held GROUP BY uri, version
),
unsure AS (
    SELECT uri, chunk.version = '' AS is_unversioned FROM chunk LEFT JOIN known USING (uri, version)
    WHERE chunk.version = '' OR known.uri IS NULL
),
unversioned AS (
    SELECT uri, min(part) FILTER (error_code IS NOT NULL AND (version = '' OR $retry_errors)) AS error_part
    FROM held SEMI JOIN (FROM unsure WHERE is_unversioned) USING (uri) GROUP BY uri
),
contents AS (
    SELECT uri, list_sort(list(DISTINCT CASE WHEN held.version = '' THEN error_code ELSE content END)) AS known
    FROM held JOIN unsure USING (uri) LEFT JOIN unversioned USING (uri)
    WHERE CASE WHEN is_unversioned
        THEN NOT ($retry_errors AND error_code IS NOT NULL AND part = unversioned.error_part)
        ELSE error_code IS NULL
    END
    GROUP BY uri
),
found AS (
    SELECT
        chunk.*, contents.known AS contents, known.error_code,
        CASE WHEN chunk.version = '' THEN unversioned.error_part IS NOT NULL ELSE known.uri IS NOT NULL END AS is_known,
        CASE
            WHEN chunk.version = '' THEN unversioned.error_part
            WHEN NOT known.is_ok AND ($retry_errors OR known.error_code IN {PASSING_CODES}) THEN known.error_part
        END AS retried_part
    FROM chunk LEFT JOIN known USING (uri, version) LEFT JOIN unversioned USING (uri) LEFT JOIN contents USING (uri)
)
SELECT
    uri, version, num_bytes, is_known, retried_part,
    coalesce(list_filter(
        CASE
            WHEN version = '' OR NOT is_known THEN contents
            WHEN retried_part IS NOT NULL AND NOT $retry_errors THEN [error_code]
        END,
        lambda x: x IS NOT NULL
    ), []) AS known,
    NOT is_known AND {_VERSION_KEY} IN (FROM taken) AS is_taken
FROM found
"""

_COUNTS: Final = """
SELECT
    count(*), count(*) FILTER (is_known AND retried_part IS NULL), count(*) FILTER (is_taken)
FROM work
"""

_CARRY: Final = """
INSERT INTO carried SELECT uri, version, num_bytes, known FROM work WHERE NOT is_known AND NOT is_taken
"""

_RETRY: Final = """
INSERT INTO retried SELECT retried_part, uri, version, num_bytes, known FROM work WHERE retried_part IS NOT NULL
"""

_CUT: Final = f"""
CREATE OR REPLACE TABLE cut AS
SELECT *, (row_number() OVER (ORDER BY {_ORDER}) - 1)::BIGINT AS number FROM carried
"""

# The name of a part is a digest of the images that it will hold, and of what the output held of them.
_NEW: Final = """
WITH named AS (
    SELECT
        number // $size AS slice,
        'part-' || left(sha256($model_id || string_agg(
            md5(concat_ws(chr(9), uri, version, array_to_string(known, chr(9)))), '' ORDER BY number
        )), 32) || '.parquet' AS part
    FROM cut WHERE number < $num GROUP BY slice
)
SELECT
    part, number, number % $size AS position, uri, version, num_bytes, known, false AS is_retry, $model_id AS model_id
FROM cut JOIN named ON number // $size = slice WHERE number < $num
"""

_RETRIED: Final = f"""
SELECT
    part, row_number() OVER (PARTITION BY part ORDER BY {_ORDER}) - 1 AS position,
    uri, version, num_bytes, known, true AS is_retry, $model_id AS model_id
FROM (FROM retried ORDER BY part, uri, version LIMIT $num)
"""

# A slice is taken over if its part is not there. If some of its images are done all the same, or lie in another slice,
# somebody has not kept to the plan, and its images are planned anew.
_TAKEN: Final = f"""
WITH
rows AS (
    SELECT *, {_VERSION_KEY} AS key
    FROM {{plans}} WHERE model_id = $model_id AND NOT is_retry AND part NOT IN (SELECT part FROM live)
),
once AS (SELECT * FROM rows QUALIFY row_number() OVER (PARTITION BY part, position ORDER BY filename) = 1),
images AS (SELECT key, min(part) AS first_part, count(*) AS num FROM once GROUP BY key),
refused AS (
    SELECT once.part FROM once JOIN images USING (key) WHERE num > 1 AND first_part <> once.part
    UNION SELECT part FROM once SEMI JOIN done USING (uri, version) WHERE version <> ''
)
FROM once ANTI JOIN refused USING (part)
"""


class Planner:
    """Makes local files of `PLAN_SCHEMA`, which it publishes, out of the chunks of a listing."""

    def __init__(
        self,
        database: duckdb.DuckDBPyConnection,
        scratch: Path,
        plans: PublishedPlans,
        model_id: str,
        *,
        retry_errors: bool,
        max_images: int | None,
    ) -> None:
        """Prepare the tables.

        Args:
            database: that of the `Index`.
            scratch: a local directory for the files.
            plans: where plans are published.
            model_id: the model to label with.
            retry_errors: whether all images that failed are tried again, and not only those with `PASSING_CODES`.
            max_images: how many images are planned at most; None for all.
        """
        self._database = database
        self._scratch = scratch
        self._plans = plans
        self._model_id = model_id
        self._retry_errors = retry_errors
        self._room = max_images
        self._num_files = self._num_entries = self._num_images = self._already_done = 0
        self._num_taken = self._num_still_listed = self._num_new = 0
        self.num_slices = 0
        self.taken_from: list[str] = []
        """The runs whose plans were taken over."""
        database.execute(_TABLES)

    @property
    def counts(self) -> Counts:
        """Numbers of images, as far as the chunks have come."""
        return Counts(
            listed=self._num_entries + self._num_taken - self._num_still_listed,
            duplicate=self._num_entries - self._num_images,
            already_done=self._already_done,
            to_label=self._num_taken + self._num_new,
        )

    @property
    def is_full(self) -> bool:
        """Whether as many images are planned as there may be."""
        return self._room == 0

    def take_over(self, open_plans: list[OpenPlan]) -> list[Path]:
        """The slices that the plans of dead runs have left for this model. They are published already."""
        ours = [plan for plan in open_plans if self._is_ours(plan)]
        if not ours:
            return []
        for plan in ours:
            self._plans.take_over(plan)
        plans = db.reading((plan.path for plan in ours), "filename = true", "file_row_number = true")
        path = self._next_path()
        self._num_taken = self._write(_TAKEN.format(plans=plans), path, "filename, file_row_number")
        for plan in ours:
            plan.path.unlink()
        self.taken_from = sorted({plan.run_id for plan in ours})
        self._execute(f"INSERT INTO taken SELECT {_VERSION_KEY} FROM {db.reading([path])}")
        self._count_slices(path)
        self._take_room(self._num_taken)
        return [path]

    def _is_ours(self, plan: OpenPlan) -> bool:
        ((found,),) = self._execute(
            f"SELECT bool_or(model_id = {db.quoted(self._model_id)}) FROM {db.reading([plan.path])}"
        )
        return bool(found)

    def plan(self, chunk: Chunk) -> list[Path]:
        """Plan a chunk of the listing. Returns the local files of what was published."""
        listed = db.reading([chunk.path])
        ((num_entries,),) = self._execute(f"SELECT count(*) FROM {listed}")
        if num_entries:
            self._subtract(listed, num_entries)
        chunk.path.unlink()
        files = self._cut(is_last=chunk.is_last)
        if chunk.is_last:
            files += self._cut_retried()
        return files

    def _subtract(self, listed: str, num_entries: int) -> None:
        """Find what is known of the images of a chunk, and carry those that are new."""
        self._execute(_CHUNK.format(listed=listed))
        self._execute("INSERT INTO seen SELECT key FROM chunk")
        ((first, last),) = self._execute("SELECT coalesce(min(uri), ''), coalesce(max(uri), '') FROM chunk")
        self._execute(_HELD.format(first=db.quoted(first), last=db.quoted(last)))
        if self._execute("SELECT 1 FROM held WHERE part = '' LIMIT 1"):
            self._execute(_FORGET)
        self._execute(_WORK, retry_errors=self._retry_errors)
        ((num_images, already_done, num_taken),) = self._execute(_COUNTS)
        self._execute(_CARRY)
        self._execute(_RETRY)
        self._num_entries += num_entries
        self._num_images += num_images
        self._already_done += already_done
        self._num_still_listed += num_taken
        self._num_new += num_images - already_done - num_taken

    def _cut(self, *, is_last: bool) -> list[Path]:
        """Cut the new images into slices. The rest, which is no whole slice, waits for the next chunk."""
        ((num,),) = self._execute("SELECT count(*) FROM carried")
        if self._room is not None and num >= self._room:
            num, is_last = self._room, True
        num -= 0 if is_last else num % SLICE_SIZE
        if num == 0:
            return []
        self._execute(_CUT)
        path = self._next_path()
        self._write(_NEW, path, "number", num=num, size=SLICE_SIZE)
        self._execute(
            "CREATE OR REPLACE TABLE carried AS SELECT * EXCLUDE (number) FROM cut WHERE number >= $num", num=num
        )
        self._execute("DROP TABLE cut")
        self._take_room(num)
        return self._publish(path)

    def _cut_retried(self) -> list[Path]:
        """A slice for each part that has rows of images that are tried again."""
        ((num,),) = self._execute("SELECT count(*) FROM retried")
        num = num if self._room is None else min(num, self._room)
        if num == 0:
            return []
        path = self._next_path()
        self._write(_RETRIED, path, "part, position", num=num)
        self._take_room(num)
        return self._publish(path)

    def _publish(self, path: Path) -> list[Path]:
        self._plans.publish(path)
        self._count_slices(path)
        return [path]

    def _count_slices(self, path: Path) -> None:
        ((num,),) = self._execute(f"SELECT count(DISTINCT (part, is_retry)) FROM {db.reading([path])}")
        self.num_slices += num

    def _take_room(self, num: int) -> None:
        if self._room is not None:
            self._room = max(0, self._room - num)

    def _next_path(self) -> Path:
        self._num_files += 1
        return self._scratch / f"plan-{self._num_files:05}.parquet"

    def _write(self, sql: str, path: Path, order: str, **parameters: object) -> int:
        """Write rows to a local file of `PLAN_SCHEMA`. Returns their number."""
        wanted = parameters | {"model_id": self._model_id}
        return db.copy(self._database, sql, path, PLAN_SCHEMA, order=order, group_rows=_GROUP_ROWS, parameters=wanted)

    def _execute(self, sql: str, **parameters: object) -> list[Any]:
        return self._database.execute(sql, parameters or None).fetchall()
