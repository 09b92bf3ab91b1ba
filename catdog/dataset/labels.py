"""The class of an image, from the names of its folders, from its own name, or from a label."""

import re
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Final

from catdog.schema import CLASS_NAMES
from catdog.storage.names import without_archive_suffix
from catdog.storage.tables import stem_of
from catdog.storage.urls import split_member

RULES: Final = ("auto", "folder", "prefix")
"""The values of `--labels` that are not a table."""

_PREFIX: Final = re.compile(r"[A-Za-z]+")
_NUMBER: Final = re.compile(r"[+-]?\d+(?:\.0*)?")


class Classes:
    """The names of the classes, and the numbers.

    >>> classes = Classes({"kitten": 0, "n02123045": 0, "puppy": 1})
    >>> [classes.index(name) for name in ("Cats", "DOG", "kittens", "N02123045", "bird")]
    [0, 1, 0, 0, None]
    >>> [classes.of_label(label) for label in ("puppy", 0, 1.0, "1", "2", None)]
    [1, 0, 1, 1, None, None]
    """

    def __init__(self, names: Mapping[str, int] | None = None) -> None:
        """`names`: other names than `CLASS_NAMES`, and the indices of their classes (`PrepareConfig.other_names`)."""
        self._names = {folded(name): index for name, index in (names or {}).items()}
        # Who says what one number means, says what all of them mean.
        self._numbers = {str(int(float(name))): index for name, index in self._names.items() if _NUMBER.fullmatch(name)}
        if not self._numbers:
            self._numbers = {str(index): index for index in range(len(CLASS_NAMES))}
        longest_first = sorted(self._names, key=len, reverse=True)
        self._begin = re.compile(
            "|".join(
                re.escape(name) + (r"(?!\d)" if name[-1].isdecimal() else r"(?![^\W\d_])") for name in longest_first
            )
            or "(?!)"
        )

    def index(self, name: str) -> int | None:
        """Index into `CLASS_NAMES` of a class that is named `cat`, `Cats`, `DOG`, ...; None for any other name."""
        name = folded(name)
        for known in (name, name.removesuffix("s")):
            if known in self._names:
                return self._names[known]
            if known in CLASS_NAMES:
                return CLASS_NAMES.index(known)
        return None

    def of_label(self, label: object) -> int | None:
        """Index of the class that a label names or numbers; None for any other label, and for none."""
        if label is None or isinstance(label, bool):
            return None
        text = folded(str(label))
        if _NUMBER.fullmatch(text):
            return self._numbers.get(str(int(float(text))))
        return self.index(text)

    def by_folders(self, folders: Sequence[str]) -> int | None:
        """Index of the class that the nearest folder is named after, the last of `folders` first; None if none is."""
        return next((index for name in reversed(folders) if (index := self.index(name)) is not None), None)

    def by_prefix(self, uri: str) -> int | None:
        """Index of the class that the file name begins with, as in `cat.123.jpg` and `dog_7.png`, or None."""
        name = _path(uri).name
        if (known := self._begin.match(folded(name))) is not None:
            return self._names[known[0]]
        letters = _PREFIX.match(name)
        return self.index(letters.group()) if letters else None


def folded(name: str) -> str:
    """A name as it is compared: in lower case, with composed accents, without the spaces around it."""
    return unicodedata.normalize("NFC", name).strip().casefold()


def _path(uri: str) -> PurePosixPath:
    """The path within the archive or storage: `train/cat.1.jpg` for `zip://train/cat.1.jpg::s3://bucket/train.zip`."""
    return PurePosixPath(uri.split("::", 1)[0].split("://", 1)[-1])


def parent(folder: str) -> str:
    """The name of a folder, whose URL ends in a slash; "" for an archive itself, and for a table."""
    return "" if folder.startswith("row://") else _path(folder).name


def folders(uri: str) -> list[str]:
    """The names of the folders above a file, or of a folder's URL that ends in a slash, the outermost first.

    An archive counts as a folder, without its suffix. So does a table that holds images.
    """
    places: list[str] = []
    while (chained := split_member(uri)) is not None:
        places.insert(0, "" if uri.startswith("row://") else chained[0])
        uri = chained[1]
    found: list[str] = []
    for place in [uri, *places]:
        if found:
            found[-1] = stem_of(without_archive_suffix(found[-1]))
        found += [part for part in place.split("/") if part]
    is_folder = (places[-1] if places else uri).endswith("/") or places[-1:] == [""]
    return found if is_folder else found[:-1]
