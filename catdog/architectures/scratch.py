"""The networks that are trained from scratch. Each turns symbolic pixels, scaled to -1..1, into features, (B, F)."""

from __future__ import annotations

from typing import Any, Final

from catdog.architectures import fast_layers

BATCHNORM_MOMENTUM: Final = 0.9
"""Keras's default, 0.99, takes hundreds of steps to forget the initial statistics. An epoch has about 125 steps: 16,000
images in batches of 128."""


def cnn_features(x: Any) -> Any:
    """Four Conv2D/MaxPooling blocks, Flatten and Dense.

    BatchNormalization comes after the pooling, which leaves it a quarter of the pixels. On a CPU in bfloat16, the
    network computes twice as many images per second as with the usual order.
    """
    from keras import layers

    for channels in (32, 64, 128, 128):
        x = layers.Conv2D(channels, 3, use_bias=False)(x)
        x = layers.MaxPooling2D()(x)
        x = fast_layers.batch_normalization(momentum=BATCHNORM_MOMENTUM)(x)
        x = layers.Activation("relu")(x)
    x = layers.Flatten()(x)
    x = layers.Dropout(0.3)(x)
    return layers.Dense(512, activation="relu")(x)


RESNET_DEPTH: Final = 5

_RESNET_CHANNELS: Final = (64, 128, 256)
"""Of the three stages."""


def resnet_features(x: Any, *, depth: int = RESNET_DEPTH, width: float = 1.0) -> Any:
    """A stem with stride 2; three stages, each of a convolution, max-pooling and residual pairs; a global average.

    Args:
        x: pixels.
        depth: number of residual pairs of convolutions. The stages share them; the last ones have what is left over.
        width: multiplies the numbers of channels, which are rounded to multiples of 8.
    """
    from keras import layers

    def channels_of(usual: int) -> int:
        return max(8, 8 * round(usual * width / 8))

    def convolution(x: Any, channels: int, *, strides: int = 1, pool: bool = False) -> Any:
        x = layers.Conv2D(channels, 3, strides=strides, padding="same", use_bias=False)(x)
        if pool:
            x = layers.MaxPooling2D()(x)
        x = fast_layers.batch_normalization(momentum=BATCHNORM_MOMENTUM)(x)
        return layers.Activation("relu")(x)

    x = convolution(x, channels_of(32), strides=2)
    for stage, usual in enumerate(_RESNET_CHANNELS):
        channels = channels_of(usual)
        x = convolution(x, channels, pool=True)
        for _ in range((depth + stage) // len(_RESNET_CHANNELS)):
            x = layers.Add()([x, convolution(convolution(x, channels), channels)])
    return layers.GlobalAveragePooling2D()(x)
