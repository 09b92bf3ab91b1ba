"""A model and a labelled split to metrics, figures and suspects.

`metrics.json` is written last: it goes with the other files beside it.
"""

import importlib.metadata
import time
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime
from operator import itemgetter
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from catdog import __version__, bundle, metrics, report, storage
from catdog.config import EvaluateConfig, to_dict
from catdog.dataset import DatasetInfo, iter_split, load_info
from catdog.engines import load_engine
from catdog.errors import DatasetError, UsageError
from catdog.inference.label import Labeller
from catdog.schema import CLASS_NAMES

METRICS_NAME: Final = "metrics.json"
CONFUSION_NAME: Final = "confusion.png"
RELIABILITY_NAME: Final = "reliability.png"
GRID_NAME: Final = "predictions.png"
PREDICTIONS_NAME: Final = "predictions.parquet"
OUTPUT_NAMES: Final = (PREDICTIONS_NAME, CONFUSION_NAME, RELIABILITY_NAME, GRID_NAME, METRICS_NAME)

FORMAT: Final = "catdog-evaluation/1"
_LIBRARIES: Final = ("keras", "numpy", "pillow", "scipy", "tensorflow")
NUM_PICTURES: Final = 12
"""Most wrong, and most right photographs in `predictions.png`."""

NUM_SUSPECTS: Final = 50
"""Most suspects in `metrics.json`; `predictions.parquet` has them all."""

EVALUATION_SCHEMA: Final = pa.schema(
    [
        pa.field("uri", pa.string(), nullable=False),
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("true_label", pa.string(), nullable=False),
        pa.field("label", pa.string(), nullable=False),
        pa.field("prob_dog", pa.float32(), nullable=False),
        pa.field("confidence", pa.float32(), nullable=False),
        pa.field("needs_review", pa.bool_(), nullable=False),
    ]
)
"""`predictions.parquet`: a row per image, in the dataset's order. `label`, `prob_dog`, `confidence` and `needs_review`
are the model's, as in the output of predict; `true_label` is the dataset's."""


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Label a split of a dataset as predict would, and measure how right that is.

    Writes `predictions.parquet`, `confusion.png`, `reliability.png`, `predictions.png` and `metrics.json`; an earlier
    evaluation in the same place is replaced.

    Returns:
        What `metrics.json` holds (the metrics of `catdog.metrics.classification_metrics` and `review_metrics`, the
        suspects, and what was evaluated on what), and in `files` where everything lies.

    Raises:
        UsageError: the split holds no images, or the output holds something else.
        DatasetError: the dataset is damaged, or a picture in it cannot be decoded.
        BundleError: the model cannot be used.
    """
    started = time.monotonic()
    output = storage.absolute(config.output)
    _refuse_foreign_output(output)
    info = load_info(config.data)
    if not info.num_images(config.split):
        raise UsageError(f"--split must name a split that holds images. Received: --split={config.split} of {info.url}")
    model = bundle.load(config.model)
    engine = load_engine(model, config.engine)

    tables, gallery = [], Gallery()
    labeller = Labeller(model, engine, config.batch_size)
    for table, images in label_split(info, config.split, labeller):
        tables.append(table)
        gallery.add(table, images)
    predictions = pa.concat_tables(tables)

    labels_B = pc.equal(predictions["true_label"], CLASS_NAMES[1]).to_numpy().astype(np.int64)
    prob_dog_B = predictions["prob_dog"].to_numpy()
    needs_review_B = predictions["needs_review"].to_numpy()
    result = {
        "format": FORMAT,
        "split": config.split,
        **metrics.classification_metrics(labels_B, prob_dog_B),
        "review_threshold": model.review_threshold,
        **metrics.review_metrics(labels_B, prob_dog_B, needs_review_B),
        "suspects": suspects(predictions),
        "model_id": model.model_id,
        "data_digest": info.digest,
        "engine": engine.name,
        "config": to_dict(config),
        "versions": {"catdog": __version__, **{name: importlib.metadata.version(name) for name in _LIBRARIES}},
        "evaluated_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "duration_s": round(time.monotonic() - started, 1),
    }
    files = {name: storage.join(output, name) for name in OUTPUT_NAMES}
    figures = {
        CONFUSION_NAME: report.confusion(result["confusion_matrix"], CLASS_NAMES),
        RELIABILITY_NAME: report.reliability(labels_B, {"Reliability": prob_dog_B}),
        GRID_NAME: gallery.draw(),
    }
    storage.delete(files[METRICS_NAME])  # an earlier one: it must not stand beside files that it does not describe
    storage.publish_parquet(files[PREDICTIONS_NAME], predictions)
    for name, png in figures.items():
        storage.publish_bytes(files[name], png)
    storage.publish_json(files[METRICS_NAME], result)
    return {"command": "evaluate", "output": output, "files": files, **result}


def label_split(info: DatasetInfo, split: str, labeller: Labeller) -> Iterator[tuple[pa.Table, list[bytes]]]:
    """The rows of `predictions.parquet` and the encoded images they are of, batch by batch, in the dataset's order.

    Raises:
        DatasetError: a picture cannot be decoded, or a label is neither class.
    """
    columns = ["uri", "image_id", "label", "image"]
    for batch in iter_split(info, split, columns, batch_size=labeller.batch_size):
        uris, images, labels = (batch[name].to_pylist() for name in ("uri", "image", "label"))
        odd = set(labels) - set(range(len(CLASS_NAMES)))
        if odd:
            raise DatasetError(f"a dataset's labels must be 0 (cat) or 1 (dog). Received: {odd.pop()} in {info.url}")
        files = [storage.SourceFile(uri, "", len(image)) for uri, image in zip(uris, images, strict=True)]
        verdicts = labeller.label_bytes(files, images)
        for row in verdicts.filter(pc.not_equal(verdicts["status"], "ok")).to_pylist():
            raise DatasetError(
                f"every picture of a dataset must decode. Received: {row['uri']} of {info.url}: "
                f"{row['error_code']}: {row['error_message']}"
            )
        columns_made = {
            "uri": batch["uri"],
            # The file's; that of the stored picture is another where prepare turned it upright.
            "image_id": batch["image_id"],
            "true_label": pa.array([CLASS_NAMES[label] for label in labels]),
            **{name: verdicts[name] for name in ("label", "prob_dog", "confidence", "needs_review")},
        }
        yield pa.table(columns_made, schema=EVALUATION_SCHEMA), images


def suspects(predictions: pa.Table) -> list[dict[str, Any]]:
    """The images whose label is most likely to be wrong: where the model disagrees, and is surest of itself."""
    wrong = predictions.filter(pc.not_equal(predictions["true_label"], predictions["label"]))
    ranked = wrong.sort_by([("confidence", "descending"), ("image_id", "ascending")]).slice(0, NUM_SUSPECTS)
    return [
        {**row, "confidence": round(row["confidence"], 6)}
        for row in ranked.select(["uri", "image_id", "true_label", "label", "confidence"]).to_pylist()
    ]


RankedItem = tuple[float, str, report.GridItem]


class Gallery:
    """What `predictions.png` shows: the surest of the wrong answers, and as many right ones, drawn at random.

    It keeps no more photographs than that while a split streams past.
    """

    def __init__(self) -> None:
        self._num_seen = Counter[bool]()
        self._wrong: list[RankedItem] = []
        self._right: list[RankedItem] = []

    def add(self, table: pa.Table, images: list[bytes]) -> None:
        """Consider the photographs of one batch: rows of `EVALUATION_SCHEMA` and their encoded images."""
        for row, image in zip(table.to_pylist(), images, strict=True):
            item = report.GridItem(
                image=image, label=row["true_label"], predicted_label=row["label"], confidence=row["confidence"]
            )
            self._num_seen[item.is_right] += 1
            # An id is a hash of the image: the smallest ids are a random sample, and the same one every time.
            if item.is_right:
                self._right.append((0.0, row["image_id"], item))
            else:
                self._wrong.append((-item.confidence, row["image_id"], item))
        self._right, self._wrong = (
            sorted(kept, key=itemgetter(0, 1))[:NUM_PICTURES] for kept in (self._right, self._wrong)
        )

    def draw(self) -> bytes:
        """The grid, a PNG."""
        num_wrong, num_images = self._num_seen[False], self._num_seen.total()
        title = f"{num_wrong:,} of {num_images:,} wrong"
        if num_wrong > len(self._wrong):
            title += f": the {len(self._wrong)} surest of them"
        if self._right:
            title += f"; {len(self._right)} of the right ones, at random"
        return report.predictions_grid([item for *_, item in self._wrong + self._right], title)


def _refuse_foreign_output(output: str) -> None:
    """Refuse an output that holds anything else than an evaluation, which may have been killed while it was written."""
    names = set(storage.list_names(output))
    if METRICS_NAME in names:
        storage.refuse_foreign_output(output, (METRICS_NAME,), says={"format": FORMAT})
    else:
        storage.refuse_foreign_output(output, OUTPUT_NAMES if names <= set(OUTPUT_NAMES) else ())
