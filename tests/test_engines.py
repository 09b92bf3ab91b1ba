"""A bundle's model as an engine: the same logits as Keras, whatever the engine, the batch and the threads."""

import dataclasses
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest

from catdog import bundle, openvino_ir, quantization
from catdog.architectures import build_model, exported, in_bfloat16, logits_model
from catdog.config import EngineName
from catdog.engines import ENGINES, GOLDEN_TOLERANCES, Engine, load_engine
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
    made = quantization.quantized(
        ir, SIZE, images_BHWC, lambda: [(images_BHWC, np.arange(len(images_BHWC)) % 2)], review_precision=0.9
    )
    card = {"image_size": SIZE, "temperature": 1.0, "review_threshold": 0.8, "int8": made.card | {"is_accepted": True}}
    bundle.save(url, model, card, irs={"float": ir, "int8": made.ir})
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
    logits_B = engine.predict(images_BHWC)
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


@pytest.mark.parametrize("name", ["openvino", "openvino-float"])
def test_a_logit_is_the_same_on_one_core_and_on_two(saved: bundle.Bundle, images_BHWC: np.ndarray, name: str) -> None:
    alone, both = (load_engine(saved, name, num_parallel=number) for number in (1, 2))  # type: ignore[arg-type]
    np.testing.assert_array_equal(alone.predict(images_BHWC), both.predict(images_BHWC))


def test_where_the_batch_matters_images_are_computed_one_by_one(
    saved: bundle.Bundle, images_BHWC: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits_B = load_engine(saved, "openvino").predict(images_BHWC)
    infer = OpenVINOEngine._infer
    sizes = set()

    def noisy(self: OpenVINOEngine, request: object, images: np.ndarray) -> np.ndarray:
        sizes.add(len(images))
        return infer(self, request, images) + np.float32(1e-6 * (len(images) - 1))

    monkeypatch.setattr(OpenVINOEngine, "_infer", noisy)
    engine = load_engine(saved, "openvino")
    assert sizes == {1, BATCH_SIZE}
    sizes.clear()
    np.testing.assert_array_equal(engine.predict(images_BHWC), logits_B)
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
    old = dataclasses.replace(saved, paths={name: saved.paths[name] for name in (bundle.MODEL_NAME,)})
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
    def off(card: dict[str, Any]) -> dict[str, Any]:
        return card | {"golden_logits": [logit + 1 for logit in card["golden_logits"]]}

    card = off(saved.card) | {"int8": off(saved.card["int8"])}
    with pytest.raises(
        BundleError, match=r"must compute its golden logits to within 0\.\d+ \(\w+\)\. Received: off by [01]"
    ):
        load_engine(dataclasses.replace(saved, card=card), name)


def test_every_engine_has_a_name_on_the_command_line() -> None:
    assert set(ENGINES) | {"auto"} == set(get_args(EngineName))
