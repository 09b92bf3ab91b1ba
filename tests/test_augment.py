import numpy as np
import numpy.typing as npt
import pytest
import tensorflow as tf

from catdog.augment import random_views


def photographs(num: int, size: int) -> npt.NDArray[np.uint8]:
    """Smooth pictures, each of its own colours."""
    y, x = np.mgrid[:size, :size] / size
    planes = [128 + 100 * np.sin(6 * (x * np.cos(i) + y * np.sin(i)) + i) for i in range(3 * num)]
    return np.stack(planes, -1).reshape(size, size, num, 3).transpose(2, 0, 1, 3).astype(np.uint8)


def views(images: npt.NDArray[np.uint8], seed: int, **changes: float) -> npt.NDArray[np.float32]:
    options = {"crop_size": 48, "min_area": 0.4, "rotation_deg": 20} | changes
    return np.asarray(random_views(images, seed=tf.constant([7, seed]), **options))


def test_views_have_the_crops_size_and_the_pixels_range() -> None:
    result = views(photographs(5, 64), seed=1)
    assert result.shape == (5, 48, 48, 3)
    assert result.dtype == np.float32
    assert result.min() >= 0
    assert result.max() <= 255


def test_the_seed_alone_decides() -> None:
    images = photographs(4, 64)
    np.testing.assert_array_equal(views(images, seed=1), views(images, seed=1))
    assert np.abs(views(images, seed=1) - views(images, seed=2)).mean() > 5


def test_images_are_varied_independently() -> None:
    same = np.repeat(photographs(1, 64), 6, axis=0)
    result = views(same, seed=3)
    assert all(np.abs(result[0] - other).mean() > 1 for other in result[1:])


def test_a_view_shows_the_picture_it_was_made_of() -> None:
    images = photographs(8, 64)
    result = views(images, seed=5, min_area=1.0, rotation_deg=0, crop_size=64)
    # Without zoom and rotation what is left is a flip and other light: grey levels correlate with one of the two.
    for image, view in zip(images.astype(float), result, strict=True):
        ways = [np.corrcoef(view.mean(-1).ravel(), way.mean(-1).ravel())[0, 1] for way in (image, image[:, ::-1])]
        assert max(ways) > 0.9


@pytest.mark.parametrize("order", [[3, 1, 0, 2]])
def test_pixels_stay_with_their_image(order: list[int]) -> None:
    images = np.stack([np.full((32, 32, 3), level, np.uint8) for level in (0, 80, 160, 240)])[order]
    means = views(images, seed=9, crop_size=32).mean((1, 2, 3))
    assert np.argsort(means).tolist() == np.argsort(order).tolist()
