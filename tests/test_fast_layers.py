"""The fast layers compute what Keras's own layers do, and a saved model has Keras's own."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np
import numpy.typing as npt
import pytest
import tensorflow as tf

from catdog import architectures, bundle
from catdog.architectures import fast_layers

pytestmark = pytest.mark.slow

Array = npt.NDArray[np.float32]
RNG = np.random.default_rng(0)
SIZE = 32


def maps(*shape: int) -> Array:
    return RNG.normal(0.5, 2, shape).astype(np.float32)


def outputs_and_gradients(layer: Any, inputs: Array, upstream: Array, **call: Any) -> tuple[Array, list[Array]]:
    """The outputs, and the gradients of (outputs x upstream) for the inputs and all that is trained."""
    tensor = tf.constant(inputs)
    with tf.GradientTape() as tape:
        tape.watch(tensor)
        outputs = layer(tensor, **call)
        loss = tf.reduce_sum(outputs * upstream)
    gradients = tape.gradient(loss, [tensor, *(variable.value for variable in layer.trainable_variables)])
    return np.asarray(outputs), [np.asarray(gradient) for gradient in gradients]


def twins(fast: Any, stock: Any, shape: tuple[int, ...]) -> None:
    """Build both, with the same weights."""
    for layer in (fast, stock):
        layer.build(shape)
    weights = [np.abs(maps(*variable.shape)) + 0.1 for variable in stock.weights]
    for layer in (fast, stock):
        layer.set_weights(weights)


def assert_same(fast: Any, stock: Any, inputs: Array, **call: Any) -> None:
    upstream = maps(*np.asarray(stock(inputs, **call)).shape)
    # That call may have moved statistics.
    fast.set_weights(stock.get_weights())
    ours, theirs = (outputs_and_gradients(layer, inputs, upstream, **call) for layer in (fast, stock))
    np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-4, atol=1e-4)
    for one, other in zip(ours[1], theirs[1], strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("training", [True, False])
def test_batch_normalization_is_that_of_keras(training: bool) -> None:
    fast = fast_layers.batch_normalization(momentum=0.9)
    stock = keras.layers.BatchNormalization(momentum=0.9)
    inputs = maps(6, 5, 4, 3)
    twins(fast, stock, inputs.shape)
    assert_same(fast, stock, inputs, training=training)
    ours, theirs = (dict(zip(("mean", "variance"), layer.get_weights()[2:], strict=True)) for layer in (fast, stock))
    np.testing.assert_allclose(ours["mean"], theirs["mean"], rtol=1e-5)
    # The fused operation's variance is the unbiased one: of 120 numbers, 120/119 of Keras's.
    np.testing.assert_allclose(ours["variance"], theirs["variance"], rtol=1 / 119 if training else 1e-6)


def test_the_moving_statistics_follow_their_formula() -> None:
    layer = fast_layers.batch_normalization(momentum=0.9)
    inputs = maps(6, 5, 4, 3)
    mean, variance = np.zeros(3), np.ones(3)
    for _ in range(3):
        layer(inputs, training=True)
        mean = 0.9 * mean + 0.1 * inputs.mean((0, 1, 2))
        variance = 0.9 * variance + 0.1 * inputs.var((0, 1, 2), ddof=1)
    np.testing.assert_allclose(layer.moving_mean.numpy(), mean, rtol=1e-5)
    np.testing.assert_allclose(layer.moving_variance.numpy(), variance, rtol=1e-5)
    layer(inputs, training=False)
    layer.trainable = False
    layer(inputs, training=True)
    np.testing.assert_allclose(layer.moving_mean.numpy(), mean, rtol=1e-5)


@pytest.mark.parametrize("side", [7, 8])
@pytest.mark.parametrize("strides", [1, 2])
@pytest.mark.parametrize("kernel_size", [3, 5])
def test_depthwise_convolution_is_that_of_keras(kernel_size: int, strides: int, side: int) -> None:
    fast = fast_layers.depthwise_convolution(kernel_size, strides=strides)
    stock = keras.layers.DepthwiseConv2D(kernel_size, strides=strides, padding="same")
    inputs = maps(2, side, side, 3)
    twins(fast, stock, inputs.shape)
    assert_same(fast, stock, inputs)


def as_if_trained(name: str, images: Array) -> keras.Model:
    """A model whose weights and moving statistics are not those it was built with."""
    keras.utils.set_random_seed(3)
    model = architectures.build_model(name, SIZE)
    for variable in model.weights:
        variable.assign(variable.value * RNG.uniform(0.8, 1.2, variable.shape) + RNG.uniform(0, 0.01, variable.shape))
    for _ in range(30):
        model(images, training=True)
    return model


def logits_of(model: keras.Model, images: Array) -> Array:
    return np.asarray(architectures.logits_model(model)(images, training=False))[:, 0]


def layers_of(model: keras.Model) -> list[keras.Layer]:
    return [inner for layer in model.layers for inner in (layers_of(layer) if hasattr(layer, "layers") else [layer])]


@pytest.fixture
def policy(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "mixed_bfloat16":
        request.getfixturevalue("bfloat16")
    keras.config.set_dtype_policy(request.param)
    yield request.param
    keras.config.set_dtype_policy("float32")


@pytest.mark.parametrize(
    ("name", "policy"), [("resnet", "float32"), ("efficientnet_lite0", "mixed_bfloat16")], indirect=["policy"]
)
def test_what_is_saved_computes_the_same_with_layers_of_keras_alone(name: str, policy: str, tmp_path: Path) -> None:
    images = RNG.integers(0, 256, (4, SIZE, SIZE, 3)).astype(np.float32)
    images[1] = images[0][:, ::-1]
    model = as_if_trained(name, images)
    expected = logits_of(model, images)
    if architectures.architecture(name).recipe.mirror:
        expected = (expected + logits_of(model, images[:, :, ::-1])) / np.float32(2)
        assert expected[0] == pytest.approx(expected[1], rel=1e-5)
    saved = architectures.exported(model, name)
    assert all(type(layer).__module__.startswith("keras.") for layer in layers_of(saved))
    tolerance = 0.005 if policy == "float32" else 0.05  # kernels are rounded to 11 bits, and in bfloat16 all to 8
    np.testing.assert_allclose(logits_of(saved, images), expected, rtol=tolerance, atol=tolerance)

    keras.config.set_dtype_policy("float32")
    card = {"image_size": SIZE, "temperature": 1.0, "review_threshold": 0.9}
    bundle.save(str(tmp_path), saved, card)
    loaded = bundle.load_model(bundle.load(str(tmp_path)))  # which is in Keras's safe mode
    np.testing.assert_allclose(logits_of(loaded, images), logits_of(saved, images), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(
        np.asarray(loaded(images, training=False))[:, 0], 1 / (1 + np.exp(-logits_of(saved, images))), rtol=1e-5
    )
