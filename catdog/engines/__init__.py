"""Engines, which compute the model of a bundle fast on this hardware.

An engine is a module of this package with a function that loads a bundle. It is listed in `ENGINES`, and in
`catdog.config.EngineName` for the command line.

Shapes: `B` images in a call, `H` = `W` = the bundle's image size, `C` = 3 (RGB).
"""

import importlib
from collections.abc import Mapping, Sequence
from importlib import util
from typing import Final, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from catdog.bundle import Arithmetic, Bundle, golden_images, ir_names
from catdog.config import EngineName
from catdog.errors import BundleError

ENGINES: Final[dict[str, tuple[str, str]]] = {
    "openvino": ("catdog.engines.openvino", "load"),
    "openvino-float": ("catdog.engines.openvino", "load_float"),
    "tensorflow": ("catdog.engines.tensorflow", "load"),
}
"""Name of an engine → its module, and the function of the module that loads it."""

GOLDEN_TOLERANCES: Final[dict[Arithmetic, float]] = {"float32": 0.02, "bfloat16": 0.25, "int8": 0.25}
"""By how much a golden logit may differ from the one in the card: for int8 from the int8 model's own, else from the
one that was computed in float32.

float32: another order of summation changes a logit by about 1e-6, weights in float16 by about 1e-3. A GPU's
TensorFloat-32 rounds to 11 bits, 8 times finer than bfloat16. bfloat16: it rounds to 8 bits, which has changed a logit
by up to 0.1. int8: sums are exact, what lies between them is not, and a number that is rounded to another of 256 levels
is off by as much as in bfloat16. The weights of another model change a logit by whole units."""


SCORE_TOLERANCES: Final[dict[Arithmetic, float]] = {"float32": 0.1, "bfloat16": 1.0, "int8": 1.0}
"""By how much a golden score may differ, as `GOLDEN_TOLERANCES`. A score is a difference of logits of many classes, or
the logarithm of a distance, and what it is compared with is not as fine."""


class Outputs(NamedTuple):
    """What a model gives for images, in their order."""

    logits_B: npt.NDArray[np.float32]  # noqa: N815
    """Logits of class 1."""

    neither_B: npt.NDArray[np.float32] | None  # noqa: N815
    """Scores of `catdog.neither`; None if the bundle has none."""


class Engine(Protocol):
    """Computes a model. It is thread-safe.

    An output depends only on its image: not on the other images of the call, their number, or other calls.
    """

    @property
    def name(self) -> str:
        """One of `ENGINES`."""

    @property
    def arithmetic(self) -> Arithmetic:
        """Number format in which the feature maps are computed."""

    def predict(self, images_BHWC: npt.NDArray[np.uint8]) -> Outputs:
        """The model's outputs. Pixels are RGB, 0..255. `B` may be 0."""


def load_engine(bundle: Bundle, name: EngineName = "auto", *, num_parallel: int = 1, use_gpu: bool = False) -> Engine:
    """Load a bundle's model, warm it up, and check that it gives the logits that it gave when it was saved.

    Args:
        bundle: a verified bundle.
        name: `auto` (OpenVINO on CPUs, TensorFlow on GPUs), or one of `ENGINES`.
        num_parallel: number of calls of `predict` that compute at the same time, each on one CPU core.
        use_gpu: whether to compute on this process's GPU. If not, no GPU is touched.

    Raises:
        BundleError: the model cannot be used.
    """
    module, function = ENGINES[_chosen(bundle, use_gpu=use_gpu) if name == "auto" else name]
    load = getattr(importlib.import_module(module), function)
    engine: Engine = load(bundle, num_parallel=num_parallel, use_gpu=use_gpu)
    _check_golden(bundle, engine)
    return engine


def _chosen(bundle: Bundle, *, use_gpu: bool) -> str:
    """The engine that `auto` stands for: TensorFlow on a GPU, and for bundles without OpenVINO's files."""
    has_ir = all(name in bundle.paths for name in ir_names("float").values())
    return "openvino" if has_ir and not use_gpu and util.find_spec("openvino") else "tensorflow"


def _check_golden(bundle: Bundle, engine: Engine) -> None:
    """Check that the engine gives the bundle's golden logits and scores. This also warms it up."""
    outputs, arithmetic = engine.predict(golden_images(bundle.image_size)), engine.arithmetic
    _check_close(bundle, "logits", outputs.logits_B, bundle.golden_logits(arithmetic), GOLDEN_TOLERANCES, arithmetic)
    neither = bundle.neither(arithmetic)
    if neither is not None:
        scores_B = np.full(1, np.nan) if outputs.neither_B is None else outputs.neither_B
        _check_close(bundle, "scores", scores_B, neither["golden_scores"], SCORE_TOLERANCES, arithmetic)


def _check_close(
    bundle: Bundle,
    what: str,
    found_B: npt.NDArray[np.floating],
    golden_B: Sequence[float],
    tolerances: Mapping[Arithmetic, float],
    arithmetic: Arithmetic,
) -> None:
    difference = float(np.max(np.abs(found_B - np.asarray(golden_B))))
    if not difference <= tolerances[arithmetic]:  # true of NaN as well
        raise BundleError(
            f"{bundle.url}: the model must compute its golden {what} to within {tolerances[arithmetic]} "
            f"({arithmetic}). Received: off by {difference:.3g} on this machine"
        )
