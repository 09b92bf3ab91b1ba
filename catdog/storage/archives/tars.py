"""Tar archives. A plain one is read in ranges, a compressed one from its beginning to its end.

The version of a member says where it lies, so that a worker that is given a member and its version reads it from a
plain archive without looking at the others.
"""

import bz2
import collections
import contextlib
import errno
import gzip
import lzma
import tarfile
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import IO, Any, Final, Literal

import pyarrow as pa

from catdog.errors import ImageError
from catdog.storage import names
from catdog.storage.archives.interface import Member, Place, Reader, SectionPlace

_BLOCK_BYTES: Final = tarfile.BLOCKSIZE

_STREAM_BYTES: Final = 2**18
"""What is unpacked at a time."""

_PASSED_BYTES: Final = 64 * 2**20
"""Memory for members of a compressed archive that were passed on the way to another one. Several threads read an
archive at a time, and each asks for a stretch of it."""

_MAX_PASSES: Final = 2
"""Passes through one compressed archive that a process has under way at most."""


def _unpack_zstandard(file: IO[bytes]) -> IO[bytes]:
    stream: IO[bytes] = pa.CompressedInputStream(pa.PythonFile(file, mode="r"), "zstd")
    return stream


_UNPACKERS: Final[tuple[tuple[bytes, Callable[[IO[bytes]], Any]], ...]] = (
    (b"\x1f\x8b", lambda file: gzip.GzipFile(fileobj=file)),
    (b"\x28\xb5\x2f\xfd", _unpack_zstandard),
    (b"BZh", bz2.BZ2File),
    (b"\xfd7zXZ\x00", lzma.LZMAFile),
)
"""The first bytes of a compressed archive, and what unpacks it."""


def open_tar(place: Place) -> Reader:
    """The reader of a tar archive. Its first bytes say whether it is compressed, whatever its name says."""
    head = place.fetch(0, _BLOCK_BYTES)
    for magic, unpack in _UNPACKERS:
        if head.startswith(magic):
            return CompressedTarReader(place, unpack)
    if len(head) < _BLOCK_BYTES:
        raise tarfile.ReadError("it ends early")
    if any(head):  # else it is empty
        tarfile.TarInfo.frombuf(head, "utf-8", "replace")
    return TarReader(place)


class _Info(tarfile.TarInfo):
    """A header. Unlike tarfile, which takes a damaged or missing header for the end of the archive, it complains."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> "_Info":
        try:
            return super().fromtarfile(archive)
        except tarfile.HeaderError as error:
            if type(error).__name__ == "EOFHeaderError":  # the mark at the end of an archive
                raise
            raise tarfile.ReadError(f"it is damaged or ends early at byte {archive.offset}: {error}") from error


def _scan(file: IO[bytes], mode: Literal["r:", "r|"]) -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo]]:
    """The headers of an archive. tarfile must not keep them all."""
    with tarfile.open(
        fileobj=file, mode=mode, bufsize=_STREAM_BYTES, tarinfo=_Info, encoding="utf-8", errors="replace"
    ) as archive:
        while (info := archive.next()) is not None:
            if not info.isdir():
                yield archive, info
            archive.members.clear()  # type: ignore[attr-defined]


def _member(info: tarfile.TarInfo) -> Member:
    is_file = info.isreg() and not info.issparse()
    version = f"{info.offset_data:013d}-{info.size}-{int(info.mtime)}"
    return Member(info.name, version, info.size, is_file, info.offset_data)


def _member_of_version(name: str, version: str) -> Member | None:
    """The member that a version describes; None if the text is no version of a member."""
    offset, _, rest = version.partition("-")
    size, _, _ = rest.partition("-")
    if not (offset.isdecimal() and size.isdecimal()):
        return None
    return Member(name, version, int(size), where=int(offset))


class _TarReader(Reader):
    """What the two readers share: finding a member."""

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        self._lock = threading.Lock()
        self._by_name: dict[str, Member] | None = None

    def member(self, name: str, version: str | None = None) -> Member:
        """As `Reader.member`. With a version, the archive is not asked: reading the member finds out."""
        if version and (told := _member_of_version(name, version)) is not None:
            return told
        with self._lock:
            if self._by_name is None:
                self._by_name = {member.name: member for member in self.members() if member.is_file}
        if name not in self._by_name:
            raise FileNotFoundError(errno.ENOENT, "there is no such member in the archive")
        return self._by_name[name]


class TarReader(_TarReader):
    """A tar archive that is not compressed."""

    def members(self) -> Iterator[Member]:
        """As `Reader.members`."""
        with self.place.open() as file:
            for _, info in _scan(file, "r:"):
                yield _member(info)

    def read(self, member: Member, num_bytes: int | None = None) -> bytes:
        """As `Reader.read`. The header before the data must be the one that was listed."""
        start = self._checked_start(member) if num_bytes is not None else member.where - _BLOCK_BYTES
        if num_bytes is not None:
            return self.place.fetch(start, start + min(num_bytes, member.num_bytes))
        data = self.place.fetch(start, start + _BLOCK_BYTES + member.num_bytes)
        _check_header(data[:_BLOCK_BYTES], member)
        if len(data) < _BLOCK_BYTES + member.num_bytes:
            raise EOFError
        return data[_BLOCK_BYTES:]

    def place_of(self, member: Member) -> Place:
        """As `Reader.place_of`."""
        return SectionPlace(self.place, self._checked_start(member), member.num_bytes)

    def _checked_start(self, member: Member) -> int:
        start: int = member.where
        _check_header(self.place.fetch(start - _BLOCK_BYTES, start), member)
        return start


def _check_header(header: bytes, member: Member) -> None:
    try:
        info = tarfile.TarInfo.frombuf(header, "utf-8", "replace")
    except tarfile.HeaderError:
        info = None
    if info is None or not info.isreg() or member.version.split("-")[1:] != [str(info.size), str(int(info.mtime))]:
        raise ImageError("not_found", "the archive member is not where it was listed")


class _Pass:
    """One way through a compressed archive, from its beginning.

    Attributes:
        at: where the member lies that `next` gave last.
        close: closes the archive. That happens by itself, too, when nobody holds the pass any more.
    """

    def __init__(self, reader: "CompressedTarReader") -> None:
        closing = contextlib.ExitStack()
        self.close = weakref.finalize(self, closing.close)
        file = closing.enter_context(reader.place.open())
        self._file = closing.enter_context(reader.unpacked(file))
        self._scan = _scan(self._file, "r|")
        self._archive: tarfile.TarFile | None = None
        self._info: tarfile.TarInfo | None = None
        self._head = b""
        self._opened: IO[bytes] | None = None
        self.at = -1

    def next(self) -> Member | None:
        """The next member that is no folder; None at the end of the archive."""
        found = next(self._scan, None)
        if found is None:
            self._check_end()
            return None
        self._archive, self._info = found
        self._opened, self._head = None, b""
        self.at = self._info.offset_data
        return _member(self._info)

    def read(self, num_bytes: int | None = None) -> bytes:
        """The bytes of the member that `next` gave, or the first of them."""
        if self._archive is None or self._info is None:
            raise RuntimeError("next must give a member first")
        if self._opened is None:
            self._opened = self._archive.extractfile(self._info)
        if self._opened is not None and (num_bytes is None or len(self._head) < num_bytes):
            self._head += self._opened.read(-1 if num_bytes is None else num_bytes - len(self._head))
        return self._head if num_bytes is None else self._head[:num_bytes]

    def _check_end(self) -> None:
        """Unpack what is left, so that a checksum at the end of the file is compared, and a lack of it is found."""
        while self._file.read(2**20):
            pass


class CompressedTarReader(_TarReader):
    """A tar archive that is compressed as a whole. Its members are read in their order, and passed only once.

    A thread that asks for a member takes the pass that lies before it and nearest to it. What it passes is kept for the
    threads that ask for it a moment later.
    """

    def __init__(self, place: Place, unpack: Callable[[IO[bytes]], Any]) -> None:
        super().__init__(place)
        self._unpack = unpack
        self._reading = threading.Lock()
        self._passes: list[_Pass] = []
        self._passed: collections.OrderedDict[int, tuple[Member, bytes]] = collections.OrderedDict()
        self._passed_bytes = 0
        self._listing: _Pass | None = None

    def unpacked(self, file: IO[bytes]) -> IO[bytes]:
        """The tar archive in an open file, from its beginning."""
        stream: IO[bytes] = self._unpack(file)
        return stream

    def members(self) -> Iterator[Member]:
        """As `Reader.members`. As long as a member is the last one that was given, `read` can read its first bytes."""
        listing = _Pass(self)
        try:
            while (member := listing.next()) is not None:
                self._listing = listing
                yield member
        finally:
            self._listing = None
            listing.close()

    def read(self, member: Member, num_bytes: int | None = None) -> bytes:
        """As `Reader.read`."""
        if self._listing is not None and self._listing.at == member.where and num_bytes is not None:
            return self._listing.read(num_bytes)
        with self._reading:
            kept = self._passed.pop(member.where, None)
            if kept is not None:
                self._passed_bytes -= len(kept[1])
                found, data = kept
            else:
                found, data = self._advance(member)
        if found.version != member.version:
            raise ImageError("not_found", "the archive member is not where it was listed")
        return data if num_bytes is None else data[:num_bytes]

    def _advance(self, member: Member) -> tuple[Member, bytes]:
        """Go on to a member, and keep what is passed on the way."""
        before = [each for each in self._passes if each.at < member.where]
        under_way = max(before, key=lambda each: each.at, default=None)
        if under_way is None:
            if len(self._passes) == _MAX_PASSES:
                self._passes.pop(0).close()
            under_way = _Pass(self)
            self._passes.append(under_way)
        try:
            while (found := under_way.next()) is not None and found.where < member.where:
                if found.is_file and not names.is_other_name(found.name) and found.num_bytes <= _PASSED_BYTES // 8:
                    self._keep(found, under_way.read())
            if found is None or found.where != member.where:
                raise ImageError("not_found", "the archive member is not where it was listed")
            return found, under_way.read()
        except Exception:
            self._passes.remove(under_way)
            under_way.close()
            raise

    def _keep(self, member: Member, data: bytes) -> None:
        if member.where in self._passed:
            return
        self._passed[member.where] = member, data
        self._passed_bytes += len(data)
        while self._passed_bytes > _PASSED_BYTES:
            _, (_, dropped) = self._passed.popitem(last=False)
            self._passed_bytes -= len(dropped)

    def place_of(self, member: Member) -> Place:
        """As `Reader.place_of`. The member is unpacked in memory."""
        return self.unpacked_place(member, "an archive in a compressed archive")
