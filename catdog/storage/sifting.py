"""Leaving files out of a listing: those that `--include` and `--exclude` do not take, and those that are no images."""

import collections
import concurrent.futures
from collections.abc import Iterator
from typing import Final, NamedTuple

from catdog.errors import ImageError, StorageError
from catdog.storage import names
from catdog.storage.archives import Head
from catdog.storage.archives.interface import FilePlace
from catdog.storage.filesystems import SourceFile, attempt
from catdog.storage.outages import MAX_CONNECTIONS
from catdog.storage.patterns import Chosen
from catdog.storage.reading import is_bad_alone
from catdog.storage.urls import is_local, split_member, storage_of
from catdog.storage.walking import Skip

NOT_AN_IMAGE: Final = "not_an_image"
"""The reason for which a file is skipped that is no image."""

_OF_MOST: Final = (".jpg", ".JPG", ".jpeg", ".png")
"""How the names of most images end. To look at a name more closely takes a microsecond."""

_AHEAD_FILES: Final = 1024
"""Files that wait for the first bytes of one before them at most."""


class Found(NamedTuple):
    """A file that was found, before anything is left out."""

    file: SourceFile

    is_named: bool = False
    """Whether the user named this very file: then it is listed, whatever it is."""

    head: Head | None = None
    """What reads the first bytes of a member of an archive."""

    is_slow: bool = False
    """Whether that takes a request. Otherwise it must be called before the next file is looked for."""


class Sieve:
    """Leaves out of one source what is not to be listed.

    Attributes:
        base: the directory of the source, with a slash at its end, or the archive that the source is.
        folder: the folder in this archive, with a slash at its end; "" for the whole archive.
        num_left_out: number of files, and of archives, that `chosen` does not take.
    """

    def __init__(self, skip: Skip, chosen: Chosen, *, skips_others: bool) -> None:
        self.base = self.folder = ""
        self.num_left_out = 0
        self._skip, self._chosen, self._skips_others = skip, chosen, skips_others

    def drops(self, archive: str) -> bool:
        """Whether an archive is left out with all that it holds. If so, it is counted."""
        if not self._chosen.exclude or not self._chosen.drops(self._below(archive)):
            return False
        self.num_left_out += 1
        return True

    def sifted(self, found: Iterator[Found]) -> Iterator[SourceFile]:
        """The files that are left, in their order."""
        if not self._chosen and not self._skips_others:
            return (each.file for each in found)
        return self._sifted(found)

    def _sifted(self, found: Iterator[Found]) -> Iterator[SourceFile]:
        waiting: collections.deque[tuple[SourceFile, concurrent.futures.Future[bool] | None]] = collections.deque()
        pool: concurrent.futures.ThreadPoolExecutor | None = None
        try:
            for each in found:
                asked = None
                if self._chosen and not self._chosen.takes(self._below(each.file.uri)):
                    self.num_left_out += 1
                    continue
                if self._skips_others and not each.is_named and _is_suspect(each.file.uri):
                    if each.is_slow or not (each.head or is_local(each.file.uri)):
                        pool = pool or concurrent.futures.ThreadPoolExecutor(MAX_CONNECTIONS, "catdog-look")
                        asked = pool.submit(_may_be_image, each)
                    elif not _may_be_image(each):
                        self._skip(NOT_AN_IMAGE, each.file.uri)
                        continue
                if asked is None and not waiting:
                    yield each.file
                    continue
                waiting.append((each.file, asked))
                while waiting and (waiting[0][1] is None or waiting[0][1].done() or len(waiting) > _AHEAD_FILES):
                    yield from self._answered(*waiting.popleft())
            while waiting:
                yield from self._answered(*waiting.popleft())
        finally:
            if pool is not None:
                pool.shutdown(cancel_futures=True)

    def _answered(self, file: SourceFile, asked: "concurrent.futures.Future[bool] | None") -> Iterator[SourceFile]:
        if asked is None or asked.result():
            yield file
        else:
            self._skip(NOT_AN_IMAGE, file.uri)

    def _below(self, uri: str) -> str:
        """The path of a file below the source. An archive counts as a folder."""
        inner: list[str] = []
        while uri != self.base and (chained := split_member(uri)) is not None:
            inner.insert(0, chained[0])
            uri = chained[1]
        outer = [] if uri == self.base else [uri.removeprefix(self.base)]
        return "/".join([*outer, *inner]).removeprefix(self.folder)


def _is_suspect(uri: str) -> bool:
    """Whether a file must be looked into, because its name does not say that it is an image.

    In a remote storage, a name without a suffix does not make a file suspect. Many a bucket holds images under the
    digests of their bytes, and a request for each of them would take hours.
    """
    if uri.endswith(_OF_MOST):
        return False
    if (suffix := names.suffix_of(uri)) == "":
        return storage_of(uri) == ""
    return not names.is_image_suffix(suffix)


def _may_be_image(found: Found) -> bool:
    """Whether the first bytes are those of an image, or cannot be read: then a row says why."""
    try:
        return names.looks_like_image((found.head or _head_of(found.file.uri))(names.HEAD_BYTES))
    except (ImageError, OSError):
        return True
    except StorageError:
        if is_bad_alone(found.file.uri):
            return True
        raise


def _head_of(uri: str) -> Head:
    return lambda num_bytes: attempt(uri, lambda: FilePlace(uri).fetch(0, num_bytes))
