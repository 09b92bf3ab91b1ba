"""Which page of a TIFF file is the picture: not the thumbnail that stands before it.

Raw formats (DNG, NEF, CR2, ARW, ...) are TIFF files, too. Most of them have a thumbnail as their first page, and the
picture on a page that belongs to it or in a form that only raw converters read.
"""

import io
import struct
from dataclasses import dataclass
from typing import Final

from PIL.TiffImagePlugin import ImageFileDirectory_v2

_WIDTH_TAG: Final = 256
_HEIGHT_TAG: Final = 257
_PAGES_BELOW_TAG: Final = 330

_NEW_SUBFILE_TYPE_TAG: Final = 254
_REDUCED_OR_MASK: Final = 0b101
"""The bits of NewSubfileType for a page that shows another one in a lower resolution, or masks it."""

_SUBFILE_TYPE_TAG: Final = 255
_REDUCED: Final = 2
"""The value of the older SubfileType for a page that shows another one in a lower resolution."""

_SAMPLE_FORMAT_TAG: Final = 339
_FLOATING_POINT: Final = 3

_MAX_PAGES: Final = 64
"""How many pages are looked at: a thumbnail is not far from its picture."""

_BIG_TIFF: Final = 43
_SHAPE_TOLERANCE: Final = 0.05

_BAD_DATA: Final = (OSError, ValueError, SyntaxError, TypeError, LookupError, ArithmeticError, EOFError, struct.error)


@dataclass(frozen=True, slots=True)
class Page:
    """A page of a TIFF file."""

    number: int | None
    """Its place in the file; None for a page that belongs to another one. Pillow does not read those."""

    width: int
    height: int
    is_full: bool
    """Whether the file does not call it a smaller version, or a mask, of another page."""

    def is_thumbnail_of(self, other: "Page") -> bool:
        """Whether `other` has the same shape and at least twice as many pixels per side."""
        is_larger = other.width >= 2 * self.width and other.height >= 2 * self.height
        return is_larger and abs(other.width * self.height / (other.height * self.width) - 1) < _SHAPE_TOLERANCE


def picture(data: bytes) -> Page | None:
    """The first page that is no thumbnail; None if no page is intact.

    A page counts as a thumbnail if the file says so, or if all others that are none look like larger versions of it.
    """
    pages = _pages(data)
    full = [page for page in pages if page.is_full] or pages
    first = next((page for page in full if page.number is not None), full[0] if full else None)
    others = [page for page in full if page is not first]
    if first is not None and others and all(first.is_thumbnail_of(other) for other in others):
        return max(others, key=lambda page: page.width)
    return first


def has_floats(data: bytes) -> bool:
    """Whether these are the bytes of a TIFF file whose first page has floating-point numbers for pixels."""
    try:
        formats = _tags(data, _first_offset(data)).get(_SAMPLE_FORMAT_TAG, ())
    except _BAD_DATA:
        return False
    return isinstance(formats, tuple) and _FLOATING_POINT in formats


def _pages(data: bytes) -> list[Page]:
    """The pages that are intact and say their size."""
    pages: list[Page] = []
    todo: list[tuple[int, int | None]] = [(_first_offset(data), 0)]
    seen = {0}
    while todo and len(seen) <= _MAX_PAGES:
        offset, number = todo.pop()
        if offset in seen:
            continue
        seen.add(offset)
        try:
            tags = _tags(data, offset)
            width, height = int(tags.get(_WIDTH_TAG, 0)), int(tags.get(_HEIGHT_TAG, 0))
            is_part = int(tags.get(_NEW_SUBFILE_TYPE_TAG, 0)) & _REDUCED_OR_MASK
            is_reduced = tags.get(_SUBFILE_TYPE_TAG) == _REDUCED
            below = tags.get(_PAGES_BELOW_TAG, ())
        except _BAD_DATA:
            continue
        if width > 0 and height > 0:
            pages.append(Page(number, width, height, not (is_part or is_reduced)))
        todo += [(each, None) for each in (below if isinstance(below, tuple) else (below,)) if isinstance(each, int)]
        if number is not None:
            todo.append((tags.next, number + 1))
    return pages


def _header(data: bytes) -> bytes:
    return data[: 16 if data[2] == _BIG_TIFF else 8]


def _first_offset(data: bytes) -> int:
    """Where the tags of the first page lie."""
    return int(ImageFileDirectory_v2(_header(data)).next)


def _tags(data: bytes, offset: int) -> ImageFileDirectory_v2:
    """The tags of the page that lie at an offset; `next` is that of the next page."""
    file = io.BytesIO(data)
    file.seek(offset)
    tags = ImageFileDirectory_v2(_header(data))
    tags.load(file)
    return tags
