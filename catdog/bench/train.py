"""`catdog bench train`: ratios of images per second, measured in turns on the same cores.

Every round runs every contender of `catdog.bench.contenders`, one after the other, each in a process of its own, every
other round in reverse order: what else the machine does falls on all of them alike. The first epoch of each, with its
tracing and its cold caches, is left out.
"""

from __future__ import annotations

import logging
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar, Final

from catdog import hardware, scratch, storage
from catdog.bench import processes, subset
from catdog.bench.processes import Epoch, Settings
from catdog.bench.record import Begun, BenchRecord
from catdog.bench.spread import Spread, spread
from catdog.config import BenchTrainConfig, TrainConfig
from catdog.dataset import reading
from catdog.errors import UsageError
from catdog.records import plural
from catdog.training import resolve

logger = logging.getLogger(__name__)

ARCH: Final = "cnn"
"""Its recipe trains on images of one size. Crops that grow would leave the tutorial, whose do not, more to compute."""

NUM_EPOCHS: Final = 3
NUM_TUTORIAL_EPOCHS: Final = 2
"""It is the slowest, and its epochs the longest."""

NUM_VAL_IMAGES: Final = 256
"""`catdog train` validates after every epoch; that is not measured."""


@dataclass(frozen=True, kw_only=True)
class Figure(Spread):
    """A ratio, over the rounds."""

    target: float

    def __str__(self) -> str:
        """`98.7 % (97.5 to 99.1)`."""
        return f"{100 * self.median:.1f} % ({100 * self.min:.1f} to {100 * self.max:.1f})"


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What a contender did in a round, its first epoch left out."""

    images_per_s: float
    input_share: float
    """Share of its seconds in which the workers waited for images."""

    epochs: list[list[Epoch]]
    """Of each of its processes, all epochs."""


Round = Mapping[str, Measurement]
"""By the contenders' names."""


@dataclass(frozen=True, kw_only=True)
class BenchTrainRecord(BenchRecord):
    """What `bench.json` holds.

    Its figures:

    - `tutorial_speedup`: images per second on Ray Train as a multiple of those of the Keras tutorial, with or without
      XLA, whichever is faster in that round. The tutorial decodes its images in every epoch; ours are decoded once,
      before.
    - `tutorial_speedup_streamed`: the same where ours are decoded in every epoch, too.
    - `ray_efficiency`: images per second on Ray Train as a share of those of bare processes.
    - `scaling_efficiency`: images per second of all workers as a share of as many times those of one worker, which
      trains with the same images per step and worker, and has as many steps in an epoch.
    - `sharing_efficiency`: images per second of all workers as a share of those of as many bare processes side by side,
      each of which trains a model of its own. They share caches, memory and clock as our workers do, but no gradients.
    - `input_share_in_memory`, `input_share_streamed`: the share of the time in which workers wait for images, which are
      held in the object store, or decoded anew in every epoch on the cores that train.
    """

    file_name: ClassVar[str] = "bench.json"

    command: str = "bench train"
    arch: str
    figures: dict[str, Figure]
    rounds: list[dict[str, Measurement]]
    num_workers: int
    image_size: int
    num_images: int
    """Per epoch."""

    def summary(self) -> list[str]:
        """Every figure with its range over the rounds and its target."""
        figures, workers = self.figures, plural(self.num_workers, "worker")
        goals = {name: f"{100 * figure.target:g} %" for name, figure in figures.items()}
        return [
            f"Trained {self.arch} at {self.image_size} px on {self.num_images:,} images, "
            f"{len(self.rounds)} times with every contender, in {self.duration_s:,.0f} s.",
            "Images per second:",
            f"  Keras tutorial  {figures['tutorial_speedup']} of its (goal: at least {goals['tutorial_speedup']})",
            f"    both decoding {figures['tutorial_speedup_streamed']} of its "
            f"(goal: at least {goals['tutorial_speedup_streamed']})",
            f"  bare processes  {figures['ray_efficiency']} of theirs (goal: at least {goals['ray_efficiency']})",
            f"  one worker      {figures['scaling_efficiency']} of its with each of {workers} "
            f"(goal: at least {goals['scaling_efficiency']})",
            f"  side by side    {figures['sharing_efficiency']} of those of {workers} that share nothing "
            f"(goal: at least {goals['sharing_efficiency']})",
            "Share of the time in which workers wait for images:",
            f"  in memory       {figures['input_share_in_memory']} (goal: below {goals['input_share_in_memory']})",
            f"  streamed        {figures['input_share_streamed']} (goal: below {goals['input_share_streamed']})",
            f"Bench: {self.output}",
        ]


def bench_train(config: BenchTrainConfig) -> BenchTrainRecord:
    """Measure, and write `bench.json`.

    Raises:
        UsageError: the dataset has too few JPEG files, or the output holds something else.
        TrainingError: a contender failed.
    """
    begun = Begun(BenchTrainRecord, config)
    num_workers = config.num_workers or hardware.num_cores()
    batch_size = config.batch_size * num_workers
    training = resolve(
        TrainConfig(
            data=config.data,
            output=begun.output,
            arch=ARCH,
            weights="none",
            image_size=config.image_size,
            batch_size=batch_size,
            num_workers=num_workers,
        )
    )
    image_size = training.image_size
    num_steps = config.num_images // batch_size
    if num_steps == 0:
        raise UsageError(
            f"--num-images must be at least one batch of {num_workers} workers, {batch_size}. "
            f"Received: --num-images={config.num_images}"
        )
    rounds: list[dict[str, Measurement]] = []
    with scratch.directory("bench") as directory:
        trials = _trials(config, directory, num_workers, image_size, num_steps)
        for number in range(config.num_rounds):
            measured: dict[str, Measurement] = {}
            for name in list(trials)[:: -1 if number % 2 else 1]:
                measured[name] = _measure(trials[name], tempfile.mkdtemp(dir=directory))
                logger.info(
                    "Round %d of %d: %s, %.0f images/s",
                    number + 1,
                    config.num_rounds,
                    name,
                    measured[name].images_per_s,
                )
            rounds.append({name: measured[name] for name in trials})
    record = BenchTrainRecord(
        arch=ARCH,
        figures=figures(rounds, num_workers),
        rounds=rounds,
        num_workers=num_workers,
        image_size=image_size,
        num_images=num_steps * batch_size,
        **begun.common(),
    )
    return begun.publish(record)


def _trials(
    config: BenchTrainConfig, directory: str, num_workers: int, image_size: int, num_steps: int
) -> dict[str, list[Settings]]:
    """The processes of each contender, by its name. Contenders that a figure compares run one right after the other."""
    batch_size = config.batch_size * num_workers
    data, small_data, pictures = (str(Path(directory, name)) for name in ("data", "small-data", "pictures"))
    info = subset.write_dataset(
        reading.load_info(config.data), data, num_train=num_steps * batch_size, num_val=NUM_VAL_IMAGES
    )
    subset.write_dataset(info, small_data, num_train=num_steps * config.batch_size, num_val=NUM_VAL_IMAGES)
    subset.write_pictures(info, pictures)
    everything: Settings = {
        "data": data,
        "pictures": pictures,
        "arch": ARCH,
        "image_size": image_size,
        "batch_size": batch_size,
        "num_workers": num_workers,
        "epochs": NUM_EPOCHS,
    }
    addresses = [f"127.0.0.1:{port}" for port in processes.free_ports(num_workers)]
    tutorial = everything | {"role": "tutorial", "epochs": NUM_TUTORIAL_EPOCHS}
    one_worker = {"num_workers": 1, "batch_size": config.batch_size, "data": small_data}
    return {
        "tutorial_xla": [tutorial | {"jit_compile": True}],
        "tutorial": [tutorial | {"jit_compile": False}],
        "ray_train": [everything | {"role": "ray_train", "in_memory": True}],
        "bare": [everything | {"role": "bare", "rank": rank, "addresses": addresses} for rank in range(num_workers)],
        "side_by_side": [
            everything | {"role": "bare", "rank": 0, "addresses": [address]} | one_worker for address in addresses
        ],
        "one_worker": [everything | {"role": "ray_train", "in_memory": True} | one_worker],
        "streamed": [everything | {"role": "ray_train", "in_memory": False}],
    }


def _measure(settings: Sequence[Settings], directory: str) -> Measurement:
    """Run a contender. What counts is the first process of each group, whose processes are always at the same step."""
    output = storage.join(directory, "output")
    found = processes.run([each | {"output": output} for each in settings], directory)
    groups = [epochs[1:] for each, epochs in zip(settings, found, strict=True) if each.get("rank", 0) == 0]
    return Measurement(
        images_per_s=sum(_total(epochs, "num_images") / _total(epochs, "seconds") for epochs in groups),
        input_share=statistics.mean(_total(epochs, "input_s") / _total(epochs, "seconds") for epochs in groups),
        epochs=found,
    )


def _total(epochs: Sequence[Epoch], name: str) -> float:
    return sum(epoch[name] for epoch in epochs)


def figures(rounds: Sequence[Round], num_workers: int) -> dict[str, Figure]:
    """Every figure of `BenchTrainRecord` over the rounds."""

    def images_per_s(a_round: Round, *names: str) -> float:
        return max(a_round[name].images_per_s for name in names)

    def speedup(a_round: Round, name: str) -> float:
        return images_per_s(a_round, name) / images_per_s(a_round, "tutorial", "tutorial_xla")

    definitions: dict[str, tuple[Callable[[Round], float], float]] = {
        "tutorial_speedup": (lambda each: speedup(each, "ray_train"), 2.0),
        "tutorial_speedup_streamed": (lambda each: speedup(each, "streamed"), 2.0),
        "ray_efficiency": (lambda each: images_per_s(each, "ray_train") / images_per_s(each, "bare"), 0.98),
        "scaling_efficiency": (
            lambda each: images_per_s(each, "ray_train") / (num_workers * images_per_s(each, "one_worker")),
            0.95,
        ),
        "sharing_efficiency": (
            lambda each: images_per_s(each, "ray_train") / images_per_s(each, "side_by_side"),
            0.95,
        ),
        "input_share_in_memory": (lambda each: each["ray_train"].input_share, 0.02),
        "input_share_streamed": (lambda each: each["streamed"].input_share, 0.02),
    }
    found = {}
    for name, (definition, target) in definitions.items():
        values = [definition(each) for each in rounds]
        found[name] = Figure(**asdict(spread(values)), target=target)
    return found
