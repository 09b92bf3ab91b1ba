"""Walking through directories and prefixes. One directory at a time is in memory, or one page of a listing of S3."""

import dataclasses
import errno
import functools
import itertools
import os
import stat
from collections.abc import Callable, Iterator
from typing import Any, Final

from catdog.errors import StorageError
from catdog.provenance import redact
from catdog.storage import key_ranges, patterns, s3
from catdog.storage.filesystems import SourceFile, attempt, describe, filesystem, require, version_of, version_of_status
from catdog.storage.names import is_hidden
from catdog.storage.urls import is_local, join, local_path, path_uri

Skip = Callable[[str, str], object]
"""Is told the reason and the URL of what is passed over."""


@dataclasses.dataclass(frozen=True)
class _Way:
    """One way down, of a glob without braces."""

    matchers: tuple[Callable[[str], object], ...] = ()
    """What the name of a directory must match, level by level."""

    is_bounded: bool = False
    """Whether no directory is entered below these levels."""

    @staticmethod
    def of(url: str, directory: str) -> "_Way":
        parts = url.removeprefix(directory).lstrip("/").split("/")[:-1]
        plain = list(itertools.takewhile(lambda part: "**" not in part, parts))
        is_bounded = len(plain) == len(parts) and "**" not in url.rpartition("/")[2]
        return _Way(tuple(patterns.matcher(part) for part in plain), is_bounded)

    def leads_to(self, name: str) -> bool:
        return bool(self.matchers[0](name)) if self.matchers else not self.is_bounded


@dataclasses.dataclass(frozen=True)
class Depth:
    """Which directories a walk enters: those that a glob can match."""

    ways: tuple[_Way, ...] = (_Way(),)

    @staticmethod
    def of(url: str, directory: str) -> "Depth":
        """The directories below `directory` that the glob `url` can match."""
        return Depth(tuple(_Way.of(each, directory) for each in patterns.alternatives(url)))

    @property
    def is_flat(self) -> bool:
        """Whether no directory is entered at all."""
        return all(way.is_bounded and not way.matchers for way in self.ways)

    def enters(self, name: str) -> bool:
        """Whether a directory of this name is entered."""
        return any(way.leads_to(name) for way in self.ways)

    def below(self, name: str) -> "Depth":
        """What is entered in the directory of this name."""
        ways = [way for way in self.ways if way.leads_to(name)]
        return Depth(tuple(dataclasses.replace(way, matchers=way.matchers[1:]) for way in ways))


_ALL: Final = Depth()


def walk(directory: str, skip: Skip, depth: Depth = _ALL, prefix: str | None = None) -> Iterator[SourceFile]:
    """Visible files under a directory, as deep as `depth` says.

    Of S3, only the objects whose URL starts with `prefix` are listed. Other storages list everything.
    """
    if is_local(directory):
        path = local_path(directory)
        yield from _walk_local(path, skip, depth, (os.path.realpath(path),))
        return
    fs, path = filesystem(directory, fresh=True)
    if s3.is_s3(fs):
        yield from _walk_s3(fs, directory, prefix or directory + "/", flat=depth.is_flat)
    else:
        yield from _walk_any(fs, directory, path, skip, depth, is_root=True)


def _walk_local(directory: str, skip: Skip, depth: Depth, above: tuple[str, ...]) -> Iterator[SourceFile]:
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
        skip("unreadable_directory", path_uri(directory))
        return
    for entry in entries:
        if is_hidden(entry.name):
            continue
        try:
            is_directory = entry.is_dir()
        except OSError as error:
            if error.errno == errno.ELOOP:
                skip("loop", path_uri(entry.path))
                continue
            is_directory = False  # what is wrong with it will be told when it is read
        if not is_directory:
            if (file := stat_local(entry.path, skip)) is not None:
                yield file
        elif not depth.enters(entry.name):
            continue
        elif (real := os.path.realpath(entry.path)) in above:
            skip("loop", path_uri(entry.path))
        else:
            yield from _walk_local(entry.path, skip, depth.below(entry.name), (*above, real))


def stat_local(path: str, skip: Skip) -> SourceFile | None:
    """A local file; None for a pipe, a socket or a device. A missing file or broken link has the version ""."""
    uri = path_uri(path)
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return SourceFile(uri, "", 0)
    if not stat.S_ISREG(status.st_mode):
        skip("not_a_file", uri)
        return None
    return SourceFile(uri, version_of_status(status), status.st_size)


def list_s3(fs: Any, directory: str, prefix: str = "") -> dict[str, SourceFile]:
    """What lies directly in a directory, and has a name that starts with `prefix`, by name. A folder has no version."""
    found: dict[str, SourceFile] = {}
    begin = len(directory) + 1 - len(_bucket_of(directory))
    for page in _pages(fs, directory, f"{directory}/{prefix}", flat=True):
        for key, version, num_bytes in zip(page.keys, page.versions, page.sizes, strict=True):
            found[key[begin:]] = SourceFile(_bucket_of(directory) + key, version, num_bytes)
        for key in page.folders:
            name = key[begin:].rstrip("/")
            found.setdefault(name, SourceFile(f"{directory}/{name}", "", 0))
    found.pop("", None)  # an object with the name of the directory
    return found


def _walk_s3(fs: Any, directory: str, prefix: str, *, flat: bool) -> Iterator[SourceFile]:
    """Visible objects whose URL starts with `prefix`; with `flat`, only those directly in the directory."""
    base = _bucket_of(directory)
    begin = len(directory) + 1 - len(base)
    for page in _pages(fs, directory, prefix, flat=flat):
        for key, version, num_bytes in zip(page.keys, page.versions, page.sizes, strict=True):
            if not key.endswith("/") and not is_hidden(key[begin:]):
                yield SourceFile(base + key, version, num_bytes)


def _pages(fs: Any, directory: str, prefix: str, *, flat: bool) -> Iterator[s3.Page]:
    """All pages of the objects whose URL starts with `prefix`. `directory` is what an error names."""

    def fetch(after: str, token: str | None) -> s3.Page:
        return require(directory, functools.partial(s3.list_page, fs, prefix, token, flat=flat, after=after))

    key_prefix = prefix.removeprefix(_bucket_of(prefix))
    return key_ranges.pages(key_prefix, fetch, key_ranges.num_lists(), is_ordered=s3.lists_in_order(prefix))


def _bucket_of(url: str) -> str:
    """`s3://bucket/photos` as `s3://bucket/`."""
    scheme, _, path = url.partition("://")
    return f"{scheme}://{path.partition('/')[0]}/"


def _walk_any(
    fs: Any, directory: str, path: str, skip: Skip, depth: Depth, *, is_root: bool = False
) -> Iterator[SourceFile]:
    try:
        entries = attempt(directory, lambda: fs.ls(path, detail=True))
    except PermissionError as error:
        if is_root:
            raise StorageError(f"{redact(directory)}: permission denied: {describe(error)}") from error
        skip("unreadable_directory", directory)
        return
    for entry in sorted(entries, key=lambda found: str(found["name"])):
        name = entry["name"].rstrip("/").rpartition("/")[2]
        if is_hidden(name):
            continue
        if entry["type"] != "directory":
            yield SourceFile(join(directory, name), version_of(entry), entry["size"] or 0)
        elif depth.enters(name):
            yield from _walk_any(fs, join(directory, name), entry["name"], skip, depth.below(name))
