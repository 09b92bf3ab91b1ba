"""Random views and cutmix: what they change, and that the same seed gives the same result."""

import itertools
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import tensorflow as tf

from catdog.augment import Rows, cutmix, random_views

pytestmark = pytest.mark.slow


def photographs(num: int, size: int) -> npt.NDArray[np.uint8]:
    """Smooth pictures, each of its own colours."""
    y, x = np.mgrid[:size, :size] / size
    planes = [128 + 100 * np.sin(6 * (x * np.cos(i) + y * np.sin(i)) + i) for i in range(3 * num)]
    return np.stack(planes, -1).reshape(size, size, num, 3).transpose(2, 0, 1, 3).astype(np.uint8)


def mixed(
    images: npt.NDArray[np.uint8], targets: npt.NDArray[np.float32], seed: int, max_area: float = 0.5
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    pictures, probabilities = cutmix(
        tf.cast(images, tf.float32), tf.constant(targets), max_area=max_area, seed=tf.constant([7, seed])
    )
    return np.asarray(pictures), np.asarray(probabilities)


def views(images: npt.NDArray[np.uint8], seed: int, **changes: Any) -> npt.NDArray[np.float32]:
    options: dict[str, Any] = {"crop_size": 48, "min_area": 0.4, "rotation_deg": 20} | changes
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


def test_without_strength_the_light_stays_as_it_is() -> None:
    images = np.stack([np.full((32, 32, 3), level, np.uint8) for level in (0, 80, 160, 240)])
    plain = views(images, seed=9, crop_size=32, colour_strength=0.0)
    np.testing.assert_allclose(plain, images, atol=1e-3)
    changes = [np.abs(views(images, seed=9, crop_size=32, colour_strength=each) - images).mean() for each in (0.5, 1.0)]
    assert 0 < changes[0] < changes[1]
    np.testing.assert_array_equal(views(images, seed=9, colour_strength=1.0), views(images, seed=9))


@pytest.mark.parametrize("order", [[3, 1, 0, 2]])
def test_pixels_stay_with_their_image(order: list[int]) -> None:
    images = np.stack([np.full((32, 32, 3), level, np.uint8) for level in (0, 80, 160, 240)])[order]
    means = views(images, seed=9, crop_size=32).mean((1, 2, 3))
    assert np.argsort(means).tolist() == np.argsort(order).tolist()


@pytest.mark.parametrize("num_workers", [2, 3])
def test_a_view_depends_on_the_place_in_the_whole_batch(num_workers: int) -> None:
    images = photographs(7, 40)
    size: dict[str, Any] = {"crop_size": 32, "min_area": 0.4, "rotation_deg": 20}
    seed = tf.constant([7, 1])
    whole = np.asarray(random_views(images, seed=seed, **size))
    bounds = [rank * len(images) // num_workers for rank in range(num_workers + 1)]
    shares = [
        np.asarray(random_views(images[start:stop], seed=seed, rows=Rows(start, stop, len(images)), **size))
        for start, stop in itertools.pairwise(bounds)
    ]
    np.testing.assert_array_equal(np.concatenate(shares), whole)


def test_patches_are_where_the_whole_batch_has_them() -> None:
    images = np.stack([np.full((32, 32, 3), level, np.uint8) for level in (10, 60, 110, 160)])
    targets = np.array([0, 1, 0, 1], np.float32)
    whole, _ = mixed(images, targets, seed=1)
    rows, seed = Rows(2, 4, 4), tf.constant([7, 1])
    share, _ = cutmix(tf.cast(images[2:], tf.float32), tf.constant(targets[2:]), max_area=0.5, seed=seed, rows=rows)
    # The other image is another one of the worker's own; the patch is the same.
    for ours, theirs, level in zip(np.asarray(share), whole[2:], (110, 160), strict=True):
        np.testing.assert_array_equal(ours != level, theirs != level)


@pytest.mark.parametrize("num_images", [1, 2, 7])
def test_a_patch_is_mixed_into_the_target_by_its_area(num_images: int) -> None:
    images = np.stack([np.full((48, 48, 3), 10 * index, np.uint8) for index in range(num_images)])
    targets = np.linspace(0, 1, num_images, dtype=np.float32)
    shares = []
    for seed in range(20):
        pictures, probabilities = mixed(images, targets, seed)
        for index, (picture, probability) in enumerate(zip(pictures, probabilities, strict=True)):
            other = num_images - 1 - index
            assert set(np.unique(picture)) <= {10 * index, 10 * other}
            if other != index:
                share = np.mean(picture == 10 * other)
                shares.append(share)
                expected = targets[index] * (1 - share) + targets[other] * share
                assert probability == pytest.approx(expected, abs=1e-6)
            else:
                assert probability == pytest.approx(targets[index], abs=1e-6)
    if shares:
        assert max(shares) <= 0.5 * 1.03  # up to a whole pixel of the side
        assert np.mean(shares) == pytest.approx(0.25, abs=0.1)


def test_cutmix_is_what_plain_numpy_makes_of_the_same_draws() -> None:
    images, targets = photographs(5, 40), np.array([0, 1, 1, 0.2, 0.9], np.float32)
    area_B, x_B, y_B = np.asarray(tf.random.stateless_uniform([3, 5], seed=[8, 4]))
    expected, expected_targets = images.astype(np.float32), targets.copy()
    for index in range(5):
        length = int(np.rint(np.sqrt(area_B[index] * np.float32(0.5)) * 40))
        left, top = (int(np.rint(draw * (40 - length))) for draw in (x_B[index], y_B[index]))
        patch = np.s_[top : top + length, left : left + length]
        expected[index][patch] = images[4 - index][patch]
        share = length**2 / 40**2
        expected_targets[index] = targets[index] * (1 - share) + targets[4 - index] * share
    pictures, probabilities = mixed(images, targets, seed=3)
    np.testing.assert_array_equal(pictures, expected)
    np.testing.assert_allclose(probabilities, expected_targets, rtol=1e-6)
    again, _ = mixed(images, targets, seed=3)
    np.testing.assert_array_equal(again, pictures)
    assert not np.array_equal(mixed(images, targets, seed=4)[0], pictures)
