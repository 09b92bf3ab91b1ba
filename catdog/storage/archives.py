"""Zip archives, read in place wherever they are."""

import collections
import errno
import lzma
import os
import struct
import threading
import zipfile
import zlib
from collections.abc import Iterator
from typing import Final

from catdog.errors import ImageError, UsageError
from catdog.provenance import redact
from catdog.storage.filesystems import SourceFile, attempt, filesystem, open_handle, require, version_of
from catdog.storage.urls import is_local, member_uri

_MAX_OPEN: Final = 8
"""Archives that a process keeps open at most."""

_ENCRYPTED: Final = 0x1
"""The bit in a member's flags that says so."""

_DAMAGE: Final = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error, ValueError)
"""What zipfile raises when the data is damaged. It also raises EOFError, which is treated apart."""


class _Archive:
    """One open archive, shared by all threads. zipfile locks its reads itself, but not its count of open members."""

    def __init__(self, uri: str) -> None:
        self._lock = threading.Lock()
        try:
            self._zip = zipfile.ZipFile(uri if is_local(uri) else open_handle(uri))
        except (*_DAMAGE, NotImplementedError) as error:
            raise UsageError(f"A .zip must be a readable archive: {error}. Received: {redact(uri)}") from error

    def members(self) -> Iterator[zipfile.ZipInfo]:
        """All files, in the archive's order. Two members of one name come as the last one twice: zipfile opens that."""
        return (self._zip.getinfo(info.filename) for info in self._zip.infolist() if not info.is_dir())

    def member(self, name: str) -> zipfile.ZipInfo:
        try:
            return self._zip.getinfo(name)
        except KeyError:
            raise FileNotFoundError(errno.ENOENT, "there is no such member in the archive") from None

    def read(self, info: zipfile.ZipInfo) -> bytes:
        if info.flag_bits & _ENCRYPTED:
            raise ImageError("permission_denied", "the archive member is encrypted")
        try:
            with self._lock:
                member = self._zip.open(info)
            try:
                data = member.read()
            finally:  # a member that stays open keeps the archive open
                with self._lock:
                    member.close()
        except EOFError as error:
            raise ImageError("truncated", "the archive member ends early") from error
        except NotImplementedError as error:
            raise ImageError("unsupported_format", f"the archive member cannot be read: {error}") from error
        except _DAMAGE as error:
            raise ImageError("decode_failed", f"the archive member is damaged: {error}") from error
        except OSError as error:
            if type(error) is OSError and error.errno is None:  # bz2 says so that data is damaged
                raise ImageError("decode_failed", f"the archive member is damaged: {error}") from error
            raise
        return data


_archives: collections.OrderedDict[tuple[str, str, int], _Archive] = collections.OrderedDict()
_remote_versions: dict[str, str] = {}
_lock = threading.Lock()


def list_members(archive: str) -> Iterator[SourceFile]:
    """Every file in an archive, in the archive's order.

    Raises:
        UsageError: `archive` is not a zip archive.
        FileNotFoundError: there is no such archive.
        StorageError: the storage failed.
    """
    forget(archive)
    for info in require(archive, lambda: _open(archive)).members():
        yield _source_file(archive, info)


def stat_member(archive: str, member: str) -> SourceFile:
    """One member of an archive, without reading it. Errors as `read_member`."""
    return _source_file(archive, attempt(archive, lambda: _open(archive)).member(member))


def read_member(archive: str, member: str, max_bytes: int) -> bytes:
    """The bytes of one member of an archive. Thread-safe.

    Raises:
        ImageError: the member is encrypted, damaged, or larger than `max_bytes`.
        UsageError: `archive` is not a zip archive.
        FileNotFoundError, PermissionError, StorageError: as `attempt`.
    """

    def read() -> bytes:
        opened = _open(archive)
        info = opened.member(member)
        if info.file_size > max_bytes:
            raise ImageError("too_large", f"{info.file_size} bytes is more than {max_bytes} bytes")
        try:
            return opened.read(info)
        except OSError:
            forget(archive)  # the archive may have been replaced: the next attempt opens it anew
            raise

    return attempt(archive, read)


def forget(archive: str) -> None:
    """Make the next use of an archive open it anew. Threads that are reading it keep what they have open."""
    with _lock:
        _remote_versions.pop(archive, None)
        for key in [key for key in _archives if key[0] == archive]:
            del _archives[key]


def _open(archive: str) -> _Archive:
    with _lock:
        key = (archive, _version(archive), os.getpid())
        if key not in _archives:
            _archives[key] = _Archive(archive)
        _archives.move_to_end(key)
        if len(_archives) > _MAX_OPEN:
            _archives.popitem(last=False)  # the archive is closed when its last reader lets go of it
        return _archives[key]


def _version(archive: str) -> str:
    """A text that changes when the archive is replaced.

    A remote storage is asked once per archive. If the archive is replaced later, reading it through s3fs fails, and
    `read_member` opens it anew.
    """
    if is_local(archive):
        status = os.stat(archive)
        return f"{status.st_size}-{status.st_mtime_ns}"
    if archive not in _remote_versions:
        fs, path = filesystem(archive, fresh=True)
        _remote_versions[archive] = version_of(fs.info(path))
    return _remote_versions[archive]


def _source_file(archive: str, info: zipfile.ZipInfo) -> SourceFile:
    return SourceFile(member_uri(info.filename, archive), f"{info.CRC:08x}-{info.file_size}", info.file_size)
