"""What a listing may lack. The books of a run close over what was listed; what a lost mount holds was not."""

from collections.abc import Mapping, Sequence
from typing import Final

from catdog.inference.drift import Night
from catdog.provenance import redact
from catdog.records import plural

_UNREADABLE: Final = "unreadable_directory"

_MIN_IMAGES: Final = 20
"""A smaller listing is not compared with."""

_LAST_NIGHTS: Final = 3

_KEPT_SHARE: Final = 0.9
"""A collection that keeps its images lacks some if it has less than this share of what one of its last nights had."""

_USUAL_SHARE: Final = 0.5
"""One whose images are taken away when they are labelled lacks some if it has less than this share of the smallest."""


def missing(
    tonight: Night, earlier: Sequence[Night], skipped: Mapping[str, int], first_skipped: Mapping[str, str]
) -> list[str]:
    """What the listing of a run may lack, a sentence each.

    Args:
        tonight: the run.
        earlier: earlier nights of its output, the newest first.
        skipped: reason → number of things that the listing passed over.
        first_skipped: reason → the first of them.
    """
    found = []
    if num := skipped.get(_UNREADABLE, 0):
        first = redact(first_skipped.get(_UNREADABLE, "unknown"))
        found.append(
            f"{plural(num, 'folder')} could not be read, and what lies below has no labels: the first is {first}."
        )
    before = [
        night.num_listed for night in earlier if night.sources == tonight.sources and night.num_listed is not None
    ]
    if tonight.num_listed is not None and before and tonight.num_listed < _least(tonight, before):
        numbers = ", ".join(f"{number:,}" for number in before[:_LAST_NIGHTS])
        found.append(
            f"Only {plural(tonight.num_listed, 'image')} listed; the last nights had {numbers}. If nobody took images "
            "away, a mount or a part of the storage is missing."
        )
    return found


def _least(tonight: Night, before: Sequence[int]) -> float:
    """How many images were to be expected at least, after these numbers on earlier nights, the newest first."""
    if max(before) < _MIN_IMAGES:
        return 0.0
    if 2 * tonight.num_known >= (tonight.num_listed or 0) > 0:
        return _KEPT_SHARE * max(before[:_LAST_NIGHTS])
    return _USUAL_SHARE * min(before)
