"""Name → Keras model, its preprocessing included, and the recipe it is trained with.

Every model takes RGB pixels of 0 to 255, shape (B, H, W, 3), and ends in a layer `logits`, float32 (B, 1), of class 1
(`dog`), followed by a sigmoid `prob_dog`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from catdog.errors import UsageError

if TYPE_CHECKING:
    import keras

LOGITS_LAYER: Final = "logits"
PROBABILITY_LAYER: Final = "prob_dog"

BATCHNORM_MOMENTUM: Final = 0.9
"""Keras's default of 0.99 takes hundreds of steps to forget the initial statistics; an epoch here has about 125."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How an architecture is trained unless the command line says otherwise."""

    image_size: int
    """Pixels per side that the bundle's model is fed, in validation and inference."""

    train_scale: float = 1.0
    """Side of the training crops as a share of `image_size`. Random crops make objects look larger than whole pictures
    do; training smaller than testing evens that out (Touvron et al. 2019, "Fixing the train-test resolution
    discrepancy")."""

    min_area: float
    """Smallest share of the picture's area that a random training crop shows."""

    rotation_deg: float
    """Largest random rotation, either way, in degrees."""

    epochs: int
    batch_size: int
    """Images per optimizer step, over all workers."""

    learning_rate: float
    """Adam's peak rate."""

    weight_decay: float
    """Decoupled (AdamW), on kernels only."""

    label_smoothing: float = 0.0

    @property
    def warmup_fraction(self) -> float:
        """Share of all steps in which the learning rate rises linearly from 0 to its peak."""
        return 0.1


@dataclass(frozen=True)
class Architecture:
    """A named model body and its recipe."""

    name: str
    build_features: Callable[[Any], Any]
    """Symbolic pixels scaled to -1..1, (B, H, W, 3), to features, (B, F)."""

    fixed_size: bool
    """Whether the weights' shapes depend on the image size."""

    recipe: Recipe


def _cnn_features(x: Any) -> Any:
    """Four Conv2D/MaxPooling blocks, Flatten and Dense.

    BatchNormalization comes after the pooling: a quarter of the pixels to normalise, and twice the images per second of
    the usual order on a CPU in bfloat16.
    """
    from keras import layers

    for channels in (32, 64, 128, 128):
        x = layers.Conv2D(channels, 3, use_bias=False)(x)
        x = layers.MaxPooling2D()(x)
        x = layers.BatchNormalization(momentum=BATCHNORM_MOMENTUM)(x)
        x = layers.Activation("relu")(x)
    x = layers.Flatten()(x)
    x = layers.Dropout(0.3)(x)
    return layers.Dense(512, activation="relu")(x)


def _resnet_features(x: Any) -> Any:
    """A stem with stride 2, three stages of convolution, max-pooling and a residual pair, a global average."""
    from keras import layers

    def convolution(x: Any, channels: int, *, strides: int = 1, pool: bool = False) -> Any:
        x = layers.Conv2D(channels, 3, strides=strides, padding="same", use_bias=False)(x)
        if pool:
            x = layers.MaxPooling2D()(x)
        x = layers.BatchNormalization(momentum=BATCHNORM_MOMENTUM)(x)
        return layers.Activation("relu")(x)

    x = convolution(x, 32, strides=2)
    for channels in (64, 128, 256):
        x = convolution(x, channels, pool=True)
        x = layers.Add()([x, convolution(convolution(x, channels), channels)])
    return layers.GlobalAveragePooling2D()(x)


ARCHITECTURES: Final = {
    architecture.name: architecture
    for architecture in (
        Architecture(
            "cnn",
            _cnn_features,
            fixed_size=True,
            recipe=Recipe(
                image_size=150,
                min_area=0.6,
                rotation_deg=15,
                epochs=30,
                batch_size=128,
                learning_rate=1e-3,
                weight_decay=0.01,
            ),
        ),
        Architecture(
            "resnet",
            _resnet_features,
            fixed_size=False,
            recipe=Recipe(
                image_size=128,
                train_scale=0.75,
                min_area=0.35,
                rotation_deg=10,
                epochs=18,
                batch_size=128,
                learning_rate=4e-3,
                weight_decay=0.05,
                label_smoothing=0.05,
            ),
        ),
    )
}


def architecture(name: str) -> Architecture:
    """Look an architecture up. Raises `UsageError` for an unknown name."""
    try:
        return ARCHITECTURES[name]
    except KeyError:
        known = ", ".join(ARCHITECTURES)
        raise UsageError(f"--arch must be one of {known}. Received: --arch={name}") from None


def build_model(name: str, image_size: int) -> keras.Model:
    """A freshly initialised model, in Keras's current dtype policy.

    Args:
        name: one of `ARCHITECTURES`.
        image_size: pixels per side, `S`. An architecture without `fixed_size` also takes other sizes.

    Returns:
        Model from pixels (B, S, S, 3), 0 to 255, to `prob_dog`, float32 (B, 1).
    """
    import keras

    chosen = architecture(name)
    side = image_size if chosen.fixed_size else None
    pixels = keras.Input((side, side, 3), name="pixels")
    x = keras.layers.Rescaling(1 / 127.5, offset=-1.0, name="scale")(pixels)
    features = chosen.build_features(x)
    # float32 whatever the policy: bfloat16 has 8 bits of mantissa, too few for a calibrated logit.
    logits = keras.layers.Dense(1, dtype="float32", name=LOGITS_LAYER)(features)
    probabilities = keras.layers.Activation("sigmoid", dtype="float32", name=PROBABILITY_LAYER)(logits)
    return keras.Model(pixels, probabilities, name=name)


def logits_model(model: keras.Model) -> keras.Model:
    """The part of `model` up to its logits, float32 (B, 1), sharing its weights."""
    import keras

    return keras.Model(model.input, model.get_layer(LOGITS_LAYER).output, name=f"{model.name}_logits")
