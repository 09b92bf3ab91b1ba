"""Whether two pictures look the same to a person: their thumbnails are compared, cell by cell.

Shapes: `P` pairs of pictures, `N` = 256 cells of a thumbnail (16 x 16), `C` = 3 (RGB), values 0..255.

A copy of a picture, encoded anew, resized, or made a little lighter, differs a little all over. Two frames of one
camera differ hardly anywhere, but very much where the animal is. So the largest difference of a cell counts, beside the
mean of all cells. Before that, the darker picture gets the lightness and the contrast of the other one.

Measured on the largest difference: of the 39 pairs of Dogs vs. Cats that look the same, at most 13.4; of changed
copies of 60 photographs, at most 10 (JPEG quality 30), 18 (quality 10), 8 (64 px). Photographs that were made 20 %
lighter (which cuts off the lights), given 30 % more contrast, or cropped by 1 % on each side differ by up to 22, 30 and
34: 85 %, 83 % and 84 % count as the same, and all that were made 20 % darker. Of 5,000 pairs of frames that show one
background, each with another animal in another place, and have near hashes, none counts as the same if the animals are
12 % as wide as the frame or wider.
"""

from typing import Final

import numpy as np
import numpy.typing as npt

from catdog.dataset.scan import THUMBNAIL_PX

NUM_VALUES: Final = THUMBNAIL_PX**2 * 3
"""Values of a thumbnail."""

MAX_DIFFERENCE: Final = 15.0
MAX_SPREAD_DIFFERENCE: Final = 24.0
MAX_RATIO: Final = 8.0
MAX_MEAN: Final = 10.0
"""Two pictures look the same if no cell differs by more than `MAX_DIFFERENCE`, or, where no cell differs by more than
`MAX_RATIO` times the mean difference, by more than `MAX_SPREAD_DIFFERENCE`; and if the mean is at most `MAX_MEAN`."""

_STD: Final = 50.0
"""Standard deviation to which the pictures' contrast is scaled, so that differences in flat pictures count as much."""

_DARK: Final = 10.0
_LIGHT: Final = 240.0
"""Values beyond are left out when lightness and contrast are compared: they may have been cut off."""


_PORTION: Final = 128
"""Pairs that are compared together: their values fit in a core's cache."""


def look_same(a_PNC: npt.NDArray[np.uint8], b_PNC: npt.NDArray[np.uint8]) -> npt.NDArray[np.bool_]:
    """Whether the pictures of each pair look the same. Returns an array of shape `P`."""
    is_same = np.zeros(len(a_PNC), bool)
    for start in range(0, len(a_PNC), _PORTION):
        portion = slice(start, start + _PORTION)
        differences_PN = _differences(a_PNC[portion].reshape(-1, NUM_VALUES), b_PNC[portion].reshape(-1, NUM_VALUES))
        mean_P, max_P = differences_PN.mean(axis=1), differences_PN.max(axis=1)
        limit_P = np.clip(MAX_RATIO * mean_P, MAX_DIFFERENCE, MAX_SPREAD_DIFFERENCE)
        is_same[portion] = (max_P <= limit_P) & (mean_P <= MAX_MEAN)
    return is_same


def _differences(a_PV: npt.NDArray[np.uint8], b_PV: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """The difference of every cell, averaged over the channels, once lightness and contrast are the same. `V` = N * C.

    Least squares: lighter = gain * (darker - its mean) + mean of lighter.
    """
    swap_P1 = (a_PV.mean(axis=1) > b_PV.mean(axis=1))[:, None]
    darker_PV = np.where(swap_P1, b_PV, a_PV).astype(np.float32)
    lighter_PV = np.where(swap_P1, a_PV, b_PV).astype(np.float32)
    weight_PV = ((lighter_PV < _LIGHT) & (darker_PV > _DARK)) + np.float32(1e-3)  # the sums must be above zero
    total_P = weight_PV.sum(axis=1)
    mean_lighter_P = np.einsum("pv,pv->p", weight_PV, lighter_PV) / total_P
    darker_PV -= (np.einsum("pv,pv->p", weight_PV, darker_PV) / total_P)[:, None]
    weight_PV *= darker_PV
    gain_P = np.einsum("pv,pv->p", weight_PV, lighter_PV - mean_lighter_P[:, None]) / np.maximum(
        np.einsum("pv,pv->p", weight_PV, darker_PV), 1
    )
    darker_PV *= gain_P[:, None]
    darker_PV += mean_lighter_P[:, None]
    scale_P = _STD / np.maximum(lighter_PV.std(axis=1), 1)
    difference_PV = np.abs(np.clip(darker_PV, 0, 255) - lighter_PV)
    difference_PV *= scale_P[:, None] / 3
    summed: npt.NDArray[np.float32] = difference_PV[:, 0::3] + difference_PV[:, 1::3] + difference_PV[:, 2::3]
    return summed
