"""What `catdog bench` measures, on a few drawings: whether the figures are what they say, not what they are."""

import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from catdog import bundle, drawings, provenance
from catdog.bench import chaos, processes, subset, train, train_contenders, train_record, watched
from catdog.bench.killer import DURATIONS_S, Kill, Killer
from catdog.config import BenchChaosConfig, BenchTrainConfig, PrepareConfig
from catdog.dataset import load_info, prepare
from catdog.errors import OutputRefusedError, TrainingError, UsageError
from catdog.ray_session import connect

pytestmark = pytest.mark.slow

TINY: dict[str, Any] = {"image_size": 48, "batch_size": 8, "num_workers": 2, "num_images": 37}


@pytest.fixture(scope="module", autouse=True)
def embedded_ray() -> Iterator[None]:
    with connect(None, min_cpus=4):
        yield


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> str:
    root = tmp_path_factory.mktemp("drawings")
    for label in ("cat", "dog"):
        (root / label).mkdir()
        for index in range(30):
            drawings.draw(label, [index]).save(root / label / f"{index}.jpg", quality=90)
    drawings.draw("cat", [30]).save(root / "cat" / "30.png")
    output = tmp_path_factory.mktemp("dataset") / "data"
    prepare(PrepareConfig(images=str(root), output=str(output), val_fraction=0.2, test_fraction=0.0))
    return str(output)


def epochs_of(settings: processes.Settings) -> list[train_record.Epoch]:
    """As if all were equally fast, but for a slow first epoch, and the streamed one waiting half the time."""
    num_images = 32.0 if settings["num_workers"] == 2 else 16.0
    input_s = 0.5 if settings["role"] == "ray_train" and not settings["in_memory"] else 0.0
    return [
        {"num_images": num_images, "seconds": seconds, "input_s": input_s, "train_loss": 0.7} for seconds in (9, 1, 1)
    ]


def test_train_measures_every_contender_in_every_round(
    dataset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = []

    def run(settings: list[processes.Settings], scratch: str) -> list[list[train_record.Epoch]]:
        order.append(tuple(settings[0].get(name) for name in ("role", "num_workers", "in_memory", "jit_compile")))
        assert load_info(settings[0]["data"]).num_images("train") == 16 * settings[0]["num_workers"]
        assert len(list(Path(settings[0]["pictures"]).glob("*/*.jpg"))) == 32
        assert len({each["output"] for each in settings}) == 1
        return [epochs_of(each) for each in settings]

    monkeypatch.setattr(train, "run_contenders", run)
    record = train.bench_train(BenchTrainConfig(data=dataset, output=str(tmp_path), num_rounds=2, **TINY))
    assert len(order) == 14
    assert order[7:] == order[6::-1]

    assert json.loads((tmp_path / "bench.json").read_text()) == record.to_dict()
    assert (record.num_images, record.num_workers, len(record.rounds)) == (32, 2, 2)
    medians = {name: figure.median for name, figure in record.figures.items()}
    assert medians == {
        "tutorial_speedup": 1.0,
        "tutorial_speedup_streamed": 1.0,
        "ray_efficiency": 1.0,
        "scaling_efficiency": 1.0,
        "sharing_efficiency": 1.0,
        "input_share_in_memory": 0.0,
        "input_share_streamed": 0.5,
    }
    lines = record.summary()
    assert lines[0].startswith("Trained cnn at 48 px on 32 images, 2 times with every contender, in ")
    assert "  one worker      100.0 % (100.0 to 100.0) of its with each of 2 workers (goal: at least 95 %)" in lines
    assert "  streamed        50.0 % (50.0 to 50.0) (goal: below 2 %)" in lines
    assert lines[-1] == f"Bench: {tmp_path}"


def test_the_figures_are_the_ratios_that_they_say() -> None:
    speeds = {"tutorial": 100, "tutorial_xla": 50, "ray_train": 250, "bare": 260, "side_by_side": 270}
    speeds |= {"one_worker": 130, "streamed": 240}
    slower = {**speeds, "tutorial_xla": 125}
    rounds = [
        {name: train_record.Measurement(images_per_s=speed, input_share=0.0, epochs=[]) for name, speed in each.items()}
        for each in (speeds, slower)
    ]
    figures = train_record.figures(rounds, num_workers=2)
    tutorial = figures.pop("tutorial_speedup")  # taken at its best
    assert (tutorial.min, tutorial.median, tutorial.max) == (2.0, 2.25, 2.5)
    assert str(tutorial) == "225.0 % (200.0 to 250.0)"
    assert {name: figure.median for name, figure in figures.items()} == pytest.approx(
        {
            "tutorial_speedup_streamed": (240 / 125 + 240 / 100) / 2,
            "ray_efficiency": 250 / 260,
            "scaling_efficiency": 250 / (2 * 130),
            "sharing_efficiency": 250 / 270,
            "input_share_in_memory": 0.0,
            "input_share_streamed": 0.0,
        }
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_images": 1000}, r"^--num-images must be at most the number of JPEG files to train on, \d+\. Received: "),
        ({"num_images": 15}, r"^--num-images must be at least one batch of 2 workers, 16\. Received: --num-images=15$"),
        ({"image_size": 33}, r"^--image-size must be at least 46 for --arch cnn\. Received: --image-size=33$"),
    ],
)
def test_train_refuses_what_it_cannot_measure(
    dataset: str, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        train.bench_train(BenchTrainConfig(data=dataset, output=str(tmp_path), **(TINY | change)))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("run", "config_type"), [(train.bench_train, BenchTrainConfig), (chaos.bench_chaos, BenchChaosConfig)]
)
def test_an_output_that_holds_something_else_is_refused(
    dataset: str, tmp_path: Path, run: Callable[[Any], Any], config_type: type[Any]
) -> None:
    (tmp_path / "bench.json").write_text('{"mine": 1}')
    (tmp_path / "chaos.json").write_text("mine")
    config = config_type(data=dataset, output=str(tmp_path))
    with pytest.raises(OutputRefusedError, match=r"^--output must be empty"):
        run(config)
    assert {path.name for path in tmp_path.iterdir()} == {"bench.json", "chaos.json"}


def test_a_contender_that_fails_ends_the_others(tmp_path: Path) -> None:
    broken = {"role": "tutorial", "pictures": str(tmp_path / "none"), "image_size": 48, "batch_size": 8}
    waiting = {"role": "bare", "rank": 0, "addresses": ["127.0.0.1:1", "127.0.0.1:2"]}
    with pytest.raises(TrainingError, match=r"^a contender must finish\. Received: (tutorial|bare) with exit code 1: "):
        train.run_contenders([broken, waiting], str(tmp_path))


class Training:
    """Stands in for a training of two workers: processes that sleep, and a board that says what they would do."""

    def __init__(self, board: watched.Board, num_steps: int, checkpoint_steps: int) -> None:
        self.board, self.num_steps, self.checkpoint_steps = board, num_steps, checkpoint_steps
        self.saved = 0
        self.lost: list[int] = []

    def run(self) -> None:
        while self.saved < self.num_steps:
            workers = [subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) for _ in range(2)]
            try:
                self.lost += self.run_group(workers)
            finally:
                for worker in workers:
                    worker.kill()
                    worker.wait()

    def run_group(self, workers: list[subprocess.Popen[bytes]]) -> list[int]:
        """Steps that are lost with the group; none at the end."""

        def is_dead() -> bool:
            time.sleep(0.005)
            return any(worker.poll() is not None for worker in workers)

        for record, worker in zip(self.board, workers, strict=True):
            record["restored"], record["step"], record["is_saving"], record["pid"] = -1, -1, 0, worker.pid
        for _ in range(20):
            if is_dead():
                return [0]
        self.board["restored"] = first = self.saved
        for step in range(first, self.num_steps):
            if is_dead():
                return [step - self.saved]
            self.board["step"] = step + 1
            if (step + 1) % self.checkpoint_steps == 0:
                self.board["is_saving"][0] = 1
                if any(is_dead() for _ in range(20)):
                    return [step + 1 - self.saved]
                self.saved = step + 1
                self.board["is_saving"][0] = 0
        return []


def test_the_killer_kills_at_all_moments_and_counts_what_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(DURATIONS_S, "starting", 0.0)
    config = BenchChaosConfig(data="d", output="o", num_kills=5, checkpoint_steps=10)
    board = watched.create(str(tmp_path / "board"), 2)
    training = Training(board, num_steps=120, checkpoint_steps=10)
    killer = Killer(board, config, 120)
    with killer:
        training.run()
    moments = [kill.moment for kill in killer.kills]
    assert len(moments) == killer.num_restarts == 5
    assert (moments[1], moments[3]) == ("saving", "starting")
    assert killer.kills[1].rank == 0
    assert sum(killer.lost_steps) == sum(training.lost)
    assert max(killer.lost_steps) <= 10


def test_chaos_does_not_touch_a_cluster(dataset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    with pytest.raises(UsageError, match=r"must have a Ray of its own\. Received: RAY_ADDRESS=10\.0\.0\.1:6379$"):
        chaos.bench_chaos(BenchChaosConfig(data=dataset, output=str(tmp_path)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_weight_difference": 0.5}, r"^the weights must be those .* Received: max_weight_difference=0\.5 after 2"),
        ({"max_weight_difference": float("nan")}, r"^the weights must be those .* Received: max_weight_difference=nan"),
        ({"most_lost_steps": 11}, r"^a kill must not cost more steps .* Received: most_lost_steps=11 after 2 kills$"),
        ({"num_kills": 1}, r"^--num-kills=2 workers must be killed\. Received: 1 killed$"),
    ],
)
def test_chaos_that_leaves_traces_is_an_error(change: dict[str, Any], message: str) -> None:
    outcome = chaos.Outcome(val_loss=0.1, val_accuracy=0.9, wall_seconds=60.0)
    record = chaos.BenchChaosRecord(
        output="/chaos",
        num_kills=2,
        kills=[Kill(0, 5, "saving"), Kill(1, -1, "starting")],
        kills_by_moment={"saving": 1, "starting": 1},
        num_restarts=2,
        num_lost_steps=12,
        most_lost_steps=10,
        max_weight_difference=0.0,
        num_steps=50,
        undisturbed=outcome,
        disturbed=outcome,
        host=provenance.Host(cpu="", num_cores=2, system=""),
        load_average=0.0,
        config={"num_kills": 2, "checkpoint_steps": 10},
        versions={},
        duration_s=60.0,
    )
    chaos.check(record)
    with pytest.raises(TrainingError, match=message):
        chaos.check(dataclasses.replace(record, **change))


@pytest.fixture(scope="module")
def disturbed(dataset: str, tmp_path_factory: pytest.TempPathFactory) -> chaos.BenchChaosRecord:
    """The record of a training of which two workers were killed."""
    output = str(tmp_path_factory.mktemp("chaos"))
    return chaos.bench_chaos(
        BenchChaosConfig(data=dataset, output=output, num_kills=2, arch="cnn", batch_size=8, checkpoint_steps=4)
    )


def test_a_training_ends_where_it_would_have_whoever_is_killed(disturbed: chaos.BenchChaosRecord) -> None:
    record, output = disturbed, Path(disturbed.output)
    assert record.to_dict() == json.loads((output / "chaos.json").read_text())
    assert record.num_kills == len(record.kills) == sum(record.kills_by_moment.values()) == 2
    assert record.num_restarts >= 2
    assert record.max_weight_difference == 0
    assert record.most_lost_steps <= 4
    for name in ("val_loss", "val_accuracy"):
        assert getattr(record.disturbed, name) == getattr(record.undisturbed, name)
    one, other = (bundle.load(str(output / name)).card for name in ("undisturbed", "disturbed"))
    assert one["golden_logits"] == other["golden_logits"]
    head, restarts, weights, *_ = record.summary()
    assert head.startswith(f"Killed 2 workers of a training of {record.num_steps} steps: ")
    assert restarts.startswith(f"  restarts    {record.num_restarts}; ")
    assert weights == "  weights     differ by at most 0"


def test_ray_train_and_bare_processes_take_the_same_steps(
    dataset: str, disturbed: chaos.BenchChaosRecord, tmp_path: Path
) -> None:
    subset.write_pictures(load_info(dataset), str(tmp_path / "pictures"))
    output = Path(disturbed.output) / "undisturbed"
    settings: processes.Settings = {
        "data": dataset,
        "pictures": str(tmp_path / "pictures"),
        "output": str(output),
        "arch": "cnn",
        "image_size": 48,
        "batch_size": 8,
        "num_workers": 2,
        "epochs": bundle.load(str(output)).card["epochs_trained"],
    }
    addresses = [f"127.0.0.1:{port}" for port in processes.free_ports(2)]
    bare = [settings | {"role": "bare", "rank": rank, "addresses": addresses} for rank in range(2)]
    tutorial = settings | {"role": "tutorial", "jit_compile": False}
    one, other, keras = train.run_contenders([*bare, tutorial], str(tmp_path))
    ray_train = train_contenders.ray_train(settings | {"in_memory": True})  # has been trained already

    num_images = load_info(dataset).num_images("train") // 8 * 8
    for epochs in (one, other, keras, ray_train):
        assert [epoch["num_images"] for epoch in epochs] == [num_images] * settings["epochs"]
        assert all(0 <= epoch["input_s"] < epoch["seconds"] for epoch in epochs)
        assert all(np.isfinite(epoch["train_loss"]) for epoch in epochs)
    for epochs in (one, other):
        assert [epoch["train_loss"] for epoch in epochs] == pytest.approx(
            [epoch["train_loss"] for epoch in ray_train], rel=1e-5
        )
