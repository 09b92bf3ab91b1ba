"""A bundle's model as an engine: the same logits as Keras, whatever the batch."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from catdog import bundle
from catdog.architectures import build_model, exported, in_bfloat16, logits_model
from catdog.engines import Engine, has_bfloat16, load_engine

SIZE = 32


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> bundle.Bundle:
    import keras

    keras.utils.set_random_seed(0)
    url = str(tmp_path_factory.mktemp("engines") / "model")
    bundle.save(
        url,
        exported(build_model("resnet", SIZE), "resnet"),
        {"image_size": SIZE, "temperature": 1.0, "review_threshold": 0.8},
    )
    return bundle.load(url)


@pytest.fixture(scope="module")
def engine(saved: bundle.Bundle) -> Engine:
    return load_engine(saved, num_threads=2)


@pytest.fixture(scope="module")
def images_BHWC() -> np.ndarray:  # noqa: N802
    rng = np.random.default_rng(0)
    flat = rng.integers(0, 200, (67, 1, 1, 3)) + rng.integers(0, 56, (67, SIZE, SIZE, 3))
    return flat.astype(np.uint8)


def test_computes_the_models_logits(saved: bundle.Bundle, engine: Engine, images_BHWC: np.ndarray) -> None:
    model = bundle.load_model(saved)
    exact_B = np.asarray(logits_model(model)(images_BHWC.astype("float32"), training=False))[:, 0]
    if has_bfloat16():
        model = in_bfloat16(model)
    expected_B = np.asarray(logits_model(model)(images_BHWC.astype("float32"), training=False))[:, 0]
    logits_B = engine.predict(images_BHWC)
    assert logits_B.dtype == np.float32
    assert np.ptp(logits_B) > 0.01  # different images, different logits
    np.testing.assert_allclose(logits_B, expected_B, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(logits_B, exact_B, atol=bundle.GOLDEN_TOLERANCE / 10)


def test_a_logit_depends_on_its_image_alone(engine: Engine, images_BHWC: np.ndarray) -> None:
    logits_B = engine.predict(images_BHWC)
    order = np.random.default_rng(1).permutation(len(images_BHWC))
    np.testing.assert_array_equal(engine.predict(images_BHWC[order]), logits_B[order])
    for num_images in (1, 3, 8, 64):
        np.testing.assert_array_equal(engine.predict(images_BHWC[:num_images]), logits_B[:num_images])


def test_threads_may_share_it(engine: Engine, images_BHWC: np.ndarray) -> None:
    logits_B = engine.predict(images_BHWC)
    with ThreadPoolExecutor(4) as pool:
        calls = [pool.submit(engine.predict, images_BHWC[start:]) for start in range(16)]
    for start, call in enumerate(calls):
        np.testing.assert_array_equal(call.result(), logits_B[start:])
