"""What the readers of archives share: where the bytes of an archive lie, what a member is, and what a reader does.

An archive may be a file anywhere, or a member of another archive. A format is a module with a `Reader`.
"""

import abc
import gzip
import io
import lzma
import os
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any, Final

from catdog.errors import ImageError
from catdog.storage import s3
from catdog.storage.filesystems import RetryingFile, WrappedFile, filesystem, open_handle
from catdog.storage.urls import is_local

_DAMAGE: Final = (zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError, struct.error, ValueError)
"""What the libraries raise when the data is damaged. They also raise EOFError, which is treated apart."""


MAX_INNER_BYTES: Final = 2**30
"""Size of the largest archive in an archive that is unpacked in memory. Kaggle's train.zip has 543 MB."""


class UnreadableError(ValueError):
    """Why an archive in an archive cannot be read. The callers of `catdog.storage.archives` see a `UsageError`."""


class Place(abc.ABC):
    """Where the bytes of an archive lie. Thread-safe.

    Attributes:
        is_near: whether reading it asks no other machine.
        held_bytes: memory that it takes.
    """

    is_near: bool
    held_bytes: int = 0

    @abc.abstractmethod
    def open(self) -> IO[bytes]:
        """A seekable binary file, for one thread at a time. An error that can pass is tried again."""

    @abc.abstractmethod
    def fetch(self, start: int, stop: int) -> bytes:
        """Bytes `start` to `stop`; fewer if the archive ends before."""


class FilePlace(Place):
    """A file on this machine or in a remote storage."""

    def __init__(self, uri: str) -> None:
        self._uri = uri
        self.is_near = is_local(uri)

    def open(self) -> IO[bytes]:
        """As `Place.open`."""
        handle = open_handle(self._uri)
        return handle if self.is_near else io.BufferedReader(RetryingFile(self._uri, handle))

    def fetch(self, start: int, stop: int) -> bytes:
        """As `Place.fetch`."""
        if self.is_near:
            with open_handle(self._uri) as file:
                file.seek(start)
                return file.read(stop - start)
        fs, path = filesystem(self._uri)
        data: bytes
        try:
            data = s3.read_range(fs, path, start, stop) if s3.is_s3(fs) else fs.cat_file(path, start=start, end=stop)
        except Exception as error:
            if s3.is_invalid_range(error) or getattr(error, "status", None) == 416:  # the archive ends before
                return b""
            raise
        return data[start:stop] if len(data) > stop - start else data  # a web server may send the whole file


class SectionPlace(Place):
    """A member of another archive that lies there as it is, uncompressed."""

    def __init__(self, outer: Place, start: int, num_bytes: int) -> None:
        self._outer, self._start, self._num_bytes = outer, start, num_bytes
        self.is_near = outer.is_near
        self.held_bytes = outer.held_bytes

    def open(self) -> IO[bytes]:
        """As `Place.open`."""
        return io.BufferedReader(_Section(self._outer.open(), self._start, self._num_bytes))

    def fetch(self, start: int, stop: int) -> bytes:
        """As `Place.fetch`."""
        stop = min(stop, self._num_bytes)
        return self._outer.fetch(self._start + start, self._start + stop) if start < stop else b""


class MemoryPlace(Place):
    """A member of another archive, unpacked in memory."""

    is_near = True

    def __init__(self, data: bytes) -> None:
        self._data = data
        self.held_bytes = len(data)

    def open(self) -> IO[bytes]:
        """As `Place.open`."""
        return io.BytesIO(self._data)

    def fetch(self, start: int, stop: int) -> bytes:
        """As `Place.fetch`."""
        return self._data[start:stop]


class _Section(WrappedFile):
    """A part of a file, as a file. It closes the whole file."""

    def __init__(self, file: IO[bytes], start: int, num_bytes: int) -> None:
        super().__init__(file)
        self._start, self._num_bytes = start, num_bytes
        self._at = 0

    def readinto(self, buffer: Any) -> int:
        self._file.seek(self._start + self._at)
        data = self._file.read(max(0, min(len(buffer), self._num_bytes - self._at)))
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._num_bytes}[whence]
        return self._at

    def tell(self) -> int:
        return self._at


@dataclass(frozen=True, slots=True)
class Member:
    """A member of an archive.

    Attributes:
        name: its path in the archive.
        version: what changes when its content does.
        num_bytes: its size, unpacked.
        is_file: whether it is a file: a link, say, is none.
        where: what its reader needs to read it.
    """

    name: str
    version: str
    num_bytes: int
    is_file: bool = True
    where: Any = None


class Reader(abc.ABC):
    """The members of one archive, shared by all threads.

    What a method raises when the archive is damaged is what its library raises; `described` and `as_image_error` turn
    that into words.
    """

    is_encrypted: bool = False
    """Whether nothing in it can be read without a password."""

    def __init__(self, place: Place) -> None:
        self.place = place

    @abc.abstractmethod
    def members(self) -> Iterator[Member]:
        """All members but folders, in the order in which they lie in the archive. Several may have one name."""

    @abc.abstractmethod
    def member(self, name: str, version: str | None = None) -> Member:
        """The member of this name and version; the last one of this name if none has this version.

        Raises:
            FileNotFoundError: there is no member of this name.
        """

    @abc.abstractmethod
    def read(self, member: Member, num_bytes: int | None = None) -> bytes:
        """The bytes of a member, or the first `num_bytes` of them. An encrypted member raises `ImageError`."""

    @abc.abstractmethod
    def place_of(self, member: Member) -> Place:
        """Where the bytes of a member lie that is an archive itself."""

    def unpacked_place(self, member: Member, what: str) -> Place:
        """A member that is an archive itself, unpacked in memory. `what` says which of the two is compressed.

        Raises:
            UnreadableError: the member is larger than `MAX_INNER_BYTES`.
        """
        if member.num_bytes > MAX_INNER_BYTES:
            raise UnreadableError(
                f"{what} must have at most {MAX_INNER_BYTES} bytes, and this one has {member.num_bytes}: "
                "unpack the outer one"
            )
        return MemoryPlace(self.read(member))


def is_damage(error: Exception) -> bool:
    """Whether an error says that the data of an archive is damaged, ends early, or is of an unknown kind."""
    # bz2 and Arrow say with a bare OSError that data is damaged. Other OSErrors are those of a storage.
    is_bare = type(error) is OSError and error.errno is None
    return isinstance(error, (*_DAMAGE, EOFError, NotImplementedError, gzip.BadGzipFile)) or is_bare


def as_image_error(error: Exception) -> ImageError:
    """The error row of a member whose data is damaged."""
    if isinstance(error, EOFError):
        return ImageError("truncated", "the archive member ends early")
    if isinstance(error, NotImplementedError):
        return ImageError("unsupported_format", f"the archive member cannot be read: {error}")
    return ImageError("decode_failed", f"the archive member is damaged: {error}")
