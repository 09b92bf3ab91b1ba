"""Why a picture got its label: how much each part of it speaks for the class.

Most networks average their last feature map over the picture, and the logit is a weighted sum of these averages. The
same weighted sum at each place of the map says what the place contributes: Zhou et al., "Learning deep features for
discriminative localization" (CVPR 2016). Where a network has no such layer, parts of the picture are covered one after
the other, and the change of the logit is measured: Zeiler and Fergus, "Visualizing and understanding convolutional
networks" (ECCV 2014).

Shapes: `S` pixels per side of the model's input, `C` = 3 (RGB); `Y`, `X` of the heat map; `F` features; `B` covered
pictures.
"""

from collections.abc import Callable
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt

from catdog import openvino_ir
from catdog.bundle import Bundle, ir_names
from catdog.engines import Engine

Method = Literal["class-activation-map", "occlusion"]
Pixels = npt.NDArray[np.uint8]
Heat = npt.NDArray[np.float32]

_NUM_CELLS: Final = 8
"""Cells per side of the picture."""

_NUM_COVERED: Final = 3
"""Cells per side of the square that is covered at a time. A smaller one hides too little of what a network sees."""


class Saliency:
    """Finds the heat maps of one model. It is not thread-safe."""

    def __init__(self, bundle: Bundle, engine: Engine) -> None:
        """Prepare what the model allows.

        Args:
            bundle: the model.
            engine: what computes it.
        """
        self._engine = engine
        self._feature_map = _feature_map(bundle)
        self.method: Method = "occlusion" if self._feature_map is None else "class-activation-map"

    def heat(self, pixels_SSC: Pixels) -> Heat:
        """How much each part of a picture speaks for `dog`, and, if negative, for `cat`."""
        if self._feature_map is not None:
            return self._feature_map(pixels_SSC)
        return _occlusion(self._engine, pixels_SSC)


def _feature_map(bundle: Bundle) -> Callable[[Pixels], Heat] | None:
    """The function that gives the class activation map; None if the network has none, or no files for OpenVINO."""
    names = ir_names("float")
    if not all(name in bundle.paths for name in names.values()):
        return None
    model = openvino_ir.read_ir({suffix: bundle.paths[name].read_bytes() for suffix, name in names.items()})
    found = openvino_ir.averaged_features(model)
    if found is None:
        return None
    features, axes, weights_F = found
    index = len(model.outputs)
    model.add_outputs([features])
    settings = {"INFERENCE_NUM_THREADS": 1, "NUM_STREAMS": 1, "ENABLE_CPU_PINNING": False}
    request = openvino_ir.load_openvino().Core().compile_model(model, "CPU", settings).create_infer_request()

    def heat(pixels_SSC: Pixels) -> Heat:
        request.infer([np.ascontiguousarray(pixels_SSC[np.newaxis])])
        maps = np.array(request.get_output_tensor(index).data, np.float32)
        maps_BYXF = np.moveaxis(maps, axes, (1, 2))
        return _mean_of_views(maps_BYXF @ weights_F)

    return heat


def _mean_of_views(heat_BYX: Any) -> Heat:
    """The heat map of a picture; if its mirror image was computed, too, the mean of both."""
    heat_YX: Heat = heat_BYX[0] if len(heat_BYX) == 1 else (heat_BYX[0] + heat_BYX[1][:, ::-1]) / 2
    return heat_YX


def _occlusion(engine: Engine, pixels_SSC: Pixels) -> Heat:
    """By how much the logit falls where a part of the picture is covered by the picture's mean colour."""
    size = len(pixels_SSC)
    edges = np.linspace(0, size, _NUM_CELLS + 1).round().astype(int)
    num_places = _NUM_CELLS - _NUM_COVERED + 1
    squares = [(slice(y, y + _NUM_COVERED), slice(x, x + _NUM_COVERED)) for y, x in np.ndindex(num_places, num_places)]
    covered_BSSC = np.repeat(pixels_SSC[np.newaxis], len(squares) + 1, axis=0)
    colour_C = pixels_SSC.mean(axis=(0, 1)).round().astype(np.uint8)
    for number, (rows, columns) in enumerate(squares):
        covered_BSSC[number, edges[rows.start] : edges[rows.stop], edges[columns.start] : edges[columns.stop]] = (
            colour_C
        )
    logits_B = engine.predict(covered_BSSC).logits_B
    heat_YX = np.zeros((_NUM_CELLS, _NUM_CELLS), np.float32)
    count_YX = np.zeros_like(heat_YX)
    for square, logit in zip(squares, logits_B[:-1], strict=True):
        heat_YX[square] += logits_B[-1] - logit
        count_YX[square] += 1
    return heat_YX / count_YX
