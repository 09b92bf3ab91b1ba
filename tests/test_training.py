import csv
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from catdog import bundle, drawings
from catdog.config import PrepareConfig, TrainConfig, to_dict
from catdog.dataset import prepare
from catdog.dataset.reading import load_info
from catdog.errors import DatasetError, OutputRefusedError, TrainingError, UsageError
from catdog.ray_session import connect
from catdog.training import checkpoint, train
from catdog.training.feed import Feed, SplitOnce, decoded

SMALL: dict[str, Any] = {"arch": "resnet", "image_size": 32, "batch_size": 16, "num_workers": 2}


@pytest.fixture(scope="module", autouse=True)
def embedded_ray() -> Iterator[None]:
    with connect(None, min_cpus=4):
        yield


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> str:
    root = tmp_path_factory.mktemp("drawings")
    for label in ("cat", "dog"):
        (root / label).mkdir()
        for index in range(60):
            drawings.draw(label, [index]).save(root / label / f"{index}.jpg", quality=90)
    output = tmp_path_factory.mktemp("dataset") / "data"
    prepare(PrepareConfig(images=str(root), output=str(output), val_fraction=0.25, test_fraction=0.05))
    return str(output)


def read_history(output: Path) -> list[dict[str, float]]:
    rows = csv.DictReader(io.StringIO((output / "history.csv").read_text()))
    return [{name: float(value) for name, value in row.items()} for row in rows]


def tensorboard_steps(output: Path) -> dict[str, list[int]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(output / "tensorboard"))
    events.Reload()
    return {tag: [event.step for event in events.Tensors(tag)] for tag in events.Tags()["tensors"]}


@pytest.fixture(scope="module")
def trained(dataset: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("trained") / "model"
    train(TrainConfig(data=dataset, output=str(output), epochs=2, **SMALL))
    return output


def test_a_training_writes_a_bundle_its_history_and_its_curves(trained: Path, dataset: str) -> None:
    loaded = bundle.load(str(trained))
    assert (loaded.card["arch"], loaded.image_size, loaded.card["epochs_trained"]) == ("resnet", 32, 2)
    assert loaded.card["data_digest"] == load_info(dataset).digest
    bundle.load_model(loaded)

    history = read_history(trained)
    assert [row["epoch"] for row in history] == [1, 2]
    assert history[-1]["learning_rate"] < history[0]["learning_rate"]
    assert loaded.card["metrics"]["val_loss"] == pytest.approx(min(row["val_loss"] for row in history), rel=1e-5)
    with Image.open(trained / "curves.png") as curves:
        assert curves.width > 600
    assert tensorboard_steps(trained)["val_accuracy"] == [1, 2]
    assert not (trained / checkpoint.DIRECTORY).exists()


def test_validation_counts_every_image_once(trained: Path, dataset: str) -> None:
    # The bundle's own model, image by image in one process, gives what the two workers reported together.
    from catdog import architectures, images

    loaded = bundle.load(str(trained))
    rows = pq.read_table(Path(dataset) / "val").to_pylist()
    pixels_BHWC = np.stack([images.decode(row["image"], 32).pixels_HWC for row in rows]).astype("float32")
    labels_B = np.array([row["label"] for row in rows])
    logits_B = np.asarray(architectures.logits_model(bundle.load_model(loaded))(pixels_BHWC))[:, 0]
    losses_B = np.logaddexp(0, np.where(labels_B == 1, -logits_B, logits_B))
    assert loaded.card["metrics"]["val_loss"] == pytest.approx(losses_B.mean(), abs=5e-3)
    assert loaded.card["metrics"]["val_accuracy"] == pytest.approx(np.mean((logits_B > 0) == labels_B), abs=1 / 60)


def test_the_same_command_again_finds_it_done(trained: Path, dataset: str) -> None:
    card = (trained / "bundle.json").read_bytes()
    started = time.monotonic()
    record = train(TrainConfig(data=dataset, output=str(trained), epochs=2, **SMALL))
    assert record["resumed"]
    assert (trained / "bundle.json").read_bytes() == card
    assert time.monotonic() - started < 60


def test_another_configuration_in_the_same_output_is_refused(trained: Path, dataset: str) -> None:
    with pytest.raises(OutputRefusedError, match=r"with the same configuration.* with epochs=2 instead of 3$"):
        train(TrainConfig(data=dataset, output=str(trained), epochs=3, **SMALL))


def test_an_output_that_holds_something_else_is_refused(dataset: str, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(OutputRefusedError, match=r"^--output must be empty"):
        train(TrainConfig(data=dataset, output=str(tmp_path), **SMALL))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"arch": "vgg"}, r"^--arch must be one of cnn, resnet\. Received: --arch=vgg$"),
        ({"batch_size": 1000}, r"^--batch-size must be at most the number of training images, \d+\. Received: "),
    ],
)
def test_what_cannot_be_trained_is_refused_before_anything_is_written(
    dataset: str, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        train(TrainConfig(data=dataset, output=str(tmp_path / "model"), **(SMALL | change)))
    assert not (tmp_path / "model").exists()


def test_a_dataset_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"dataset\.json"):
        train(TrainConfig(data=str(tmp_path), output=str(tmp_path / "model"), **SMALL))
    assert not (tmp_path / "model").exists()


def test_more_workers_than_the_cluster_holds_are_refused(dataset: str, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"^the cluster must have 65 CPUs for 64 workers .* Received: \d+ CPUs$"):
        train(TrainConfig(data=dataset, output=str(tmp_path), **(SMALL | {"num_workers": 64, "batch_size": 64})))


def test_a_loss_that_is_not_finite_ends_the_training_with_one_clear_line(dataset: str, tmp_path: Path) -> None:
    config = TrainConfig(data=dataset, output=str(tmp_path / "model"), epochs=2, learning_rate=1e30, **SMALL)
    with pytest.raises(TrainingError, match=r"^the training loss must stay finite.* Received: loss=(nan|inf) in epoch"):
        train(config)


def test_a_killed_driver_goes_on_from_the_last_checkpoint(dataset: str, tmp_path: Path) -> None:
    output = tmp_path / "model"
    config = TrainConfig(data=dataset, output=str(output), epochs=6, **SMALL)
    script = "import json, sys; from catdog.config import TrainConfig; from catdog.training import train; "
    driver = subprocess.Popen(
        [sys.executable, "-c", script + "train(TrainConfig(**json.loads(sys.argv[1])))", json.dumps(to_dict(config))],
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 180
        while checkpoint.load_latest(str(output)) is None and driver.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
    finally:
        # The driver's whole group: an embedded Ray is its own.
        os.killpg(driver.pid, signal.SIGKILL)
        driver.wait()
    interrupted = checkpoint.load_latest(str(output))
    assert interrupted is not None
    assert interrupted.epoch < 6

    record = train(config)
    assert record["resumed"]
    assert (record["epochs_trained"], [row["epoch"] for row in read_history(output)]) == (6, [1, 2, 3, 4, 5, 6])
    kept = read_history(output)[: interrupted.epoch]
    assert [row["val_loss"] for row in kept] == pytest.approx(
        [row["val_loss"] for row in interrupted.history], rel=1e-5
    )


@pytest.mark.parametrize("in_memory", [True, False])
def test_a_feed_hands_out_every_image_of_its_share(dataset: str, in_memory: bool) -> None:
    info = load_info(dataset)
    datasets = {split: decoded(info, split, 32) for split in ("train", "val")}
    (shares,) = SplitOnce().configure(datasets, 1)
    train_feed, val_feed = (Feed(shares[split], in_memory) for split in ("train", "val"))

    num_train = info.num_images("train")
    num_batches = num_train // 8
    epochs = [
        list(train_feed.train_batches(num_batches=num_batches, batch_size=8, shuffle_seed=(0, epoch)))
        for epoch in (0, 1)
    ]
    for batches in epochs:
        assert [images.shape for images, _ in batches] == [(8, 32, 32, 3)] * num_batches
        seen = {image.tobytes() for images, _ in batches for image in images}
        assert len(seen) == num_batches * 8
    assert not np.array_equal(epochs[0][0][0], epochs[1][0][0])

    labels = np.concatenate([labels for _, labels in val_feed.all_batches(8)])
    assert np.bincount(labels).tolist() == list(info.counts["val"].values())
