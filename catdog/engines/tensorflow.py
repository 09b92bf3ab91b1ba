"""The TensorFlow engine: it computes the bundle's Keras model, in bfloat16 on CPUs and GPUs that have it.

Every call of the compiled model has the same number of images and runs on one core. With another number of images or of
threads, the libraries below TensorFlow would sum in another order, which would change the last bits of a logit. On some
CPUs, these bits also depend on the place of an image in the batch. The batch size is the first of `BATCH_SIZES` at
which they do not.
"""

from importlib import util
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from catdog import hardware
from catdog.bundle import Arithmetic, Bundle, golden_images, load_model
from catdog.errors import BundleError

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

        from catdog.architectures import in_bfloat16, logits_model

        self.arithmetic: Arithmetic = "bfloat16" if hardware.tensorflow_has_bfloat16() else "float32"
        model = load_model(bundle)
        if self.arithmetic == "bfloat16":
            model = in_bfloat16(model)
        model = logits_model(model)
        size = bundle.image_size

        def compute(images_BHWC: Any) -> Any:
            return tf.reshape(model(tf.cast(images_BHWC, tf.float32), training=False), [-1])

        self._compute = tf.function(
            compute, input_signature=[tf.TensorSpec((None, size, size, 3), tf.uint8)], autograph=False
        )
        (image_HWC, *_) = golden_images(size)
        sizes = GPU_BATCH_SIZES if use_gpu else BATCH_SIZES
        self.batch_size = next((number for number in sizes if self._ignores_place(image_HWC, number)), 1)
        """Number of images per call of the compiled model."""

    def _ignores_place(self, image_HWC: npt.NDArray[np.uint8], batch_size: int) -> bool:
        """Whether an image gets the same logit, to the last bit, at every place in a batch of this size."""
        logits_B = self._compute(np.repeat(image_HWC[np.newaxis], batch_size, axis=0)).numpy()
        return len(np.unique(logits_B)) == 1

    def predict(self, images_BHWC: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """See `catdog.engines.Engine`."""
        logits = [np.empty(0, np.float32)]
        for start in range(0, len(images_BHWC), self.batch_size):
            batch_BHWC = images_BHWC[start : start + self.batch_size]
            missing = self.batch_size - len(batch_BHWC)
            if missing:
                batch_BHWC = np.concatenate([batch_BHWC, np.zeros((missing, *batch_BHWC.shape[1:]), np.uint8)])
            logits.append(self._compute(batch_BHWC).numpy()[: self.batch_size - missing])
        return np.concatenate(logits)
