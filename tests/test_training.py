"""Whole trainings on a real Ray. Each of them costs its workers' start, so most tests look at the same few."""

import contextlib
import csv
import dataclasses
import io
import json
import os
import re
import shutil
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
import ray
from PIL import Image

from catdog import architectures, bundle, cli, drawings, images
from catdog.config import PrepareConfig, TrainConfig, to_dict
from catdog.dataset import prepare
from catdog.dataset.reading import load_info
from catdog.errors import DatasetError, OutputRefusedError, TrainingError, UsageError
from catdog.training import checkpoint, loop, train

SMALL: dict[str, Any] = {"arch": "cnn", "image_size": 48, "batch_size": 15, "num_workers": 2, "learning_rate": 5e-4}
"""An odd batch: the workers' shares differ. The network has dropout, which draws at random."""

NUM_EPOCHS, STEPS_PER_EPOCH, CHECKPOINT_STEPS = 3, 5, 2
"""So checkpoints are at steps 2, 4, 5, 7, 9, 10, ...: of two in a row one is within an epoch."""


@pytest.fixture(scope="module", autouse=True)
def small_ray() -> Iterator[None]:
    ray.init(address="local", num_cpus=3, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> str:
    root = tmp_path_factory.mktemp("drawings")
    for label in ("cat", "dog"):
        (root / label).mkdir()
        for index in range(60):
            drawings.draw(label, [index]).save(root / label / f"{index}.jpg", quality=90)
    output = tmp_path_factory.mktemp("dataset") / "data"
    prepare(PrepareConfig(images=str(root), output=str(output), val_fraction=0.25, test_fraction=0.05))
    assert load_info(str(output)).num_images("train") // SMALL["batch_size"] == STEPS_PER_EPOCH
    return str(output)


def config(dataset: str, output: Path, **changes: Any) -> TrainConfig:
    fields = {"data": dataset, "output": str(output), "epochs": NUM_EPOCHS, "checkpoint_steps": CHECKPOINT_STEPS}
    return TrainConfig(**(fields | SMALL | changes))


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
    """An undisturbed training."""
    output = tmp_path_factory.mktemp("trained") / "model"
    record = train(config(dataset, output))
    assert not record["resumed"]
    return output


def test_a_training_writes_a_bundle_its_history_and_its_curves(trained: Path, dataset: str) -> None:
    loaded = bundle.load(str(trained))
    assert (loaded.card["arch"], loaded.image_size, loaded.card["epochs_trained"]) == ("cnn", 48, NUM_EPOCHS)
    assert loaded.card["data_digest"] == load_info(dataset).digest
    assert loaded.card["training_config"]["batch_size"] == 15
    bundle.load_model(loaded)

    history = read_history(trained)
    assert [row["epoch"] for row in history] == [1, 2, 3]
    assert history[-1]["learning_rate"] < history[0]["learning_rate"]
    metrics = loaded.card["metrics"]
    assert metrics == pytest.approx({name: history[-1][name] for name in metrics}, rel=1e-5)
    with Image.open(trained / "curves.png") as curves:
        assert curves.width > 600
    assert tensorboard_steps(trained)["epoch/val_accuracy"] == [1, 2, 3]
    assert not (trained / checkpoint.DIRECTORY).exists()


def test_validation_counts_every_image_once(trained: Path, dataset: str) -> None:
    # The bundle's own model, image by image in one process, gives what the two workers reported together.
    loaded = bundle.load(str(trained))
    rows = pq.read_table(Path(dataset) / "val").to_pylist()
    pixels_BHWC = np.stack([images.decode(row["image"], 48).pixels_HWC for row in rows]).astype("float32")
    labels_B = np.array([row["label"] for row in rows])
    logits_B = np.asarray(architectures.logits_model(bundle.load_model(loaded))(pixels_BHWC))[:, 0]
    losses_B = np.logaddexp(0, np.where(labels_B == 1, -logits_B, logits_B))
    assert loaded.card["metrics"]["val_loss"] == pytest.approx(losses_B.mean(), rel=0.02)
    assert loaded.card["metrics"]["val_accuracy"] == pytest.approx(np.mean((logits_B > 0) == labels_B), abs=0.06)
    assert loaded.card["calibration"]["num_images"] == len(rows)


def test_the_same_command_again_finds_it_done(trained: Path, dataset: str) -> None:
    card = (trained / "bundle.json").read_bytes()
    # Where and how fast it computes may differ.
    record = train(config(dataset, trained, num_workers=1, checkpoint_steps=7))
    assert record["resumed"]
    assert (trained / "bundle.json").read_bytes() == card


def test_another_configuration_in_the_same_output_is_refused(trained: Path, dataset: str) -> None:
    with pytest.raises(OutputRefusedError, match=r"with the same configuration.* with epochs=3 instead of 4$"):
        train(config(dataset, trained, epochs=4))


def test_an_output_that_holds_something_else_is_refused(dataset: str, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(OutputRefusedError, match=r"^--output must be empty"):
        train(config(dataset, tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"arch": "vgg"}, r"^--arch must be one of cnn, resnet, .*\. Received: --arch=vgg$"),
        ({"batch_size": 1000}, r"^--batch-size must be at most the number of training images, \d+\. Received: "),
        ({"batch_size": None, "num_workers": 129}, r"^--num-workers must be at most --batch-size\. Received: "),
        ({"image_size": 45}, r"^--image-size must be at least 46 for --arch cnn\. Received: --image-size=45$"),
        ({"head_epochs": 1}, r"^--head-epochs needs pretrained --weights\. Received: --head-epochs=1$"),
        ({"weights": "imagenet"}, r"^--weights must be none for an architecture that has no pretrained weights; "),
        ({"arch": "vgg16", "weights": "/no/file.h5"}, r"^--weights must be none, imagenet or a file that can be read"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_anything_is_written(
    dataset: str, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        train(config(dataset, tmp_path / "model", **change))
    assert not (tmp_path / "model").exists()


def test_a_dataset_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"dataset\.json"):
        train(config(str(tmp_path), tmp_path / "model"))
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("split", ["train", "val"])
def test_images_of_one_class_only_are_refused(dataset: str, tmp_path: Path, split: str) -> None:
    info = json.loads((Path(dataset) / "dataset.json").read_text())
    counts = info["counts"][split]
    counts.update(cat=counts["cat"] + counts["dog"], dog=0)
    (tmp_path / "dataset.json").write_text(json.dumps(info))
    with pytest.raises(UsageError, match=rf"^training needs images of both classes in {split}\. Received: no dog in"):
        train(config(str(tmp_path), tmp_path / "model"))
    assert not (tmp_path / "model").exists()


def test_more_workers_than_the_cluster_holds_are_refused(
    dataset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("catdog.training.trainer.RESOURCES_TIMEOUT_S", 1)
    message = r"^the cluster must have 16 CPUs for 15 workers and what feeds them\. Received: 3 CPUs$"
    with pytest.raises(TrainingError, match=message):
        train(config(dataset, tmp_path / "model", num_workers=15))
    # It got nowhere, so its place may be taken.
    with pytest.raises(TrainingError, match=r"^the cluster must have 15 CPUs for 14 workers"):
        train(config(dataset, tmp_path / "model", num_workers=14, epochs=9))
    assert json.loads((tmp_path / "model" / "train.json").read_text())["config"]["epochs"] == 9


def test_weights_of_another_network_are_one_line_and_no_bundle(
    dataset: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # The first worker finds out, while the other one waits for it.
    path = tmp_path / "other.weights.h5"
    architectures.build_model("resnet", 32).save_weights(path)
    flags = {"data": dataset, "output": tmp_path / "model", **SMALL, "arch": "efficientnet_lite0", "weights": path}
    assert cli.main(["train", *(f"--{name.replace('_', '-')}={value}" for name, value in flags.items())]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "Traceback" not in err
    expected = "error: --weights must hold the weights of efficientnet_lite0 without its classifier. Received: "
    assert err.splitlines()[-1].startswith(expected)
    assert [found.name for found in (tmp_path / "model").iterdir()] == ["train.json"]


def test_a_loss_that_is_not_finite_ends_the_training_and_keeps_the_last_good_checkpoint(
    dataset: str, tmp_path: Path
) -> None:
    message = r"^the loss must stay finite; .* The last good checkpoint is kept\. Received: loss=(nan|inf) in epoch 1$"
    with pytest.raises(TrainingError, match=message):
        train(config(dataset, tmp_path / "model", learning_rate=1e30, checkpoint_steps=1))
    kept = checkpoint.load_latest(str(tmp_path / "model"))
    assert kept is not None
    assert kept.step == 1
    assert all(np.isfinite(array).all() for arrays in kept.arrays.values() for array in arrays)
    assert not (tmp_path / "model" / "bundle.json").exists()


def command(config: TrainConfig) -> list[str]:
    """A command line that trains so."""
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in to_dict(config).items() if value is not None]
    switches = [flag for flag in flags if not flag.endswith(("=True", "=False"))]  # those have their defaults
    return [sys.executable, "-c", "import sys; from catdog.cli import main; sys.exit(main())", "train", *switches]


@pytest.fixture(scope="module")
def after_a_full_disk(dataset: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The output of a training whose file system had no space for a third checkpoint, and what it said."""
    root = tmp_path_factory.mktemp("full")
    disk, kept = root / "disk", root / "kept"
    for directory in (disk, kept):
        directory.mkdir()
    # A mount of the process's own and of Ray's, its children; what lies there is copied before it goes.
    isolated = ["unshare", "--map-root-user", "--mount", "sh", "-c"]
    mount = 'mount -t tmpfs -o size=12m tmpfs "$0"'  # a checkpoint has 5 MB
    with contextlib.suppress(FileNotFoundError):
        probe = subprocess.run([*isolated, mount, str(disk)], capture_output=True)
        if probe.returncode == 0:
            script = f'{mount}; kept="$1"; shift; "$@"; code=$?; cp -R "$0/." "$kept"; exit $code'
            line = [*isolated, script, str(disk), str(kept), *command(config(dataset, disk))]
            run = subprocess.run(line, capture_output=True, text=True)
            assert run.returncode == 1, run.stderr
            assert run.stdout == ""
            return kept, run.stderr
    pytest.skip("needs Linux's user namespaces")


def test_a_full_disk_is_one_clear_error_and_the_last_good_checkpoint_stays(
    after_a_full_disk: tuple[Path, str],
) -> None:
    output, said = after_a_full_disk
    assert "Traceback" not in said
    error = said.splitlines()[-1]
    assert error.startswith("error: ")
    assert re.search(r"/disk/_checkpoints/step-0000000[45]-\w{16}\.npz", error)
    assert error.endswith("No space left on device")
    kept = checkpoint.load_latest(str(output))
    assert kept is not None
    assert kept.step in (2, 4)
    assert kept.history == []
    assert not list((output / checkpoint.DIRECTORY).glob(".*"))


def test_after_a_full_disk_and_a_kill_within_an_epoch_the_model_is_that_of_an_undisturbed_training(
    after_a_full_disk: tuple[Path, str], trained: Path, dataset: str, tmp_path: Path
) -> None:
    output = tmp_path / "model"
    shutil.copytree(after_a_full_disk[0], output)
    # With a driver and a Ray of its own.
    driver = subprocess.Popen(
        command(config(dataset, output)), start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        while checkpoint.latest_step(str(output)) <= STEPS_PER_EPOCH and driver.poll() is None:
            time.sleep(0.01)
    finally:
        os.killpg(driver.pid, signal.SIGKILL)
        driver.wait()
    wait_until_nothing_changes(output)
    if checkpoint.latest_step(str(output)) % STEPS_PER_EPOCH == 0:  # as if it had been killed a moment earlier
        max((output / checkpoint.DIRECTORY).glob("step-*")).unlink()
    interrupted = checkpoint.load_latest(str(output))
    assert interrupted is not None
    assert STEPS_PER_EPOCH < interrupted.step < NUM_EPOCHS * STEPS_PER_EPOCH
    assert interrupted.step % STEPS_PER_EPOCH in (2, 4)
    assert interrupted.sums["loss"] > 0

    record = train(config(dataset, output))
    assert record["resumed"]
    assert record["epochs_trained"] == NUM_EPOCHS
    for name in ("epoch", "train_loss", "train_accuracy", "val_loss", "val_accuracy", "learning_rate"):
        ours, theirs = ([row[name] for row in read_history(each)] for each in (output, trained))
        assert ours == pytest.approx(theirs, rel=1e-5), name
    ours, theirs = (bundle.load_model(bundle.load(str(each))).get_weights() for each in (output, trained))
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-7)


def wait_until_nothing_changes(output: Path) -> None:
    """Workers outlive their driver by a moment."""
    before: object = None
    while (now := sorted((path, path.stat().st_mtime_ns) for path in output.rglob("*"))) != before:
        before = now
        time.sleep(2)


def test_with_fewer_cpus_than_workers_it_starts_with_fewer_and_streams(
    dataset: str, trained: Path, tmp_path: Path
) -> None:
    # Its workers hold all 3 CPUs of the cluster: none is left for the tasks that decode what they stream.
    seen = tmp_path / "workers"
    seen.mkdir()

    def watched(settings: dict[str, Any]) -> None:
        context = ray.train.get_context()
        (seen / f"{context.get_world_rank()} of {context.get_world_size()}").touch()
        loop.train_loop(settings)

    started = config(dataset, tmp_path / "model", num_workers=4, min_workers=1)
    record = train(started, in_memory=False, train_loop=watched)
    assert {path.name for path in seen.iterdir()} == {"0 of 3", "1 of 3", "2 of 3"}
    assert record["epochs_trained"] == NUM_EPOCHS
    ours, theirs = read_history(tmp_path / "model")[-1], read_history(trained)[-1]
    for name in ("train_loss", "val_loss"):
        assert ours[name] == pytest.approx(theirs[name], abs=0.15), name
    bundle.load_model(bundle.load(str(tmp_path / "model")))


def test_a_configuration_has_no_field_left_to_the_recipe(dataset: str, trained: Path) -> None:
    saved = json.loads((trained / "train.json").read_text())["config"]
    assert [field.name for field in dataclasses.fields(TrainConfig) if saved[field.name] is None] == [
        "min_workers",
        "ray_address",
    ]
