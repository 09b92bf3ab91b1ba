"""A model as OpenVINO's intermediate representation (IR): making it, quantizing it, and reading it.

An IR is a pair of files: a graph in XML, and its weights. It takes pixels, uint8 (B, S, S, 3) for any `B`, and gives
logits, float32 (B,). Its weights are float16, or for convolutions of a quantized model int8. A second output may be the
score of `catdog.neither`, float32 (B,); or, to fit that, the features, float32 (B, F).

The last layer is written as a product and a sum, which OpenVINO computes in float32 whatever it computes the rest in:
bfloat16 has 8 bits of mantissa, too few for a calibrated logit.

Shapes: `B` images, `S` pixels per side, `F` features.
"""

from __future__ import annotations

import contextlib
import io
import logging
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from catdog import scratch
from catdog.neither import Gauge

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
    compute = tf.function(_function_of(model), autograph=False).get_concrete_function(tf.TensorSpec(shape, tf.uint8))
    return _files_of(openvino.convert_model(convert_variables_to_constants_v2(compute).graph))


def _function_of(model: keras.Model) -> Any:
    """The function of uint8 pixels that gives a model's logits, its last layer computed in float32."""
    import tensorflow as tf

    from catdog.architectures import LOGITS_LAYER, logits_model, scoring_network

    found = scoring_network(model)
    if found is None:
        plain = logits_model(model)
        return lambda images_BSSC: tf.reshape(plain(tf.cast(images_BSSC, tf.float32), training=False), [-1])
    network, is_mirrored = found
    kernel_F, bias = (tf.cast(weight, tf.float32) for weight in network.get_layer(LOGITS_LAYER).get_weights())

    def compute(images_BSSC: Any) -> Any:
        pixels_BSSC = tf.cast(images_BSSC, tf.float32)
        if is_mirrored:
            pixels_BSSC = tf.concat([pixels_BSSC, tf.reverse(pixels_BSSC, [2])], axis=0)
        features_BF = tf.cast(network(pixels_BSSC, training=False)[1], tf.float32)
        logits_B = tf.reduce_sum(features_BF * kernel_F[:, 0], axis=1) + bias
        return tf.reduce_mean(tf.reshape(logits_B, [2, -1]), axis=0) if is_mirrored else logits_B

    return compute


def gauged(ir: IR, gauge: Gauge | None) -> IR:
    """The IR of a model without a score, with the score of `gauge` as a second output, if there is one."""
    if gauge is None:
        return ir
    return _with_output(ir, lambda features: _score(features, gauge).output(0)) or ir


def with_features(ir: IR) -> IR | None:
    """The IR with the features as a second output; None if the logits are no weighted sum of features."""
    return _with_output(ir, lambda features: features)


def _with_output(ir: IR, output_of: Callable[[Any], Any]) -> IR | None:
    model = read_ir(ir)
    features = _features(model)
    if features is None:
        return None
    model.add_results([load_openvino().opset13.result(output_of(features))])
    return _files_of(model)


def _features(model: Any) -> Any | None:
    """The output, float32 (B, F), whose weighted sum is the logit: of an image and its mirror image, the mean of both.

    None if the logit is none.
    """
    from openvino import opset13 as ops

    last = _last_layer(model)
    kinds = [operation.get_type_name() for operation in last]
    if "ReduceSum" not in kinds or kinds[-1] != "Multiply":
        return None
    features = next((value for value in last[-1].input_values() if _constant(value.get_node()) is None), None)
    if features is None or features.get_partial_shape().rank.get_length() != 2:
        return None
    if _has_averaged_map(model):  # see `quantized_ir`: the mean is computed once more, in other words
        mean = features.get_node()
        again = ops.reduce_mean(mean.input_value(0), mean.input_value(1), keep_dims=True)
        num_features = features.get_partial_shape()[1].get_length()
        features = ops.reshape(again, ops.constant(np.array([-1, num_features])), special_zero=False).output(0)
    if "ReduceMean" not in kinds:
        return features
    num_features = features.get_partial_shape()[1].get_length()
    views = ops.reshape(features, ops.constant(np.array([2, -1, num_features])), special_zero=False)
    return ops.reduce_mean(views, ops.constant(np.array([0])), keep_dims=False).output(0)


def _has_averaged_map(model: Any) -> bool:
    """Whether the features of a model are a map's averages."""
    last = _last_layer(model)
    inputs = last[-1].input_values() if last else []
    return any(
        value.get_node().get_type_name() == "ReduceMean"
        and value.get_node().input_value(0).get_partial_shape().rank.get_length() == 4
        for value in inputs
    )


def _last_layer(model: Any) -> list[Any]:
    """The operations that make the logit of features, from the last one: means of two views, a bias, sum, product."""
    found = []
    operation = model.output(0).get_node().input_value(0).get_node()
    while operation.get_type_name() in ("ReduceMean", "Reshape", "Add", "ReduceSum", "Multiply", "FakeQuantize"):
        found.append(operation)
        if operation.get_type_name() == "Multiply":
            break
        operation = operation.input_value(0).get_node()
    return found


def _score(features: Any, gauge: Gauge) -> Any:
    """The operation that computes `Gauge.scores` from features."""
    from openvino import opset13 as ops

    def constant(array: Any) -> Any:
        return ops.constant(np.asarray(array))

    def log_sum_exp(values: Any) -> Any:
        largest = ops.reduce_max(values, constant([1]), keep_dims=True)
        total = ops.reduce_sum(ops.exp(ops.subtract(values, largest)), constant([1]), keep_dims=True)
        return ops.add(ops.log(total), largest)

    moved = ops.subtract(features, constant(gauge.offset_F[np.newaxis]))
    # Scaled before the product, the weights would stay bytes when it is computed, which not every CPU can do.
    kernel = ops.convert(constant(gauge.kernel_FK), "f32")
    sums = ops.matmul(moved, kernel, transpose_a=False, transpose_b=False)
    values = ops.add(ops.multiply(sums, constant(gauge.scale_K[np.newaxis])), constant(gauge.bias_K[np.newaxis]))
    if gauge.kind == "classes":
        lengths = constant([gauge.num_others, len(gauge.bias_K) - gauge.num_others])
        others, kin = ops.variadic_split(values, constant(1), lengths).outputs()
        score = ops.subtract(log_sum_exp(others), log_sum_exp(kin))
    else:
        away = ops.subtract(ops.unsqueeze(values, constant([1])), constant(gauge.centers_CK[np.newaxis]))
        squares = ops.reduce_sum(ops.multiply(away, away), constant([2]), keep_dims=False)
        score = ops.log(ops.reduce_min(squares, constant([1]), keep_dims=True))
    return ops.squeeze(score, constant([1]))


def quantized_ir(ir: IR, images: Iterable[npt.NDArray[np.uint8]], *, num_float: int = 0, num_late: int = 0) -> IR:
    """The IR with int8 convolutions and matrix products, after NNCF's post-training quantization.

    Args:
        ir: a model with float weights.
        images: photographs of the training split, SSC, from which the ranges of the feature maps are taken.
        num_float: how many convolutions, from the first, keep their float weights.
        num_late: how many do of those before the last.
    """
    model = read_ir(ir)
    import nncf

    nncf.set_log_level(logging.ERROR)
    convolutions = [
        operation.get_friendly_name()
        for operation in model.get_ordered_ops()
        if operation.get_type_name() in ("Convolution", "GroupConvolution")
    ]
    # Where products are rounded and the features have a second use, in a score, OpenVINO 2026.4 gives wrong logits.
    last_layer = [] if _has_averaged_map(model) else [each.get_friendly_name() for each in _last_layer(model)]
    kept = convolutions[:num_float] + convolutions[:-1][max(num_float, len(convolutions) - 1 - num_late) :]
    held = [image[np.newaxis] for image in images]
    with contextlib.redirect_stdout(io.StringIO()):  # its progress bars
        made = nncf.quantize(
            model,
            nncf.Dataset(held),
            preset=nncf.QuantizationPreset.MIXED,
            subset_size=len(held),
            ignored_scope=nncf.IgnoredScope(names=[*kept, *last_layer]),
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
        product = _only_consumer(operation, "Multiply")
        if axes is None or len(axes) != 2 or product is None:
            return None
        total = _only_consumer(product, "ReduceSum")
        weights = [_constant(value.get_node()) for value in product.input_values()]
        weights_F = next((np.ravel(each) for each in weights if each is not None), None)
        if total is None or weights_F is None:
            return None
        return operation.input_value(0), (int(axes[0]), int(axes[1])), weights_F.astype(np.float32)
    return None


def _only_consumer(operation: Any, kind: str) -> Any | None:
    """The operation of this kind that takes the output of this one; None if there is another number of them."""
    targets = [target.get_node() for target in operation.output(0).get_target_inputs()]
    found = [target for target in targets if target.get_type_name() == kind]
    return found[0] if len(found) == 1 else None


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
