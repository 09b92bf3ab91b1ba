"""An overlay that shows which parts of a picture speak for its label.

Shapes: `H`, `W` of the overlay; `Y`, `X` of the heat map, which is coarser; `C` = 3 (RGB).
"""

import io
from typing import Final

import numpy as np
import numpy.typing as npt
from PIL import Image

_COLOUR: Final = np.array((255, 106, 0), np.float32)
_MOST_OPAQUE: Final = 0.6
_DIMMED: Final = 0.55
"""Brightness of what does not speak for the label."""


def overlay_png(picture: Image.Image, heat_YX: npt.NDArray[np.float32], *, max_px: int) -> bytes:
    """A PNG of a picture in which the parts with much heat glow, and the others are dim.

    Args:
        picture: an upright RGB picture. The PNG has its shape, and at most `max_px` on the longer side.
        heat_YX: how much each part of the picture speaks for the label. What is negative counts as 0.
        max_px: longest side of the PNG.
    """
    small = picture.copy()
    small.thumbnail((max_px, max_px))
    pixels_HWC = np.asarray(small, np.float32)
    positive_YX = np.maximum(heat_YX, 0).astype(np.float32)
    if positive_YX.max() > 0:
        positive_YX /= positive_YX.max()
    smooth = Image.fromarray(positive_YX).resize(small.size, Image.Resampling.BICUBIC)
    heat_HW1 = np.clip(np.asarray(smooth), 0, 1)[..., np.newaxis]
    lit_HWC = pixels_HWC * (_DIMMED + (1 - _DIMMED) * heat_HW1)
    opacity_HW1 = _MOST_OPAQUE * heat_HW1**2
    mixed_HWC = lit_HWC * (1 - opacity_HW1) + _COLOUR * opacity_HW1
    buffer = io.BytesIO()
    Image.fromarray(mixed_HWC.round().astype(np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()
