"""A bundle's model as an engine: the same logits as Keras, whatever the batch."""

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from typing import get_args

import numpy as np
import pytest

from catdog import bundle
from catdog.architectures import build_model, exported, in_bfloat16, logits_model
from catdog.config import EngineName
from catdog.engines import ENGINES, GOLDEN_TOLERANCES, Engine, load_engine
from catdog.engines.tensorflow import BATCH_SIZES, TensorFlowEngine
from catdog.errors import BundleError
from catdog.hardware import has_bfloat16

pytestmark = pytest.mark.slow

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
    return load_engine(saved, num_parallel=2)


@pytest.fixture(scope="module")
def images_BHWC() -> np.ndarray:  # noqa: N802
    rng = np.random.default_rng(0)
    flat = rng.integers(0, 200, (67, 1, 1, 3)) + rng.integers(0, 56, (67, SIZE, SIZE, 3))
    return flat.astype(np.uint8)


def test_computes_the_models_logits(saved: bundle.Bundle, engine: Engine, images_BHWC: np.ndarray) -> None:
    model = bundle.load_model(saved)
    exact_B = np.asarray(logits_model(model)(images_BHWC.astype("float32"), training=False))[:, 0]
    if engine.arithmetic == "bfloat16":
        model = in_bfloat16(model)
    expected_B = np.asarray(logits_model(model)(images_BHWC.astype("float32"), training=False))[:, 0]
    logits_B = engine.predict(images_BHWC)
    assert logits_B.dtype == np.float32
    assert np.ptp(logits_B) > 0.01  # different images, different logits
    np.testing.assert_allclose(logits_B, expected_B, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(logits_B, exact_B, atol=GOLDEN_TOLERANCES[engine.arithmetic] / 10)


def test_a_logit_depends_on_its_image_alone(engine: Engine, images_BHWC: np.ndarray) -> None:
    logits_B = engine.predict(images_BHWC)
    order = np.random.default_rng(1).permutation(len(images_BHWC))
    np.testing.assert_array_equal(engine.predict(images_BHWC[order]), logits_B[order])
    for num_images in (0, 1, 3, 8, 64):
        np.testing.assert_array_equal(engine.predict(images_BHWC[:num_images]), logits_B[:num_images])


def test_threads_may_share_it(engine: Engine, images_BHWC: np.ndarray) -> None:
    logits_B = engine.predict(images_BHWC)
    with ThreadPoolExecutor(4) as pool:
        calls = [pool.submit(engine.predict, images_BHWC[start:]) for start in range(16)]
    for start, call in enumerate(calls):
        np.testing.assert_array_equal(call.result(), logits_B[start:])


def test_a_batch_size_is_chosen_in_which_an_image_may_stand_anywhere(
    saved: bundle.Bundle, images_BHWC: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = TensorFlowEngine(saved)
    assert engine.batch_size in (*BATCH_SIZES, 1)
    logits_B = engine.predict(images_BHWC[:3])
    # As if the place in a batch of 16, then in any, did matter on this CPU.
    monkeypatch.setattr(TensorFlowEngine, "_ignores_place", lambda self, image, batch_size: batch_size > BATCH_SIZES[0])
    assert TensorFlowEngine(saved).batch_size == BATCH_SIZES[1]
    monkeypatch.setattr(TensorFlowEngine, "_ignores_place", lambda self, image, batch_size: False)
    single = TensorFlowEngine(saved)
    assert single.batch_size == 1
    np.testing.assert_allclose(
        single.predict(images_BHWC[:3]), logits_B, atol=GOLDEN_TOLERANCES[engine.arithmetic] / 10
    )


def test_a_place_that_matters_is_noticed(saved: bundle.Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    import tensorflow as tf

    engine = TensorFlowEngine(saved)
    image_HWC = bundle.golden_images(SIZE)[0]
    assert engine._ignores_place(image_HWC, engine.batch_size)
    compute = engine._compute
    monkeypatch.setattr(
        engine, "_compute", lambda images: compute(images) + tf.range(len(images), dtype=tf.float32) * 1e-6
    )
    assert not engine._ignores_place(image_HWC, 16)


def test_arithmetic_is_the_cpus(engine: Engine) -> None:
    assert engine.arithmetic == ("bfloat16" if has_bfloat16() else "float32")


def test_a_model_that_computes_something_else_is_refused(saved: bundle.Bundle) -> None:
    card = saved.card | {"golden_logits": [logit + 1 for logit in saved.golden_logits]}
    with pytest.raises(
        BundleError, match=r"must compute its golden logits to within 0\.\d+ \(\w+\)\. Received: off by [01]"
    ):
        load_engine(dataclasses.replace(saved, card=card))


def test_every_engine_has_a_name_on_the_command_line() -> None:
    assert set(ENGINES) | {"auto"} == set(get_args(EngineName))
