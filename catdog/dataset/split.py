"""The split of an image: a pure function of the key of its duplicate group and a seed."""

import hashlib
from typing import Final

_POSITION_BYTES: Final = 8


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
