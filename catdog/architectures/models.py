"""Building an architecture's Keras model, and finding the parts of a model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from catdog.architectures import fast_layers
from catdog.architectures.backbones import BACKBONE_LAYER
from catdog.architectures.registry import architecture
from catdog.errors import UsageError

if TYPE_CHECKING:
    import keras

LOGITS_LAYER: Final = "logits"
TEMPERATURE_LAYER: Final = "temperature"
PROBABILITY_LAYER: Final = "prob_dog"


def build_model(name: str, image_size: int, *, depth: int | None = None, width: float | None = None) -> keras.Model:
    """A freshly initialised model, in Keras's current dtype policy.

    Args:
        name: one of `ARCHITECTURES`.
        image_size: pixels per side, `S`. An architecture without `fixed_size` also takes other sizes.
        depth: number of residual blocks; None for the usual one, and where the architecture has but one.
        width: multiple of the usual numbers of channels; None as for `depth`.

    Returns:
        A model from pixels (B, S, S, 3), 0 to 255, to `prob_dog`, float32 (B, 1).
    """
    import keras

    chosen = architecture(name)
    side = image_size if chosen.fixed_size else None
    pixels = keras.Input((side, side, 3), name="pixels")
    if chosen.backbone is not None:
        x = chosen.backbone.preprocess(pixels)
    else:
        x = keras.layers.Rescaling(1 / 127.5, offset=-1.0, name="scale")(pixels)
    given = {"depth": depth, "width": width}
    features = chosen.build_features(x, **{key: value for key, value in given.items() if value is not None})
    # float32 whatever the policy: bfloat16 has 8 bits of mantissa, too few for a calibrated logit.
    logits = keras.layers.Dense(1, dtype="float32", name=LOGITS_LAYER)(features)
    return _with_probability(pixels, logits, name)


def _with_probability(pixels: Any, logits: Any, name: str) -> keras.Model:
    """The model from `pixels` to the probability that belongs to `logits`."""
    import keras

    probabilities = keras.layers.Activation("sigmoid", dtype="float32", name=PROBABILITY_LAYER)(logits)
    return keras.Model(pixels, probabilities, name=name)


def logits_model(model: keras.Model) -> keras.Model:
    """The part of `model` up to its logits, float32 (B, 1), sharing its weights."""
    import keras

    return keras.Model(model.input, model.get_layer(LOGITS_LAYER).output, name=f"{model.name}_logits")


def features_model(model: keras.Model) -> keras.Model:
    """The part of `model` up to its logits, (B, 1), and the features that give them, (B, F), sharing its weights."""
    import keras

    last = model.get_layer(LOGITS_LAYER)
    return keras.Model(model.input, [last.output, last.input], name=f"{model.name}_features")


def scoring_network(model: keras.Model) -> tuple[keras.Model, bool] | None:
    """The network of a model that `exported` made, with its logits, (B, 1), and the features that give them, (B, F).

    Returns:
        The network, which shares its weights, and whether `exported` averages its logits over an image and its mirror
        image. None if the logits are no weighted sum of features.
    """
    import keras

    mirrored = mirrored_network(model)
    network = mirrored or model
    if not isinstance(network.get_layer(LOGITS_LAYER), keras.layers.Dense):
        return None
    return features_model(network), mirrored is not None


def exported(model: keras.Model, name: str) -> keras.Model:
    """A copy of a model that `build_model(name, ...)` made, as a bundle holds it: with Keras's own layers only.

    If the recipe has `mirror`, the logit of an image is the mean of the logits of the image and its mirror image.
    """
    import keras

    plain = fast_layers.with_stock_layers(model)
    if not architecture(name).recipe.mirror:
        return plain
    logits = logits_model(plain)
    pixels = keras.Input(plain.input.shape[1:], name="pixels")
    both = [logits(pixels), logits(keras.ops.flip(pixels, axis=2))]
    return _with_probability(pixels, keras.layers.Average(dtype="float32", name=LOGITS_LAYER)(both), name)


def calibrated(model: keras.Model, temperature: float) -> keras.Model:
    """A model that `exported` made, whose probabilities are those of its logits divided by `temperature`.

    So it gives, in plain Keras, the probabilities that catdog gives. It shares its weights with `model`.
    """
    import keras

    logits = model.get_layer(LOGITS_LAYER).output
    scaled = keras.layers.Rescaling(1 / temperature, dtype="float32", name=TEMPERATURE_LAYER)(logits)
    return _with_probability(model.input, scaled, model.name)


def load_trained(model: keras.Model, trained: keras.Model) -> None:
    """Give a model that `build_model` made the weights of one of the same architecture that `exported` made.

    Raises:
        UsageError: the weights do not fit.
    """
    weights = (mirrored_network(trained) or trained).get_weights()
    shapes = [tuple(weight.shape) for weight in model.weights]
    found = [tuple(weight.shape) for weight in weights]
    if found != shapes:
        raise UsageError(
            f"the model to start from must have the weights of {model.name}: {len(shapes)} arrays. "
            f"Received: {len(found)} arrays, of which {sum(a == b for a, b in zip(found, shapes, strict=False))} fit"
        )
    model.set_weights(weights)


def mirrored_network(model: keras.Model) -> keras.Model | None:
    """The network whose logits `exported` averaged over an image and its mirror image; None if it did not."""
    import keras

    if not isinstance(model.get_layer(LOGITS_LAYER), keras.layers.Average):
        return None
    return next((layer for layer in model.layers if isinstance(layer, keras.Model)), None)


def backbone_layer(model: keras.Model) -> keras.Model | None:
    """The published network within `model`, or None where there is none.

    To freeze it, leave `backbone_variables` out of what is trained. Do not set its `trainable`: to set that to True
    would also make its BatchNormalization trainable, which would then learn from the statistics of each batch.
    """
    return next((layer for layer in model.layers if layer.name == BACKBONE_LAYER), None)


def backbone_variables(model: keras.Model) -> list[Any]:
    """The variables in the backbone of `model` that fine-tuning changes: all except BatchNormalization's.

    The list is empty where there is no backbone.
    """
    backbone = backbone_layer(model)
    return [] if backbone is None else list(backbone.trainable_variables)
