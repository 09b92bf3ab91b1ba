"""A bundle's model as an engine: the same logits as Keras, whatever the engine, the batch and the threads."""

import dataclasses
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest

from catdog import bundle, openvino_ir, quantization
from catdog.architectures import build_model, exported, in_bfloat16, logits_model, scoring_network
from catdog.config import EngineName
from catdog.engines import ENGINES, GOLDEN_TOLERANCES, SCORE_TOLERANCES, Engine, load_engine
from catdog.engines.openvino import BATCH_SIZE, OpenVINOEngine
from catdog.engines.tensorflow import BATCH_SIZES, TensorFlowEngine
from catdog.errors import BundleError, UsageError
from catdog.hardware import has_bfloat16

pytestmark = pytest.mark.slow

SIZE = 32


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> bundle.Bundle:
    """A bundle with an int8 model that is accepted whatever it says."""
    import keras

    keras.utils.set_random_seed(0)
    url = str(tmp_path_factory.mktemp("engines") / "model")
    model = exported(build_model("resnet", SIZE), "resnet")
    ir = openvino_ir.float_ir(model, SIZE)
    images_BHWC = images(300)
    batches = [(images_BHWC, np.arange(len(images_BHWC)) % 2)]
    gauge = quantization.fitted_gauge(ir, SIZE, batches)
    assert gauge is not None
    made = quantization.quantized(ir, SIZE, images_BHWC, lambda: batches, review_precision=0.9, gauge=gauge)
    card = {
        "image_size": SIZE,
        "temperature": 1.0,
        "review_threshold": 0.8,
        "int8": made.card | {"is_accepted": True},
        "neither": made.neither_card(gauge, bundle.golden_scores(model, gauge, SIZE)),
    }
    bundle.save(url, model, card, irs={"float": openvino_ir.gauged(ir, gauge), "int8": made.ir}, gauge=gauge)
    return bundle.load(url)


@pytest.fixture(scope="module")
def plain(saved: bundle.Bundle, tmp_path_factory: pytest.TempPathFactory) -> bundle.Bundle:
    """The same without a score, as older versions made it."""
    url = str(tmp_path_factory.mktemp("engines") / "plain")
    bundle.save(
        url,
        bundle.load_model(saved),
        {name: saved.card[name] for name in ("image_size", "temperature", "review_threshold")},
    )
    return bundle.load(url)


@pytest.fixture(scope="module", params=[*ENGINES])
def engine(saved: bundle.Bundle, request: pytest.FixtureRequest) -> Engine:
    return load_engine(saved, request.param, num_parallel=2)


def images(num_images: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    flat = rng.integers(0, 200, (num_images, 1, 1, 3)) + rng.integers(0, 56, (num_images, SIZE, SIZE, 3))
    return flat.astype(np.uint8)


@pytest.fixture(scope="module")
def images_BHWC() -> np.ndarray:  # noqa: N802
    return images(67)


def test_computes_the_models_logits(saved: bundle.Bundle, engine: Engine, images_BHWC: np.ndarray) -> None:
    model = bundle.load_model(saved)
    exact_B = np.asarray(logits_model(model)(images_BHWC.astype("float32"), training=False))[:, 0]
    logits_B = engine.predict(images_BHWC).logits_B
    assert logits_B.dtype == np.float32
    assert np.ptp(exact_B) > 0.01  # different images, different logits
    if engine.arithmetic == "int8":
        assert np.corrcoef(logits_B, exact_B)[0, 1] > 0.7
        return
    np.testing.assert_allclose(logits_B, exact_B, atol=GOLDEN_TOLERANCES[engine.arithmetic] / 10)
    if engine.name == "tensorflow":
        if engine.arithmetic == "bfloat16":
            model = in_bfloat16(model)
        expected_B = np.asarray(logits_model(model)(images_BHWC.astype("float32"), training=False))[:, 0]
        np.testing.assert_allclose(logits_B, expected_B, rtol=1e-5, atol=1e-5)


def test_computes_the_scores_of_the_features(saved: bundle.Bundle, engine: Engine, images_BHWC: np.ndarray) -> None:
    gauge, found = bundle.load_gauge(saved), scoring_network(bundle.load_model(saved))
    assert gauge is not None
    assert found is not None
    network, is_mirrored = found
    assert is_mirrored
    views = (images_BHWC, images_BHWC[:, :, ::-1])
    features_BF = np.mean([network(view.astype("float32"), training=False)[1] for view in views], axis=0)
    exact_B, scores_B = gauge.scores(features_BF), engine.predict(images_BHWC).neither_B
    assert scores_B is not None
    assert np.ptp(exact_B) > 0.1
    if engine.arithmetic == "int8":
        assert np.corrcoef(scores_B, exact_B)[0, 1] > 0.7
    else:
        np.testing.assert_allclose(scores_B, exact_B, atol=SCORE_TOLERANCES[engine.arithmetic] / 4)


def outputs(engine: Engine, images_BHWC: np.ndarray) -> np.ndarray:
    """Logits and scores, (2, B)."""
    found = engine.predict(images_BHWC)
    assert found.neither_B is not None
    return np.stack([found.logits_B, found.neither_B])


def test_outputs_depend_on_their_image_alone(engine: Engine, images_BHWC: np.ndarray) -> None:
    outputs_OB = outputs(engine, images_BHWC)
    order = np.random.default_rng(1).permutation(len(images_BHWC))
    np.testing.assert_array_equal(outputs(engine, images_BHWC[order]), outputs_OB[:, order])
    for num_images in (0, 1, 3, 8, 64):
        np.testing.assert_array_equal(outputs(engine, images_BHWC[:num_images]), outputs_OB[:, :num_images])


def test_threads_may_share_it(engine: Engine, images_BHWC: np.ndarray) -> None:
    outputs_OB = outputs(engine, images_BHWC)
    with ThreadPoolExecutor(4) as pool:
        calls = [pool.submit(engine.predict, images_BHWC[start:]) for start in range(16)]
    for start, call in enumerate(calls):
        np.testing.assert_array_equal(np.stack(call.result()), outputs_OB[:, start:])  # type: ignore[arg-type]


def test_a_batch_size_is_chosen_in_which_an_image_may_stand_anywhere(
    saved: bundle.Bundle, images_BHWC: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = TensorFlowEngine(saved)
    assert engine.batch_size in (*BATCH_SIZES, 1)
    logits_B = engine.predict(images_BHWC[:3]).logits_B
    # As if the place in a batch of 16, then in any, did matter on this CPU.
    monkeypatch.setattr(TensorFlowEngine, "_ignores_place", lambda self, image, batch_size: batch_size > BATCH_SIZES[0])
    assert TensorFlowEngine(saved).batch_size == BATCH_SIZES[1]
    monkeypatch.setattr(TensorFlowEngine, "_ignores_place", lambda self, image, batch_size: False)
    single = TensorFlowEngine(saved)
    assert single.batch_size == 1
    np.testing.assert_allclose(
        single.predict(images_BHWC[:3]).logits_B, logits_B, atol=GOLDEN_TOLERANCES[engine.arithmetic] / 10
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


@pytest.mark.parametrize("name", ["openvino", "openvino-float"])
def test_a_logit_is_the_same_on_one_core_and_on_two(saved: bundle.Bundle, images_BHWC: np.ndarray, name: str) -> None:
    alone, both = (load_engine(saved, name, num_parallel=number) for number in (1, 2))  # type: ignore[arg-type]
    np.testing.assert_array_equal(outputs(alone, images_BHWC), outputs(both, images_BHWC))


def test_where_the_batch_matters_images_are_computed_one_by_one(
    saved: bundle.Bundle, images_BHWC: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    outputs_OB = outputs(load_engine(saved, "openvino"), images_BHWC)
    infer = OpenVINOEngine._infer
    sizes = set()

    def noisy(self: OpenVINOEngine, request: object, images: np.ndarray) -> list[np.ndarray]:
        sizes.add(len(images))
        logits_B, scores_B = infer(self, request, images)
        return [logits_B, scores_B + np.float32(1e-4 * (len(images) - 1))]

    monkeypatch.setattr(OpenVINOEngine, "_infer", noisy)
    engine = load_engine(saved, "openvino")
    assert sizes == {1, BATCH_SIZE}
    sizes.clear()
    np.testing.assert_array_equal(outputs(engine, images_BHWC), outputs_OB)
    assert sizes == {1}


def test_arithmetic_is_the_cpus_or_what_the_card_accepts(saved: bundle.Bundle) -> None:
    cpus = "bfloat16" if has_bfloat16() else "float32"
    assert {name: load_engine(saved, name).arithmetic for name in ENGINES} == {  # type: ignore[arg-type]
        "openvino": "int8",
        "openvino-float": cpus,
        "tensorflow": cpus,
    }


def test_the_int8_model_is_not_used_where_the_card_refuses_it(saved: bundle.Bundle) -> None:
    int8 = saved.card["int8"]
    refused = dataclasses.replace(saved, card=saved.card | {"int8": int8 | {"is_accepted": False}})
    assert load_engine(saved, "openvino").arithmetic == load_engine(saved).arithmetic == "int8"
    assert load_engine(refused, "openvino").arithmetic != "int8"
    assert load_engine(saved, "openvino-float").arithmetic != "int8"
    assert saved.temperature("int8") == int8["temperature"] != saved.temperature("float32")
    assert saved.review_threshold("int8") == int8["review_threshold"]


def test_a_bundle_without_openvinos_files_is_computed_by_tensorflow(saved: bundle.Bundle) -> None:
    paths = {name: saved.paths[name] for name in (bundle.MODEL_NAME,)}
    old = dataclasses.replace(saved, paths=paths, card=saved.card | {"neither": None})
    assert load_engine(old).name == "tensorflow"
    with pytest.raises(BundleError, match=r"needs a bundle with its files, which `catdog convert` adds"):
        load_engine(old, "openvino-float")


def test_openvino_computes_on_no_gpu(saved: bundle.Bundle) -> None:
    with pytest.raises(UsageError, match=r"^--use-gpu needs --engine tensorflow, or auto\. Received: openvino"):
        load_engine(saved, "openvino", use_gpu=True)


@pytest.mark.parametrize("content", [b"", b"no graph", b"<net/>"])
def test_a_damaged_graph_is_one_error(saved: bundle.Bundle, tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "int8.xml"
    path.write_bytes(content)
    damaged = dataclasses.replace(saved, paths={**saved.paths, bundle.ir_names("int8")["xml"]: path})
    with pytest.raises(BundleError, match=r"^openvino/int8.xml must be a model in OpenVINO's IR\. Received: [^\n]+$"):
        load_engine(damaged, "openvino")


def test_a_worker_that_labels_with_openvino_imports_no_tensorflow(saved: bundle.Bundle) -> None:
    code = f"""
import sys
from catdog import bundle
from catdog.engines import load_engine
load_engine(bundle.load({saved.url!r}))
print(*(name for name, module in sys.modules.items() if module is not None))
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    imported = set(ran.stdout.split())
    assert "openvino" in imported
    assert not imported & {"tensorflow", "keras", "nncf", "openvino_telemetry", "scipy", "matplotlib", "ray"}


@pytest.mark.parametrize("name", [*ENGINES])
def test_a_model_that_computes_something_else_is_refused(saved: bundle.Bundle, name: EngineName) -> None:
    def refused(off: Callable[[dict[str, Any]], dict[str, Any]], what: str) -> None:
        card = off(saved.card) | {"int8": off(saved.card["int8"])}
        message = rf"must compute its golden {what} to within \d\.\d+ \(\w+\)\. Received: off by [0-3]"
        with pytest.raises(BundleError, match=message):
            load_engine(dataclasses.replace(saved, card=card), name)

    def off(values: list[float], by: float) -> list[float]:
        return [value + by for value in values]

    refused(lambda card: card | {"golden_logits": off(card["golden_logits"], 1)}, "logits")
    refused(
        lambda card: card | {"neither": card["neither"] | {"golden_scores": off(card["neither"]["golden_scores"], 2)}},
        "scores",
    )


@pytest.mark.parametrize("name", ["openvino", "tensorflow"])
def test_a_bundle_without_a_score_gives_none(plain: bundle.Bundle, name: EngineName) -> None:
    found = load_engine(plain, name).predict(images(3))
    assert found.logits_B.shape == (3,)
    assert found.neither_B is None
    assert plain.neither("float32") is None
    assert bundle.load_gauge(plain) is None


def test_a_score_that_is_promised_must_be_there(saved: bundle.Bundle, plain: bundle.Bundle) -> None:
    card = plain.card | {"neither": saved.card["neither"]}
    with pytest.raises(BundleError, match=r"must compute its golden scores .* Received: off by nan"):
        load_engine(dataclasses.replace(plain, card=card), "openvino-float")
    with pytest.raises(BundleError, match=r"a bundle with a score must have neither.npz\. Received: "):
        load_engine(dataclasses.replace(plain, card=card), "tensorflow")


def test_every_engine_has_a_name_on_the_command_line() -> None:
    assert set(ENGINES) | {"auto"} == set(get_args(EngineName))
