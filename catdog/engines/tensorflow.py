"""The TensorFlow engine: it computes the bundle's Keras model, in bfloat16 on CPUs and GPUs that have it.

Every call of the compiled model has the same number of images and runs on one core. With another number of images or of
threads, the libraries below TensorFlow would sum in another order, which would change the last bits of a logit. On some
CPUs, these bits also depend on the place of an image in the batch. The batch size is the first of `BATCH_SIZES` at
which they do not.
"""

from collections.abc import Callable
from importlib import util
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from catdog import hardware
from catdog.bundle import Arithmetic, Bundle, golden_images, load_gauge, load_model
from catdog.engines import Outputs
from catdog.errors import BundleError
from catdog.neither import Gauge

BATCH_SIZES: Final = (16, 32, 64)
"""Numbers of images per call of the compiled model, to be tried in this order. On a CPU core, 16 is as fast as 64. If
none will do, the batch size is 1, which is a fifth to a half as fast. (With AVX2, the results of matrix products of 8
and of 32 rows were seen to depend on the place of a row, those of 16 rows not.)"""

GPU_BATCH_SIZES: Final = (64,)
"""As `BATCH_SIZES`, on a GPU, which needs larger batches to be busy."""


def load(bundle: Bundle, *, num_parallel: int, use_gpu: bool) -> "TensorFlowEngine":
    """Load a bundle's model: see `catdog.engines.load_engine`.

    If TensorFlow has computed in this process before, it keeps the number of threads that it had.
    """
    if not util.find_spec("tensorflow"):
        raise BundleError(
            "the tensorflow engine needs TensorFlow: pip install 'catdog[train]'. For bundles with OpenVINO's files "
            f"--engine openvino does without. Received: {bundle.url}, and no TensorFlow"
        )
    hardware.configure_tensorflow(num_threads=1, num_parallel=num_parallel, use_gpu=use_gpu)
    return TensorFlowEngine(bundle, use_gpu=use_gpu)


class TensorFlowEngine:
    """An engine, see `catdog.engines.Engine`."""

    name: Final = "tensorflow"

    def __init__(self, bundle: Bundle, *, use_gpu: bool = False) -> None:
        import tensorflow as tf

        from catdog.architectures import in_bfloat16

        self.arithmetic: Arithmetic = "bfloat16" if hardware.tensorflow_has_bfloat16() else "float32"
        model = load_model(bundle)
        if self.arithmetic == "bfloat16":
            model = in_bfloat16(model)
        size, gauge = bundle.image_size, load_gauge(bundle)
        self._has_score = gauge is not None
        self._compute = tf.function(
            _logits_of(model) if gauge is None else _logits_and_scores_of(model, gauge),
            input_signature=[tf.TensorSpec((None, size, size, 3), tf.uint8)],
            autograph=False,
        )
        (image_HWC, *_) = golden_images(size)
        sizes = GPU_BATCH_SIZES if use_gpu else BATCH_SIZES
        self.batch_size = next((number for number in sizes if self._ignores_place(image_HWC, number)), 1)
        """Number of images per call of the compiled model."""

    def _ignores_place(self, image_HWC: npt.NDArray[np.uint8], batch_size: int) -> bool:
        """Whether an image gets the same outputs, to the last bit, at every place in a batch of this size."""
        outputs_OB = self._compute(np.repeat(image_HWC[np.newaxis], batch_size, axis=0)).numpy()
        return bool(np.all(outputs_OB == outputs_OB[:, :1]))

    def predict(self, images_BHWC: npt.NDArray[np.uint8]) -> Outputs:
        """See `catdog.engines.Engine`."""
        parts = [np.empty((1 + self._has_score, 0), np.float32)]
        for start in range(0, len(images_BHWC), self.batch_size):
            batch_BHWC = images_BHWC[start : start + self.batch_size]
            missing = self.batch_size - len(batch_BHWC)
            if missing:
                batch_BHWC = np.concatenate([batch_BHWC, np.zeros((missing, *batch_BHWC.shape[1:]), np.uint8)])
            parts.append(self._compute(batch_BHWC).numpy()[:, : self.batch_size - missing])
        logits_B, *scores = np.concatenate(parts, axis=1)
        return Outputs(logits_B, scores[0] if scores else None)


def _logits_of(model: Any) -> Callable[[Any], Any]:
    """The function of pixels that gives a model's logits, (1, B)."""
    import tensorflow as tf

    from catdog.architectures import logits_model

    model = logits_model(model)
    return lambda images_BHWC: tf.reshape(model(tf.cast(images_BHWC, tf.float32), training=False), [1, -1])


def _logits_and_scores_of(model: Any, gauge: Gauge) -> Callable[[Any], Any]:
    """The function of pixels that gives a model's logits and the scores of its features, (2, B)."""
    import tensorflow as tf

    from catdog.architectures import scoring_network

    found = scoring_network(model)
    if found is None:
        raise BundleError("a bundle with a score must have a network whose logits are a weighted sum of its features")
    network, is_mirrored = found

    def compute(images_BHWC: Any) -> Any:
        pixels_BHWC = tf.cast(images_BHWC, tf.float32)
        outputs = network(pixels_BHWC, training=False)
        if is_mirrored:
            mirrored = network(pixels_BHWC[:, :, ::-1], training=False)
            outputs = [(a + b) / 2 for a, b in zip(outputs, mirrored, strict=True)]
        logits_B1, features_BF = outputs
        return tf.stack([logits_B1[:, 0], _scores(features_BF, gauge)])

    return compute


def _scores(features_BF: Any, gauge: Gauge) -> Any:
    """As `Gauge.scores`."""
    import tensorflow as tf

    kernel_FK = gauge.kernel_FK.astype(np.float32) * gauge.scale_K
    values_BK = (tf.cast(features_BF, tf.float32) - gauge.offset_F) @ kernel_FK + gauge.bias_K
    if gauge.kind == "classes":
        others, kin = values_BK[:, : gauge.num_others], values_BK[:, gauge.num_others :]
        return tf.reduce_logsumexp(others, axis=1) - tf.reduce_logsumexp(kin, axis=1)
    squares_BC = tf.reduce_sum(tf.square(values_BK[:, tf.newaxis] - gauge.centers_CK), axis=2)
    return tf.math.log(tf.reduce_min(squares_BC, axis=1))
