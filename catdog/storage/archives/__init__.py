"""Archives, read in place wherever they are, also within another archive. Nothing is unpacked to disk.

A process keeps a few archives open. `zips` and `tars` know the formats; `interface` is what they share.
"""

import collections
import os
import threading
from collections.abc import Callable, Iterator
from typing import Final

from catdog.errors import ImageError, UsageError
from catdog.provenance import redact
from catdog.storage.archives.interface import (
    MAX_INNER_BYTES,
    FilePlace,
    Member,
    Place,
    Reader,
    as_image_error,
    is_damage,
)
from catdog.storage.archives.tars import open_tar
from catdog.storage.archives.zips import ZipReader
from catdog.storage.filesystems import SourceFile, attempt, version_of, version_of_status
from catdog.storage.filesystems import info as info_of
from catdog.storage.names import archive_scheme, suffix_of
from catdog.storage.urls import is_local, local_path, member_uri, outermost, split_member

MAX_DEPTH: Final = 3
"""How many archives may lie in each other. An archive may hold itself."""

_MAX_OPEN: Final = 8
"""Archives that a process keeps open at most."""

_DAMAGED: Final = {"truncated", "decode_failed", "not_found"}
"""Codes of the errors that come, too, if an archive was replaced after its directory was read."""

Head = Callable[[int], bytes]
"""Reads the first bytes of a member, as many as it is told."""

_FORMATS: Final[dict[str, Callable[[Place], Reader]]] = {"zip": ZipReader, "tar": open_tar}
"""Scheme of the members' URLs → what reads such an archive."""

_archives: collections.OrderedDict[tuple[str, str, int], Reader] = collections.OrderedDict()
_remote_versions: dict[str, str] = {}
_opening: collections.defaultdict[str, threading.Lock] = collections.defaultdict(threading.Lock)
_lock = threading.Lock()
"""For the three above. Nobody holds it while a storage is asked."""


def list_members(archive: str) -> Iterator[tuple[SourceFile, bool, Head]]:
    """Every member of an archive but folders, in the order in which they lie there, hidden ones too.

    With each comes whether it is a file, and what reads its first bytes. That may be called until the next member is
    asked for; where `is_slow`, also later. Whoever lists an archive anew calls `forget` before.

    Raises:
        UsageError: `archive` cannot be read, or is encrypted. This may come after some members.
        FileNotFoundError, PermissionError: there is no such archive, or it is denied.
        StorageError: the storage failed.
    """
    if depth_of(archive) >= MAX_DEPTH:
        raise UsageError(_complaint(archive, f"at most {MAX_DEPTH} archives may lie in each other"))
    reader = attempt(archive, lambda: _open(archive))
    if reader.is_encrypted:
        raise UsageError(_complaint(archive, "it is encrypted"))
    scheme = _scheme(archive)
    try:
        for member in reader.members():
            file = SourceFile(member_uri(member.name, archive, scheme), member.version, member.num_bytes)
            yield file, member.is_file, _head_of(archive, reader, member)
    except Exception as error:
        if not is_damage(error):
            raise
        raise UsageError(_complaint(archive, error)) from error


def _head_of(archive: str, reader: Reader, member: Member) -> Head:
    def head(num_bytes: int) -> bytes:
        try:
            return attempt(archive, lambda: reader.read(member, num_bytes))
        except Exception as error:
            if is_damage(error):
                raise as_image_error(error) from error
            raise

    return head


def is_slow(archive: str) -> bool:
    """Whether reading the first bytes of a member takes a request, and can be done at any time."""
    return _scheme(archive) == "zip" and not is_local(outermost(archive))


def stat_member(archive: str, member: str, *, patience_s: float | None = None) -> SourceFile:
    """One member of an archive, without reading it. Errors as `read_member`."""
    found = attempt(archive, lambda: _open(archive), patience_s=patience_s).member(member)
    return SourceFile(member_uri(member, archive, _scheme(archive)), found.version, found.num_bytes)


def read_member(
    archive: str, member: str, max_bytes: int, *, version: str | None = None, patience_s: float | None = None
) -> bytes:
    """The bytes of one member of an archive. Thread-safe.

    Args:
        archive: URL of the archive.
        member: name of the member.
        max_bytes: size of the largest member that is unpacked.
        version: as in `SourceFile.version`: which member is meant, if several have this name.
        patience_s: as for `attempt`.

    Raises:
        ImageError: the member is encrypted, damaged, or larger than `max_bytes`.
        UsageError: `archive` is not an archive.
        FileNotFoundError, PermissionError, StorageError: as `attempt`.
    """

    def read_once() -> bytes:
        opened = _open(archive)
        try:
            found = opened.member(member, version)
            if found.num_bytes > max_bytes:
                raise ImageError("too_large", f"{found.num_bytes} bytes is more than {max_bytes} bytes")
            return opened.read(found)
        except Exception as error:
            if is_damage(error):
                raise as_image_error(error) from error
            if isinstance(error, OSError) and is_local(outermost(archive)):
                forget(archive)  # what is open may be stale: the next attempt opens it anew
            raise

    def read() -> bytes:
        root = outermost(archive)
        with _lock:
            before = _remote_versions.get(root)
        try:
            return read_once()
        except (ImageError, FileNotFoundError) as error:
            may_be_replaced = not is_local(root) and getattr(error, "code", "not_found") in _DAMAGED
            if not may_be_replaced or not _is_replaced(root, before):
                raise
        return read_once()

    return attempt(archive, read, patience_s=patience_s)


def why_no_image(archive: str, *, patience_s: float | None = None) -> ImageError:
    """The error row of an archive that stands among the images. Errors of the storage as `attempt`."""
    try:
        if attempt(archive, lambda: _open(archive), patience_s=patience_s).is_encrypted:
            return ImageError("permission_denied", "the archive is encrypted")
        for _ in list_members(archive):
            pass
    except UsageError as error:
        return ImageError("decode_failed", str(error))
    return ImageError("unsupported_format", "an archive is no image")


def depth_of(uri: str) -> int:
    """In how many archives a file lies."""
    depth = 0
    while (chained := split_member(uri)) is not None:
        depth, uri = depth + 1, chained[1]
    return depth


def _complaint(archive: str, why: object) -> str:
    return f"A .{suffix_of(archive) or 'zip'} must be a readable archive: {why}. Received: {redact(archive)}"


def _is_replaced(root: str, before: str | None) -> bool:
    """Whether a remote archive is no longer the one that was opened. Then the next use opens it anew."""
    now = version_of(info_of(root, fresh=True))
    with _lock:
        if _remote_versions.get(root) not in (None, now):
            _forget(root)
    return before is not None and now != before


def forget(archive: str) -> None:
    """Make the next use of an archive open it anew. Threads that are reading it keep what they have open."""
    with _lock:
        _forget(outermost(archive))


def _forget(root: str) -> None:
    _remote_versions.pop(root, None)
    for key in [key for key in _archives if outermost(key[0]) == root]:
        del _archives[key]


def _open(archive: str) -> Reader:
    root = outermost(archive)
    key = _found(archive, root)
    if key is not None and (opened := _kept(key)) is not None:
        return opened
    with _lock:
        opening = _opening[archive]
    with opening:  # one thread opens it; the others wait
        key = _found(archive, root)
        if key is None:
            version = version_of(info_of(root, fresh=True))
            with _lock:
                _remote_versions[root] = version
            key = (archive, version, os.getpid())
        if (opened := _kept(key)) is not None:
            return opened
        opened = _opened(archive)
        with _lock:
            _archives[key] = opened
            while len(_archives) > _MAX_OPEN or (len(_archives) > 1 and _held_bytes() > MAX_INNER_BYTES):
                _archives.popitem(last=False)  # the archive is closed when its last reader lets go of it
                _opening.clear()
        return opened


def _opened(archive: str) -> Reader:
    try:
        return _FORMATS[_scheme(archive)](_place_of(archive))
    except Exception as error:
        if not is_damage(error):
            raise
        raise UsageError(_complaint(archive, error)) from error


def _place_of(archive: str) -> Place:
    chained = split_member(archive)
    if chained is None:
        return FilePlace(archive)
    name, outer = chained
    reader = _open(outer)
    return reader.place_of(reader.member(name))


def _scheme(archive: str) -> str:
    return archive_scheme(archive) or "zip"


def _held_bytes() -> int:
    return sum(reader.place.held_bytes for reader in _archives.values())


def _kept(key: tuple[str, str, int]) -> Reader | None:
    with _lock:
        if key in _archives:
            _archives.move_to_end(key)
        return _archives.get(key)


def _found(archive: str, root: str) -> tuple[str, str, int] | None:
    """The key of an archive in `_archives`; None if its storage must be asked first.

    The key changes when the archive is replaced. A remote storage is asked once per archive: if the archive is replaced
    later, what is read does not fit its directory, and `read_member` opens it anew.
    """
    if is_local(root):
        return archive, version_of_status(os.stat(local_path(root))), os.getpid()
    with _lock:
        version = _remote_versions.get(root)
    return None if version is None else (archive, version, os.getpid())
