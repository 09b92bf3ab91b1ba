"""Finding images. Listings stream: one directory at a time is in memory, or one page of a listing of S3."""

import concurrent.futures
import functools
import glob
import itertools
import logging
import os
import re
import stat
from collections.abc import Iterator
from typing import Any, Final

import fsspec.utils
import pyarrow as pa
import pyarrow.parquet as pq

from catdog.errors import UsageError
from catdog.provenance import redact
from catdog.storage import archives, s3
from catdog.storage.filesystems import MAX_CONNECTIONS, SourceFile, attempt, filesystem, require, version_of
from catdog.storage.reading import open_read
from catdog.storage.urls import absolute, is_local, join, member_uri, split_member

logger = logging.getLogger(__name__)

_MANIFEST_ROWS: Final = 1024
"""Rows of a manifest whose files are looked up together."""


def list_images(url: str) -> Iterator[SourceFile]:
    """Every file of a collection, in a deterministic order.

    `url` is one of:
    - a directory or prefix, listed recursively;
    - a glob of files; each `.zip` archive among them is read in place;
    - one file;
    - a `.zip` archive, read in place, or one member or one folder of it;
    - a Parquet manifest, whose column `uri` names the files. A relative name starts at the manifest's directory.

    Names that start with a dot are skipped, and so is `__MACOSX`. Nothing else is filtered: later, a file that is no
    image becomes an error row. Every row of a manifest gives a file, also if an earlier row named the same file, and
    also if there is no such file (its version is then "").

    Raises:
        UsageError: there is nothing at `url`, or no file in it, or a file is not what its name says.
        StorageError: the storage failed.
    """
    url = absolute(url)
    files = _list(url)
    try:
        first = next(files, None)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UsageError(f"--images must exist. Received: --images={redact(url)}") from error
    if first is None:
        raise UsageError(f"--images must hold at least one file. Received: --images={redact(url)}")
    return itertools.chain([first], files)


def list_names(url: str, suffix: str = "") -> list[str]:
    """Sorted names directly under a directory that end in `suffix`; none if there is no such directory.

    Names that start with a dot are left out: those files are temporary, or not ours.
    """
    return [name for name in list_all_names(url) if name.endswith(suffix) and not name.startswith(".")]


def list_all_names(url: str) -> list[str]:
    """Sorted names directly under a directory; none if there is no such directory."""
    url = absolute(url)

    def names() -> list[str]:
        if is_local(url):
            return os.listdir(url)
        fs, path = filesystem(url, fresh=True)
        listed = (name.rstrip("/") for name in fs.ls(path, detail=False))
        return [name.rpartition("/")[2] for name in listed if name != path.rstrip("/")]

    try:
        return sorted(require(url, names))
    except (FileNotFoundError, NotADirectoryError):
        return []


def exists(url: str) -> bool:
    """Whether there is a file or a directory at a URL."""
    try:
        _kind(absolute(url))
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def _kind(url: str) -> str:
    """`file` or `directory`; FileNotFoundError if there is neither."""

    def look() -> str:
        if is_local(url):
            return "directory" if stat.S_ISDIR(os.stat(url).st_mode) else "file"
        fs, path = filesystem(url, fresh=True)
        return str(fs.info(path)["type"])

    return require(url, look)


def _list(url: str) -> Iterator[SourceFile]:
    if (chained := split_member(url)) is not None:
        yield from _list_archive(chained[1], under=chained[0])
        return
    try:
        kind = _kind(url)
    except (FileNotFoundError, NotADirectoryError):
        if not glob.has_magic(url):
            raise
        yield from _list_glob(url)
        return
    if kind == "directory":
        yield from _walk(url)
    elif url.lower().endswith(".zip"):
        yield from _list_archive(url)
    elif url.lower().endswith(".parquet"):
        yield from _list_manifest(url)
    else:
        yield _look_up(url)


def _list_archive(archive: str, under: str = "") -> Iterator[SourceFile]:
    folder = under.strip("/") + "/"
    for file in archives.list_members(archive):
        member, _ = split_member(file.uri) or ("", "")
        if not _is_hidden(member) and (not under or member == under or member.startswith(folder)):
            yield file


def _is_hidden(path: str) -> bool:
    return any(part.startswith(".") or part == "__MACOSX" for part in path.split("/"))


def _list_glob(url: str) -> Iterator[SourceFile]:
    fixed = re.split(r"[*?[]", url, maxsplit=1)[0]
    directory = fixed.rpartition("/")[0] or "/"
    if "://" in url and "://" not in directory:
        raise UsageError(f"A glob must name its bucket. Received: {redact(url)}")
    try:
        is_match = re.compile(fsspec.utils.glob_translate(url)).match
    except ValueError as error:
        raise UsageError(f"A glob must be one that fsspec takes: {error}. Received: {redact(url)}") from error
    num_levels = None if "**" in url else url.count("/") - fixed.count("/") + 1
    for file in _walk(directory, num_levels, fixed):
        if not is_match(file.uri):
            continue
        if file.uri.lower().endswith(".zip"):
            yield from _list_archive(file.uri)
        else:
            yield file


def _walk(directory: str, num_levels: int | None = None, prefix: str | None = None) -> Iterator[SourceFile]:
    """Visible files under a directory, at most `num_levels` deep.

    Of S3, only the objects whose URL starts with `prefix` are listed. Other storages list everything.
    """
    if is_local(directory):
        yield from _walk_local(directory, num_levels, (os.path.realpath(directory),))
        return
    fs, path = filesystem(directory, fresh=True)
    if s3.is_s3(fs):
        yield from _walk_s3(fs, directory, prefix or directory + "/", flat=num_levels == 1)
    else:
        yield from _walk_any(fs, directory, path, num_levels)


def _walk_local(directory: str, num_levels: int | None, above: tuple[str, ...]) -> Iterator[SourceFile]:
    try:
        entries = require(directory, lambda: sorted(os.scandir(directory), key=lambda found: found.name))
    except FileNotFoundError:
        return  # deleted since its parent was listed
    for entry in entries:
        if _is_hidden(entry.name):
            continue
        if not entry.is_dir():
            if (file := _stat_local(entry.path)) is not None:
                yield file
        elif (real := os.path.realpath(entry.path)) in above:
            logger.warning("%s leads back to a directory above it: skipped", entry.path)
        elif num_levels != 1:
            yield from _walk_local(entry.path, num_levels and num_levels - 1, (*above, real))


def _stat_local(path: str) -> SourceFile | None:
    """A local file; None for a pipe, a socket or a device. A missing file or broken link has the version ""."""
    # A name that is not UTF-8 cannot be a uri. Listed with escapes, it ends as a row with the error not_found.
    uri = path if path.isascii() else os.fsencode(path).decode("utf-8", "backslashreplace")
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return SourceFile(uri, "", 0)
    if not stat.S_ISREG(status.st_mode):
        logger.warning("%s is not a regular file: skipped", uri)
        return None
    return SourceFile(uri, f"{status.st_size}-{status.st_mtime_ns}", status.st_size)


def _walk_s3(fs: Any, directory: str, prefix: str, *, flat: bool) -> Iterator[SourceFile]:
    """Visible objects whose URL starts with `prefix`; with `flat`, only those directly in the directory."""
    token = None
    while True:
        page = require(directory, functools.partial(s3.list_page, fs, prefix, token, flat=flat))
        for url, item in page.objects:
            if not url.endswith("/") and not _is_hidden(url[len(directory) + 1 :]):
                yield SourceFile(url, version_of(item), item["Size"])
        if (token := page.next_token) is None:
            return


def _walk_any(fs: Any, directory: str, path: str, num_levels: int | None) -> Iterator[SourceFile]:
    entries = require(directory, lambda: fs.ls(path, detail=True))
    for entry in sorted(entries, key=lambda found: str(found["name"])):
        name = entry["name"].rstrip("/").rpartition("/")[2]
        if _is_hidden(name):
            continue
        if entry["type"] != "directory":
            yield SourceFile(join(directory, name), version_of(entry), entry["size"] or 0)
        elif num_levels != 1:
            yield from _walk_any(fs, join(directory, name), entry["name"], num_levels and num_levels - 1)


def _list_manifest(url: str) -> Iterator[SourceFile]:
    directory = url.rpartition("/")[0]
    seen: set[str] = set()
    with open_read(url) as file, concurrent.futures.ThreadPoolExecutor(MAX_CONNECTIONS) as pool:
        try:
            parquet = pq.ParquetFile(file)
        except pa.ArrowInvalid as error:
            raise UsageError(f"A manifest must be a Parquet file: {error}. Received: {redact(url)}") from error
        if "uri" not in parquet.schema_arrow.names:
            raise UsageError(
                "A manifest must have a column named uri. "
                f"Received: {redact(url)} with the columns {', '.join(parquet.schema_arrow.names)}"
            )
        for batch in parquet.iter_batches(_MANIFEST_ROWS, columns=["uri"]):
            uris = [_resolve(uri, directory) for uri in batch.column(0).to_pylist()]
            named = {chained[1] for uri in uris if (chained := split_member(uri)) is not None}
            for archive in named - seen:
                archives.forget(archive)
            seen |= named
            yield from (map(_look_up, uris) if all(map(is_local, uris)) else pool.map(_look_up, uris))


def _resolve(uri: object, directory: str) -> str:
    if not isinstance(uri, str):
        raise UsageError(f"Each uri of a manifest must be text. Received: {uri!r}")
    if (chained := split_member(uri)) is not None:
        return member_uri(chained[0], _resolve(chained[1], directory))
    return absolute(uri) if "://" in uri or os.path.isabs(uri) else join(directory, uri)


def _look_up(uri: str) -> SourceFile:
    """The file that a manifest names. If nothing can be read there, its version is ""."""
    if is_local(uri):
        return _stat_local(uri) or SourceFile(uri, "", 0)

    def look() -> SourceFile:
        fs, path = filesystem(uri)
        info = fs.info(path)
        return SourceFile(uri, version_of(info), info["size"] or 0)

    try:
        if (chained := split_member(uri)) is not None:
            return archives.stat_member(chained[1], chained[0])
        return attempt(uri, look)
    except (OSError, UsageError):
        return SourceFile(uri, "", 0)
