"""`catdog bench train`: ratios of images per second, measured in turns on the same cores.

Every round runs every contender of `catdog.bench.train_contenders`, one after the other, each in a process of its own,
every other round in reverse order: what else the machine does falls on all of them alike. The first epoch of each, with
its tracing and its cold caches, is left out.
"""

from __future__ import annotations

import contextlib
import json
import logging
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from catdog import hardware, scratch, storage
from catdog.bench import processes, subset
from catdog.bench.processes import Settings
from catdog.bench.record import Begun
from catdog.bench.rounds import in_turn
from catdog.bench.train_record import BenchTrainRecord, Epoch, Measurement, figures
from catdog.config import BenchTrainConfig, TrainConfig
from catdog.dataset import reading
from catdog.errors import TrainingError, UsageError
from catdog.training import resolve

logger = logging.getLogger(__name__)

ARCH: Final = "cnn"
"""Its recipe trains on images of one size. Crops that grow would leave the tutorial, whose do not, more to compute."""

NUM_EPOCHS: Final = 3
NUM_TUTORIAL_EPOCHS: Final = 2
"""It is the slowest, and its epochs the longest."""

NUM_VAL_IMAGES: Final = 256
"""`catdog train` validates after every epoch; that is not measured."""

POLL_S: Final = 0.2
"""How often is looked whether a contender has ended."""


def bench_train(config: BenchTrainConfig) -> BenchTrainRecord:
    """Measure, and write `bench.json`.

    Raises:
        UsageError: the dataset has too few JPEG files, or the output holds something else.
        TrainingError: a contender failed.
    """
    begun = Begun(BenchTrainRecord, config)
    num_workers = config.num_workers or hardware.num_cores()
    batch_size = config.batch_size * num_workers
    image_size = _image_size(config, begun.output, batch_size, num_workers)
    num_steps = config.num_images // batch_size
    if num_steps == 0:
        raise UsageError(
            f"--num-images must be at least one batch of {num_workers} workers, {batch_size}. "
            f"Received: --num-images={config.num_images}"
        )
    with scratch.directory("bench") as directory:
        trials = _trials(config, directory, num_workers, image_size, num_steps)
        rounds = [_measure_all(trials, directory, number, config.num_rounds) for number in range(config.num_rounds)]
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


def _image_size(config: BenchTrainConfig, output: str, batch_size: int, num_workers: int) -> int:
    """The size of the images, as a training with these settings has it."""
    training = TrainConfig(
        data=config.data,
        output=output,
        arch=ARCH,
        weights="none",
        image_size=config.image_size,
        batch_size=batch_size,
        num_workers=num_workers,
    )
    return resolve(training).image_size


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


def _measure_all(
    trials: Mapping[str, Sequence[Settings]], directory: str, number: int, num_rounds: int
) -> dict[str, Measurement]:
    """Run every contender once."""
    measured: dict[str, Measurement] = {}
    for name in in_turn(trials, number):
        measured[name] = _measure(trials[name], tempfile.mkdtemp(dir=directory))
        speed = measured[name].images_per_s
        logger.info("Round %d of %d: %s, %.0f images/s", number + 1, num_rounds, name, speed)
    return {name: measured[name] for name in trials}


def _measure(settings: Sequence[Settings], directory: str) -> Measurement:
    """Run a contender. What counts is the first process of each group, whose processes are always at the same step."""
    output = storage.join(directory, "output")
    found = run_contenders([each | {"output": output} for each in settings], directory)
    groups = [epochs[1:] for each, epochs in zip(settings, found, strict=True) if each.get("rank", 0) == 0]
    return Measurement(
        images_per_s=sum(_total(epochs, "num_images") / _total(epochs, "seconds") for epochs in groups),
        input_share=statistics.mean(_total(epochs, "input_s") / _total(epochs, "seconds") for epochs in groups),
        epochs=found,
    )


def run_contenders(settings: Sequence[Settings], scratch: str) -> list[list[Epoch]]:
    """Train side by side until all have ended. Returns the epochs of each.

    Args:
        settings: of each contender.
        scratch: a local directory.

    Raises:
        TrainingError: one failed; the others have been ended.
    """
    results = [Path(scratch, f"result-{index}.json") for index in range(len(settings))]
    with contextlib.ExitStack() as stack:
        started = []
        for each, result in zip(settings, results, strict=True):
            command, log = processes.role("train_contenders", each, str(result)), result.with_suffix(".log")
            started.append((stack.enter_context(processes.running(command, log)), log))
        # Where one fails, the others wait for it, and must be ended.
        while any(process.poll() is None for process, _ in started):
            time.sleep(POLL_S)
            for (process, log), each in zip(started, settings, strict=True):
                if process.poll():
                    raise TrainingError(
                        f"a contender must finish. Received: {each['role']} with exit code {process.returncode}: "
                        f"{processes.tail(log.read_text(errors='replace'))}"
                    )
    return [json.loads(result.read_text()) for result in results]


def _total(epochs: Sequence[Epoch], name: str) -> float:
    return sum(epoch[name] for epoch in epochs)
