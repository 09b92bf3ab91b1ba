"""The sources of a run, which `--images` names: listing them into a file, and the places that every worker must see."""

import gzip
import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from catdog import storage
from catdog.errors import UsageError
from catdog.provenance import redact
from catdog.storage.manifests import Columns
from catdog.storage.names import archive_scheme
from catdog.storage.patterns import Chosen
from catdog.storage.urls import is_local, local_path, outermost, split_member


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


@dataclass(frozen=True, kw_only=True)
class Listed:
    """What the listing of a run's sources says, besides the images."""

    roots: tuple[Root, ...]
    """The local places of the images."""

    own: tuple[str, ...]
    """The storages of the sources and of the output (`storage.storage_of`). Another storage may fail: that is rows."""

    skipped: dict[str, int]
    """Reason → number of things that were passed over (`storage.Listing`)."""


def refuse_output_inside(sources: Sequence[str], output: str) -> None:
    """Raise `UsageError` if the output lies within a source: a run would label its own files.

    Globs are looked at when they are listed.
    """
    for source in sources:
        if storage.is_inside(output, source):
            raise UsageError(
                f"--output must not lie inside --images. Received: --images={redact(source)} --output={redact(output)}"
            )


def spill_listing(
    path: Path,
    sources: Sequence[str],
    output: str,
    chosen: Chosen,
    *,
    columns: Columns | None = None,
    allow_empty: bool = False,
) -> Listed:
    """Write the listing of all sources to a local file. What is no image is skipped.

    Args:
        path: the file to write.
        sources: where the images are.
        output: directory of the part files.
        chosen: which of the files are listed.
        columns: which columns of manifests hold what.
        allow_empty: whether there may be nothing to list.

    Raises:
        UsageError: there is nothing in a source, or it includes the output; or no file is left in all of them.
        StorageError: a storage of the job's own failed.
    """
    own = {storage.storage_of(url) for url in (*sources, output)}
    roots, skipped = [], Counter[str]()
    num_listed = num_left_out = 0
    # This is JSON, because making an Arrow table from Python values imports pandas, which takes half a second.
    with gzip.open(path, "wt", compresslevel=1) as spilled:
        for source in sources:
            listing = storage.list_images(
                source,
                exclude=output,
                own=own,
                columns=columns,
                chosen=chosen,
                skip_others=True,
                allow_empty=allow_empty,
            )
            first = last = ""
            for file in listing:
                row = {"uri": file.uri, "version": file.version, "num_bytes": file.num_bytes}
                spilled.write(json.dumps(row) + "\n")
                num_listed += 1
                place = outermost(file.uri)
                if file.version and is_local(place):
                    first, last = min(first or place, place), max(last, place)
            skipped += listing.skipped
            num_left_out += listing.num_left_out
            if first:
                roots.append(_root(source, local_path(first), local_path(last)))
    if num_left_out and not num_listed and not allow_empty:
        raise UsageError(
            "--include and --exclude must leave some files to label. "
            f"Received: none of the {num_left_out} files and archives in --images. (Globs need quotes.)"
        )
    return Listed(roots=tuple(roots), own=tuple(sorted(own)), skipped=dict(skipped))


def _root(source: str, first: str, last: str) -> Root:
    """The place of a source whose first and last file, by name, have these paths."""
    if is_local(source) and os.path.isdir(local_path(source)):
        path = local_path(source)
    elif first != last:
        path = os.path.commonpath([first, last])
    else:
        path = first if split_member(source) or archive_scheme(first) else os.path.dirname(first)
    return Root(path=path, witnesses=tuple(dict.fromkeys([first, last])))
