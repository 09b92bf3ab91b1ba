"""`catdog bench train`: ratios of images per second, measured in turns on the same cores.

Every round runs every contender of `catdog.bench.contenders`, one after the other, each in a process of its own, every
other round in reverse order: what else the machine does falls on all of them alike. The first epoch of each, with its
tracing and its cold caches, is left out.
"""

from __future__ import annotations

import logging
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

from catdog import __version__, storage
from catdog.bench import processes, subset
from catdog.bench.processes import Epoch, Settings
from catdog.config import BenchTrainConfig, TrainConfig, to_dict
from catdog.dataset import reading
from catdog.errors import UsageError
from catdog.training import schedule
from catdog.training.trainer import resolve

logger = logging.getLogger(__name__)

RECORD_NAME: Final = "bench.json"
ARCH: Final = "cnn"
"""Its recipe trains on images of one size. Crops that grow would leave the tutorial, whose do not, more to compute."""

NUM_EPOCHS: Final = 3
NUM_TUTORIAL_EPOCHS: Final = 2
"""It is the slowest, and its epochs the longest."""

NUM_VAL_IMAGES: Final = 256
"""`catdog train` validates after every epoch; that is not measured."""

_LIBRARIES: Final = ("keras", "numpy", "ray", "tensorflow")


def bench_train(config: BenchTrainConfig) -> dict[str, Any]:
    """Measure, and write `bench.json`.

    Returns:
        What `bench.json` holds: in `figures`, by name, the median, minimum and maximum over the rounds and the target
        of each; in `rounds`, every contender's `images_per_s` and `input_share`, the part of its seconds in which the
        workers waited for images. The figures:

        - `tutorial_speedup`: our seconds per epoch in those of the Keras tutorial, with or without XLA, whichever is
          faster in that round. It decodes its images in every epoch; ours are decoded once, before.
        - `tutorial_speedup_streamed`: the same where ours are decoded in every epoch, too.
        - `ray_efficiency`: images per second on Ray Train as a share of those of bare processes.
        - `scaling_efficiency`: images per second of all workers as a share of as many times those of one, which trains
          with the same images per step and worker, and has as many steps in an epoch.
        - `sharing_efficiency`: the same as a share of those of as many bare processes side by side that train each for
          itself. They share caches, memory and clock as our workers do, but no gradients.
        - `input_share_in_memory`, `input_share_streamed`: with the images held in the object store, and decoded anew
          every epoch on the cores that train.

    Raises:
        UsageError: the dataset has too few JPEG files, or the output holds something else.
        TrainingError: a contender failed.
    """
    started = time.monotonic()
    output = storage.absolute(config.output)
    storage.refuse_foreign_output(output, (RECORD_NAME,), says={"command": "bench train"})
    num_workers = config.num_workers or os.cpu_count() or 1
    batch_size = config.batch_size * num_workers
    training = resolve(
        TrainConfig(
            data=config.data,
            output=output,
            arch=ARCH,
            weights="none",
            image_size=config.image_size,
            batch_size=batch_size,
            num_workers=num_workers,
        )
    )
    image_size = schedule.resolved(training.image_size)
    num_steps = config.num_images // batch_size
    if num_steps == 0:
        raise UsageError(
            f"--num-images must be at least one batch of {num_workers} workers, {batch_size}. "
            f"Received: --num-images={config.num_images}"
        )
    rounds: list[dict[str, Any]] = []
    load_average = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="catdog-bench-") as scratch:
        trials = _trials(config, scratch, num_workers, image_size, num_steps)
        for number in range(config.num_rounds):
            measured = {}
            for name in list(trials)[:: -1 if number % 2 else 1]:
                measured[name] = _measure(trials[name], tempfile.mkdtemp(dir=scratch))
                logger.info(
                    "Round %d of %d: %s, %.0f images/s",
                    number + 1,
                    config.num_rounds,
                    name,
                    measured[name]["images_per_s"],
                )
            rounds.append({name: measured[name] for name in trials})
    record = {
        "command": "bench train",
        "output": output,
        "arch": ARCH,
        "figures": figures(rounds, num_workers),
        "rounds": rounds,
        "num_workers": num_workers,
        "num_cpus": os.cpu_count(),
        "cpu": _cpu(),
        "load_average": load_average,
        "image_size": image_size,
        "num_images": num_steps * batch_size,
        "config": to_dict(config),
        "versions": {"catdog": __version__, **{name: version(name) for name in _LIBRARIES}},
        "duration_s": round(time.monotonic() - started, 1),
    }
    storage.publish_json(storage.join(output, RECORD_NAME), record)
    return record


def _trials(
    config: BenchTrainConfig, scratch: str, num_workers: int, image_size: int, num_steps: int
) -> dict[str, list[Settings]]:
    """The processes of each contender, by its name. Whom a figure compares stand side by side."""
    batch_size = config.batch_size * num_workers
    data, small_data, pictures = (str(Path(scratch, name)) for name in ("data", "small-data", "pictures"))
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
    tutorial = everything | {"contender": "tutorial", "epochs": NUM_TUTORIAL_EPOCHS}
    one_worker = {"num_workers": 1, "batch_size": config.batch_size, "data": small_data}
    return {
        "tutorial_xla": [tutorial | {"jit_compile": True}],
        "tutorial": [tutorial | {"jit_compile": False}],
        "ray_train": [everything | {"contender": "ray_train", "in_memory": True}],
        "bare": [
            everything | {"contender": "bare", "rank": rank, "addresses": addresses} for rank in range(num_workers)
        ],
        "side_by_side": [
            everything | {"contender": "bare", "rank": 0, "addresses": [address]} | one_worker for address in addresses
        ],
        "one_worker": [everything | {"contender": "ray_train", "in_memory": True} | one_worker],
        "streamed": [everything | {"contender": "ray_train", "in_memory": False}],
    }


def _measure(settings: Sequence[Settings], scratch: str) -> dict[str, Any]:
    """What the first process of each group says: all of a group are at the same step at all times."""
    output = storage.join(scratch, "output")
    found = processes.run([each | {"output": output} for each in settings], scratch)
    groups = [epochs[1:] for each, epochs in zip(settings, found, strict=True) if each.get("rank", 0) == 0]
    return {
        "images_per_s": sum(_total(epochs, "num_images") / _total(epochs, "seconds") for epochs in groups),
        "input_share": statistics.mean(_total(epochs, "input_s") / _total(epochs, "seconds") for epochs in groups),
        "epochs": found,
    }


def _total(epochs: Sequence[Epoch], name: str) -> float:
    return sum(epoch[name] for epoch in epochs)


def figures(rounds: Sequence[dict[str, Any]], num_workers: int) -> dict[str, dict[str, float]]:
    """What the rounds come to."""

    def images_per_s(a_round: dict[str, Any], *names: str) -> float:
        return max(float(a_round[name]["images_per_s"]) for name in names)

    def speedup(a_round: dict[str, Any], name: str) -> float:
        return images_per_s(a_round, name) / images_per_s(a_round, "tutorial", "tutorial_xla")

    definitions: dict[str, tuple[Callable[[dict[str, Any]], float], float]] = {
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
        "input_share_in_memory": (lambda each: float(each["ray_train"]["input_share"]), 0.02),
        "input_share_streamed": (lambda each: float(each["streamed"]["input_share"]), 0.02),
    }
    return {
        name: {
            "median": statistics.median(map(figure, rounds)),
            "min": min(map(figure, rounds)),
            "max": max(map(figure, rounds)),
            "target": target,
        }
        for name, (figure, target) in definitions.items()
    }


def _cpu() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), "unknown")
