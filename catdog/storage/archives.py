"""Zip archives, read in place wherever they are."""

import collections
import errno
import io
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
from catdog.storage import s3
from catdog.storage.filesystems import SourceFile, attempt, filesystem, open_handle, require, version_of
from catdog.storage.filesystems import info as info_of
from catdog.storage.urls import is_local, local_path, member_uri

_MAX_OPEN: Final = 8
"""Archives that a process keeps open at most."""

_ENCRYPTED: Final = 0x1
"""The bit in a member's flags that says so."""

_DAMAGED: Final = {"truncated", "decode_failed", "not_found"}
"""Codes of the errors that come, too, if an archive was replaced after its directory was read."""

_HEADER: Final = struct.Struct("<4s22xHH")
"""What lies before the data of a member: signature, ..., length of the name, length of the extra field."""

_SLACK_BYTES: Final = 256
"""How much longer that extra field may be than the one in the directory without a second request."""

_DAMAGE: Final = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error, ValueError)
"""What zipfile raises when the data is damaged. It also raises EOFError, which is treated apart."""


class _Archive:
    """The directory of one archive, shared by all threads.

    A local archive is kept open. zipfile locks its reads itself, but not its count of open members. Of a remote archive
    each member is fetched by requests of its own, so that threads do not wait for each other.
    """

    def __init__(self, uri: str) -> None:
        self._uri = uri
        self._lock = threading.Lock()
        try:
            if is_local(uri):
                self._zip = zipfile.ZipFile(local_path(uri))
                infos = self._zip.infolist()
            else:
                with open_handle(uri) as handle, zipfile.ZipFile(handle) as archive:
                    infos = archive.infolist()
        except (*_DAMAGE, NotImplementedError) as error:
            raise UsageError(f"A .zip must be a readable archive: {error}. Received: {redact(uri)}") from error
        infos = [info for info in infos if not info.is_dir()]
        self._infos = sorted(infos, key=lambda info: info.header_offset)
        self._by_name = {info.filename: info for info in infos}
        self._others = [info for info in infos if self._by_name[info.filename] is not info]

    def members(self) -> Iterator[zipfile.ZipInfo]:
        """All files, in the order in which they lie in the archive. Several may have one name."""
        return iter(self._infos)

    def member(self, name: str, version: str | None = None) -> zipfile.ZipInfo:
        """The member of this name and version; the last one of this name if none has this version."""
        found = self._by_name.get(name)
        if found is None:
            raise FileNotFoundError(errno.ENOENT, "there is no such member in the archive")
        if version in (None, _version_of_member(found)):
            return found
        others = (info for info in self._others if info.filename == name and _version_of_member(info) == version)
        return next(others, found)

    def read(self, info: zipfile.ZipInfo) -> bytes:
        """The bytes of a member.

        Raises:
            ImageError: the member cannot be read.
                Its code is in `_DAMAGED` if the data does not fit the directory: it is damaged, or was replaced.
        """
        if info.flag_bits & _ENCRYPTED:
            raise ImageError("permission_denied", "the archive member is encrypted")
        try:
            return self._read_local(info) if is_local(self._uri) else self._read_remote(info)
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

    def _read_local(self, info: zipfile.ZipInfo) -> bytes:
        with self._lock:
            member = self._zip.open(info)
        try:
            return member.read()
        finally:  # a member that stays open keeps the archive open
            with self._lock:
                member.close()

    def _read_remote(self, info: zipfile.ZipInfo) -> bytes:
        begin = info.header_offset
        # The header that lies before the data repeats the name, and has an extra field of a length of its own.
        guess = _HEADER.size + len(info.filename.encode()) + len(info.extra) + _SLACK_BYTES
        data = self._fetch(begin, begin + guess + info.compress_size)
        if len(data) < _HEADER.size:
            raise EOFError
        signature, name_bytes, extra_bytes = _HEADER.unpack_from(data)
        if signature != b"PK\x03\x04":
            raise zipfile.BadZipFile("there is no member where the archive's directory says")
        start = _HEADER.size + name_bytes + extra_bytes
        if len(data) < start + info.compress_size:
            data += self._fetch(begin + len(data), begin + start + info.compress_size)
        if len(data) < start + info.compress_size:
            raise EOFError
        compressed = io.BytesIO(data[start : start + info.compress_size])
        with zipfile.ZipExtFile(compressed, "r", info) as member:
            return member.read()

    def _fetch(self, start: int, stop: int) -> bytes:
        fs, path = filesystem(self._uri)
        data: bytes
        try:
            data = s3.read_range(fs, path, start, stop) if s3.is_s3(fs) else fs.cat_file(path, start=start, end=stop)
        except Exception as error:
            if s3.is_invalid_range(error) or getattr(error, "status", None) == 416:  # the archive ends before
                return b""
            raise
        return data[start:stop] if len(data) > stop - start else data  # a web server may send the whole file


_archives: collections.OrderedDict[tuple[str, str, int], _Archive] = collections.OrderedDict()
_remote_versions: dict[str, str] = {}
_opening: collections.defaultdict[str, threading.Lock] = collections.defaultdict(threading.Lock)
_lock = threading.Lock()
"""For the three above. Nobody holds it while a storage is asked."""


def list_members(archive: str) -> Iterator[SourceFile]:
    """Every file in an archive, in the order in which they lie there.

    Raises:
        UsageError: `archive` is not a zip archive.
        FileNotFoundError: there is no such archive.
        StorageError: the storage failed.
    """
    forget(archive)
    for info in require(archive, lambda: _open(archive)).members():
        yield _source_file(archive, info)


def stat_member(archive: str, member: str, *, patience_s: float | None = None) -> SourceFile:
    """One member of an archive, without reading it. Errors as `read_member`."""
    return _source_file(archive, attempt(archive, lambda: _open(archive), patience_s=patience_s).member(member))


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
        UsageError: `archive` is not a zip archive.
        FileNotFoundError, PermissionError, StorageError: as `attempt`.
    """

    def read_once() -> bytes:
        opened = _open(archive)
        info = opened.member(member, version)
        if info.file_size > max_bytes:
            raise ImageError("too_large", f"{info.file_size} bytes is more than {max_bytes} bytes")
        try:
            return opened.read(info)
        except OSError:
            if is_local(archive):
                forget(archive)  # what is open may be stale: the next attempt opens it anew
            raise

    def read() -> bytes:
        with _lock:
            before = _remote_versions.get(archive)
        try:
            return read_once()
        except (ImageError, FileNotFoundError) as error:
            may_be_replaced = not is_local(archive) and getattr(error, "code", "not_found") in _DAMAGED
            if not may_be_replaced or not _is_replaced(archive, before):
                raise
        return read_once()

    return attempt(archive, read, patience_s=patience_s)


def _is_replaced(archive: str, before: str | None) -> bool:
    """Whether a remote archive is no longer the one that was opened. Then the next use opens it anew."""
    now = version_of(info_of(archive, fresh=True))
    with _lock:
        if _remote_versions.get(archive) not in (None, now):
            _forget(archive)
    return before is not None and now != before


def forget(archive: str) -> None:
    """Make the next use of an archive open it anew. Threads that are reading it keep what they have open."""
    with _lock:
        _forget(archive)


def _forget(archive: str) -> None:
    _remote_versions.pop(archive, None)
    for key in [key for key in _archives if key[0] == archive]:
        del _archives[key]


def _open(archive: str) -> _Archive:
    key = _found(archive)
    if key is not None and (opened := _kept(key)) is not None:
        return opened
    with _lock:
        opening = _opening[archive]
    with opening:  # one thread opens it; the others wait
        key = _found(archive)
        if key is None:
            version = version_of(info_of(archive, fresh=True))
            with _lock:
                _remote_versions[archive] = version
            key = (archive, version, os.getpid())
        if (opened := _kept(key)) is not None:
            return opened
        opened = _Archive(archive)
        with _lock:
            _archives[key] = opened
            if len(_archives) > _MAX_OPEN:
                _archives.popitem(last=False)  # the archive is closed when its last reader lets go of it
                _opening.clear()
        return opened


def _kept(key: tuple[str, str, int]) -> _Archive | None:
    with _lock:
        if key in _archives:
            _archives.move_to_end(key)
        return _archives.get(key)


def _found(archive: str) -> tuple[str, str, int] | None:
    """The key of an archive in `_archives`; None if its storage must be asked first.

    The key changes when the archive is replaced. A remote storage is asked once per archive: if the archive is replaced
    later, what is read does not fit its directory, and `read_member` opens it anew.
    """
    if is_local(archive):
        status = os.stat(local_path(archive))
        return archive, f"{status.st_size}-{status.st_mtime_ns}", os.getpid()
    with _lock:
        version = _remote_versions.get(archive)
    return None if version is None else (archive, version, os.getpid())


def _version_of_member(info: zipfile.ZipInfo) -> str:
    return f"{info.CRC:08x}-{info.file_size}"


def _source_file(archive: str, info: zipfile.ZipInfo) -> SourceFile:
    return SourceFile(member_uri(info.filename, archive), _version_of_member(info), info.file_size)
