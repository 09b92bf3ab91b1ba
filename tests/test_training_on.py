"""Training that starts from a model, stops early, or weighs classes; and what a saved model is worth in plain Keras."""

import io
import json
import os
import signal
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from dataset_case import row_of, write_splits
from inference_case import encoded_drawings, rows_of, save_model
from PIL import Image
from ray_case import small_ray

from catdog import architectures, bundle, cli
from catdog.config import PredictConfig, TrainConfig
from catdog.dataset.reading import iter_split, load_info
from catdog.errors import BundleError, OutputRefusedError, UsageError
from catdog.images import decode
from catdog.inference import predict
from catdog.training import TrainRecord, group, request, resolve, train
from catdog.training.history import HistoryRow
from catdog.training.observers import Observer

pytestmark = pytest.mark.slow

SIZE = 48


@pytest.fixture(scope="module", autouse=True)
def ray_of_this_module() -> Iterator[None]:
    with small_ray(num_cpus=3):
        yield


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Drawings, of which a quarter are dogs in `train`."""
    drawings = iter(enumerate(encoded_drawings(120)))
    splits: dict[str, list[Any]] = {"train": [], "val": [], "test": []}
    for index, picture in drawings:
        split = ("train", "train", "train", "val")[index // 2 % 4]
        if split == "val" or index % 2 == 0 or index % 3 == 0:
            splits[split].append(row_of(picture, f"/{index}.jpg", index % 2))
    return write_splits(str(tmp_path_factory.mktemp("on") / "data"), {name: [rows] for name, rows in splits.items()})


def config(dataset: str, output: Path, **changes: Any) -> TrainConfig:
    fields: dict[str, Any] = {"arch": "resnet", "image_size": SIZE, "epochs": 1, "augment": False} | changes
    return TrainConfig(data=dataset, output=str(output), **fields)


@pytest.fixture(scope="module")
def parent(dataset: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TrainRecord]:
    output = tmp_path_factory.mktemp("parent") / "model"
    return output, train(config(dataset, output, epochs=2))


def validation_logits(model: Path, dataset: str) -> tuple[list[int], Any]:
    """Labels and logits of the validation split, from the saved Keras model."""
    network = architectures.logits_model(bundle.load_model(bundle.load(str(model))))
    rows = [row for batch in iter_split(dataset, "val") for row in batch.to_pylist()]
    pixels_BSSC = np.stack([decode(row["image"], SIZE).pixels_HWC for row in rows]).astype("float32")
    return [row["label"] for row in rows], np.asarray(network(pixels_BSSC))[:, 0]


# Starting from a model.


def test_it_starts_from_the_weights_of_a_model(
    dataset: str, parent: tuple[Path, TrainRecord], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, record = parent
    with pytest.raises(OutputRefusedError, match=r"to train on from a model, give it as --from, and another --output"):
        train(config(dataset, output, epochs=3))
    flags = ["--data", dataset, "--output", str(tmp_path / "on"), "--epochs", "1", "--no-augment", "--json"]
    assert cli.main(["train", *flags, "--from", str(output), "--learning-rate", "1e-9"]) == 0
    on = json.loads(capsys.readouterr().out)
    assert (on["arch"], on["config"]["image_size"], on["config"]["from_id"]) == ("resnet", SIZE, record.model_id)
    card, _ = bundle.read_card(str(tmp_path / "on"))
    assert card["parent_model_id"] == record.model_id
    assert "from_" not in card["training_config"]
    assert bundle.load(str(output)).model_id == record.model_id
    # At this rate nothing is learnt, but that BatchNormalization's moving statistics follow the images.
    networks = [bundle.load_model(bundle.load(str(each))) for each in (output, tmp_path / "on")]
    for expected, found in zip(*(network.trainable_weights for network in networks), strict=True):
        np.testing.assert_allclose(found.numpy(), expected.numpy(), atol=1e-3)
    again = train(config(dataset, tmp_path / "on", arch=None, image_size=None, from_=str(output), learning_rate=1e-9))
    assert (again.model_id, again.resumed) == (on["model_id"], True)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"arch": "cnn"}, UsageError, r"^--from must be a model of the network .* with resnet, and --arch=cnn$"),
        (
            {"from_": "nowhere"},
            BundleError,
            r"^a model bundle is a directory with a bundle\.json\. Received: .*nowhere$",
        ),
    ],
)
def test_what_it_cannot_start_from(
    dataset: str, parent: tuple[Path, TrainRecord], tmp_path: Path, changes: dict[str, Any], error: Any, message: str
) -> None:
    with pytest.raises(error, match=message):
        train(config(dataset, tmp_path / "on", **{"from_": str(parent[0])} | changes))
    assert not (tmp_path / "on").exists()


def test_weights_and_from_do_not_come_together(dataset: str, tmp_path: Path) -> None:
    rule = r"^--weights and --from must not come together\. Received: --weights=imagenet --from=model$"
    with pytest.raises(UsageError, match=rule):
        resolve(config(dataset, tmp_path, weights="imagenet", from_="model"))


@pytest.mark.parametrize("arch", ["cnn", "resnet"])
def test_a_saved_model_gives_its_weights_back(arch: str) -> None:
    trained, fresh = (architectures.build_model(arch, SIZE) for _ in range(2))
    saved = architectures.calibrated(architectures.exported(trained, arch), 2.0)
    architectures.load_trained(fresh, saved)
    for expected, found in zip(trained.weights, fresh.weights, strict=True):
        np.testing.assert_allclose(found.numpy(), expected.numpy(), atol=1e-3)
    other = architectures.build_model("cnn" if arch == "resnet" else "resnet", SIZE)
    with pytest.raises(UsageError, match=r"^the model to start from must have the weights of"):
        architectures.load_trained(other, saved)


def test_a_network_of_one_size_keeps_it(dataset: str, tmp_path: Path) -> None:
    model = architectures.exported(architectures.build_model("cnn", SIZE), "cnn")
    card = {"arch": "cnn", "image_size": SIZE, "temperature": 1.0, "review_threshold": 0.5}
    bundle.save(str(tmp_path / "cnn"), model, card)
    with pytest.raises(UsageError, match=r"^--image-size must be that of the model to start from, 48, for --arch cnn"):
        resolve(config(dataset, tmp_path, arch="cnn", from_=str(tmp_path / "cnn"), image_size=64))


# Few images, and few of one class.


@pytest.mark.parametrize(
    ("num_images", "num_workers", "expected"), [(10_000, 1, 128), (400, 1, 64), (3, 1, 1), (3, 2, 2)]
)
def test_a_recipes_batch_is_smaller_for_few_images(
    dataset: str, tmp_path: Path, num_images: int, num_workers: int, expected: int
) -> None:
    assert architectures.architecture("cnn").recipe.batch_size == 128
    fields = {"arch": "cnn", "num_workers": num_workers}
    resolved = resolve(config(dataset, tmp_path, **fields))
    assert request.for_few_images(resolved, num_images).batch_size == expected
    with request.accepted(config(dataset, tmp_path / "few", **fields)) as accepted:
        assert accepted.config.batch_size == 8
    with request.accepted(config(dataset, tmp_path / "asked", **fields, batch_size=3)) as accepted:
        assert accepted.config.batch_size == 3


def test_classes_weigh_the_same_if_asked_to(dataset: str, tmp_path: Path) -> None:
    info = load_info(dataset)
    num_cats, num_dogs = info.counts["train"]["cat"], info.counts["train"]["dog"]
    assert num_cats > 2 * num_dogs > 0
    assert group.class_weights(resolve(config(dataset, tmp_path)), info) == (1.0, 1.0)
    of_cats, of_dogs = group.class_weights(resolve(config(dataset, tmp_path, class_weights="auto")), info)
    assert of_cats * num_cats == pytest.approx(of_dogs * num_dogs)
    assert of_cats * num_cats + of_dogs * num_dogs == pytest.approx(num_cats + num_dogs)
    # Images of one grey: no network can tell them apart, and all get the label of the same class.
    grey = io.BytesIO()
    Image.new("RGB", (SIZE, SIZE), (128, 128, 128)).save(grey, "PNG")
    labels = {"train": [0] * 60 + [1] * 20, "val": [0, 1] * 10}
    rows = {
        split: [[row_of(grey.getvalue(), f"/{split}/{index}.png", label) for index, label in enumerate(each)]]
        for split, each in labels.items()
    }
    record = train(config(write_splits(str(tmp_path / "grey"), rows), tmp_path / "model", class_weights="auto"))
    assert statistics.mean(share for share in record.recall.values() if share is not None) == 0.5
    assert record.config["class_weights"] == "auto"


# Stopping early.


def test_it_stops_and_keeps_the_best_epoch_also_across_an_interruption(dataset: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"epochs": 12, "early_stopping": 2, "learning_rate": 0.02, "batch_size": 16}
    record = train(config(dataset, tmp_path / "whole", **settings))
    lines = (tmp_path / "whole" / "history.csv").read_text().splitlines()
    column = lines[0].split(",").index("val_loss")
    losses = [float(line.split(",")[column]) for line in lines[1:]]
    assert record.best_epoch == 1 + int(np.argmin(losses))
    assert record.epochs_trained == len(losses) == min(12, record.best_epoch + 2)
    assert record.epochs_trained >= 4
    assert record.metrics["val_loss"] == pytest.approx(min(losses), rel=1e-4)
    labels, logits_N = validation_logits(tmp_path / "whole", dataset)
    loss = np.mean(np.logaddexp(0, np.where(np.array(labels) == 1, -logits_N, logits_N)))
    assert loss == pytest.approx(min(losses), rel=0.05)
    assert any("its validation figures are too good for that" in line for line in record.summary())

    is_killed = tmp_path / "killed"

    class Killer(Observer):
        def epoch_done(self, history: Sequence[HistoryRow]) -> None:
            if len(history) == 3 and not is_killed.exists():
                is_killed.touch()
                os.kill(os.getpid(), signal.SIGKILL)

    resumed = train(config(dataset, tmp_path / "killed-once", **settings), observers=[lambda worker: Killer()])
    assert is_killed.exists()
    assert (resumed.best_epoch, resumed.epochs_trained) == (record.best_epoch, record.epochs_trained)
    _, again_N = validation_logits(tmp_path / "killed-once", dataset)
    np.testing.assert_array_equal(again_N, logits_N)


# The saved model in plain Keras.


@pytest.mark.filterwarnings("ignore:(?s).*tf.lite.Interpreter is deprecated")
@pytest.mark.parametrize("arch", ["resnet", "cnn"])
def test_the_saved_model_gives_the_probabilities_of_predict(
    arch: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")  # so that catdog computes in float32, too
    url = str(tmp_path / "model")
    if arch == "resnet":
        save_model(url)
    else:
        model = architectures.exported(architectures.build_model(arch, SIZE), arch)
        bundle.save(url, model, {"arch": arch, "image_size": SIZE, "temperature": 0.01, "review_threshold": 0.5})
    (tmp_path / "images").mkdir()
    pictures = encoded_drawings(6)
    for index, picture in enumerate(pictures):
        (tmp_path / "images" / f"{index}.jpg").write_bytes(picture)
    output = tmp_path / "output"
    predict(
        PredictConfig(
            images=str(tmp_path / "images"), output=str(output), model=url, executor="inline", engine="openvino-float"
        )
    )
    expected_B = np.array(rows_of(output)["prob_dog"].to_pylist())
    assert np.ptp(expected_B) > 0.02
    pixels_BSSC = np.stack([decode(picture, SIZE).pixels_HWC for picture in pictures]).astype("float32")

    network = keras.saving.load_model(str(tmp_path / "model" / "model.keras"), compile=False)
    np.testing.assert_allclose(network.predict(pixels_BSSC, verbose=0)[:, 0], expected_B, atol=2e-3)

    network.export(str(tmp_path / "saved"), format="tf_saved_model", verbose=False)
    served = tf.saved_model.load(str(tmp_path / "saved"))
    np.testing.assert_allclose(np.asarray(served.serve(pixels_BSSC))[:, 0], expected_B, atol=2e-3)

    tflite = tf.lite.TFLiteConverter.from_saved_model(str(tmp_path / "saved")).convert()
    interpreter = tf.lite.Interpreter(model_content=tflite)
    (given,), (gives,) = interpreter.get_input_details(), interpreter.get_output_details()
    interpreter.resize_tensor_input(given["index"], pixels_BSSC.shape)
    interpreter.allocate_tensors()
    interpreter.set_tensor(given["index"], pixels_BSSC)
    interpreter.invoke()
    np.testing.assert_allclose(interpreter.get_tensor(gives["index"])[:, 0], expected_B, atol=2e-3)
