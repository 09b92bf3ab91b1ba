"""The demo: it draws pictures, and runs the jobs prepare, train, predict and evaluate on them."""

import concurrent.futures
import contextlib
import io
import logging
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from catdog import drawings, hardware, records, storage
from catdog.config import DemoConfig, EvaluateConfig, PredictConfig, PrepareConfig, TrainConfig
from catdog.dataset import prepare
from catdog.dataset.pipeline import PrepareRecord
from catdog.evaluation import EvaluationRecord, evaluate
from catdog.inference import RunRecord, predict
from catdog.metrics import Estimate
from catdog.provenance import redact
from catdog.ray_session import connect
from catdog.schema import CLASS_NAMES
from catdog.training import TrainRecord, train

logger = logging.getLogger(__name__)

RECORD_NAME: Final = "demo.json"
"""Name of the file that marks a directory as a demo's. It is written first, and again at the end, with the record."""

PARTS: Final = ("drawings", "data", "model", "predictions", "evaluation")
"""Names of the directories in a demo's directory."""

NUM_DRAWINGS: Final = 600
NUM_WORKERS: Final = 2
SEED: Final = 0


@dataclass(frozen=True, kw_only=True)
class DemoRecord(records.Record):
    """What the demo did: the records of all jobs."""

    command: str
    output: str
    drawings: str
    """Directory of the pictures."""

    accuracy: Estimate
    """Accuracy on the test split, which had no part in training."""

    duration_s: float
    prepare: PrepareRecord
    train: TrainRecord
    predict: RunRecord
    evaluate: EvaluationRecord

    def summary(self) -> list[str]:
        """The lines of every job, and the paths of what to look at."""
        return [
            *self.prepare.summary(),
            *self.train.summary(),
            *self.predict.summary(),
            *self.evaluate.summary(),
            f"The demo took {self.duration_s:,.0f} s. Look at:",
            f"  {self.drawings}",
            f"  {self.prepare.output}/samples.png",
            f"  {self.train.output}/curves.png",
            *(f"  {path}" for name, path in self.evaluate.files.items() if name.endswith(".png")),
            f"To try the model in a browser: catdog serve --model {self.train.output}",
        ]


def run_demo(config: DemoConfig) -> DemoRecord:
    """Draw pictures, and run every job on them, on this machine. An earlier demo in the same directory is replaced.

    Raises:
        OutputRefusedError: the output holds something that no demo wrote.
        OutputClaimedError: another demo is at work there.
    """
    output = storage.absolute(config.output)
    storage.refuse_foreign_output(output, (RECORD_NAME,), says={"command": "demo"})
    with storage.claimed(output, "demo"):
        return _run(output)


def _run(output: str) -> DemoRecord:
    started = time.monotonic()
    for name in PARTS:
        storage.delete(storage.join(output, name))
    storage.publish_json(storage.join(output, RECORD_NAME), {"command": "demo"})
    pictures, data, model, predictions, evaluation = (storage.join(output, name) for name in PARTS)
    _draw(pictures)
    with _embedded_ray():
        prepared = prepare(PrepareConfig(images=pictures, output=data, val_fraction=0.15, test_fraction=0.2, seed=SEED))
        trained = train(
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
    labelled = predict(PredictConfig(images=pictures, output=predictions, model=model, executor="inline"))
    evaluated = evaluate(EvaluateConfig(data=data, model=model, output=evaluation))
    record = DemoRecord(
        command="demo",
        output=redact(output),
        drawings=redact(pictures),
        accuracy=evaluated.accuracy,
        duration_s=round(time.monotonic() - started, 1),
        prepare=prepared,
        train=trained,
        predict=labelled,
        evaluate=evaluated,
    )
    storage.publish_json(storage.join(output, RECORD_NAME), record.to_dict())
    return record


def _draw(url: str) -> None:
    """Draw pictures into a folder per class, with two files that cannot be decoded: real collections have some."""
    logger.info("Drawing %d pictures", NUM_DRAWINGS)

    def draw(index: int) -> None:
        label = CLASS_NAMES[index % len(CLASS_NAMES)]
        storage.publish_bytes(storage.join(url, label, f"{label}-{index:03}.jpg"), _jpeg(label, index))

    with concurrent.futures.ThreadPoolExecutor(hardware.num_cores()) as pool:
        list(pool.map(draw, range(NUM_DRAWINGS)))
    storage.publish_bytes(storage.join(url, "cat", "cut-short.jpg"), _jpeg("cat", NUM_DRAWINGS)[:2000])
    storage.publish_bytes(storage.join(url, "dog", "not-a-picture.jpg"), b"A letter about a dog.\n")


def _jpeg(label: str, index: int) -> bytes:
    buffer = io.BytesIO()
    drawings.draw(label, (SEED, index)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


@contextlib.contextmanager
def _embedded_ray() -> Iterator[None]:
    """One embedded Ray for all jobs, whatever `RAY_ADDRESS` says: the nodes of a cluster might not see our files."""
    address = os.environ.pop("RAY_ADDRESS", None)
    try:
        with connect(None, min_cpus=NUM_WORKERS + hardware.num_cores()):
            yield
    finally:
        if address is not None:
            os.environ["RAY_ADDRESS"] = address
