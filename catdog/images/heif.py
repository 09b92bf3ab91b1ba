"""HEIF files: HEIC, the photographs of iPhones. libheif reads them, through the package `pillow-heif`.

The package is an extra. It is imported when the first HEIF file comes, and needed for nothing else: Pillow itself reads
AVIF, which has the same container.
"""

import functools
import io
from types import ModuleType
from typing import Final

from PIL import ImageFile

from catdog.errors import ImageError

FORMAT: Final = "HEIF"
"""Pillow's name for the file format."""

_CODED: Final = frozenset((b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs"))
_ANY_CODEC: Final = frozenset((b"mif1", b"mif2", b"mif3", b"msf1", b"heif"))
_AVIF: Final = frozenset((b"avif", b"avis"))
"""The brands of a container: coded as HEVC, coded as anything, coded as AV1."""

_ENDS_EARLY: Final = ("end of file", "insufficient input data", "file size too small", "cannot read full", "truncated")
"""libheif's words for a file that ends early."""


def is_heif(data: bytes) -> bool:
    """Whether the first bytes are those of a HEIF file that is not AVIF."""
    brands = _brands(data)
    return bool(brands & _CODED) or (bool(brands & _ANY_CODEC) and not brands & _AVIF)


def _brands(data: bytes) -> set[bytes]:
    """The brands that an ISO container claims; none for any other file."""
    if data[4:8] != b"ftyp":
        return set()
    end = min(int.from_bytes(data[:4], "big"), len(data), 256)
    return {data[8:12], *(data[start : start + 4] for start in range(16, end, 4))}


def open_header(data: bytes) -> ImageFile.ImageFile:
    """The primary picture of a HEIF file, not yet decoded. It is upright: libheif turns it as the file says.

    Raises:
        ImageError: `pillow-heif` is not installed.
        SyntaxError: the header is damaged.
    """
    try:
        library = _library()
    except ImportError as error:
        raise ImageError(
            "unsupported_format", f"HEIC and HEIF need one more package: pip install 'catdog[heif]'. Received: {error}"
        ) from error
    image: ImageFile.ImageFile = library.HeifImageFile(io.BytesIO(data))
    return image


@functools.cache
def _library() -> ModuleType:
    """`pillow-heif`, set up for one picture per thread.

    Raises:
        ImportError: it is not installed, or does not work here.
    """
    import pillow_heif

    pillow_heif.libheif_version()  # raises the ImportError of its native part, which the import itself puts off
    pillow_heif.options.DECODE_THREADS = 1  # images are decoded on as many threads as there are cores
    pillow_heif.options.THUMBNAILS = pillow_heif.options.DEPTH_IMAGES = pillow_heif.options.AUX_IMAGES = False
    return pillow_heif


def error_of(text: str) -> ImageError:
    """The error for libheif's words about a file."""
    words = text.lower()
    if any(early in words for early in _ENDS_EARLY):
        return ImageError("truncated", text)
    is_foreign = "unsupported" in words
    return ImageError("unsupported_format" if is_foreign else "decode_failed", text)
