"""The journals of compactions: which part files of an output were merged, into which, and how far that is.

A compaction (`catdog.inference.compaction`) moves the rows of many small part files, its sources, into a few large
ones, its targets. Its journal `_compact/<id>.json` is published after the targets lie whole under hidden names beside
it, and before the first source is touched:

- `open`: the sources lose their rows, one after the other, and then the targets appear. Whoever needs all rows of the
  output reads the hidden files in place of both (`settled`).
- `closed`: the targets are there. The sources are still there, too, without rows, for readers that have listed them.
- `cleared`: the sources are gone.

A journal is kept for good, because it tells where the parts are that a run record names.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Final, Literal, TypeVar

from catdog import storage
from catdog.errors import StorageError
from catdog.inference.publish import is_part
from catdog.provenance import one_line, redact

COMPACT_NAME: Final = "_compact"
"""Name of the directory of the journals in an output."""

_MAX_TRIES: Final = 20
_READERS: Final = 16

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Journal:
    """What a journal says."""

    id: str
    state: Literal["open", "closed", "cleared"]
    sources: dict[str, int]
    """Part file → number of rows that it had."""

    targets: dict[str, int]
    """Part file → number of rows that it gets."""

    columns: list[str]
    """Those of all these files."""

    closed_at: str | None = None

    def publish(self, output: str) -> None:
        """Write the journal, in place of what it said before."""
        storage.publish_json(storage.join(output, COMPACT_NAME, f"{self.id}.json"), asdict(self))


def hidden(target: str) -> str:
    """Where the rows of a target lie before it appears, as seen from the output."""
    return f"{COMPACT_NAME}/.{target}"


def read_journals(output: str) -> list[Journal]:
    """All journals of an output, the oldest first.

    Raises:
        StorageError: one is not whole, or of a later version of catdog.
    """
    place = storage.join(output, COMPACT_NAME)

    def read(name: str) -> Journal:
        try:
            return Journal(**storage.read_json(storage.join(place, name)))
        except (ValueError, TypeError) as error:
            raise StorageError(
                f"the journal of a compaction must be whole. Received: {redact(storage.join(place, name))}: "
                + one_line(error)
            ) from error

    with ThreadPoolExecutor(_READERS) as pool:
        return list(pool.map(read, storage.list_names(place, ".json")))


def merged_away(journals: Sequence[Journal]) -> set[str]:
    """The part files whose rows have gone to others. They have no rows any more, or are gone."""
    return {part for journal in journals for part in journal.sources}


def settled(output: str, read: Callable[[Sequence[str], set[str]], T]) -> T:
    """What `read` makes of all rows of an output, also while a compaction is at work there, or after one that died.

    Args:
        output: directory of the part files.
        read: takes the names of the files that hold the rows (some may be hidden), and those of the part files whose
            rows have gone to others. It is called again if a compaction came in between.

    Raises:
        StorageError: the storage failed; or compactions kept coming in between.
    """
    for _ in range(_MAX_TRIES):
        journals = read_journals(output)
        files = [name for name in storage.list_names(output) if is_part(name)]
        for journal in journals:
            if journal.state == "open":
                files = [name for name in files if name not in journal.sources and name not in journal.targets]
                files += map(hidden, journal.targets)
        try:
            found = read(files, merged_away(journals))
        except StorageError:
            if read_journals(output) == journals:
                raise
        else:
            if read_journals(output) == journals:
                return found
    raise StorageError(f"{redact(output)} could not be read: compactions kept coming in between")
