"""Zip archives. Each member is read for itself, wherever the archive lies."""

import errno
import io
import struct
import threading
import weakref
import zipfile
from collections.abc import Iterator
from typing import Final

from catdog.errors import ImageError
from catdog.storage.archives.interface import Member, Place, Reader, SectionPlace, UnreadableError

_ENCRYPTED: Final = 0x1
"""The bit in a member's flags that says so."""

_HEADER: Final = struct.Struct("<4s22xHH")
"""What lies before the data of a member: signature, ..., length of the name, length of the extra field."""

_SLACK_BYTES: Final = 256
"""How much longer that extra field may be than the one in the directory without a second request."""

_HEAD_BYTES: Final = 4096
"""Compressed bytes that are fetched to unpack the first few bytes of a member."""


class ZipReader(Reader):
    """The directory of one zip archive.

    An archive on this machine is kept open. zipfile locks its reads itself, but not its count of open members. Of a
    remote archive each member is fetched by requests of its own, so that threads do not wait for each other.
    """

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        self._lock = threading.Lock()
        handle = place.open()
        closing = weakref.finalize(self, handle.close)
        try:
            self._zip = zipfile.ZipFile(handle)
        except BaseException:
            closing()
            raise
        infos = self._zip.infolist()
        if not place.is_near:
            closing()
        infos = [info for info in infos if not info.is_dir()]
        self._infos = sorted(infos, key=lambda info: info.header_offset)
        self._by_name = {info.filename: info for info in infos}
        self._others = [info for info in infos if self._by_name[info.filename] is not info]
        self.is_encrypted = bool(infos) and all(info.flag_bits & _ENCRYPTED for info in infos)

    def members(self) -> Iterator[Member]:
        """As `Reader.members`."""
        return map(_member, self._infos)

    def member(self, name: str, version: str | None = None) -> Member:
        """As `Reader.member`."""
        found = self._by_name.get(name)
        if found is None:
            raise FileNotFoundError(errno.ENOENT, "there is no such member in the archive")
        if version in (None, _version_of(found)):
            return _member(found)
        others = (info for info in self._others if info.filename == name and _version_of(info) == version)
        return _member(next(others, found))

    def read(self, member: Member, num_bytes: int | None = None) -> bytes:
        """As `Reader.read`."""
        info: zipfile.ZipInfo = member.where
        if info.flag_bits & _ENCRYPTED:
            raise ImageError("permission_denied", "the archive member is encrypted")
        return self._read_near(info, num_bytes) if self.place.is_near else self._read_remote(info, num_bytes)

    def place_of(self, member: Member) -> Place:
        """As `Reader.place_of`. A member that is stored is read where it is; another one is unpacked in memory."""
        info: zipfile.ZipInfo = member.where
        if info.flag_bits & _ENCRYPTED:
            raise UnreadableError("the archive is encrypted")
        if info.compress_type == zipfile.ZIP_STORED:
            header = self.place.fetch(info.header_offset, info.header_offset + _HEADER.size)
            return SectionPlace(self.place, info.header_offset + _data_offset(header), info.file_size)
        return self.unpacked_place(member, "a compressed archive in an archive")

    def _read_near(self, info: zipfile.ZipInfo, num_bytes: int | None) -> bytes:
        with self._lock:
            member = self._zip.open(info)
        try:
            return member.read() if num_bytes is None else member.read(num_bytes)
        finally:  # a member that stays open keeps the archive open
            with self._lock:
                member.close()

    def _read_remote(self, info: zipfile.ZipInfo, num_bytes: int | None) -> bytes:
        begin = info.header_offset
        # The header that lies before the data repeats the name, and has an extra field of a length of its own.
        guess = _HEADER.size + len(info.filename.encode()) + len(info.extra) + _SLACK_BYTES
        needed = info.compress_size if num_bytes is None else min(info.compress_size, max(num_bytes, _HEAD_BYTES))
        data = self.place.fetch(begin, begin + guess + needed)
        start = _data_offset(data)
        if len(data) < start + needed:
            data += self.place.fetch(begin + len(data), begin + start + needed)
        if len(data) < start + needed:
            raise EOFError
        compressed = io.BytesIO(data[start : start + needed])
        with zipfile.ZipExtFile(compressed, "r", info) as member:
            return member.read() if num_bytes is None else member.read1(num_bytes)


def _data_offset(header: bytes) -> int:
    """Where the data of a member begins, counted from the beginning of its header."""
    if len(header) < _HEADER.size:
        raise EOFError
    signature, name_bytes, extra_bytes = _HEADER.unpack_from(header)
    if signature != b"PK\x03\x04":
        raise zipfile.BadZipFile("there is no member where the archive's directory says")
    return int(_HEADER.size + name_bytes + extra_bytes)


def _version_of(info: zipfile.ZipInfo) -> str:
    return f"{info.CRC:08x}-{info.file_size}"


def _member(info: zipfile.ZipInfo) -> Member:
    return Member(info.filename, _version_of(info), info.file_size, where=info)
