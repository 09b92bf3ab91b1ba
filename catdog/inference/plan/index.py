"""What an output holds, as an index says it, so that a plan need not read the part files again.

`OUTPUT/_index/keys-<digest>.parquet` are files of `INDEX_SCHEMA`, sorted by uri. The digest is that of the bytes. A row
of the index says what a row of a part file says of an image, and in which version of which part it was read
(`storage.list_files`). It does not count once that part is gone, or has another version. A plan reads the parts that no
row of the index names, and writes what it read into a new file of the index; it merges files, so that there are few. A
part without rows is named by a row without a uri. A part of which the storage tells no version is left out.

An image whose storage has a new version of it, but the same bytes, gets no row in the parts. The index remembers the
version in a row with the part "". Such a row counts as long as a part has a label for the same bytes and uri.

The index is only ever a copy. If it is lost or damaged, a plan reads the parts, and writes it anew.
"""

import hashlib
import logging
import re
import shutil
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from catdog import failpoints, provenance, storage
from catdog.errors import StorageError
from catdog.inference import database as db
from catdog.inference.plan.slices import CONTENT_VERSION
from catdog.inference.publish import LARGE_BYTES, checked_parts, read_parts, spill_keys
from catdog.schema import INDEX_SCHEMA, table_of, table_of_columns
from catdog.storage import SourceFile

logger = logging.getLogger(__name__)

INDEX_NAME: Final = "_index"
"""Name of the directory of the index in an output."""

MIN_PARTS: Final = 16
"""So many parts must be unknown to the index before a file is written for them."""

_MAX_FILES: Final = 8
"""With more files than that, the index is merged although there is little new."""

_MERGED: Final = 2
"""A file of the index is merged with those that have together at least 1 / `_MERGED` times as many rows."""

_GROUP_ROWS: Final = 122_880
"""Rows in a row group of the index. A plan reads those groups whose range of uris its chunk of the listing meets."""

_SAME_ROWS: Final = 100_000
_SAME_S: Final = 60.0
"""So many images with a new version and the same bytes are noted together, or those of so many seconds."""

_NAME: Final = re.compile(r"keys-([0-9a-f]{32})\.parquet")
_KEYS: Final = ("uri", "source_version", "model_id", "error_code", "image_id")
_LIVE_SCHEMA: Final = pa.schema([pa.field("part", pa.string()), pa.field("part_version", pa.string())])

_SAME_PART: Final = "USING (part, part_version)"

_ROWS: Final = f"""
SELECT
    uri, source_version, model_id, error_code, part, part_version,
    CASE
        WHEN image_id IS NOT NULL THEN '{CONTENT_VERSION}' || left(image_id, 32)
        WHEN starts_with(source_version, '{CONTENT_VERSION}') THEN source_version
    END AS content
FROM {{keys}} JOIN unknown USING (part)
UNION ALL BY NAME
SELECT '' AS uri, '' AS source_version, '' AS model_id, NULL AS error_code, NULL AS content, part, part_version
FROM unknown ANTI JOIN {{keys}} USING (part)
"""


class Index:
    """What an output holds for one model: the view `done` of a database (uri, version, error_code, content, part).

    `error_code` is null for a label. `content` begins with `CONTENT_VERSION`, or is null. The table `live` has the
    parts that are there.

    Attributes:
        parts: names of the part files, sorted.
    """

    def __init__(
        self, database: duckdb.DuckDBPyConnection, scratch: Path, output: str, model_id: str, *, may_write: bool
    ) -> None:
        """Read the index, and those parts that it does not know.

        Args:
            database: where the tables are made.
            scratch: a local directory, in which copies of the files of the index stay.
            output: directory of the part files.
            model_id: the model.
            may_write: whether the index is brought up to date. The run holds the claim of the output then.

        Raises:
            OutputRefusedError: the output holds something that predict did not write.
            StorageError: the storage failed.
        """
        self._database = database
        self._scratch = scratch
        self._url = storage.join(output, INDEX_NAME)
        self._may_write = may_write
        there = storage.list_files(output)
        self.parts = checked_parts(output, sorted(there))
        self._note_parts(there)
        files = self._fetched() if INDEX_NAME in there else {}
        num_unknown = self._compare(files)
        if num_unknown:
            files = files | self._read_unknown(output, there)
        if may_write and (num_unknown >= MIN_PARTS or len(files) > _MAX_FILES):
            files = self._merged(files)
        self._make_view(files, model_id)

    def _note_parts(self, there: Mapping[str, SourceFile]) -> None:
        path = self._scratch / "live.parquet"
        columns = [self.parts, [there[part].version for part in self.parts]]
        pq.write_table(table_of_columns(columns, _LIVE_SCHEMA), path)
        self._database.execute(f"CREATE TABLE live AS FROM {db.reading([path])}")
        path.unlink()

    def _fetched(self) -> dict[Path, int]:
        """Local copies of the files of the index that are whole, with their numbers of rows."""
        found, damaged = {}, []
        for name in storage.list_names(self._url):
            if (match := _NAME.fullmatch(name)) is None:
                continue
            try:
                path, digest = _fetch(storage.join(self._url, name), self._scratch / name)
            except FileNotFoundError:  # another run has just merged it
                continue
            if digest == match[1]:
                found[path] = db.num_rows(path)
            else:
                path.unlink()
                damaged.append(name)
        if damaged:
            logger.warning(
                "A file of the index is damaged, and part files are read in its place: %s",
                provenance.redact(storage.join(self._url, damaged[0])),
            )
            self._delete(damaged)
        return found

    def _delete(self, names: Iterable[str]) -> None:
        if self._may_write:
            for name in names:
                storage.delete(storage.join(self._url, name))

    def _compare(self, files: Iterable[Path]) -> int:
        """Make the tables `stale` and `unknown` of what only the index or only the output has. Number of the latter."""
        paths = list(files)
        covered = f"SELECT DISTINCT part, part_version FROM {db.reading(paths)} WHERE part <> ''"
        self._database.execute(f"CREATE TABLE covered AS {covered if paths else 'FROM live LIMIT 0'}")
        self._database.execute("CREATE TABLE stale AS FROM covered ANTI JOIN live USING (part, part_version)")
        self._database.execute("CREATE TABLE unknown AS FROM live ANTI JOIN covered USING (part, part_version)")
        self._database.execute("DROP TABLE covered")
        return self._count("unknown")

    def _count(self, rows: str) -> int:
        ((num,),) = self._database.execute(f"SELECT count(*) FROM {rows}").fetchall()
        return int(num)

    def _read_unknown(self, output: str, there: Mapping[str, SourceFile]) -> dict[Path, int]:
        """A local file with the rows of the parts that the index does not know, and their number."""
        names = [part for (part,) in self._database.execute("SELECT part FROM unknown ORDER BY part").fetchall()]
        keys, path = self._scratch / "keys.parquet", self._scratch / "unknown.parquet"
        large = {name for name in names if there[name].num_bytes > LARGE_BYTES}
        spill_keys(keys, read_parts(output, names, _KEYS, large=large), _KEYS)
        pa.default_memory_pool().release_unused()  # the database needs the room now
        num_rows = self._copy(_ROWS.format(keys=db.reading([keys])), path)
        keys.unlink()
        return {path: num_rows}

    def _copy(self, rows: str, path: Path) -> int:
        """Write rows to a local file of the index. Returns their number."""
        return db.copy(self._database, rows, path, INDEX_SCHEMA, order="uri, source_version", group_rows=_GROUP_ROWS)

    def _merged(self, files: dict[Path, int]) -> dict[Path, int]:
        """Merge small files, those that are mostly stale, and what the index did not know, into a file of the index."""
        has_stale = bool(self._count("stale"))
        chosen: list[Path] = []
        total = 0
        for path, num_rows in sorted(files.items(), key=lambda item: (item[0].name != "unknown.parquet", item[1])):
            is_stale = has_stale and 2 * self._count(f"{db.reading([path])} SEMI JOIN stale {_SAME_PART}") > num_rows
            if not chosen or num_rows <= _MERGED * total or is_stale:
                chosen.append(path)
                total += num_rows
        path = self._scratch / "merged.parquet"
        rows = f"FROM {db.reading(chosen)} ANTI JOIN stale {_SAME_PART} WHERE part = '' OR part_version <> ''"
        num_rows = self._copy(rows, path)
        try:
            published = _publish(self._url, path)
            self._delete(path.name for path in chosen if _NAME.fullmatch(path.name) and path != published)
        except StorageError as error:  # a run can do without
            logger.warning("The index of the output could not be written: %s", error)
            return files
        kept = {path: num for path, num in files.items() if path not in chosen}
        for path in chosen:
            if path != published:
                path.unlink()
        return kept | {published: num_rows}

    def _make_view(self, files: Iterable[Path], model_id: str) -> None:
        if not (paths := list(files)):
            path = self._scratch / "none.parquet"
            pq.write_table(table_of([], INDEX_SCHEMA), path)
            paths = [path]
        living = f"ANTI JOIN stale {_SAME_PART}" if self._count("stale") else ""
        self._database.execute(
            f"CREATE VIEW done AS SELECT uri, source_version AS version, error_code, content, part "
            f"FROM {db.reading(paths)} {living} WHERE model_id = {db.quoted(model_id)}"
        )


class SameImages:
    """The images of which a run finds that only their version is new, and their bytes are not. The index keeps them."""

    def __init__(self, output: str, model_id: str, scratch: Path) -> None:
        self._url = storage.join(output, INDEX_NAME)
        self._model_id = model_id
        self._scratch = scratch
        self._found: list[tuple[str, str, str]] = []
        self._since = time.monotonic()

    def note(self, found: Iterable[tuple[str, str, str]]) -> None:
        """Note (uri, version, content) of such images. From time to time those that were noted are published."""
        self._found += map(tuple, found)  # type: ignore[arg-type]
        if len(self._found) >= _SAME_ROWS or time.monotonic() - self._since > _SAME_S:
            self.publish()

    def publish(self) -> None:
        """Publish what was noted. If that fails, a later run reads the images again."""
        found, self._found = sorted(self._found), []
        self._since = time.monotonic()
        if not found:
            return
        uris, versions, contents = map(list, zip(*found, strict=True))
        num = len(found)
        columns = [uris, versions, [self._model_id] * num, [None] * num, contents, [""] * num, [""] * num]
        path = self._scratch / "same.parquet"
        pq.write_table(table_of_columns(columns, INDEX_SCHEMA), path, compression="zstd")
        try:
            _publish(self._url, path).unlink()
        except StorageError as error:
            logger.warning("The index of the output could not be written: %s", error)


def _fetch(url: str, path: Path) -> tuple[Path, str]:
    """Copy a file of the index to this machine. Returns the copy, and the digest of its bytes."""
    digest = hashlib.blake2b(digest_size=16)
    with storage.open_read(url) as source, open(path, "wb") as target:
        while block := source.read(2**20):
            digest.update(block)
            target.write(block)
    return path, digest.hexdigest()


def _publish(url: str, path: Path) -> Path:
    """Publish a local file as one of the index, under the name that its bytes give it. Returns its new local path."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
    renamed = path.with_name(f"keys-{digest}.parquet")
    shutil.move(path, renamed)
    with failpoints.step("index"):
        storage.publish_file(storage.join(url, renamed.name), str(renamed))
    return renamed
