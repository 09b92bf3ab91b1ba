"""Globs: which names they match, and the filter that `--include` and `--exclude` make.

A glob is one of fsspec's (`*`, `?`, `[ab]`, `**` for any number of folders) with these additions: `{jpg,png}` stands
for either, `{000..009}` for each of these numbers, and a suffix matches in upper and in lower case (`*.jpg` also
matches `IMG_1.JPG`).
"""

import functools
import glob
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import fsspec.utils

from catdog.errors import UsageError
from catdog.provenance import redact

_BRACES: Final = re.compile(r"\{([^{}]*,[^{}]*|(\d{1,9})\.\.(\d{1,9}))\}")
"""Innermost braces with a comma, or of a range of numbers. Others are a part of a name."""

_MAGIC: Final = re.compile(r"[*?\[]")
_TEXT_SUFFIX: Final = re.compile(r"\.[a-zA-Z][a-zA-Z0-9]*$")
_MAX_ALTERNATIVES: Final = 1000


def is_glob(url: str) -> bool:
    """Whether a URL that names nothing may be a glob."""
    return glob.has_magic(url) or _BRACES.search(url) is not None


def alternatives(pattern: str) -> list[str]:
    """The globs without braces that a glob with braces stands for.

    >>> alternatives("{a,b}/*.{jpg,png}")
    ['a/*.jpg', 'a/*.png', 'b/*.jpg', 'b/*.png']
    >>> alternatives("pets-{08..11}.tar")
    ['pets-08.tar', 'pets-09.tar', 'pets-10.tar', 'pets-11.tar']
    """
    done: list[str] = []
    waiting = [pattern]
    while waiting:
        first = waiting.pop(0)
        if (braces := _BRACES.search(first)) is None:
            done.append(first)
        else:
            waiting[:0] = [first[: braces.start()] + each + first[braces.end() :] for each in _meant(braces)]
        if len(done) + len(waiting) > _MAX_ALTERNATIVES:
            raise UsageError(
                f"The braces of a glob must stand for at most {_MAX_ALTERNATIVES} globs. Received: {redact(pattern)}"
            )
    return done


def _meant(braces: re.Match[str]) -> list[str]:
    """What braces stand for; of a long range, only more than are allowed."""
    if braces[2] is None:
        return braces[1].split(",")
    first, last = int(braces[2]), int(braces[3])
    last = min(last, first + _MAX_ALTERNATIVES)
    return [str(number).zfill(len(braces[2])) for number in range(first, last + 1)]


def fixed(pattern: str) -> str:
    """What of a glob comes before its first pattern."""
    found = [match.start() for match in (_MAGIC.search(pattern), _BRACES.search(pattern)) if match is not None]
    return pattern[: min(found, default=len(pattern))]


def matcher(*patterns: str) -> Callable[[str], object]:
    """A function that says whether a text matches one of some globs.

    Raises:
        UsageError: fsspec does not take a glob.
    """
    whole = [alternative for pattern in patterns for alternative in alternatives(pattern)]
    try:
        return re.compile("|".join(f"(?:{_translated(each)})" for each in whole)).match
    except ValueError as error:
        given = " ".join(map(redact, patterns))
        raise UsageError(f"A glob must be one that fsspec takes: {error}. Received: {given}") from error


def _translated(pattern: str) -> str:
    """A glob without braces as a regular expression. Its suffix, if it is plain text, is the same in every case."""
    suffix = _TEXT_SUFFIX.search(pattern)
    if suffix is None:
        return str(fsspec.utils.glob_translate(pattern))
    # glob_translate ends a pattern with \Z, and escapes nothing in letters and digits.
    plain, folded = re.escape(suffix[0]), f"(?i:{re.escape(suffix[0])})"
    before, _, after = str(fsspec.utils.glob_translate(pattern)).rpartition(plain)
    return before + folded + after


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """Which files of a collection are listed: those that match one of `include`, and none of `exclude`.

    A pattern with a slash is compared with the file's path below the source, one without a slash with the file's name.
    A pattern that ends in a slash stands for all that lies below. In an archive that the source holds, the archive
    counts as a folder: `train.zip/cat.1.jpg`.

    Example:
        >>> chosen = Chosen(include=("*.{jpg,png}",), exclude=("thumbs/", "*_small.*"))
        >>> [chosen.takes(path) for path in ("cats/1.JPG", "thumbs/1.jpg", "cats/1_small.jpg", "cats/notes.txt")]
        [True, False, False, False]
    """

    include: Sequence[str] = ()
    """Globs; without any, all files match."""

    exclude: Sequence[str] = ()
    """Globs."""

    def __bool__(self) -> bool:
        """Whether it leaves anything out."""
        return bool(self.include or self.exclude)

    def takes(self, path: str) -> bool:
        """Whether the file with this path below the source is listed."""
        included, excluded = self._matchers
        return (not self.include or included(path)) and not excluded(path)

    def drops(self, path: str) -> bool:
        """Whether an archive with this path below the source is left out with all that it holds."""
        return self._matchers[1](path)

    @functools.cached_property
    def _matchers(self) -> tuple[Callable[[str], bool], Callable[[str], bool]]:
        return _any_of(self.include), _any_of(self.exclude)


def _any_of(given: Sequence[str]) -> Callable[[str], bool]:
    if not given:
        return lambda _path: False
    by_place: dict[bool, list[str]] = {True: [], False: []}
    for pattern in (each for braced in given for each in alternatives(braced)):
        by_place["/" in pattern].append(pattern.lstrip("/") + ("**" if pattern.endswith("/") else ""))
    in_name, in_path = matcher(*by_place[False]), matcher(*by_place[True])

    def matches(path: str) -> bool:
        return bool((by_place[False] and in_name(path.rpartition("/")[2])) or (by_place[True] and in_path(path)))

    return matches
