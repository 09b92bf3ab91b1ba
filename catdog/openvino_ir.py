"""A model as OpenVINO's intermediate representation (IR): making it, quantizing it, and reading it.

An IR is a pair of files: a graph in XML, and its weights. It takes pixels, uint8 (B, S, S, 3) for any `B`, and gives
logits, float32 (B,). Its weights are float16, or for convolutions of a quantized model int8.

The last layer is written as a product and a sum, which OpenVINO computes in float32 whatever it computes the rest in:
bfloat16 has 8 bits of mantissa, too few for a calibrated logit.

Shapes: `B` images, `S` pixels per side, `F` features.
"""

from __future__ import annotations

import contextlib
import io
import logging
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from catdog import scratch

if TYPE_CHECKING:
    import keras

IR = Mapping[str, bytes]
"""Suffix (`xml` or `bin`) → content of the file."""

SUFFIXES: Final = ("xml", "bin")

_WRITES_ABOUT: Final = ("conversion_parameters", "optimum", "nncf")
"""What the libraries note in an IR about how it was made, paths among it."""


def load_openvino() -> Any:
    """Import OpenVINO without its telemetry, which reports to its makers over the network."""
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # OpenVINO does without it
    import openvino

    return openvino


def float_ir(model: keras.Model, image_size: int) -> IR:
    """The IR of a model that `catdog.architectures.exported` made."""
    import tensorflow as tf
    from tensorflow.python.framework.convert_to_constants import convert_variables_to_constants_v2

    openvino = load_openvino()
    shape = (None, image_size, image_size, 3)
    compute = tf.function(_logits_function(model), autograph=False).get_concrete_function(
        tf.TensorSpec(shape, tf.uint8)
    )
    return _files_of(openvino.convert_model(convert_variables_to_constants_v2(compute).graph))


def _logits_function(model: keras.Model) -> Any:
    """The function of uint8 pixels that gives a model's logits, its last layer computed in float32."""
    import keras
    import tensorflow as tf

    from catdog.architectures import LOGITS_LAYER, logits_model, mirrored_network

    network = mirrored_network(model)
    is_mirrored = network is not None
    network = network or logits_model(model)
    last = network.get_layer(LOGITS_LAYER)
    if isinstance(last, keras.layers.Dense):
        features_of = keras.Model(network.input, last.input)
        kernel_F, bias = (tf.cast(weight, tf.float32) for weight in last.get_weights())

        def logits_of(pixels_BSSC: Any) -> Any:
            features_BF = tf.cast(features_of(pixels_BSSC, training=False), tf.float32)
            return tf.reduce_sum(features_BF * kernel_F[:, 0], axis=1) + bias
    else:

        def logits_of(pixels_BSSC: Any) -> Any:
            return tf.reshape(network(pixels_BSSC, training=False), [-1])

    def compute(images_BSSC: Any) -> Any:
        pixels_BSSC = tf.cast(images_BSSC, tf.float32)
        if not is_mirrored:
            return logits_of(pixels_BSSC)
        both = tf.concat([pixels_BSSC, tf.reverse(pixels_BSSC, [2])], axis=0)
        return tf.reduce_mean(tf.reshape(logits_of(both), [2, -1]), axis=0)

    return compute


def quantized_ir(ir: IR, images: Iterable[npt.NDArray[np.uint8]], *, num_float: int = 0) -> IR:
    """The IR with int8 convolutions and matrix products, after NNCF's post-training quantization.

    Args:
        ir: a model with float weights.
        images: photographs of the training split, SSC, from which the ranges of the feature maps are taken.
        num_float: how many convolutions, from the first, keep their float weights.
    """
    model = read_ir(ir)
    import nncf

    nncf.set_log_level(logging.ERROR)
    convolutions = [
        operation.get_friendly_name()
        for operation in model.get_ordered_ops()
        if operation.get_type_name() in ("Convolution", "GroupConvolution")
    ]
    held = [image[np.newaxis] for image in images]
    with contextlib.redirect_stdout(io.StringIO()):  # its progress bars
        made = nncf.quantize(
            model,
            nncf.Dataset(held),
            preset=nncf.QuantizationPreset.MIXED,
            subset_size=len(held),
            ignored_scope=nncf.IgnoredScope(names=convolutions[:num_float]),
            advanced_parameters=nncf.AdvancedQuantizationParameters(overflow_fix=nncf.OverflowFix.ENABLE),
        )
    return _files_of(made)


def read_ir(ir: IR) -> Any:
    """The `openvino.Model` of an IR. Nothing in an IR can execute: it names operations that OpenVINO has."""
    openvino = load_openvino()
    return openvino.Core().read_model(ir["xml"], ir["bin"])


def averaged_features(model: Any) -> tuple[Any, tuple[int, int], npt.NDArray[np.float32]] | None:
    """The last feature map of a network that averages it over the picture, and sums the averages with weights.

    Args:
        model: what `read_ir` returns.

    Returns:
        The map, which can be made an output of the model; its axes that are averaged, height and width; and the weight
        of each feature in the logit. None if the network is another one.
    """
    for operation in reversed(model.get_ordered_ops()):
        if (
            operation.get_type_name() != "ReduceMean"
            or operation.input_value(0).get_partial_shape().rank.get_length() != 4
        ):
            continue
        axes = _constant(operation.input_value(1).get_node())
        product = _only_consumer(operation)
        if axes is None or len(axes) != 2 or product is None or product.get_type_name() != "Multiply":
            return None
        total = _only_consumer(product)
        weights = [_constant(value.get_node()) for value in product.input_values()]
        weights_F = next((np.ravel(each) for each in weights if each is not None), None)
        if total is None or total.get_type_name() != "ReduceSum" or weights_F is None:
            return None
        return operation.input_value(0), (int(axes[0]), int(axes[1])), weights_F.astype(np.float32)
    return None


def _only_consumer(operation: Any) -> Any | None:
    """The operation that takes the output of this one; None if there is another number of them."""
    targets = list(operation.output(0).get_target_inputs())
    return targets[0].get_node() if len(targets) == 1 else None


def _constant(operation: Any) -> npt.NDArray[Any] | None:
    """The value of a constant, which may be converted to another number format; None of what is no constant."""
    if operation.get_type_name() == "Convert":
        operation = operation.input_value(0).get_node()
    return np.array(operation.data) if operation.get_type_name() == "Constant" else None


def _files_of(model: Any) -> IR:
    openvino = load_openvino()
    for name in _WRITES_ABOUT:
        if model.has_rt_info([name]):
            model.set_rt_info("", [name])
    with scratch.directory("openvino") as directory:
        path = Path(directory) / "model.xml"
        openvino.save_model(model, path, compress_to_fp16=True)
        return {suffix: path.with_suffix(f".{suffix}").read_bytes() for suffix in SUFFIXES}
