"""Tables of labels and splits: which rows name which of the listed files."""

import dataclasses
import logging
import posixpath
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Final

import duckdb
import pyarrow as pa

from catdog import storage
from catdog.config import PrepareConfig
from catdog.dataset.catalog import create, insert, one_row
from catdog.dataset.labels import RULES, Classes
from catdog.dataset.split import named_split
from catdog.errors import UsageError
from catdog.provenance import redact
from catdog.schema import CLASS_NAMES
from catdog.storage import manifests, patterns
from catdog.storage.listing import find_tables
from catdog.storage.manifests import Columns, Row
from catdog.storage.names import archive_scheme, without_archive_suffix
from catdog.storage.tables import COLUMN_NAMES, format_of
from catdog.storage.urls import is_relative, member_uri, resolve

logger = logging.getLogger(__name__)

TABLE_SCHEMA: Final = pa.schema(
    [
        ("number", pa.int64()),
        ("place", pa.string()),
        ("written", pa.string()),
        ("verbatim", pa.list_(pa.string())),
        ("uri", pa.list_(pa.string())),
        ("beside", pa.list_(pa.string())),
        ("moved", pa.list_(pa.string())),
        ("member", pa.list_(pa.string())),
        ("name", pa.list_(pa.string())),
        ("elsewhere", pa.string()),
        ("label", pa.string()),
        ("class", pa.int8()),
        ("split", pa.string()),
        ("named_split", pa.string()),
    ]
)
"""A row of a table. `number` counts the rows of all tables; `place` says which one it is. `written` is the name of the
image. As the listing would have it, that is `verbatim`, in each place of images; `uri` if normalised; `beside` if it
starts at the table's directory; `moved` without its drive letter; `member` within an archive. `name` is a name
without a folder; `elsewhere` an absolute one, with slashes. `class` is the index of the class that `label` names, and
`named_split` the split that `split` names. What is missing is null or empty."""

_MATCHES: Final = (
    ("verbatim", "uri"),
    ("uri", "composed"),
    ("beside", "composed"),
    ("moved", "composed"),
    ("uri", "composed_stem"),
    ("beside", "composed_stem"),
    ("moved", "composed_stem"),
    ("member", "member"),
    ("member", "member_stem"),
    ("name", "name"),
    ("name", "name_stem"),
)
"""What of a row is compared with what of a file, the most certain first. A comparison counts only where a single file
fits."""


@dataclass(frozen=True, kw_only=True)
class LabelTables:
    """The tables that say something of the listed files."""

    urls: list[str]
    places: tuple[str, ...]
    """The places of the images, where relative names start."""

    is_manifest: bool
    """Whether the images are those of these tables. Then relative names start at their directory."""

    columns: Columns
    has_labels: bool
    has_splits: bool

    has_all_labels: bool
    """Whether only these tables say what is a cat: no folder, and no name of a file, does."""

    @property
    def name(self) -> str:
        """The tables in an error."""
        others = f" and {len(self.urls) - 1} more" if len(self.urls) > 1 else ""
        return redact(self.urls[0]) + others


def find(config: PrepareConfig) -> LabelTables | None:
    """The tables that hold labels or splits; None if both follow from the names of files and folders.

    They are `--labels`, unless that is a rule; or the manifests among `--images`, for their splits, and with
    `--labels auto` for their labels, as far as they have columns of them.

    Raises:
        UsageError: `--labels` is neither a rule nor a table, or a table lacks a column.
    """
    if config.labels not in RULES:
        return _of(config, _named_tables(config.labels), is_manifest=False)
    manifests_found = [urls for source in config.sources if (urls := find_tables(source)) is not None]
    tables = _of(config, [url for urls in manifests_found for url in urls], is_manifest=True)
    if tables is not None and len(manifests_found) < len(config.sources):
        return dataclasses.replace(tables, has_all_labels=False)
    return tables


def _named_tables(place: str) -> list[str]:
    """The tables that `--labels` names."""
    if not (storage.exists(place) or patterns.is_glob(place)):
        if not manifests.is_table(place):
            raise UsageError(
                "--labels must be auto, folder, prefix, or a table: CSV, TSV, JSON lines or Parquet. "
                f"Received: --labels={redact(place)}"
            )
        raise UsageError(f"A table of labels must exist. Received: --labels={redact(place)}")
    urls = find_tables(place)
    if urls is None:
        raise UsageError(f"--labels must be a table, or a place of tables. Received: --labels={redact(place)}")
    return urls


def _of(config: PrepareConfig, urls: list[str], *, is_manifest: bool) -> LabelTables | None:
    columns = Columns(uri=config.uri_column, label=config.label_column, split=config.split_column)
    has_labels, has_splits = [], []
    for url in urls if is_manifest else urls[:1]:
        names = manifests.column_names(url)
        label = None
        if not is_manifest or config.labels == "auto":
            label = manifests.find(names, "label", columns.label, url)
        if label is None and not is_manifest:
            first_line = "no header" if format_of(url) == "text" else f"the columns {', '.join(names)}"
            raise UsageError(
                f"A table of labels must have a column named {', '.join(COLUMN_NAMES['label'])}, or that "
                f"--label-column names. Received: {redact(url)} with {first_line} in its first line"
            )
        has_labels.append(label is not None)
        is_random = config.split == "random"
        has_splits.append(not is_random and manifests.find(names, "split", columns.split, url) is not None)
    if not any(has_labels + has_splits):
        return None
    return LabelTables(
        urls=urls,
        places=config.sources,
        is_manifest=is_manifest,
        columns=columns,
        has_labels=any(has_labels),
        has_splits=any(has_splits),
        has_all_labels=all(has_labels),
    )


def match(connection: duckdb.DuckDBPyConnection, tables: LabelTables, classes: Classes) -> tuple[int, int]:
    """Set the labels in the table `listing`, and fill `row_splits(row, split)`, from tables.

    Returns how many rows they have, and how many of these name no listed file, or lack a label.

    Raises:
        UsageError: a label, or a split, is none of those that there are; or a file has two labels; or no row names a
            file.
    """
    create(connection, "named", TABLE_SCHEMA)
    for batch in read(tables, classes):
        insert(connection, "named", batch)
    places = _places(tables)
    _match_rows(connection)
    if not tables.is_manifest:
        _match_moved(connection, places, classes)
    num_rows, num_useless = _check_rows(connection, tables)
    if tables.has_labels:
        _set_labels(connection, tables)
    if tables.has_splits:
        _set_splits(connection)
    return num_rows, num_useless


def read(tables: LabelTables, classes: Classes) -> Iterator[pa.Table]:
    """The rows of tables, in batches of `TABLE_SCHEMA`."""
    numbers = count(1)
    roles = [role for role, is_there in (("label", tables.has_labels), ("split", tables.has_splits)) if is_there]
    of_images = _places(tables)
    for rows in manifests.read_rows(tables.urls, tables.columns, *roles):
        beside = _placing_in(manifests.directory_of(rows[0].table))
        places = [beside] if tables.is_manifest else of_images
        named = [{"number": next(numbers), **_row(row, classes, places, beside)} for row in rows]
        yield pa.Table.from_pylist(named, schema=TABLE_SCHEMA)


def _row(row: Row, classes: Classes, places: Sequence["_Place"], beside: "_Place") -> dict[str, object]:
    """The columns of `TABLE_SCHEMA` for a row of a table, without its number."""
    label, split = (
        None if value is None or value == "" or value != value else value for value in (row.label, row.split)
    )
    found: dict[str, object] = {
        "place": f"row {row.number} of {redact(row.table)}",
        "written": row.written,
        "label": None if label is None else str(label),
        "class": classes.of_label(label),
        "split": None if split is None else str(split),
        "named_split": None if split is None else named_split([str(split)]),
    }
    if row.written is None:
        return {**found, "verbatim": [row.row_uri]}
    tidy = unicodedata.normalize("NFC", row.written.strip())
    if is_relative(tidy):
        tidy = posixpath.normpath(tidy.replace("\\", "/"))
    moved = [(place, manifests.without_drive(tidy, place.name)) for place in places]
    is_absolute = not is_relative(tidy) or manifests.has_drive(tidy)
    return {
        **found,
        "verbatim": [place(row.written) for place in places],
        "uri": [place(tidy) for place in places],
        "beside": [beside(tidy)],
        "moved": [place(names[-1]) for place, names in moved if names],
        "member": [tidy] if is_relative(tidy) else [],
        "name": [tidy] if "/" not in tidy and not is_absolute else [],
        "elsewhere": tidy if is_absolute else None,
    }


@dataclass(frozen=True)
class _Place:
    """Turns the name of an image in a table into the URL that the listing has."""

    name: str
    """The directory, or the archive without its suffix."""

    join: Callable[[str], str]

    def __call__(self, name: str) -> str:
        return self.join(name) if is_relative(name) else resolve(name, "/")

    @property
    def around(self) -> tuple[str, str]:
        """What comes before and after a relative name."""
        marked = self.join("\0")
        begin, _, end = marked.partition("\0" if "\0" in marked else "%00")
        return begin, end


def _places(tables: LabelTables) -> list[_Place]:
    """The places of the images, but of manifests: their relative names start elsewhere."""
    return [] if tables.is_manifest else [_placing(images) for images in tables.places]


def _placing(images: str) -> _Place:
    """Places relative names in `images`, a directory or an archive, or where a glob or a manifest starts."""
    root = storage.absolute(images)
    if not storage.exists(root):
        return _placing_in(patterns.fixed(root).rpartition("/")[0])
    if (scheme := archive_scheme(root)) is not None:
        return _Place(without_archive_suffix(root), lambda name: member_uri(name, root, scheme))
    return _placing_in(manifests.directory_of(root) if manifests.is_table(root) else root)


def _placing_in(directory: str) -> _Place:
    return _Place(directory, lambda name: storage.join(directory, name))


def _match_rows(connection: duckdb.DuckDBPyConnection) -> None:
    """Create the table `matched(number, uri)`.

    A row without a suffix, such as the `id` of Kaggle's tables, matches the file with that name and any suffix. A path
    within an archive matches the member, if the collection is a glob of archives. A name without a folder matches the
    file in any folder that has it.
    """
    connection.execute(
        r"""
        CREATE TABLE names AS
        SELECT uri, composed, member,
            regexp_replace(composed, '\.[^./:]+(::|$)', '\1') AS composed_stem,
            regexp_replace(member, '\.[^./]+$', '') AS member_stem,
            name, regexp_replace(name, '\.[^.]+$', '') AS name_stem
        FROM (
            SELECT DISTINCT uri, nfc_normalize(uri) AS composed,
                nfc_normalize(regexp_extract(regexp_replace(uri, '^((?:zip|tar)://.*?)::.*$', '\1'), '[^/]*$')) AS name,
                CASE WHEN regexp_matches(uri, '^(zip|tar)://.*::')
                    THEN nfc_normalize(regexp_extract(uri, '^(?:zip|tar)://(.*?)::(?:(?:zip|tar)://|[^:]*$)', 1))
                END AS member
            FROM listing
        )
        """
    )
    connection.execute("CREATE TABLE matched (number BIGINT, uri VARCHAR)")
    for of_row, of_file in _MATCHES:
        connection.execute(
            f"""
            INSERT INTO matched
            SELECT number, min(names.uri)
            FROM (
                SELECT number, unnest({of_row}) AS key FROM named WHERE number NOT IN (SELECT number FROM matched)
            ) asked JOIN names ON asked.key = names.{of_file}
            GROUP BY number HAVING count(DISTINCT names.uri) = 1
            """
        )


def _match_moved(connection: duckdb.DuckDBPyConnection, places: Sequence[_Place], classes: Classes) -> None:
    """Match rows that name files by the paths that they have on another machine, or had in another storage.

    One directory, in which all absolute names of the tables lie, is taken for the place of the images: the outermost
    with which some row then names a file. Not one that is named for a split or a class, unless the place of the images
    has the same name: `train/1.jpg` is not `val/1.jpg`.
    """
    first, last = one_row(connection, "SELECT min(elsewhere), max(elsewhere) FROM named")
    (num_before,) = one_row(connection, "SELECT count(*) FROM matched")
    shared = [] if first is None else posixpath.commonprefix([first, last]).split("/")[:-1]
    for depth in range(1, len(shared) + 1):
        directory = "/".join(shared[:depth]) + "/"
        folder = shared[depth - 1]
        tells = named_split([folder]) is not None or classes.index(folder) is not None
        for place in places:
            if tells and folder.casefold() != place.name.rpartition("/")[2].casefold():
                continue
            _match_below(connection, directory, place)
        (num_matched,) = one_row(connection, "SELECT count(*) FROM matched")
        if num_matched > num_before:
            logger.warning(
                "%d rows name files in %s, which were found in --images.", num_matched - num_before, redact(directory)
            )
            return


def _match_below(connection: duckdb.DuckDBPyConnection, directory: str, place: _Place) -> None:
    """Match the rows that name a file in a directory with the files that have the same path below a place."""
    begin, end = place.around
    for of_file in ("composed", "composed_stem"):
        connection.execute(
            f"""
            INSERT INTO matched
            SELECT number, min(names.uri)
            FROM named JOIN names ON $begin || substr(elsewhere, $length + 1) || $end = names.{of_file}
            WHERE starts_with(elsewhere, $directory) AND number NOT IN (SELECT number FROM matched)
            GROUP BY number HAVING count(DISTINCT names.uri) = 1
            """,
            {"begin": begin, "end": end, "directory": directory, "length": len(directory)},
        )


def _check_rows(connection: duckdb.DuckDBPyConnection, tables: LabelTables) -> tuple[int, int]:
    """The numbers of rows, and of those that say nothing of any file. If that are all rows, it is an error."""
    is_useless = "(number NOT IN (SELECT number FROM matched)" + (" OR label IS NULL)" if tables.has_labels else ")")
    num_rows, num_useless, written, place = one_row(
        connection,
        f"SELECT count(*), count(*) FILTER ({is_useless}), first(written ORDER BY number) FILTER ({is_useless}), "
        f"first(place ORDER BY number) FILTER ({is_useless}) FROM named",
    )
    if num_useless == num_rows:
        (file,) = one_row(connection, "SELECT arg_min(uri, row) FROM listing")
        raise UsageError(
            f"A table of labels must name listed files. Received: none of the {num_rows} rows of {tables.name} names "
            f"one; first row: {written!r}, first file: {file}"
        )
    if num_useless:
        logger.warning(
            "%d of %d rows of %s name no listed file or have no label; the first of them, %s: %r",
            *(num_useless, num_rows, tables.name, place, written),
        )
    return num_rows, num_useless


def _set_labels(connection: duckdb.DuckDBPyConnection, tables: LabelTables) -> None:
    connection.execute(
        "CREATE TABLE told AS SELECT * EXCLUDE (uri), matched.uri FROM matched JOIN named USING (number)"
    )
    num, label, place, uri = one_row(
        connection,
        "SELECT count(*), first(label ORDER BY number), first(place ORDER BY number), first(uri ORDER BY number) "
        "FROM told WHERE label IS NOT NULL AND class IS NULL",
    )
    if num:
        raise UsageError(
            f"Every label must be {' or '.join(CLASS_NAMES)}, 0 or 1, or a name in --class-names. "
            f"Received: {num} that are not, the first in {place}: {label!r} of {uri}"
        )
    num, uri, places = one_row(
        connection,
        """
        SELECT count(*), first(uri ORDER BY first), first(places ORDER BY first)
        FROM (
            SELECT uri, min(number) AS first, arg_min(place, number) || ' and ' || arg_max(place, number) AS places
            FROM told WHERE class IS NOT NULL GROUP BY uri HAVING min(class) <> max(class)
        )
        """,
    )
    if num:
        raise UsageError(
            f"A file must have one label. Received: {num} files with two in {tables.name}, the first: {uri}, "
            f"in {places}"
        )
    connection.execute(
        "UPDATE listing SET label = told.class FROM told WHERE listing.uri = told.uri AND told.class IS NOT NULL"
    )


def _set_splits(connection: duckdb.DuckDBPyConnection) -> None:
    num, split, place = one_row(
        connection,
        "SELECT count(*), first(split ORDER BY number), first(place ORDER BY number) "
        "FROM named WHERE split IS NOT NULL AND named_split IS NULL",
    )
    if num:
        raise UsageError(
            "Every split in a table must be train, val (validation) or test; --split random draws the splits instead. "
            f"Received: {num} that are not, the first in {place}: {split!r}"
        )
    connection.execute(  # of `test` and `val`, the alphabet's first is the cleaner one; `train` comes between
        """
        INSERT INTO row_splits
        SELECT row, arg_min(named_split, CASE named_split WHEN 'test' THEN 0 WHEN 'val' THEN 1 ELSE 2 END)
        FROM matched JOIN named USING (number) JOIN listing ON listing.uri = matched.uri
        WHERE named_split IS NOT NULL GROUP BY row
        """
    )
