"""A map of the names in a listing, by which names that were not seen yet are foreseen.

A key is a number between 0 and 1: the first character says in which of so many equal parts it lies, the second one in
which part of that part, and so on. How many parts there are is learnt from the keys that were seen: where only digits
were, there are ten; where all keys had the same character, there is one. So the number half-way between `img_0001.jpg`
and `img_0999.jpg` is that of `img_0500.jpg`, and few questions about foreseen keys are asked in vain.

A place in a key is a depth (slashes before it) and an offset (characters since the last slash), because names in
one place of a directory tree are alike, also where the names of the directories above have several lengths.
"""

import bisect
import string
from collections.abc import Sequence
from typing import Final

WHOLE: Final = 1 << 320
"""The number of what lies behind all keys. Numbers are whole: multiples of 2**-320."""

_MOST_OFFSETS: Final = 64
"""Characters of a name that are told apart; those behind them are one place."""

_LONGEST: Final = 200
"""Characters behind the prefix of a key that is foreseen, at most. S3 takes 1,024 bytes."""

_SAMPLED: Final = 64
"""Of so many keys of a page, one is learnt from."""

_FEW: Final = 4
"""If so many letters were seen in a place, all are expected there."""


class KeySpace:
    """Knows which characters keys have where.

    Args:
        prefix: what all keys begin with.
    """

    def __init__(self, prefix: str) -> None:
        self._prefix, self._begin = prefix, len(prefix)
        self._seen: dict[tuple[int, int], set[str]] = {}
        self._alphabets: dict[tuple[int, int], str] = {}
        self._numbers: dict[str, int] = {}

    def learn(self, keys: Sequence[str]) -> None:
        """See keys."""
        for key in [*keys[::_SAMPLED], *keys[-1:]]:
            depth = offset = 0
            for character in key[self._begin :]:
                seen = self._seen.setdefault((depth, offset), set())
                if character not in seen:
                    seen.add(character)
                    self._alphabets[depth, offset] = _expected(seen)
                    self._numbers.clear()
                depth, offset = _following(depth, offset, character)

    def number_of(self, key: str) -> int:
        """The number of a key. That of a greater key is not less."""
        if (known := self._numbers.get(key)) is not None:
            return known
        number, width = 0, WHOLE
        depth = offset = 0
        for character in key[self._begin :]:
            alphabet = self._alphabets.get((depth, offset), "")
            place = bisect.bisect_left(alphabet, character)
            if len(alphabet) > 1:
                width //= len(alphabet)
            number += place * width
            if not width or place == len(alphabet) or alphabet[place] != character:
                break
            depth, offset = _following(depth, offset, character)
        if len(self._numbers) > 1024:
            self._numbers.clear()
        self._numbers[key] = number
        return number

    def key_at(self, number: int, precision: int) -> str:
        """A short key whose number is `number`, or less by no more than `precision` unless longer keys are unknown."""
        key, width = self._prefix, WHOLE
        depth = offset = 0
        while width > precision and (alphabet := self._alphabets.get((depth, offset))):
            if len(alphabet) > 1:
                width //= len(alphabet)
            place = min(number // width, len(alphabet) - 1)
            number -= place * width
            key += alphabet[place]
            depth, offset = _following(depth, offset, alphabet[place])
            if len(key) > self._begin + _LONGEST:
                break
        return key


def _following(depth: int, offset: int, character: str) -> tuple[int, int]:
    """The place behind one that has this character."""
    return (depth + 1, 0) if character == "/" else (depth, min(offset + 1, _MOST_OFFSETS))


def _expected(seen: set[str]) -> str:
    """The characters that are expected where these were seen, in order."""
    expected = set(seen)
    has_digits = not seen.isdisjoint(string.digits)
    if has_digits:
        expected.update(string.digits)
    for letters in (string.ascii_lowercase, string.ascii_uppercase):
        found = seen.intersection(letters)
        if len(found) >= _FEW and not found.isdisjoint(letters[6:]):
            expected.update(letters)
        elif found and has_digits and found.issubset(letters[:6]):
            expected.update(letters[:6])
    return "".join(sorted(expected))
