"""Random augmentation, computed on the device that trains.

Shapes: `B` images in the batch; `S` pixels per side as decoded; `T` pixels per side of a training crop; `C` = 3.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    import tensorflow as tf

MAX_ASPECT: Final = 4 / 3
"""Width to height of the widest crop, and height to width of the narrowest: as in Szegedy et al. 2015 (Inception)."""

MAX_BRIGHTNESS: Final = 0.2
MAX_CONTRAST: Final = 0.2
MAX_SATURATION: Final = 0.3
"""Largest relative changes of brightness, contrast and saturation, up or down. Daylight and lamplight differ by more,
but an overexposed picture teaches nothing."""


class Rows(NamedTuple):
    """The place of a worker's images in the whole batch: images `start` to `stop` of `batch_size`.

    The random numbers of an image depend on its place in the whole batch, not on which worker has it.
    """

    start: int
    stop: int
    batch_size: int


def random_views(
    images_BSSC: tf.Tensor,
    *,
    crop_size: int,
    min_area: float,
    rotation_deg: float,
    seed: tf.Tensor,
    rows: Rows | None = None,
    colour_strength: float = 1.0,
) -> tf.Tensor:
    """A random view of each image: flipped, rotated, zoomed, shifted, and with other light and colours.

    Flip, rotation, zoom and shift are one projective warp with bilinear sampling. The picture is mirrored at its edges.

    Args:
        images_BSSC: pixels, 0 to 255, any dtype.
        crop_size: `T`, pixels per side of the result.
        min_area: lower bound of the share of the picture's area that a view shows. The share is drawn uniformly between
            this and 1; a view wider or higher than the picture is then cut to it.
        rotation_deg: largest rotation either way, in degrees.
        seed: int32 (2,). The same seed gives the same views.
        rows: where these images stand in the whole batch; None if they are the whole batch.
        colour_strength: multiplies the largest changes of brightness, contrast and saturation.

    Returns:
        float32 (B, T, T, C), 0 to 255.
    """
    import tensorflow as tf

    side = float(images_BSSC.shape[1])
    draws_9B = _draws(9, images_BSSC, seed, rows)

    flip_B = tf.where(draws_9B[0] < 0.5, -1.0, 1.0)
    angle_B = _between(draws_9B[1], -1.0, 1.0) * math.radians(rotation_deg)
    shown_B = tf.sqrt(_between(draws_9B[2], min_area, 1.0))
    stretch_B = tf.exp(_between(draws_9B[3], -0.5, 0.5) * math.log(MAX_ASPECT))
    width_B = tf.minimum(shown_B * stretch_B, 1.0)
    height_B = tf.minimum(shown_B / stretch_B, 1.0)
    shift_x_B = _between(draws_9B[4], -0.5, 0.5) * (1.0 - width_B) * side
    shift_y_B = _between(draws_9B[5], -0.5, 0.5) * (1.0 - height_B) * side

    # A row of `transforms` maps an output pixel (x, y) to the input pixel (a x + b y + c, d x + e y + f).
    scale = side / crop_size
    a_B = scale * width_B * flip_B * tf.cos(angle_B)
    b_B = -scale * height_B * tf.sin(angle_B)
    d_B = scale * width_B * flip_B * tf.sin(angle_B)
    e_B = scale * height_B * tf.cos(angle_B)
    center_in, center_out = (side - 1) / 2, (crop_size - 1) / 2
    c_B = center_in + shift_x_B - (a_B + b_B) * center_out
    f_B = center_in + shift_y_B - (d_B + e_B) * center_out
    zero_B = tf.zeros_like(a_B)
    views_BTTC = tf.raw_ops.ImageProjectiveTransformV3(
        images=tf.cast(images_BSSC, tf.float32),
        transforms=tf.stack([a_B, b_B, c_B, d_B, e_B, f_B, zero_B, zero_B], axis=1),
        output_shape=[crop_size, crop_size],
        fill_value=0.0,
        interpolation="BILINEAR",
        fill_mode="REFLECT",
    )

    brightness_B = _between(draws_9B[6], -1.0, 1.0) * (MAX_BRIGHTNESS * colour_strength) * 127.5
    contrast_B = 1.0 + _between(draws_9B[7], -1.0, 1.0) * (MAX_CONTRAST * colour_strength)
    saturation_B = 1.0 + _between(draws_9B[8], -1.0, 1.0) * (MAX_SATURATION * colour_strength)
    grey_BTT1 = tf.reduce_mean(views_BTTC, axis=-1, keepdims=True)
    # ((grey + (view - grey) * saturation) - 127.5) * contrast + 127.5 + brightness, written so as to take few passes.
    offset_BTT1 = grey_BTT1 * _per_image((1.0 - saturation_B) * contrast_B) + _per_image(
        127.5 * (1.0 - contrast_B) + brightness_B
    )
    views_BTTC = views_BTTC * _per_image(saturation_B * contrast_B) + offset_BTT1
    return tf.clip_by_value(views_BTTC, 0.0, 255.0)


def cutmix(
    images_BTTC: tf.Tensor, targets_B: tf.Tensor, *, max_area: float, seed: tf.Tensor, rows: Rows | None = None
) -> tuple[tf.Tensor, tf.Tensor]:
    """Cover a square of each image with the same square of another one, and mix the targets likewise.

    This is CutMix (Yun et al., ICCV 2019). The images are mixed in pairs: the first and the last, the second and the
    last but one, and so on.

    Args:
        images_BTTC: pixels, float32.
        targets_B: probabilities of class 1, float32.
        max_area: largest share of an image's area that a patch covers. The share is drawn uniformly between 0 and this.
        seed: int32 (2,). The same seed gives the same patches.
        rows: as in `random_views`.

    Returns:
        The images and the targets, in their shapes.
    """
    import tensorflow as tf

    side = images_BTTC.shape[1]
    area_B, x_B, y_B = _draws(3, images_BTTC, seed + 1, rows)
    length_B = tf.round(tf.sqrt(area_B * max_area) * side)
    left_B, top_B = tf.round(x_B * (side - length_B)), tf.round(y_B * (side - length_B))
    place_T = tf.range(side, dtype=tf.float32)

    def within(first_B: tf.Tensor) -> tf.Tensor:
        return (place_T >= first_B[:, None]) & (place_T < (first_B + length_B)[:, None])

    patch_BTT1 = (within(top_B)[:, :, None] & within(left_B)[:, None, :])[..., None]
    share_B = tf.square(length_B / side)
    mixed_BTTC = tf.where(patch_BTT1, tf.reverse(images_BTTC, [0]), images_BTTC)
    return mixed_BTTC, targets_B * (1 - share_B) + tf.reverse(targets_B, [0]) * share_B


def _draws(num_draws: int, images_BSSC: tf.Tensor, seed: tf.Tensor, rows: Rows | None) -> list[tf.Tensor]:
    """`num_draws` random numbers between 0 and 1 for each image, each of them float32 (B,)."""
    import tensorflow as tf

    num_images = tf.shape(images_BSSC)[0]
    if rows is None:
        return list(tf.unstack(tf.random.stateless_uniform([num_draws, num_images], seed=seed)))
    draws = tf.random.stateless_uniform([num_draws, rows.batch_size], seed=seed)
    return list(tf.unstack(draws[:, rows.start : rows.stop]))


def _between(draw_B: tf.Tensor, low: float, high: float) -> tf.Tensor:
    return low + draw_B * (high - low)


def _per_image(factor_B: tf.Tensor) -> tf.Tensor:
    return factor_B[:, None, None, None]
