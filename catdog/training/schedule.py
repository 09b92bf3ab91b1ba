"""Where in the training a step lies: its epoch, its stage, its learning rate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final

WARMUP_FRACTION: Final = 0.1
"""Share of a stage's steps in which the learning rate rises linearly from 0 to its peak."""

MIN_CROP_PX: Final = 32
"""Pixels per side. Five layers of stride 2 leave nothing of fewer."""


def crop_size(crop_scales: Sequence[float], image_size: int, epoch: int, num_epochs: int) -> int:
    """Pixels per side of an epoch's training images; epochs count from 0. Each of `crop_scales` has as many epochs."""
    return max(MIN_CROP_PX, round(crop_scales[epoch * len(crop_scales) // num_epochs] * image_size))


def learning_rate_schedule(*, head_rate: float, head_steps: int, peak_rate: float, num_steps: int) -> Any:
    """A Keras schedule: a warm-up to `head_rate` while only the head learns, then one to `peak_rate` and a cosine.

    Args:
        head_rate: of the first stage.
        head_steps: length of the first stage; 0 for none.
        peak_rate: of the second stage, after its warm-up; it falls to 0 along half a cosine (Loshchilov and Hutter,
            "SGDR", ICLR 2017).
        num_steps: length of the second stage.
    """
    import keras

    head_warmup = max(1.0, WARMUP_FRACTION * head_steps)
    warmup = max(1.0, WARMUP_FRACTION * num_steps)

    class HeadThenCosine(keras.optimizers.schedules.LearningRateSchedule):  # type: ignore[misc]
        def __call__(self, step: Any) -> Any:
            done = keras.ops.cast(step, "float32")
            head = head_rate * keras.ops.minimum(1.0, (done + 1) / head_warmup)
            done = done - head_steps
            falling = 0.5 * (1 + keras.ops.cos(math.pi * (done - warmup) / max(1.0, num_steps - warmup)))
            second = peak_rate * keras.ops.where(done < warmup, (done + 1) / warmup, falling)
            return keras.ops.where(done < 0, head, second)

    return HeadThenCosine()
