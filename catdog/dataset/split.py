"""The split of an image: a pure function of the key of its duplicate group and a seed, or what a folder names."""

import hashlib
import re
from collections.abc import Sequence
from typing import Final

_POSITION_BYTES: Final = 8

HELD_OUT: Final = ("test", "val")
"""The splits that a model does not learn from, the one that is to be kept clean most first."""

RULE: Final = "hash of the group/2"
"""The rule by which splits are drawn, as `dataset.json` names it. Since version 2 every split gets images of every
class, if there are enough groups (`catdog.dataset.strata`)."""

_FOLDER: Final = re.compile(
    r"(train|val|test)(?:ing|id|idation)?(?:[ _-]?(?:set|split|data|images))?"
    r"(?:[-_.]\d+(?:-of-\d+)?(?:-[0-9a-f]{8,})?)?",
    re.IGNORECASE,
)
"""A folder, or the name of a shard (an archive, a table) without its suffix: `train-00000-of-00002`."""


def split_of(group_key: str, *, seed: int, val_fraction: float, test_fraction: float) -> str:
    """The split of a group of duplicates.

    Args:
        group_key: smallest `image_id` of the group.
        seed: number that decides the split. Another seed gives another, independent split.
        val_fraction: expected share of the groups in `val`.
        test_fraction: expected share of the groups in `test`.
    """
    digest = hashlib.sha256(f"{seed}:{group_key}".encode()).digest()
    position = int.from_bytes(digest[:_POSITION_BYTES]) / 256**_POSITION_BYTES
    if position < test_fraction:
        return "test"
    return "val" if position < test_fraction + val_fraction else "train"


def named_split(folders: Sequence[str]) -> str | None:
    """The split that a file's folders name, the innermost first; None if none does.

    >>> named_split(["pets", "Validation", "dogs"])
    'val'
    """
    for folder in reversed(folders):
        if (match := _FOLDER.fullmatch(folder)) is not None:
            return match[1].lower()
    return None
