"""Decoding: encoded bytes to pixels, or an `ImageError` with a code that says why not.

Training and labelling both decode here, so that they see the same pixels. Every function is thread-safe, and Pillow
releases the GIL while it decodes and resizes. Of an animation or a multi-page file only the first frame is read; of a
TIFF file, the first page that is no thumbnail; of a HEIF file, the picture that it calls primary. Colour profiles are
ignored.

Shapes: `H` = `W` = the requested size in pixels, `C` = 3 (RGB).
"""

import ctypes
import glob
import io
import logging
import os
import re
import struct
import warnings
import zlib
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import numpy.typing as npt
import PIL

# Importing a plugin registers its formats. With `formats=FORMATS`, `Image.open` searches for no other plugins.
from PIL import (
    AvifImagePlugin,  # noqa: F401
    BmpImagePlugin,  # noqa: F401
    GifImagePlugin,  # noqa: F401
    Image,
    ImageFile,
    Jpeg2KImagePlugin,  # noqa: F401
    JpegImagePlugin,
    PngImagePlugin,  # noqa: F401
    PpmImagePlugin,  # noqa: F401
    TiffImagePlugin,
    UnidentifiedImageError,
    WebPImagePlugin,  # noqa: F401
)

from catdog import tiff
from catdog.errors import ImageError
from catdog.images import heif, jpeg, pixels

MAX_PIXELS: Final = 89_478_485
"""Largest width times height of an image that is decoded: the limit at which Pillow warns of a decompression bomb. Of a
JPEG, that of the draft which is decoded in its place counts."""

_MAX_COEFFICIENTS: Final = 3 * MAX_PIXELS
"""Most coefficients of a JPEG in several scans, which a decoder holds at once, with 2 bytes for each."""

_DRAFTS: Final = (2, 4, 8)
"""A JPEG can be decoded at a half, a quarter or an eighth of its width and height."""

RESIZE_RULE: Final = "stretch-bilinear-v1"
"""Name of what `decode` does: the whole picture, EXIF upright, RGB, transparency on white, stretched to a square by
bilinear interpolation with antialiasing. Every model bundle stores it, so it must change whenever the result of
`decode` does."""

FORMATS: Final = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "AVIF", "JPEG2000", "PPM")
"""The formats that are read, in the order in which they are tried. Decoding none of them starts a process (EPS does),
and each is recognised by its first bytes (TGA is not). JPEG includes MPO, the multi-picture JPEG of phones. HEIF is
tried after them, if the extra `heif` is installed."""

_JPEG_FORMATS: Final = ("JPEG", "MPO")
_CANONICAL_FORMATS: Final = (*_JPEG_FORMATS, "PNG", "WEBP")

_ORIENTATION_TAG: Final = 0x0112
_UPRIGHT: Final = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation → the operation that turns the picture upright. From 5 on, it swaps width and height."""

_BAD_DATA: Final = (
    OSError,
    ValueError,
    SyntaxError,
    TypeError,
    LookupError,
    ArithmeticError,
    RuntimeError,
    EOFError,
    struct.error,
    zlib.error,
)
"""The exceptions that Pillow's decoders raise on damaged data: those that 300,000 randomly cut and altered files of its
test suite raised, and those of the functions that the decoders call."""

_CUT_SHORT: Final = re.compile("truncated|not enough image data|expected to read", re.IGNORECASE)
"""Pillow's words for a file that ends early."""


@dataclass(frozen=True, slots=True)
class DecodedImage:
    """An image in the form that the model takes.

    Attributes:
        pixels_HWC: the pixels, uint8, 0..255, RGB, read-only.
        width: the width of the upright original, in pixels.
        height: the height of the upright original, in pixels.
        remark: what is wrong with a file that is decoded all the same, in one line.
        format: Pillow's name for the file format.
        orientation: EXIF orientation of the file, 1..8, by which the pixels were turned; 1 where they were not.
    """

    pixels_HWC: npt.NDArray[np.uint8]  # noqa: N815
    width: int
    height: int
    remark: str | None = None
    format: str | None = None
    orientation: int = 1


@dataclass(frozen=True, slots=True)
class CanonicalImage:
    """An encoded, upright RGB image: JPEG, PNG or WebP. Width and height are in pixels."""

    data: bytes
    width: int
    height: int


def decode(data: bytes, size_px: int) -> DecodedImage:
    """Decode one encoded image and resize it to `size_px` x `size_px` by `RESIZE_RULE`.

    Raises:
        ImageError: empty_file, unsupported_format, truncated, too_large or decode_failed.
    """
    # A draft decodes a JPEG at a half, a quarter or an eighth of its size, which is 4 to 7 times faster for 12
    # megapixels at 150 px. It is at least twice the target size here, so that the resized pixels differ from those of
    # the full image by 0.3 of 255 on average.
    loaded = _load(data, draft_px=2 * size_px)
    small = loaded.rgb.resize((size_px, size_px), Image.Resampling.BILINEAR)
    pixels_HWC = np.asarray(loaded.turn(small))
    return DecodedImage(pixels_HWC, loaded.width, loaded.height, loaded.remark, loaded.format, loaded.orientation)


def open_upright(data: bytes) -> Image.Image:
    """Decode one encoded image at its full size: upright, RGB, transparency on white.

    A JPEG of more than `MAX_PIXELS` is decoded at the largest of a half, a quarter and an eighth that has no more.

    Raises:
        ImageError: as `decode`.
    """
    loaded = _load(data)
    return loaded.turn(loaded.rgb)


def thumbnail(data: bytes, size_px: int) -> bytes:
    """A small JPEG file of an encoded image, upright and whole, of `size_px` pixels on its longer side at most.

    Raises:
        ImageError: as `decode`.
    """
    loaded = _load(data, draft_px=2 * size_px)
    small = loaded.rgb.copy()
    small.thumbnail((size_px, size_px), Image.Resampling.BILINEAR)
    small.info.clear()  # Pillow would write the original's comment and profile
    buffer = io.BytesIO()
    loaded.turn(small).save(buffer, "JPEG", quality=80)
    return buffer.getvalue()


def canonical_bytes(data: bytes) -> CanonicalImage:
    """Validate an image by decoding it, and return it as an encoded, upright RGB image.

    A JPEG, PNG or WebP file that is already upright and RGB is returned byte for byte; a JPEG that is cut short gets an
    end. Any other file is encoded anew: JPEG and HEIF as JPEG at quality 95 with full chroma, the rest as PNG, and a
    JPEG of more than `MAX_PIXELS` at the size at which `open_upright` decodes it.

    Raises:
        ImageError: as `decode`.
    """
    loaded = _load(data)
    data = loaded.data
    if not loaded.is_canonical:
        buffer = io.BytesIO()
        upright = loaded.turn(loaded.rgb)
        if loaded.format in (*_JPEG_FORMATS, heif.FORMAT):
            upright.save(buffer, "JPEG", quality=95, subsampling=0, icc_profile=None)
        else:
            upright.save(buffer, "PNG", icc_profile=None)
        data = buffer.getvalue()
    return CanonicalImage(data, loaded.width, loaded.height)


@dataclass(frozen=True, slots=True)
class _Loaded:
    """A decoded image that is not yet turned upright.

    Attributes:
        data: the encoded bytes that were decoded.
        rgb: the pixels, at full size or at that of the draft.
        format: Pillow's name for the file format.
        orientation: EXIF orientation; 1 where the file has none.
        is_canonical: whether the file is an upright RGB JPEG, PNG or WebP, and no animation.
        width: the width of the upright original, in pixels.
        height: the height of the upright original, in pixels.
        remark: as in `DecodedImage`.
    """

    data: bytes
    rgb: Image.Image
    format: str | None
    orientation: int
    is_canonical: bool
    width: int
    height: int
    remark: str | None = None

    def turn(self, image: Image.Image) -> Image.Image:
        """Turn `image`, which has the orientation of this file, upright."""
        return image.transpose(_UPRIGHT[self.orientation]) if self.orientation in _UPRIGHT else image


def _load(data: bytes, draft_px: int | None = None) -> _Loaded:
    if not data:
        raise ImageError("empty_file", "the file is empty")
    _silence_pillow()
    try:
        return _load_whole(data, draft_px)
    except ImageError as error:
        mended = jpeg.mended(data) if error.code == "truncated" else None
        if mended is None:
            raise
    return replace(_load_whole(mended.data, draft_px), remark=mended.remark)


def _load_whole(data: bytes, draft_px: int | None) -> _Loaded:
    try:
        image = _open(data)
        if isinstance(image, TiffImagePlugin.TiffImageFile):
            _turn_to_picture(image, data)
        width, height = image.size
        _prepare(image, data, draft_px)
        image.load()
        # libheif has turned a picture already, whatever its EXIF data says.
        orientation = 1 if image.format == heif.FORMAT else _orientation(image)
        rgb = pixels.as_rgb(image)
    except Image.DecompressionBombError as error:
        raise ImageError("too_large", f"more than {MAX_PIXELS} pixels") from error
    except UnidentifiedImageError as error:
        raise _unidentified(data) from error
    except _BAD_DATA as error:
        raise _damaged(data, str(error).strip() or type(error).__name__) from error
    is_canonical = (
        image.format in _CANONICAL_FORMATS
        and rgb is image
        and orientation not in _UPRIGHT
        and (image.format in _JPEG_FORMATS or not getattr(image, "is_animated", False))
    )
    if orientation >= 5:
        width, height = height, width
    return _Loaded(data, rgb, image.format, orientation, is_canonical, width, height)


def _open(data: bytes) -> ImageFile.ImageFile:
    """The image, of which only the header has been read."""
    try:
        return Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError:
        if not jpeg.is_jpeg(data):
            raise
        return JpegImagePlugin.jpeg_factory(io.BytesIO(data))
    except UnidentifiedImageError:
        if not heif.is_heif(data):
            raise
        return heif.open_header(data)


def _turn_to_picture(image: TiffImagePlugin.TiffImageFile, data: bytes) -> None:
    """Go to the page that is no thumbnail.

    Raises:
        ImageError: Pillow does not read that page. To label the thumbnail in its place would be to guess.
    """
    page = tiff.picture(data)
    if page is None or page.number == 0:
        return
    try:
        if page.number is None:
            raise EOFError("Pillow reads no page that belongs to another one")
        image.seek(page.number)
    except _BAD_DATA as error:
        raise ImageError(
            "unsupported_format",
            f"only a thumbnail can be read of this picture of {page.width} x {page.height} px: "
            "it is in a raw format, or in a rare form of TIFF",
        ) from error


def _prepare(image: ImageFile.ImageFile, data: bytes, draft_px: int | None) -> None:
    """Refuse an image that must not be decoded, by its header, and choose the draft of a JPEG.

    Args:
        image: the image, of which nothing has been decoded yet.
        data: its encoded bytes.
        draft_px: least width and height of the draft; None for the full size.
    """
    width, height = image.size
    is_jpeg = isinstance(image, JpegImagePlugin.JpegImageFile)
    scale = 1 if width * height <= MAX_PIXELS else _fitting_scale(image, data)
    if image.mode not in pixels.MODES:
        raise ImageError("unsupported_format", f"{image.format} with the pixel mode {image.mode} is not supported")
    if is_jpeg and (draft_px is not None or scale > 1):
        least_px = draft_px or max(width, height)
        image.draft(image.mode, (min(least_px, width // scale), min(least_px, height // scale)))


def _fitting_scale(image: ImageFile.ImageFile, data: bytes) -> int:
    """The largest part of the size of a JPEG of more than `MAX_PIXELS` at which it has no more, as one of `_DRAFTS`.

    Raises:
        ImageError: there is none, or the image is no JPEG, or its decoder would hold too much all the same.
    """
    width, height = image.size
    scale = next((each for each in _DRAFTS if -(-width // each) * -(-height // each) <= MAX_PIXELS), None)
    if scale is None or not isinstance(image, JpegImagePlugin.JpegImageFile):
        raise ImageError("too_large", f"{width} x {height} px is more than {MAX_PIXELS} pixels")
    num_held = jpeg.num_held(image, data)
    if num_held > _MAX_COEFFICIENTS:
        raise ImageError(
            "too_large",
            f"a JPEG in several scans, as every progressive one is, must have at most {_MAX_COEFFICIENTS} "
            f"coefficients. Received: {num_held}, of {width} x {height} px",
        )
    return scale


def _orientation(image: ImageFile.ImageFile) -> int:
    """EXIF orientation of a loaded image; 1 where the EXIF data is damaged, as viewers show such an image unturned."""
    try:
        orientation = image.getexif().get(_ORIENTATION_TAG, 1)
    except _BAD_DATA:
        return 1
    return orientation if orientation in range(1, 9) else 1


def _damaged(data: bytes, text: str) -> ImageError:
    """The error for a decoder's words about a file."""
    if heif.is_heif(data):
        return heif.error_of(text)
    return ImageError("truncated" if _CUT_SHORT.search(text) else "decode_failed", text)


def _unidentified(data: bytes) -> ImageError:
    if tiff.has_floats(data):
        return ImageError("unsupported_format", "TIFF with floating-point pixels is read if it is grey and of 32 bits")
    prefix = data[:16].ljust(16, b"\0")  # as many bytes as Pillow checks; some of its checks fail on fewer
    if any(Image.OPEN[name][1](prefix) is True for name in FORMATS):  # type: ignore[misc]
        return ImageError("decode_failed", "the header is damaged or cut short")
    return ImageError(
        "unsupported_format", f"not an image in one of these formats: catdog reads {', '.join(FORMATS)}, {heif.FORMAT}"
    )


_PILLOW_FILTER: Final = ("ignore", None, Warning, re.compile(r"PIL\."), 0)


def _silence_pillow() -> None:
    """Hide Pillow's warnings about damaged files: an `ImageError` reports what matters.

    `warnings.catch_warnings` around each call would not be thread-safe.
    """
    if _PILLOW_FILTER not in warnings.filters:
        warnings.filterwarnings("ignore", module=r"PIL\.")


def _silence_libtiff() -> None:
    """Keep the libtiff in Pillow's wheels from writing hundreds of lines to stderr for one damaged file."""
    for path in glob.glob(os.path.join(os.path.dirname(PIL.__file__), "..", "pillow.libs", "libtiff*")):
        set_handler = ctypes.CDLL(path).TIFFSetErrorHandler
        set_handler.argtypes, set_handler.restype = [ctypes.c_void_p], ctypes.c_void_p
        set_handler(None)


logging.getLogger("PIL").setLevel(logging.CRITICAL)
_silence_libtiff()
