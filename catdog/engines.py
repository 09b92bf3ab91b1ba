"""A bundle's model, computed fast on this hardware.

Shapes: `B` images in the batch, `H` = `W` = the bundle's image size, `C` = 3 (RGB).
"""

import os
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt

from catdog.bundle import Bundle, load_model
from catdog.config import EngineName

BATCH_MULTIPLE: Final = 8
"""Batches are filled up to a multiple of this many images. For a batch of one, oneDNN takes another path, whose last
bits differ; else a logit is the same to the bit whatever the batch's size and order, with one thread or two."""


class Engine(Protocol):
    """What computes a model. Thread-safe."""

    @property
    def name(self) -> str:
        """One of `catdog.config.EngineName`, less `auto`."""

    def predict(self, images_BHWC: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """Logits, float32 (B,), in the order of the images, which are RGB, 0..255."""


def load_engine(bundle: Bundle, name: EngineName = "auto", num_threads: int | None = None) -> Engine:
    """Load a bundle's model, warmed up.

    Args:
        bundle: a verified bundle.
        name: auto takes the fastest engine that this installation and the bundle have.
        num_threads: cores to use: so many calls of `predict` compute at the same time, each on one of them. Default: a
            call takes all cores. It is set for the process, and only if TensorFlow has computed nothing in it before.

    Raises:
        BundleError: the model cannot be used.
    """
    # One engine so far: "auto" and "tensorflow" are the same.
    del name
    return _TensorFlowEngine(bundle, num_threads)


def has_bfloat16() -> bool:
    """Whether this machine's processor computes in bfloat16: an x86 CPU says so in its flags."""
    if not os.path.exists("/proc/cpuinfo"):
        return False
    with open("/proc/cpuinfo", encoding="utf-8") as info:
        flags = set(next((line for line in info if line.startswith("flags")), "").split())
    return bool(flags & {"avx512_bf16", "amx_bf16"})


class _TensorFlowEngine:
    name: Final = "tensorflow"

    def __init__(self, bundle: Bundle, num_threads: int | None) -> None:
        import tensorflow as tf

        from catdog.architectures import in_bfloat16, logits_model

        if num_threads is not None:
            _limit_threads(num_threads)
        size = bundle.image_size
        model = load_model(bundle)
        if has_bfloat16():
            model = in_bfloat16(model)
        model = logits_model(model)

        def compute(images_BHWC: Any) -> Any:
            return tf.reshape(model(tf.cast(images_BHWC, tf.float32), training=False), [-1])

        # A batch of any size, so that nothing is traced again.
        self._compute = tf.function(compute, input_signature=[tf.TensorSpec((None, size, size, 3), tf.uint8)])
        self.predict(np.zeros((BATCH_MULTIPLE, size, size, 3), np.uint8))

    def predict(self, images_BHWC: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        num_images = len(images_BHWC)
        missing = -num_images % BATCH_MULTIPLE
        if missing:
            images_BHWC = np.concatenate([images_BHWC, np.zeros((missing, *images_BHWC.shape[1:]), np.uint8)])
        logits_B: npt.NDArray[np.float32] = self._compute(images_BHWC).numpy()[:num_images]
        return logits_B


def _limit_threads(num_threads: int) -> None:
    import tensorflow as tf

    try:
        tf.config.threading.set_intra_op_parallelism_threads(1)
        tf.config.threading.set_inter_op_parallelism_threads(num_threads)
    except RuntimeError:  # TensorFlow runs already in this process, with its threads as they are
        return
