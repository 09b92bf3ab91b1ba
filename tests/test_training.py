"""Whole trainings on a real Ray. Each of them costs its workers' start, so most tests look at the same few."""

import contextlib
import csv
import dataclasses
import io
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pyarrow.parquet as pq
import pytest
import ray
from PIL import Image
from ray_case import small_ray

from catdog import architectures, bundle, drawings, images, provenance, ray_internals, storage
from catdog.config import PrepareConfig, TrainConfig
from catdog.dataset import prepare
from catdog.dataset.reading import load_info
from catdog.errors import (
    CatdogError,
    ClaimLostError,
    DatasetError,
    OutputClaimedError,
    OutputRefusedError,
    StorageError,
    TrainingError,
    UsageError,
)
from catdog.training import TrainRecord, checkpoint, decoding, group, loop, progress, request, resolve, train
from catdog.training.checkpoint import Checkpoint
from catdog.training.feed import Share
from catdog.training.observers import Observer, Tick, WorkerInfo
from catdog.training.progress import Started, Stepped, Tally, Teller
from catdog.training.step import Learner

pytestmark = pytest.mark.slow

SIZE, BATCH_SIZE = 48, 15
SMALL: dict[str, Any] = {
    "arch": "cnn",
    "image_size": SIZE,
    "batch_size": BATCH_SIZE,
    "num_workers": 2,
    "learning_rate": 5e-4,
}
"""An odd batch: the workers' shares differ. The network has dropout, which draws at random."""

NUM_EPOCHS, STEPS_PER_EPOCH, CHECKPOINT_STEPS = 3, 5, 2
"""So checkpoints are at steps 2, 4, 5, 7, 9, 10, ...: of two in a row one is within an epoch."""


@pytest.fixture(scope="module", autouse=True)
def ray_of_this_module() -> Iterator[None]:
    with small_ray(num_cpus=3):
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
    assert load_info(str(output)).num_images("train") // BATCH_SIZE == STEPS_PER_EPOCH
    return str(output)


def config(dataset: str, output: Path, **changes: Any) -> TrainConfig:
    fields: dict[str, Any] = SMALL | {"epochs": NUM_EPOCHS, "checkpoint_steps": CHECKPOINT_STEPS} | changes
    return TrainConfig(data=dataset, output=str(output), **fields)


def read_history(output: Path) -> list[dict[str, float]]:
    rows = csv.DictReader(io.StringIO((output / "history.csv").read_text()))
    return [{name: float(value) for name, value in row.items()} for row in rows]


def tensorboard_steps(output: Path) -> dict[str, list[int]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(output / "tensorboard"))
    events.Reload()
    return {tag: [event.step for event in events.Tensors(tag)] for tag in events.Tags()["tensors"]}


def command(config: TrainConfig) -> list[str]:
    """A command line that trains so."""
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in vars(config).items() if value is not None]
    switches = [flag for flag in flags if not flag.endswith(("=True", "=False"))]  # those have their defaults
    return [sys.executable, "-m", "catdog", "train", *switches]


@dataclasses.dataclass(frozen=True)
class FullDisk:
    """A training that is to fill its disk, on its way."""

    process: subprocess.Popen[str]
    kept: Path
    """Where its output is copied to."""


@pytest.fixture(scope="module")
def full_disk(dataset: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[FullDisk | None]:
    """On a file system of its own and of Ray's, its children's; None where there can be none."""
    root = tmp_path_factory.mktemp("full")
    disk, kept = root / "disk", root / "kept"
    for directory in (disk, kept):
        directory.mkdir()
    isolated = ["unshare", "--map-root-user", "--mount", "sh", "-c"]
    mount = 'mount -t tmpfs -o size=12m tmpfs "$0"'  # a checkpoint has 5 MB
    if shutil.which("unshare") is None or subprocess.run([*isolated, mount, disk], capture_output=True).returncode:
        yield None
        return
    script = f'{mount}; kept="$1"; shift; "$@"; code=$?; cp -R "$0/." "$kept"; exit $code'
    line = [*isolated, script, str(disk), str(kept), *command(config(dataset, disk, max_failures=0))]
    with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        yield FullDisk(process, kept)
        process.kill()


@dataclasses.dataclass(frozen=True)
class Trained:
    """An undisturbed training."""

    output: Path
    journals: Path
    """A file per worker: what its observer was told."""

    record: TrainRecord


@pytest.fixture(scope="module")
def undisturbed(dataset: str, full_disk: FullDisk | None, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A training, one of whose observers writes down what it is told, and one of which fails.

    (`full_disk` runs beside it, to save time.)
    """
    output, journals = tmp_path_factory.mktemp("trained") / "model", tmp_path_factory.mktemp("journals")

    # Classes of a function are pickled with their code: the workers cannot import this module.
    class Journal(Observer):
        def __init__(self, worker: WorkerInfo) -> None:
            assert worker.output == str(output)
            self._path = journals / f"{worker.rank} of {worker.num_workers}"

        def write(self, *event: object) -> None:
            with self._path.open("a") as file:
                print(*event, file=file)

        def started(self, step: int) -> None:
            self.write("started", step)

        def stepped(self, step: int) -> None:
            self.write("stepped", step)

        def saving(self, step: int) -> None:
            self.write("saving", step)

        def saved(self, step: int) -> None:
            self.write("saved", step)

        def epoch_done(self, history: Sequence[dict[str, float]]) -> None:
            self.write("epoch_done", len(history))

        def finishing(self) -> None:
            assert not (output / "bundle.json").exists()
            self.write("finishing")

        def close(self) -> None:
            self.write("close")

    class Broken(Observer):
        def stepped(self, step: int) -> None:
            raise ValueError("not today")

        def saved(self, step: int) -> None:
            raise OSError("no space")

    record = train(config(dataset, output), observers=[lambda worker: Broken(), Journal])
    assert not record.resumed
    return Trained(output, journals, record)


@pytest.fixture(scope="module")
def trained(undisturbed: Trained) -> Path:
    """The output of an undisturbed training."""
    return undisturbed.output


def test_a_training_writes_a_bundle_its_history_and_its_curves(trained: Path, dataset: str) -> None:
    loaded = bundle.load(str(trained))
    assert (loaded.card["arch"], loaded.image_size, loaded.card["epochs_trained"]) == ("cnn", SIZE, NUM_EPOCHS)
    assert loaded.card["data_digest"] == load_info(dataset).digest
    assert loaded.card["training_config"]["batch_size"] == BATCH_SIZE
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


def test_every_worker_is_observed_and_the_chief_alone_writes(undisturbed: Trained) -> None:
    def told(*, chief: bool) -> list[str]:
        expected = ["started 0"]
        for epoch in range(NUM_EPOCHS):
            for step in range(1, STEPS_PER_EPOCH + 1):
                done = epoch * STEPS_PER_EPOCH + step
                expected.append(f"stepped {done}")
                if chief and (step % CHECKPOINT_STEPS == 0 or step == STEPS_PER_EPOCH):
                    expected += [f"saving {done}", f"saved {done}"]
            expected.append(f"epoch_done {epoch + 1}")
        return [*expected, "finishing", "close"]

    for name, is_chief in (("0 of 2", True), ("1 of 2", False)):
        assert (undisturbed.journals / name).read_text().splitlines() == told(chief=is_chief)
    assert len(list((undisturbed.output / "tensorboard").iterdir())) == 1


def test_the_record_tells_what_a_training_came_to(undisturbed: Trained) -> None:
    record, card = undisturbed.record, bundle.load(str(undisturbed.output)).card
    assert list(record.to_dict()) == [
        "command",
        "output",
        "model_id",
        "arch",
        "resumed",
        "wall_seconds",
        "metrics",
        "recall",
        "best_epoch",
        "calibration",
        "epochs_trained",
        "training_seconds",
        "durations_s",
        "precision",
        "config",
        "num_repeated_steps",
    ]
    assert undisturbed.record.num_repeated_steps == 0
    assert json.loads(json.dumps(record.to_dict()))["metrics"] == card["metrics"]
    head, training, validation, recall, temperature, shares, where = record.summary()
    assert head.startswith(f"Trained cnn for {NUM_EPOCHS} epochs in ")
    assert training.endswith(f"loss {card['metrics']['train_loss']:.4f}")
    assert validation.endswith(f"loss {card['metrics']['val_loss']:.4f}")
    for name, measured in card["validation"]["per_class"].items():
        assert record.recall[name] == measured["recall"]["value"]
        assert f"{name}s {100 * measured['recall']['value']:.2f} %" in recall
    assert temperature.startswith(f"  calibration temperature {card['temperature']:.2f}: ECE ")
    assert sum(float(share) for share in re.findall(r"[\d.]+(?= %)", shares)) == pytest.approx(100, abs=0.03)
    assert where == f"Model: {undisturbed.output}"


def test_validation_counts_every_image_once(trained: Path, dataset: str) -> None:
    # The bundle's own model, image by image in one process, gives what the two workers reported together.
    loaded = bundle.load(str(trained))
    rows = pq.read_table(Path(dataset) / "val").to_pylist()
    pixels_BHWC = np.stack([images.decode(row["image"], SIZE).pixels_HWC for row in rows]).astype("float32")
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
    assert record.resumed
    assert (trained / "bundle.json").read_bytes() == card


def test_two_trainings_at_once_in_one_output_are_refused(dataset: str, tmp_path: Path) -> None:
    output = tmp_path / "model"
    with storage.claimed(str(output), "train"):
        before = sorted(output.iterdir())
        with pytest.raises(OutputClaimedError, match=r"^--output must not be in use by another run: .* `catdog train`"):
            train(config(dataset, output))
        assert sorted(output.iterdir()) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 4}, r"^the model in --output must be that of this .* with a model of epochs=4 instead of 3; "),
        ({"seed": 7}, r" with a model of seed=7 instead of 0; "),
        ({"data_digest": "0"}, r" with a model of other data; "),
        ({"training_config": None}, r" with a model of no configuration; "),
    ],
)
def test_the_model_of_another_training_is_not_taken_for_the_one_that_was_asked_for(
    trained: Path, dataset: str, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    output = tmp_path / "model"
    shutil.copytree(trained, output)
    card = json.loads((output / "bundle.json").read_text())
    for name, value in change.items():
        (card if name in card else card["training_config"])[name] = value
    (output / "bundle.json").write_text(json.dumps(card))
    with pytest.raises(TrainingError, match=message):
        train(config(dataset, output))


@pytest.mark.parametrize("name", ["model.keras", "history.csv"])
def test_a_damaged_model_is_not_taken_for_the_one_that_was_asked_for(
    trained: Path, dataset: str, tmp_path: Path, name: str
) -> None:
    output = tmp_path / "model"
    shutil.copytree(trained, output)
    (output / name).write_bytes((output / name).read_bytes()[:-1])
    with pytest.raises(TrainingError, match=rf"^the model in --output must be whole\. Received: .*{name} is damaged"):
        train(config(dataset, output))


def test_another_configuration_in_the_same_output_is_refused(trained: Path, dataset: str) -> None:
    with pytest.raises(OutputRefusedError, match=r"with the same configuration.* with epochs=3 instead of 4$"):
        train(config(dataset, trained, epochs=4))


@pytest.mark.parametrize(("name", "text"), [("thesis.txt", "mine"), ("train.json", '{"cat.1.jpg": "cat"}')])
def test_an_output_that_holds_something_else_is_refused(dataset: str, tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(OutputRefusedError, match=rf"^--output must be empty, .*, which holds {name}$"):
        train(config(dataset, tmp_path))
    assert [path.read_text() for path in tmp_path.iterdir()] == [text]


def test_an_output_that_the_workers_do_not_see_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=rf"^--output must be where every node .* Received: --output={tmp_path}, and"):
        loop._check_output(str(tmp_path))


def test_a_signature_in_the_weights_url_is_not_published_and_may_change(dataset: str, tmp_path: Path) -> None:
    def fingerprint(url: str) -> str:
        published = provenance.configuration(resolve(config(dataset, tmp_path, arch="vgg16", weights=url)))
        assert "secret" not in json.dumps(published)
        return request.fingerprint(published, "d")

    one, other = (fingerprint(f"https://user:secret@host/{name}.h5?X-Sig=secret{name}") for name in "ab")
    assert one != other
    assert fingerprint("https://user:secret@host/a.h5?X-Sig=another") == one


def test_a_training_that_an_earlier_version_began_is_the_same_training() -> None:
    config = TrainConfig(data="/data", output="/model", arch="cnn", epochs=2, batch_size=32, image_size=64)
    published = provenance.configuration(resolve(config))
    assert list(published) == [*(field.name for field in dataclasses.fields(TrainConfig)), "from_id"]
    assert (
        request.fingerprint(published, "digest") == "88da7de0b903ff0de3bcd8b41c4b39c9e9b1c49077471cfd48d44dbeb37356c4"
    )


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
    monkeypatch.setattr("catdog.training.group.RESOURCES_TIMEOUT_S", 1)
    message = r"^the cluster must have 16 CPUs for 15 workers and what feeds them\. Received: 3 CPUs$"
    with pytest.raises(TrainingError, match=message):
        train(config(dataset, tmp_path / "model", num_workers=15))
    # It got nowhere, so its place may be taken.
    with pytest.raises(TrainingError, match=r"^the cluster must have 15 CPUs for 14 workers"):
        train(config(dataset, tmp_path / "model", num_workers=14, epochs=9))
    assert json.loads((tmp_path / "model" / "train.json").read_text())["config"]["epochs"] == 9


@contextlib.contextmanager
def only_worker(config: TrainConfig, *, weights: bytes | None = None) -> Iterator[tuple[loop._Worker, Learner]]:
    """The one worker of a group, in this process: up to the end of its first epoch it has no need of Ray Train."""
    resolved = resolve(config)
    info = load_info(config.data)
    train_source, val_source = decoding.sources(info, SIZE, in_memory=True)
    briefing = loop.Briefing(
        config=resolved,
        steps_per_epoch=STEPS_PER_EPOCH,
        train=train_source,
        val=val_source,
        class_weights=(1.0, 1.0),
        claim_url=f"{config.output}/.catdog-claim-1.json",
        weights=None if weights is None else ray.put(weights),
        card={},
        observers=(),
        chief_observers=(),
    )
    storage.publish_bytes(briefing.claim_url, b"{}")
    share = Share(rank=0, num_workers=1, batch_size=BATCH_SIZE)
    learner = Learner(resolved, share, steps_per_epoch=STEPS_PER_EPOCH, precision="float32")
    yield loop._Worker(briefing, share, learner, Observer(), checkpoint.load_latest(config.output)), learner


def weights_file(model: keras.Model, path: Path) -> bytes:
    model.save_weights(path)
    return path.read_bytes()


def test_a_pretrained_backbone_is_loaded_once_and_then_is_in_the_checkpoint(
    small: None, dataset: str, tmp_path: Path
) -> None:
    published = architectures.backbone_layer(architectures.build_model("with_backbone", SIZE))
    assert published is not None
    data = weights_file(published, tmp_path / "backbone.weights.h5")
    fine_tuning = config(dataset, tmp_path / "model", arch="with_backbone", weights="imagenet")
    states = []
    for weights in (data, None):  # of the second worker nobody expects that it has them
        with only_worker(fine_tuning, weights=weights) as (worker, learner):
            assert worker._restore() == 0
        for model in (learner.model, learner.average):
            backbone = architectures.backbone_layer(model)
            assert backbone is not None
            for found, expected in zip(backbone.get_weights(), published.get_weights(), strict=True):
                np.testing.assert_array_equal(found, expected)
        states.append(learner.state())
    assert checkpoint.latest_step(fine_tuning.output) == 0
    for name, arrays in states[0].items():
        for one, other in zip(arrays, states[1][name], strict=True):
            np.testing.assert_array_equal(one, other)


def test_a_training_that_cannot_be_distilled_is_refused_before_it_begins(
    small: None, dataset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match=r"^--distillation-weight needs pretrained --weights\. Received: .*=0\.6$"):
        resolve(config(dataset, tmp_path, distillation_weight=0.6))
    published = architectures.backbone_layer(architectures.build_model("with_backbone", SIZE))
    assert published is not None
    weights_file(published, path := tmp_path / "backbone.weights.h5")
    fine_tuning = config(dataset, tmp_path / "model", arch="with_backbone", weights=str(path), distillation_weight=0.6)
    message = (
        r"^--distillation-weight above 0 needs --weights with the classifier of the published network\. Received: "
    )
    with pytest.raises(UsageError, match=message), request.accepted(fine_tuning):
        raise AssertionError


def test_weights_of_another_network_are_refused_before_any_checkpoint(
    small: None, dataset: str, tmp_path: Path
) -> None:
    data = weights_file(architectures.build_model("plain", SIZE), tmp_path / "other.weights.h5")
    fine_tuning = config(dataset, tmp_path / "model", arch="with_backbone", weights="imagenet")
    message = r"^--weights must hold the weights of with_backbone without its classifier\. Received: \d+ bytes: "
    with only_worker(fine_tuning, weights=data) as (worker, _), pytest.raises(UsageError, match=message):
        worker.run()
    assert checkpoint.latest_step(fine_tuning.output) == -1


def test_a_chief_whose_run_has_lost_the_output_writes_nothing_any_more(
    small: None, dataset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overtaken = config(dataset, tmp_path / "model", arch="plain", checkpoint_steps=1)
    rule = r"^a training must hold the claim of its --output to its end\. Received: .*claim-1\.json is gone$"
    with only_worker(overtaken) as (worker, _):
        (tmp_path / "model" / ".catdog-claim-1.json").rename(tmp_path / "model" / ".catdog-claim-2.json")
        with pytest.raises(ClaimLostError, match=rule):
            worker.run()
        assert checkpoint.latest_step(overtaken.output) == -1
        # All steps are done, and the bundle is what is left to write.
        monkeypatch.setattr(worker, "_restore", lambda: NUM_EPOCHS * STEPS_PER_EPOCH)
        with pytest.raises(ClaimLostError, match=rule):
            worker.run()
    assert not (tmp_path / "model" / "bundle.json").exists()


NOT_FINITE = r"^the loss must stay finite; .* The last good checkpoint is kept\. Received: loss=(nan|inf) in epoch 1$"


def test_a_loss_that_is_not_finite_ends_the_training_and_keeps_the_last_good_checkpoint(
    small: None, dataset: str, tmp_path: Path
) -> None:
    diverging = config(dataset, tmp_path / "model", arch="plain", learning_rate=1e37, checkpoint_steps=1)
    with only_worker(diverging) as (worker, _), pytest.raises(TrainingError, match=NOT_FINITE):
        worker.run()
    kept = checkpoint.load_latest(diverging.output)
    assert kept is not None
    assert kept.step >= 1
    assert all(np.isfinite(array).all() for arrays in kept.arrays.values() for array in arrays)


def test_weights_that_are_not_finite_end_every_worker_and_are_never_saved(
    small: None, dataset: str, tmp_path: Path
) -> None:
    diverging = config(dataset, tmp_path / "model", arch="plain", checkpoint_steps=1)
    with only_worker(diverging) as (worker, learner):
        # The first step's loss is fine, and its update is not.
        momentum = next(variable for variable in learner.optimizer.variables if len(variable.shape) > 1)
        momentum.assign(np.full(momentum.shape, np.nan))
        with pytest.raises(TrainingError, match=NOT_FINITE):
            worker.run()
        # One that is not the first, and saves nothing, must not go on and wait for it.
        share = dataclasses.replace(worker._share, rank=1)
        other = loop._Worker(worker._briefing, share, learner, Observer(), None)
        with pytest.raises(TrainingError, match=NOT_FINITE):
            other._save_checkpoint(1, {})
    assert checkpoint.latest_step(diverging.output) == -1


def test_a_training_goes_on_unheard_where_the_queue_of_its_progress_dies(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="catdog")
    tick = Tick(epoch=2, num_epochs=3, step=4, steps_per_epoch=5, loss=0.25, images_per_s=1234.5, eta_s=4000)
    with progress.followed(Tally()) as channel:
        teller = Teller(channel, WorkerInfo(rank=0, num_workers=1, output="-"))
        teller.ticked(tick)
        deadline = time.monotonic() + 60
        while not caplog.messages and time.monotonic() < deadline:
            time.sleep(0.05)
        ray.kill(channel.actor)
        teller.ticked(tick)
        teller.epoch_done([{"epoch": 2.0}])
        teller.close()
    assert caplog.messages == ["Epoch 2/3, step 4/5: loss 0.2500; 1,234 images/s, 67 min left"]


def test_a_training_goes_on_in_the_precision_that_it_began_with(dataset: str, tmp_path: Path) -> None:
    auto = resolve(config(dataset, tmp_path))
    begun = Checkpoint(step=3, history=[], sums={}, precision="float16", arrays={})
    here = loop._precision(auto, None)
    assert here in ("float32", "bfloat16")
    assert loop._precision(auto, begun) == "float16"
    assert loop._precision(auto, dataclasses.replace(begun, precision=None)) == here


def test_what_ended_the_workers_is_told_in_a_line() -> None:
    health_check_error = ray_internals.find(ray_internals.HEALTH_CHECK_ERROR)
    assert health_check_error is not None
    died = health_check_error("A worker health check failed.", ray.exceptions.ActorDiedError())
    failed = ray.exceptions.RayTaskError(
        "train_loop", "Traceback\n  File ...\nZeroDivisionError: by zero", ValueError()
    )
    for failures, text in (({0: failed, 1: died}, r"^worker 1 died$"), ({0: failed}, r"ZeroDivisionError: by zero$")):
        assert re.search(text, group._text(ray.train.WorkerGroupError("Training failed", failures)))
    assert group._text(ray.train.ControllerError(ValueError("too\nlate"))).endswith("too late")


class FakeTrainer:
    """Fails as it is told, one `fit` after the other, and reaches steps; then it is done."""

    def __init__(self, failures: Sequence[dict[int, Exception]], steps: Sequence[int] = ()) -> None:
        self.failures, self.steps, self.num_fits = list(failures), list(steps), 0
        self.pauses: list[float] = []

    def fit(self) -> None:
        self.num_fits += 1
        if self.failures:
            raise ray.train.WorkerGroupError("Training failed", self.failures.pop(0))

    def latest_step(self, output: str) -> int:
        return self.steps.pop(0) if self.steps else -1


def run_group(fake: FakeTrainer, dataset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_internals, "tensorflow_trainer", lambda *arguments, **options: fake)
    monkeypatch.setattr(checkpoint, "latest_step", fake.latest_step)
    monkeypatch.setattr("catdog.training.group.time.sleep", fake.pauses.append)
    source = decoding.Source(chunks=[], image_size=SIZE, decoded=None)
    briefing = loop.Briefing(
        config=resolve(config(dataset, tmp_path / "model", max_failures=2)),
        steps_per_epoch=STEPS_PER_EPOCH,
        train=source,
        val=source,
        class_weights=(1.0, 1.0),
        claim_url="-",
        weights=None,
        card={},
        observers=(),
        chief_observers=(),
    )
    group._run_until_done(briefing, str(tmp_path))


def raised(error: Exception) -> Exception:
    """As Ray Train hands on what a worker raised."""
    user_error = ray_internals.find(ray_internals.USER_ERROR)
    assert user_error is not None
    wrapped: Exception = user_error(error, traceback_str="Traceback")
    return wrapped


def killed(cause: Exception) -> Exception:
    """As Ray Train hands on that a worker's process is gone."""
    health_check_error = ray_internals.find(ray_internals.HEALTH_CHECK_ERROR)
    assert health_check_error is not None
    wrapped: Exception = health_check_error("A worker health check failed.", cause)
    return wrapped


FAULT = StorageError("s3://bucket/x cannot be written: 503")
DIED = ray.exceptions.ActorDiedError()


@pytest.mark.parametrize(
    ("failures", "steps", "num_fits", "pauses"),
    [
        ([{0: raised(FAULT)}], [], 2, [5.0]),
        ([{1: raised(FAULT), 0: killed(DIED)}] * 2, [], 3, [5.0, 20.0]),  # the other worker fails because of it
        ([{0: raised(FAULT)}] * 4, [-1, 2, 4, 6, 8], 5, [5.0] * 4),  # it gets on
        ([{0: killed(DIED)}] * 2, [], 3, []),
    ],
)
def test_a_fault_of_a_storage_that_passes_costs_a_restart(
    failures: list[dict[int, Exception]],
    steps: list[int],
    num_fits: int,
    pauses: list[float],
    dataset: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake = FakeTrainer(failures, steps)
    run_group(fake, dataset, tmp_path, monkeypatch)
    assert (fake.num_fits, fake.pauses) == (num_fits, pauses)


def test_a_storage_that_does_not_answer_the_driver_either_costs_a_restart(
    dataset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(url: str) -> bool:
        raise FAULT

    monkeypatch.setattr(storage, "exists", fail)
    fake = FakeTrainer([{0: raised(FAULT)}])
    run_group(fake, dataset, tmp_path, monkeypatch)
    assert fake.num_fits == 2


OUT_OF_MEMORY = ray.exceptions.OutOfMemoryError("1 worker(s) were killed due to the node running low on memory. A page")
MEMORY_RULE = (
    r"^the training workers must fit in the memory of their nodes; lower --batch-size, --image-size or --num-workers\. "
    rf"Received: memory ran out with --batch-size={BATCH_SIZE} --image-size={SIZE} --num-workers=2$"
)


@pytest.mark.parametrize(
    ("failures", "steps", "num_fits", "error", "message"),
    [
        ([{0: raised(FAULT)}] * 9, [], 3, StorageError, r"^s3://bucket/x cannot be written: 503$"),
        ([{0: raised(FAULT), 1: raised(DatasetError("damaged"))}], [], 1, DatasetError, r"^damaged$"),
        ([{0: raised(ClaimLostError("taken over"))}], [], 1, ClaimLostError, r"^taken over$"),
        (
            [{0: killed(DIED)}] * 9,
            [],
            3,
            TrainingError,
            r"^the training workers must finish\. Received: worker 0 died$",
        ),
        ([{0: killed(OUT_OF_MEMORY)}], [], 1, TrainingError, MEMORY_RULE),
        ([{0: killed(DIED), 1: killed(OUT_OF_MEMORY)}], [], 1, TrainingError, MEMORY_RULE),
        ([{0: raised(OUT_OF_MEMORY)}], [], 1, TrainingError, MEMORY_RULE),  # of a task that decodes
        ([{0: killed(OUT_OF_MEMORY)}] * 9, [-1, 2, 2], 2, TrainingError, MEMORY_RULE),  # it had got on once
    ],
)
def test_what_would_come_again_ends_a_training(
    failures: list[dict[int, Exception]],
    steps: list[int],
    num_fits: int,
    error: type[CatdogError],
    message: str,
    dataset: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake = FakeTrainer(failures, steps)
    with pytest.raises(error, match=message):
        run_group(fake, dataset, tmp_path, monkeypatch)
    assert fake.num_fits == num_fits


def test_steps_that_are_done_again_are_counted_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    tally = Tally()
    for item in (Started(0, 2), Stepped(3), Stepped(7), Started(4, 1), Stepped(5), Started(5, 2), Started(0, 2)):
        tally.heed(item)
    assert tally.num_repeated_steps == 3 + 0 + 5
    assert caplog.messages == [
        "1 worker going on from step 4: 3 steps must be done again",
        "2 workers going on from step 0: 5 steps must be done again",
    ]


def test_a_training_survives_a_fault_of_its_storage_and_a_kill(
    dataset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(group, "PAUSES_S", (0.1,))

    class Trouble(Observer):
        def __init__(self, worker: WorkerInfo) -> None:
            from catdog.training import checkpoint

            save = checkpoint.save

            def save_or_fail(output: str, checkpoint: Checkpoint) -> None:
                if not (tmp_path / "failed").exists():
                    (tmp_path / "failed").touch()
                    raise StorageError("503")
                save(output, checkpoint)

            checkpoint.save = save_or_fail

        def stepped(self, step: int) -> None:
            time.sleep(0.3)  # so that the driver is told of every step

        def saving(self, step: int) -> None:
            if step == 4 and not (tmp_path / "killed").exists():
                (tmp_path / "killed").touch()
                time.sleep(1)
                os.kill(os.getpid(), signal.SIGKILL)

    record = train(config(dataset, tmp_path / "model", epochs=1, num_workers=1), observers=[Trouble])
    assert (tmp_path / "killed").exists()
    assert record.epochs_trained == 1
    assert record.num_repeated_steps == 2 + 2  # from step 2 to none at all, and from step 4 to step 2


def test_a_training_whose_output_is_taken_over_ends(dataset: str, tmp_path: Path) -> None:
    output = tmp_path / "model"

    class Taker(Observer):
        def saved(self, step: int) -> None:
            for claim in output.glob(".catdog-claim-*.json"):
                claim.rename(output / ".catdog-claim-99.json")

    with pytest.raises(ClaimLostError):
        train(config(dataset, output, num_workers=1), observers=[lambda worker: Taker()])
    assert checkpoint.latest_step(str(output)) == CHECKPOINT_STEPS
    assert not (output / "bundle.json").exists()


@pytest.fixture(scope="module")
def after_a_full_disk(full_disk: FullDisk | None) -> tuple[Path, str]:
    """The output of a training whose file system had no space for a third checkpoint, and what it said."""
    if full_disk is None:
        pytest.skip("needs Linux's user namespaces")
    out, err = full_disk.process.communicate()
    assert full_disk.process.returncode == 1, err
    assert out == ""
    return full_disk.kept, err


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
    log = tmp_path / "log"
    with log.open("w") as said:
        driver = subprocess.Popen(
            command(config(dataset, output)), start_new_session=True, stdout=subprocess.DEVNULL, stderr=said
        )
    try:
        while checkpoint.latest_step(str(output)) <= STEPS_PER_EPOCH:
            assert driver.poll() is None, log.read_text()
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
    assert record.resumed
    assert record.epochs_trained == NUM_EPOCHS
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


@contextlib.contextmanager
def joined_node(num_cpus: int) -> Iterator[None]:
    """A node that joins the cluster of this module."""
    address = ray.get_runtime_context().gcs_address
    ray_command = str(Path(sys.executable).parent / "ray")
    line = [ray_command, "start", f"--address={address}", f"--num-cpus={num_cpus}", "--block"]
    line += ["--object-store-memory=200000000"]
    quiet = subprocess.DEVNULL
    with subprocess.Popen(line, start_new_session=True, stdout=quiet, stderr=quiet) as process:
        try:
            yield
        finally:
            process.terminate()


def test_workers_that_no_node_holds_are_refused(dataset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("catdog.training.group.RESOURCES_TIMEOUT_S", 1)
    rule = r"^the cluster must have nodes with 4 CPUs for each of 1 workers\. Received: nodes with "
    with joined_node(num_cpus=2):
        deadline = time.monotonic() + 60
        while ray.cluster_resources()["CPU"] < 5 and time.monotonic() < deadline:
            time.sleep(0.1)
        with pytest.raises(TrainingError, match=rule + r"[32] CPUs; [32] CPUs$"):
            train(config(dataset, tmp_path / "model", num_workers=1, cpus_per_worker=4))


def test_it_goes_on_with_as_many_workers_as_there_is_room_for_and_streams(
    dataset: str, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Of 3 CPUs there is room for one worker of two, and with another node for two workers.
    monkeypatch.setattr("catdog.training.group.RESIZE_INTERVAL_S", 2.0)
    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "15")
    output, seen = tmp_path / "model", tmp_path / "workers"
    seen.mkdir()

    class Watcher(Observer):
        def __init__(self, worker: WorkerInfo) -> None:
            self._is_finishing = False
            (seen / f"{worker.rank} of {worker.num_workers}").touch()

        def saved(self, step: int) -> None:
            while not (seen / "node gone").exists():
                time.sleep(0.1)

        def finishing(self) -> None:
            self._is_finishing = True

        def close(self) -> None:
            if self._is_finishing:  # and the model is there already
                os.kill(os.getpid(), signal.SIGKILL)

    def wait_for(happened: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 300
        while not happened() and time.monotonic() < deadline:
            time.sleep(0.1)

    def come_and_go() -> None:
        wait_for(lambda: checkpoint.latest_step(str(output)) > 0)
        reached = checkpoint.latest_step(str(output))
        with joined_node(num_cpus=2):
            wait_for(lambda: checkpoint.latest_step(str(output)) > reached)
        (seen / "node gone").touch()

    started = config(dataset, output, num_workers=2, min_workers=1, cpus_per_worker=2)
    node = threading.Thread(target=come_and_go)
    node.start()
    record = train(started, in_memory=False, observers=[Watcher])
    node.join()
    assert {path.name for path in seen.iterdir()} == {"0 of 1", "0 of 2", "1 of 2", "node gone"}
    assert record.epochs_trained == NUM_EPOCHS
    assert not (output / checkpoint.DIRECTORY).exists()
    ours, theirs = read_history(output)[-1], read_history(trained)[-1]
    for name in ("train_loss", "val_loss"):
        assert ours[name] == pytest.approx(theirs[name], abs=0.15), name
    bundle.load_model(bundle.load(str(output)))


def test_a_configuration_has_no_field_left_to_the_recipe(dataset: str, trained: Path) -> None:
    saved = json.loads((trained / "train.json").read_text())["config"]
    assert [field.name for field in dataclasses.fields(TrainConfig) if saved[field.name] is None] == [
        "from_",
        "depth",
        "width",
        "early_stopping",
        "min_workers",
        "ray_address",
    ]  # cnn has but one depth and width


# These come last: for some minutes Ray keeps what a killed driver had asked for, and an elastic training would wait for
# it; and as long as the driver lives what a killed controller had.
def test_a_signal_ends_a_training_and_leaves_its_last_checkpoint(dataset: str, tmp_path: Path) -> None:
    drivers = {}
    address = ray.get_runtime_context().gcs_address
    for number in (signal.SIGTERM, signal.SIGINT):
        endless = config(dataset, tmp_path / number.name, epochs=1000, num_workers=1, ray_address=address)
        # A suite that a shell started in the background has its children ignore Ctrl-C.
        drivers[number] = subprocess.Popen(
            command(endless),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
    for number, driver in drivers.items():
        output = tmp_path / number.name
        with driver:
            while checkpoint.latest_step(str(output)) < 0 and driver.poll() is None:
                time.sleep(0.05)
            driver.send_signal(number)
            out, err = driver.communicate(timeout=120)
        assert (driver.returncode, out) == (128 + number, ""), err
        assert "Traceback" not in err
        assert checkpoint.load_latest(str(output)) is not None


def test_a_training_whose_controller_is_killed_ends_and_leaves_its_last_checkpoint(
    dataset: str, tmp_path: Path
) -> None:
    class Killer(Observer):
        def saved(self, step: int) -> None:
            ray.kill(ray_internals.train_controller())

    with pytest.raises(TrainingError, match=r"the same command again goes on from the last checkpoint\."):
        train(config(dataset, tmp_path / "model", num_workers=1), observers=[lambda worker: Killer()])
    # The worker lives a moment longer than the controller: long enough for another checkpoint, if the machine is busy.
    assert checkpoint.latest_step(str(tmp_path / "model")) in (CHECKPOINT_STEPS, 2 * CHECKPOINT_STEPS)
