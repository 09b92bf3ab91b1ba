"""What a listing may lack: when a run says so, and when it does not."""

from collections.abc import Sequence

import pytest

from catdog.inference.drift import Night
from catdog.inference.missing import missing


def night(num_listed: int | None, num_known: int = 0, sources: str = "photos") -> Night:
    return Night(
        run_id="20261127T020000.000000Z-00000000",
        model_id="model",
        num_ok=0,
        num_error=0,
        labels={},
        needs_review=0,
        confidence=(),
        images_per_s=1.0,
        num_listed=num_listed,
        num_known=num_known,
        sources=sources,
    )


@pytest.mark.parametrize(
    ("tonight", "before", "is_missed"),
    [
        (night(60, 60), [90, 60], True),  # a mount is lost, and one of the last nights saw it
        (night(88, 80), [90], False),  # somebody deleted a few
        (night(0), [90], True),
        (night(5), [9, 8], False),  # too few to tell
        (night(40), [90, 100, 45], False),  # a folder that is emptied every day: nights differ
        (night(20), [90, 100, 45], True),
        (night(None, 60), [90], False),  # it stopped before the listing had ended
        (night(60, 60), [None], False),
        (night(60, 60, sources="others"), [90], False),
        (night(60, 60), [], False),
    ],
)
def test_a_listing_that_is_much_smaller_than_before_is_told(
    tonight: Night, before: Sequence[int | None], is_missed: bool
) -> None:
    found = missing(tonight, [night(number) for number in before], {}, {})
    assert [text.startswith("Only ") for text in found] == [True] * is_missed


def test_folders_that_cannot_be_read_are_told() -> None:
    reason = "unreadable_directory"
    place = {reason: "s3://key:SECRET@host/photos", "loop": "elsewhere"}
    assert missing(night(1), [], {"loop": 3}, place) == []
    assert missing(night(1), [], {reason: 2, "loop": 3}, place) == [
        "2 folders could not be read, and what lies below has no labels: the first is s3://***@host/photos."
    ]
