"""The whole way on pictures that it draws itself: prepare, train, predict, evaluate."""

import concurrent.futures
import contextlib
import io
import logging
import os
import time
from collections.abc import Iterator
from typing import Any, Final

from catdog import drawings, storage
from catdog.config import DemoConfig, EvaluateConfig, PredictConfig, PrepareConfig, TrainConfig
from catdog.ray_session import connect
from catdog.schema import CLASS_NAMES

logger = logging.getLogger(__name__)

RECORD_NAME: Final = "demo.json"
"""Written first, and again, with the record, at the end: it marks a directory as a demo's."""

PARTS: Final = ("drawings", "data", "model", "predictions", "evaluation")

NUM_DRAWINGS: Final = 600
NUM_WORKERS: Final = 2
SEED: Final = 0


def run_demo(config: DemoConfig) -> dict[str, Any]:
    """Draw pictures, and run every job on them, on this machine. An earlier demo in the same place is replaced.

    Returns:
        The records of the jobs by name, and `output`, `drawings`, `accuracy` (on the held-out test split) and
        `duration_s`.

    Raises:
        OutputRefusedError: the output holds something that is no demo's.
    """
    from catdog.dataset import prepare
    from catdog.evaluation import evaluate
    from catdog.inference import predict
    from catdog.training import train

    started = time.monotonic()
    output = storage.absolute(config.output)
    storage.refuse_foreign_output(output, (RECORD_NAME,), says={"command": "demo"})
    for name in PARTS:
        storage.delete(storage.join(output, name))
    storage.publish_json(storage.join(output, RECORD_NAME), {"command": "demo"})
    pictures, data, model, predictions, evaluation = (storage.join(output, name) for name in PARTS)
    _draw(pictures)
    records = {}
    with _embedded_ray():
        records["prepare"] = prepare(
            PrepareConfig(images=pictures, output=data, val_fraction=0.15, test_fraction=0.2, seed=SEED)
        )
        records["train"] = train(
            TrainConfig(
                data=data,
                output=model,
                arch="cnn",
                image_size=64,
                epochs=20,
                batch_size=32,
                num_workers=NUM_WORKERS,
                seed=SEED,
            )
        )
    records["predict"] = predict(PredictConfig(images=pictures, output=predictions, model=model, executor="inline"))
    records["evaluate"] = evaluate(EvaluateConfig(data=data, model=model, output=evaluation))
    record = {
        "command": "demo",
        "output": output,
        "drawings": pictures,
        "accuracy": records["evaluate"]["accuracy"],
        "duration_s": round(time.monotonic() - started, 1),
        **records,
    }
    storage.publish_json(storage.join(output, RECORD_NAME), record)
    return record


def _draw(url: str) -> None:
    """Labelled pictures in a folder per class, and two files that are no pictures, as any real collection has some."""
    logger.info("Drawing %d pictures", NUM_DRAWINGS)

    def draw(index: int) -> None:
        label = CLASS_NAMES[index % len(CLASS_NAMES)]
        storage.publish_bytes(storage.join(url, label, f"{label}-{index:03}.jpg"), _jpeg(label, index))

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(draw, range(NUM_DRAWINGS)))
    storage.publish_bytes(storage.join(url, "cat", "cut-short.jpg"), _jpeg("cat", NUM_DRAWINGS)[:2000])
    storage.publish_bytes(storage.join(url, "dog", "not-a-picture.jpg"), b"A letter about a dog.\n")


def _jpeg(label: str, index: int) -> bytes:
    buffer = io.BytesIO()
    drawings.draw(label, (SEED, index)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


@contextlib.contextmanager
def _embedded_ray() -> Iterator[None]:
    """One Ray for all jobs, on this machine: the nodes of a cluster in `RAY_ADDRESS` may not see our files."""
    address = os.environ.pop("RAY_ADDRESS", None)
    try:
        with connect(None, min_cpus=NUM_WORKERS + (os.cpu_count() or 1)):
            yield
    finally:
        if address is not None:
            os.environ["RAY_ADDRESS"] = address
