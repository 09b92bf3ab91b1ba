"""Finding images. Listings stream: one directory at a time is in memory, or one page of a listing of S3."""

import collections
import dataclasses
import errno
import functools
import glob
import itertools
import logging
import os
import posixpath
import re
import stat
from collections.abc import Callable, Collection, Iterator
from typing import Any, Final

import fsspec.utils

from catdog.errors import StorageError, UsageError
from catdog.provenance import redact
from catdog.storage import archives, manifests, outages, s3
from catdog.storage.filesystems import SourceFile, attempt, describe, filesystem, info, require, version_of
from catdog.storage.urls import (
    absolute,
    is_local,
    join,
    local_path,
    location,
    path_uri,
    split_member,
    storage_of,
)

logger = logging.getLogger(__name__)


class Listing(Iterator[SourceFile]):
    """The files of a collection, one after the other. `list_images` makes one.

    Attributes:
        skipped: how many things were passed over so far, by reason: `unreadable_directory`, `loop` (a symbolic link
            that leads to itself or to a directory above it), `not_a_file` (a pipe, a socket, a device). Names that
            start with a dot are not counted. It is complete when the listing has ended.
    """

    def __init__(self) -> None:
        self.skipped: collections.Counter[str] = collections.Counter()
        self._first_skipped: dict[str, str] = {}
        self._files: Iterator[SourceFile] = iter(())

    def __next__(self) -> SourceFile:
        try:
            return next(self._files)
        except StopIteration:
            for reason, place in self._first_skipped.items():
                logger.warning(
                    "%d skipped, for the reason %s, the first %s", self.skipped[reason], reason, redact(place)
                )
            self._first_skipped.clear()
            raise

    def skip(self, reason: str, place: str) -> None:
        """Count something that is not listed."""
        self.skipped[reason] += 1
        self._first_skipped.setdefault(reason, place)

    def begin(self, files: Iterator[SourceFile]) -> None:
        """Say where the files come from."""
        self._files = files


def list_images(url: str, *, exclude: str | None = None, own: Collection[str] | None = None) -> Listing:
    """Every file of a collection, in a deterministic order.

    `url` is one of:
    - a directory or prefix, listed recursively;
    - a glob of files; each `.zip` archive among them is read in place;
    - one file;
    - a `.zip` archive, read in place, or one member or one folder of it;
    - a Parquet manifest, whose column `uri` names the files. A relative name starts at the manifest's directory.

    In S3, an object and a prefix may have the same name. `s3://bucket/pets/`, with a slash at its end, is the prefix
    alone; `s3://bucket/pets` is both: the object, and all that lies under the prefix.

    A manifest may spell a relative name or a local path in several ways (`x`, `./x`, `d/../x`): the file has the uri
    that a listing of its directory gives it. The URL of an object is taken as it is: `d//x` and `d/x` may be two.

    Names that start with a dot are skipped, and so is `__MACOSX`. (`.` and `..` hide nothing: `./photos/cat.jpg`, as
    some programs name the members of an archive, is listed.) Local directories that may not be read, and symbolic links
    that lead back, are skipped and counted in `Listing.skipped`. Nothing else is filtered: later, a file that is no
    image becomes an error row. If an archive holds two members of one name, both are listed, each with its own version.
    Every row of a manifest gives a file, also if an earlier row named the same file, and also if there is no such file
    (its version is then "").

    Args:
        url: the collection.
        exclude: the job's output. It is an error if something under it belongs to the collection, also if a glob or
            a symbolic link leads there.
        own: what `storage_of` says of the job's own storages; those of `url` and `exclude` belong to them. If another
            storage fails when a manifest's file is looked up there, the file is listed with the version "".

    Raises:
        UsageError: there is nothing at `url`, or no file in it, or a file is not what its name says, or it includes
            the output.
        StorageError: the storage failed.
    """
    url = absolute(url, keep_slash=True)
    listing = Listing()
    own = {storage_of(place) for place in (url, exclude or url)} | set(own or ())
    files = _list(url, listing, own)
    if exclude is not None:
        files = _without(files, url, absolute(exclude))
    try:
        first = next(files, None)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UsageError(f"--images must exist. Received: --images={redact(url)}") from error
    if first is None:
        raise UsageError(f"--images must hold at least one file. Received: --images={redact(url)}")
    listing.begin(itertools.chain([first], files))
    return listing


def _without(files: Iterator[SourceFile], images: str, output: str) -> Iterator[SourceFile]:
    """The files, all of which must lie outside the output."""
    error = UsageError(
        f"--output must not lie inside --images. Received: --images={redact(images)} --output={redact(output)}"
    )
    if split_member(images) is None and glob.has_magic(images) and _would_list(images, output):
        raise error
    outer = location(output)

    @functools.lru_cache(maxsize=1024)
    def is_inside(place: str) -> bool:
        return location(place).startswith(outer)

    for file in files:
        chained = split_member(file.uri)
        place = file.uri if chained is None else chained[1]
        directory = place.rpartition("/")[0] or "/"
        if is_inside(directory) or (is_local(place) and os.path.islink(local_path(place)) and is_inside(place)):
            raise error
        yield file


def _would_list(images: str, output: str) -> bool:
    """Whether a glob matches what predict or prepare may write directly under an output, if it is no directory."""
    fixed = _fixed(images)
    directory = fixed.rpartition("/")[0] or "/"
    if "://" in images and "://" not in directory:
        return False  # a later check refuses it
    inner, outer = location(output), location(directory)
    if not inner.startswith(outer):
        return False
    is_match = _matcher(images)
    base = directory.rstrip("/") + "/" + inner.removeprefix(outer)
    return any(is_match(base + name) for name in ("part-0.parquet", "dataset.json", "train/part-0.parquet"))


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
            return os.listdir(local_path(url))
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
            return "directory" if stat.S_ISDIR(os.stat(local_path(url)).st_mode) else "file"
        return str(info(url, fresh=True)["type"])

    return require(url, look)


def _list(url: str, listing: Listing, own: Collection[str]) -> Iterator[SourceFile]:
    if (chained := split_member(url)) is not None:
        yield from _list_archive(chained[1], under=chained[0])
        return
    is_prefix, url = url.endswith("/") and url != "/" and not url.endswith("://"), absolute(url)
    has_keys = s3.is_s3_url(url) and "/" in url.partition("://")[2]
    if is_prefix and has_keys:
        files = _walk(url, listing)
        if (first := next(files, None)) is not None:
            yield first
            yield from files
            return
        if not glob.has_magic(url):
            raise FileNotFoundError(errno.ENOENT, "there is no such prefix")
    try:
        kind = "" if is_prefix and has_keys else _kind(url)
        if not kind:
            raise FileNotFoundError(errno.ENOENT, "there is no such prefix")
    except (FileNotFoundError, NotADirectoryError):
        if not glob.has_magic(url):
            raise
        yield from _list_glob(url, listing)
        return
    if kind == "directory":
        yield from _walk(url, listing)
        return
    if url.lower().endswith(".zip"):
        yield from _list_archive(url)
    elif url.lower().endswith(".parquet"):
        yield from manifests.list_manifest(url, lambda uri: _look_up(uri, listing, own))
    elif (file := _look_up(url, listing, own)) is not None:
        yield file
    if has_keys:
        yield from _walk(url, listing)


def _list_archive(archive: str, under: str = "") -> Iterator[SourceFile]:
    folder = posixpath.normpath(under)
    for file in archives.list_members(archive):
        member, _ = split_member(file.uri) or ("", "")
        name = posixpath.normpath(member)
        if not _is_hidden(member) and (not under or name == folder or name.startswith(folder + "/")):
            yield file


def _is_hidden(path: str) -> bool:
    return any((part.startswith(".") and part not in (".", "..")) or part == "__MACOSX" for part in path.split("/"))


def _fixed(url: str) -> str:
    """What of a glob comes before its first pattern."""
    return re.split(r"[*?[]", url, maxsplit=1)[0]


def _matcher(url: str) -> Callable[[str], object]:
    try:
        return re.compile(fsspec.utils.glob_translate(url)).match
    except ValueError as error:
        raise UsageError(f"A glob must be one that fsspec takes: {error}. Received: {redact(url)}") from error


def _list_glob(url: str, listing: Listing) -> Iterator[SourceFile]:
    fixed = _fixed(url)
    directory = fixed.rpartition("/")[0] or "/"
    if "://" in url and "://" not in directory:
        raise UsageError(f"A glob must name its bucket. Received: {redact(url)}")
    is_match = _matcher(url)
    for file in _walk(directory, listing, _Depth.of(url, directory), fixed):
        if not is_match(file.uri):
            continue
        if file.uri.lower().endswith(".zip"):
            yield from _list_archive(file.uri)
        else:
            yield file


@dataclasses.dataclass(frozen=True)
class _Depth:
    """Which directories a walk enters: those that a glob can match."""

    matchers: tuple[Callable[[str], object], ...] = ()
    """What the name of a directory must match, level by level."""

    is_bounded: bool = False
    """Whether no directory is entered below these levels."""

    @staticmethod
    def of(url: str, directory: str) -> "_Depth":
        parts = url.removeprefix(directory).lstrip("/").split("/")[:-1]
        plain = list(itertools.takewhile(lambda part: "**" not in part, parts))
        is_bounded = len(plain) == len(parts) and "**" not in url.rpartition("/")[2]
        return _Depth(tuple(_matcher(part) for part in plain), is_bounded)

    def enters(self, name: str) -> bool:
        return bool(self.matchers[0](name)) if self.matchers else not self.is_bounded

    @property
    def below(self) -> "_Depth":
        return dataclasses.replace(self, matchers=self.matchers[1:])


_ALL: Final = _Depth()


def _walk(directory: str, listing: Listing, depth: _Depth = _ALL, prefix: str | None = None) -> Iterator[SourceFile]:
    """Visible files under a directory, as deep as `depth` says.

    Of S3, only the objects whose URL starts with `prefix` are listed. Other storages list everything.
    """
    if is_local(directory):
        path = local_path(directory)
        yield from _walk_local(path, listing, depth, (os.path.realpath(path),))
        return
    fs, path = filesystem(directory, fresh=True)
    if s3.is_s3(fs):
        flat = depth.is_bounded and not depth.matchers
        yield from _walk_s3(fs, directory, prefix or directory + "/", flat=flat)
    else:
        yield from _walk_any(fs, directory, path, listing, depth, is_root=True)


def _walk_local(directory: str, listing: Listing, depth: _Depth, above: tuple[str, ...]) -> Iterator[SourceFile]:
    def scan() -> list[os.DirEntry[str]]:
        with os.scandir(directory) as found:
            return sorted(found, key=lambda entry: os.fsencode(entry.name))

    try:
        entries = attempt(path_uri(directory), scan)
    except FileNotFoundError:
        return  # deleted since its parent was listed
    except PermissionError as error:
        if len(above) == 1:
            raise StorageError(f"{path_uri(directory)}: permission denied: {describe(error)}") from error
        listing.skip("unreadable_directory", path_uri(directory))
        return
    for entry in entries:
        if _is_hidden(entry.name):
            continue
        try:
            is_directory = entry.is_dir()
        except OSError as error:
            if error.errno == errno.ELOOP:
                listing.skip("loop", path_uri(entry.path))
                continue
            is_directory = False  # what is wrong with it will be told when it is read
        if not is_directory:
            if (file := _stat_local(entry.path, listing)) is not None:
                yield file
        elif not depth.enters(entry.name):
            continue
        elif (real := os.path.realpath(entry.path)) in above:
            listing.skip("loop", path_uri(entry.path))
        else:
            yield from _walk_local(entry.path, listing, depth.below, (*above, real))


def _stat_local(path: str, listing: Listing) -> SourceFile | None:
    """A local file; None for a pipe, a socket or a device. A missing file or broken link has the version ""."""
    uri = path_uri(path)
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return SourceFile(uri, "", 0)
    if not stat.S_ISREG(status.st_mode):
        listing.skip("not_a_file", uri)
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


def _walk_any(
    fs: Any, directory: str, path: str, listing: Listing, depth: _Depth, *, is_root: bool = False
) -> Iterator[SourceFile]:
    try:
        entries = attempt(directory, lambda: fs.ls(path, detail=True))
    except PermissionError as error:
        if is_root:
            raise StorageError(f"{redact(directory)}: permission denied: {describe(error)}") from error
        listing.skip("unreadable_directory", directory)
        return
    for entry in sorted(entries, key=lambda found: str(found["name"])):
        name = entry["name"].rstrip("/").rpartition("/")[2]
        if _is_hidden(name):
            continue
        if entry["type"] != "directory":
            yield SourceFile(join(directory, name), version_of(entry), entry["size"] or 0)
        elif depth.enters(name):
            yield from _walk_any(fs, join(directory, name), entry["name"], listing, depth.below)


def _look_up(uri: str, listing: Listing, own: Collection[str]) -> SourceFile | None:
    """The file of this name; None for a pipe, a socket or a device. If nothing can be read there, its version is ""."""
    if is_local(uri):
        return _stat_local(local_path(uri), listing)

    def look() -> SourceFile:
        found = info(uri)
        return SourceFile(uri, version_of(found), found["size"] or 0)

    is_own = storage_of(uri) in (*own, "")
    if not is_own and outages.known(uri).is_given_up:
        return SourceFile(uri, "", 0)
    patience_s = None if is_own else outages.FOREIGN_PATIENCE_S
    try:
        if (chained := split_member(uri)) is not None:
            return archives.stat_member(chained[1], chained[0], patience_s=patience_s)
        return attempt(uri, look, patience_s=patience_s)
    except (OSError, UsageError):
        return SourceFile(uri, "", 0)
    except StorageError:
        if is_own:
            raise
        return SourceFile(uri, "", 0)
