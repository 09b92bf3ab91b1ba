"""Pixels of any mode to 8-bit RGB.

Shapes: `H` and `W` of the image; grey pixels have no third axis.
"""

from typing import Any, Final

import numpy as np
import numpy.typing as npt
from PIL import Image, TiffImagePlugin

from catdog.errors import ImageError

_16_BIT_MODES: Final = ("I;16", "I;16L", "I;16B", "I;16N")
_DEEP_MODES: Final = ("I", "F")
_PLAIN_MODES: Final = ("RGB", "RGBA", "RGBa", "RGBX", "L", "LA", "1", "P", "PA", "CMYK", "YCbCr", "LAB")

MODES: Final = (*_PLAIN_MODES, *_16_BIT_MODES, *_DEEP_MODES)
"""The pixel modes that are read."""

_WHITES: Final = {"F": (1, 255, 65535), "I": (255, 65535)}
"""The values that may be white, where the mode does not say it: F has floating-point numbers, I has integers."""


_BITS_TAG: Final = 258


def as_rgb(image: Image.Image) -> Image.Image:
    """A loaded image as RGB, on white where it is transparent. An image that is opaque RGB is returned as it is.

    Raises:
        ImageError: nothing says which value is white.
    """
    if image.mode in _16_BIT_MODES:
        return _grey(np.asarray(image), 65535)
    if image.mode in _DEEP_MODES:
        values_HW = np.asarray(image)
        return _grey(values_HW, _white(values_HW, image))
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGB", rgba.size, "white")
        white.paste(rgba, mask=rgba.getchannel("A"))
        return white
    return image if image.mode == "RGB" else image.convert("RGB")


def _grey(values_HW: npt.NDArray[Any], white: int) -> Image.Image:
    return Image.fromarray(np.rint(values_HW / (white / 255)).astype(np.uint8)).convert("RGB")


def _white(values_HW: npt.NDArray[Any], image: Image.Image) -> int:
    """The white of floating-point numbers or of integers: what the file says, else the smallest that none exceeds."""
    whites: tuple[int, ...] = _WHITES[image.mode]
    if image.mode == "I" and image.format == "PPM":
        whites = (65535,)  # Pillow scales the file's own white to it
    if image.mode == "I" and isinstance(image, TiffImagePlugin.TiffImageFile) and _is_16_bit(image):
        whites = (32767,)  # these bits have a sign
    lowest, highest = values_HW.min(), values_HW.max()
    for white in whites:
        if lowest >= 0 and highest <= white:  # neither holds if a value is no number
            return white
    raise ImageError(
        "unsupported_format",
        f"{image.format} with the pixel mode {image.mode} must have values from 0 to "
        f"{' or '.join(map(str, whites))}. Received: {lowest:g} to {highest:g}",
    )


def _is_16_bit(image: TiffImagePlugin.TiffImageFile) -> bool:
    return set(image.tag_v2.get(_BITS_TAG, ())) == {16}
