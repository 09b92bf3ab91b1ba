"""The sources of a run, which `--images` names: listing them, and the places that every worker must see."""

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final

from catdog import storage
from catdog.errors import UsageError
from catdog.provenance import redact
from catdog.storage import SourceFile
from catdog.storage.manifests import Columns
from catdog.storage.names import archive_scheme
from catdog.storage.patterns import Chosen
from catdog.storage.sifting import NOT_AN_IMAGE
from catdog.storage.urls import is_local, local_path, outermost, split_member

_LOOKED_AT: Final = 32
"""So many sources are looked at before the first file is listed, so that a mistake is found before anything is done."""


@dataclass(frozen=True, kw_only=True)
class Root:
    """A place on a local or mounted disk that holds listed images."""

    path: str
    """A directory or an archive, in which all the images lie."""

    witnesses: tuple[str, ...]
    """Files that were there when they were listed. An empty mount point has none of them."""

    def is_seen(self) -> bool:
        """Whether a witness is there for this process."""
        return any(os.path.exists(path) for path in self.witnesses)

    def is_gone(self) -> bool:
        """Whether the place is not there, or is an empty directory, as a mount point is whose storage is gone."""
        try:
            with os.scandir(self.path) as entries:
                return next(entries, None) is None
        except NotADirectoryError:
            return False
        except OSError:
            return True

    def holds(self, uri: str) -> bool:
        """Whether an image lies in this place."""
        place = outermost(uri)
        return is_local(place) and (local_path(place) + "/").startswith(self.path.rstrip("/") + "/")


class Collection:
    """The images to label, one after the other, and what their listing says besides, as far as it has come."""

    def __init__(self, files: Iterable[SourceFile], *, own: Iterable[str] = ("",)) -> None:
        """A collection of these files, as a benchmark invents them. `listed` makes one of sources."""
        self._files = files
        self.own = tuple(sorted(own))
        """The storages of the sources and of the output (`storage.storage_of`). Another one may fail: that is rows."""

    def __iter__(self) -> Iterator[SourceFile]:
        return iter(self._files)

    @property
    def roots(self) -> tuple[Root, ...]:
        """The local places of the images that were listed so far."""
        return ()

    @property
    def skipped(self) -> dict[str, int]:
        """Reason → number of things that were passed over so far (`storage.Listing`)."""
        return {}

    @property
    def first_skipped(self) -> dict[str, str]:
        """Reason → the first thing that was passed over for it."""
        return {}


def refuse_output_inside(sources: Sequence[str], output: str) -> None:
    """Raise `UsageError` if the output lies within a source: a run would label its own files.

    Globs are looked at when they are listed.
    """
    for source in sources:
        if storage.is_inside(output, source):
            raise UsageError(
                f"--output must not lie inside --images. Received: --images={redact(source)} --output={redact(output)}"
            )


def listed(
    sources: Sequence[str],
    output: str,
    chosen: Chosen,
    *,
    columns: Columns | None = None,
    allow_empty: bool = False,
) -> Collection:
    """The images of all sources. What is no image is skipped. Nothing is asked of a storage yet.

    Args:
        sources: where the images are.
        output: directory of the part files.
        chosen: which of the files are listed.
        columns: which columns of manifests hold what.
        allow_empty: whether there may be nothing to list.

    Raises:
        UsageError: to iterate raises it if there is nothing in a source, or it includes the output; or no file is left
            in all of them, or no image. The first `_LOOKED_AT` sources are looked at before the first file comes.
        StorageError: to iterate raises it if a storage of the job's own failed.
    """
    own = {storage.storage_of(url) for url in (*sources, output)}
    list_source = partial(
        storage.list_images,
        exclude=output,
        own=own,
        columns=columns,
        chosen=chosen,
        skip_others=True,
        allow_empty=allow_empty,
    )
    return _Listed(sources, list_source, own, allow_empty=allow_empty)


class _Source:
    """A source that is being listed."""

    def __init__(self, url: str, listing: storage.Listing) -> None:
        self.url = url
        self.listing = listing
        self.first = self.last = ""
        """The first and the last of the local files that were listed so far, by name."""

    def root(self) -> Root | None:
        """The place in which the local files lie that were listed so far; None if there are none."""
        first, last = self.first, self.last
        return _root(self.url, local_path(first), local_path(last)) if first else None


class _Listed(Collection):
    def __init__(
        self, sources: Sequence[str], list_source: Callable[[str], storage.Listing], own: set[str], *, allow_empty: bool
    ) -> None:
        super().__init__(self._listed(), own=own)
        self._urls = sources
        self._list_source = list_source
        self._allow_empty = allow_empty
        self._begun: list[_Source] = []

    @property
    def roots(self) -> tuple[Root, ...]:
        roots = [source.root() for source in self._begun]
        return tuple(root for root in roots if root is not None)

    @property
    def skipped(self) -> dict[str, int]:
        return dict(sum((source.listing.skipped for source in self._begun), Counter[str]()))

    @property
    def first_skipped(self) -> dict[str, str]:
        found: dict[str, str] = {}
        for source in reversed(self._begun):
            found |= source.listing.first_skipped
        return found

    def _listed(self) -> Iterator[SourceFile]:
        num_listed = 0
        looked_at = {url: self._list_source(url) for url in self._urls[:_LOOKED_AT]}
        for url in self._urls:
            source = _Source(url, looked_at.pop(url) if url in looked_at else self._list_source(url))
            self._begun.append(source)
            for file in source.listing:
                num_listed += 1
                place = outermost(file.uri)
                if file.version and is_local(place):
                    source.first, source.last = min(source.first or place, place), max(source.last, place)
                yield file
        if num_listed or self._allow_empty:
            return
        if num_left_out := sum(source.listing.num_left_out for source in self._begun):
            raise UsageError(
                "--include and --exclude must leave some files to label. "
                f"Received: none of the {num_left_out} files and archives in --images. (Globs need quotes.)"
            )
        if num_others := self.skipped.get(NOT_AN_IMAGE, 0):
            raise UsageError(
                f"--images must hold at least one image, unless --allow-empty is given. Received: {num_others} files, "
                "none of which is an image by its name or its first bytes"
            )


def _root(source: str, first: str, last: str) -> Root:
    """The place of a source whose first and last file, by name, have these paths."""
    if is_local(source) and os.path.isdir(local_path(source)):
        path = local_path(source)
    elif first != last:
        path = os.path.commonpath([first, last])
    else:
        path = first if split_member(source) or archive_scheme(first) else os.path.dirname(first)
    return Root(path=path, witnesses=tuple(dict.fromkeys([first, last])))
