"""Manifests: tables whose rows name the images of a collection, or hold them.

A file is a manifest if its name is that of a table (`catdog.storage.tables`). So are the files of a directory if all of
them are tables, and of Parquet, or named `part-*` as Spark names what it writes; names that start with `_`, such as
`_SUCCESS`, do not count, nor does what explains the tables, such as `README.md`. So are the files that a glob matches,
if all are tables and the glob itself ends as the name of a table does. Beside photographs, a table is just another
file.
"""

import concurrent.futures
import itertools
import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, NamedTuple

from catdog.errors import UsageError
from catdog.provenance import redact
from catdog.storage import archives, embedded, patterns, tables
from catdog.storage.filesystems import SourceFile, require
from catdog.storage.outages import MAX_CONNECTIONS
from catdog.storage.tables import COLUMN_NAMES, ID_NAMES
from catdog.storage.urls import is_local, outermost, resolve, split_member

_PART: Final = re.compile(r"part[-.]")
_ABOUT: Final = re.compile(
    r"(?:README|LICEN[CS]E|CITATION|dataset_infos?|.*\.(?:md|ya?ml|py|ipynb))(?:\.\w+)?", re.IGNORECASE
)
"""Files that lie beside the tables in a copy of one of Hugging Face's repositories."""

_DRIVE: Final = re.compile(r"([A-Za-z]):/+")


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Which columns of a table hold what. None: the one that is named as in `tables.COLUMN_NAMES`."""

    uri: str | None = None
    label: str | None = None
    split: str | None = None


class Row(NamedTuple):
    """A row of a table."""

    number: int
    """Its number in its file, from 1. The line with the names of the columns does not count."""

    table: str
    """The file."""

    written: str | None
    """The name of the image, as it is written; None if the row names none, or holds the image."""

    row_uri: str | None
    """The URL of the row, if it has no name: if it holds the image, or nothing."""

    image_bytes: int | None
    """About the size of the image, if the row holds it."""

    label: object = None
    split: object = None
    num_bytes: int = 0
    version: str = ""


def is_table(url: str) -> bool:
    """Whether a file is a table, by its name."""
    return tables.format_of(url) is not None


def tables_among(place: str, files: Iterator[SourceFile]) -> tuple[list[str], Iterator[SourceFile]]:
    """The tables of a manifest, if the files of a directory or a glob are one; else none. And all the files again."""
    seen: list[SourceFile] = []
    found: list[str] = []
    is_glob_of_tables = all(map(is_table, patterns.alternatives(place)))
    for file in files:
        seen.append(file)
        below = file.uri.removeprefix(place).lstrip("/")
        if not is_glob_of_tables and any(part.startswith("_") for part in below.split("/")):
            continue
        if not is_glob_of_tables and _ABOUT.fullmatch(below.rpartition("/")[2]):
            continue
        kind = tables.format_of(file.uri)
        if kind is None or not (is_glob_of_tables or kind == "parquet" or _PART.match(below.rpartition("/")[2])):
            return [], itertools.chain(seen, files)
        found.append(file.uri)
    return found, iter(seen)


def find(names: Sequence[str], role: str, asked: str | None, url: str) -> str | None:
    """The column that holds what `role` says, a key of `COLUMN_NAMES`; None if there is none.

    Raises:
        UsageError: `asked` is the name of no column; or it is None, and several columns could be meant.
    """
    flag, listed = f"--{role}-column", ", ".join(names)
    if asked is not None:
        found = [name for name in names if name == asked] or [n for n in names if n.casefold() == asked.casefold()]
        if not found:
            raise UsageError(f"{flag} must name a column. Received: {flag}={asked}, and {redact(url)} with {listed}")
        return found[0]
    found = [name for known in COLUMN_NAMES[role] for name in names if name.strip().casefold() == known]
    if not found and role == "uri":
        found = [name for known in ID_NAMES for name in names if name.strip().casefold() == known]
    if len(found) > 1 and role in ("uri", "label", "split"):
        raise UsageError(f"{flag} must say which column is meant. Received: {redact(url)} with {', '.join(found)}")
    return found[0] if found else None


def column_names(url: str) -> list[str]:
    """The names of a table's columns. Errors as `tables.open_table`."""
    with tables.open_table(url) as table:
        return list(table.names)


def read_rows(urls: Sequence[str], columns: Columns, *roles: str) -> Iterator[list[Row]]:
    """The rows of tables, in batches.

    Args:
        urls: the tables.
        columns: which of their columns hold what.
        roles: the keys of `COLUMN_NAMES` that are wanted beside `uri`. A column that a table lacks is left out.

    Raises:
        UsageError: a file is not what its name says, or has no column that names images.
        FileNotFoundError, StorageError: as `open_read`.
    """
    for url in urls:
        with tables.open_table(url) as table:
            yield from _rows_of(table, columns, roles)


def _rows_of(table: tables.Table, columns: Columns, roles: Sequence[str]) -> Iterator[list[Row]]:
    if table.is_empty:
        return
    uri = find(table.names, "uri", columns.uri, table.url)
    if uri is None:
        raise UsageError(
            f"A table of images must have a column named {', '.join(COLUMN_NAMES['uri'])}, or that --uri-column names. "
            f"Received: {redact(table.url)} with the columns {', '.join(table.names)}"
        )
    found = {role: find(table.names, role, getattr(columns, role, None), table.url) for role in roles}
    wanted = {role: name for role, name in found.items() if name is not None}
    classes = table.classes.get(wanted.get("label", ""), [])
    numbers = itertools.count(1)
    for batch in table.batches([uri, *wanted.values()]):
        yield [
            Row(number, table.url, value, None, None)
            if not others and type(value) is str and not value.isspace() and value
            else _row(table, uri, number, value, dict(zip(wanted, others, strict=True)), classes)
            for (value, *others), number in zip(batch, numbers, strict=False)  # the numbers have no end
        ]


def _row(
    table: tables.Table, column: str, number: int, value: Any, others: dict[str, Any], classes: Sequence[str]
) -> Row:
    if "label" in others:
        others["label"] = _class_of(others["label"], classes)
    if "num_bytes" in others or "version" in others:
        others |= {"num_bytes": _size(others.get("num_bytes")), "version": str(others.get("version") or "").strip('"')}
    if isinstance(value, (str, int)) and not isinstance(value, bool) and str(value).strip():
        return Row(number, table.url, str(value), None, None, **others)
    if not isinstance(value, (str, tables.Embedded, type(None))):
        raise UsageError(
            f"--uri-column must be a column of names, or of images. Received: {redact(table.url)}, whose row {number} "
            f"has the {column} {str(value)[:60]!r}"
        )
    image_bytes = value.num_bytes if isinstance(value, tables.Embedded) else None
    return Row(number, table.url, None, embedded.row_uri(column, number, table.url), image_bytes, **others)


def _class_of(label: object, classes: Sequence[str]) -> object:
    """The name of a class whose number a row has; any other label as it is."""
    return classes[label] if isinstance(label, int) and 0 <= label < len(classes) else label


def _size(value: Any) -> int:
    """A number of bytes; 0 for what is no number."""
    try:
        return max(int(value), 0)
    except (TypeError, ValueError):
        return 0


LookUp = Callable[[str], SourceFile | None]
"""Finds the file of a URL; None if what is there is no file. Many threads call it at once."""


def list_manifest(urls: Sequence[str], columns: Columns, look_up: LookUp) -> Iterator[SourceFile]:
    """The files of the rows of tables, in their order. Every row gives one, also one that names nothing.

    A relative name starts at the directory of its table. A file in a remote storage whose row has a version is not
    looked up. Any other one is, and if nothing has its name as it is written, then in other spellings: see
    `other_spellings` and `without_drive`.

    Raises:
        UsageError, FileNotFoundError, StorageError: as `read_rows`.
    """
    seen: set[str] = set()
    versions: dict[str, str] = {}

    def found(named: tuple[Row, str]) -> SourceFile:
        row, uri = named
        if row.row_uri is not None:
            return SourceFile(uri, versions[row.table] if row.image_bytes is not None else "", row.image_bytes or 0)
        if row.version and not is_local(outermost(uri)):
            return SourceFile(uri, row.version, row.num_bytes)
        file = look_up(uri)
        if file is not None and file.version:
            return file
        return _look_up_spellings(row, look_up) or file or SourceFile(uri, "", 0)

    with concurrent.futures.ThreadPoolExecutor(MAX_CONNECTIONS) as pool:
        for rows in read_rows(urls, columns, "num_bytes", "version"):
            table = rows[0].table
            directory = directory_of(table)
            named = [(row, row.row_uri or resolve(row.written or "", directory)) for row in rows]
            if table not in versions and any(row.image_bytes is not None for row in rows):
                versions[table] = require(table, partial(embedded.version_of_table, table))
            held = {chained[1] for _, uri in named if (chained := split_member(uri)) is not None}
            for archive in held - seen:
                archives.forget(archive)
            seen |= held
            is_quick = all(row.row_uri is not None or is_local(uri) or row.version for row, uri in named)
            yield from (map(found, named) if is_quick else pool.map(found, named))


def directory_of(table: str) -> str:
    """The directory of a table, from which its relative names start."""
    return table.rpartition("/")[0] or "/"


def other_spellings(written: str) -> list[str]:
    """How the name of a file may be meant that nothing has as it is written.

    Spaces around it go, backslashes become slashes, and accents are composed (NFC) or taken apart (NFD).

    >>> other_spellings(r"cats\\1.jpg ")
    ['cats\\\\1.jpg', 'cats/1.jpg']
    """
    stripped = written.strip()
    plain = [stripped] if "://" in stripped else [stripped, stripped.replace("\\", "/")]
    forms = [form for text in plain for form in (text, *(unicodedata.normalize(n, text) for n in ("NFC", "NFD")))]
    return [text for text in dict.fromkeys(forms) if text != written]


def has_drive(written: str) -> bool:
    """Whether a path begins with a drive letter, as on Windows."""
    return _DRIVE.match(written.replace("\\", "/")) is not None


def without_drive(written: str, directory: str) -> list[str]:
    """Where the file of a path with a drive letter may be on this machine; nothing for any other path.

    That is in `/mnt/c`, as WSL has it, or in a directory that has the name of one in the path.

    >>> without_drive("C:\\\\me\\\\pets\\\\cats\\\\1.jpg", "/data/pets")
    ['/mnt/c/me/pets/cats/1.jpg', 'cats/1.jpg']
    """
    path = written.strip().replace("\\", "/")
    drive = _DRIVE.match(path)
    if drive is None:
        return []
    parts, name = path[drive.end() :].split("/"), directory.rpartition("/")[2].casefold()
    below = ["/".join(parts[place + 1 :]) for place, part in enumerate(parts[:-1]) if part.casefold() == name]
    return [f"/mnt/{drive[1].lower()}/{path[drive.end() :]}", *below]


def _look_up_spellings(row: Row, look_up: LookUp) -> SourceFile | None:
    """The file that a row names in another spelling than the one that is written; None if there is none."""
    written, directory = row.written or "", directory_of(row.table)
    for other in [*other_spellings(written), *without_drive(written, directory)]:
        file = look_up(resolve(other, directory))
        if file is not None and file.version:
            return file
    return None
