"""Evaluating a model on a labelled split: metrics, figures, and images whose label is suspect.

`metrics.json` is written last, so that it always describes the other files beside it.
"""

import collections
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from operator import itemgetter
from typing import Any, Final, TypedDict

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from catdog import bundle, metrics, provenance, report, storage
from catdog.config import EvaluateConfig
from catdog.dataset import DatasetInfo, iter_split, load_info
from catdog.errors import DatasetError, UsageError
from catdog.labelling import Labelled, Labeller, load_labeller
from catdog.metrics import CalibrationError, ClassMetrics, Estimate, Metric
from catdog.records import Record
from catdog.schema import CLASS_NAMES, versioned

METRICS_NAME: Final = "metrics.json"
CONFUSION_NAME: Final = "confusion.png"
RELIABILITY_NAME: Final = "reliability.png"
GRID_NAME: Final = "predictions.png"
PREDICTIONS_NAME: Final = "predictions.parquet"
OUTPUT_NAMES: Final = (PREDICTIONS_NAME, CONFUSION_NAME, RELIABILITY_NAME, GRID_NAME, METRICS_NAME)

FORMAT: Final = "catdog-evaluation/1"
MAX_PENDING: Final = 16
"""Largest number of batches that are read while the first of them is still being labelled."""

NUM_PICTURES: Final = 12
"""Largest number of photographs with a wrong label in `predictions.png`, and of those with a right one."""

NUM_SUSPECTS: Final = 50
"""Largest number of suspects in `metrics.json`. They can all be found in `predictions.parquet`."""

EVALUATION_SCHEMA: Final = versioned(
    "evaluation",
    1,
    [
        pa.field("uri", pa.string(), nullable=False),
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("true_label", pa.string(), nullable=False),
        pa.field("label", pa.string(), nullable=False),
        pa.field("prob_dog", pa.float32(), nullable=False),
        pa.field("confidence", pa.float32(), nullable=False),
        pa.field("needs_review", pa.bool_(), nullable=False),
    ],
)
"""`predictions.parquet`: a row for each image, in the order of the dataset. `true_label` is from the dataset. `label`,
`prob_dog`, `confidence` and `needs_review` are from the model, as in the output of `predict`."""


class Suspect(TypedDict):
    """An image whose label in the dataset is likely to be wrong."""

    uri: str
    image_id: str
    true_label: str
    """The label in the dataset."""

    label: str
    """The label that the model gives."""

    confidence: float
    """Probability of `label`, from the model."""


class FloatFigures(TypedDict):
    """What the model with float weights makes of the images that the int8 model labelled."""

    arithmetic: str
    accuracy: Estimate
    log_loss: Estimate
    num_other_labels: int
    """Number of images to which the two give different labels."""


@dataclass(frozen=True, kw_only=True)
class EvaluationRecord(Record):
    """What an evaluation found: the content of `metrics.json`, and the URLs of the files."""

    command: str
    output: str
    files: dict[str, str]
    """File name → URL."""

    format: str
    split: str
    num_images: int
    class_counts: dict[str, int]
    accuracy: Estimate
    balanced_accuracy: Metric
    roc_auc: Metric
    log_loss: Estimate
    brier_score: Estimate
    expected_calibration_error: CalibrationError
    per_class: dict[str, ClassMetrics]
    confusion_matrix: list[list[int]]
    """Numbers of images: a row for each true class, a column for each predicted class."""

    review_threshold: float
    coverage: Estimate
    selective_accuracy: Metric
    suspects: list[Suspect]
    model_id: str
    data_digest: str
    engine: str
    arithmetic: str
    """Number format of the model's feature maps."""

    in_float: FloatFigures | None
    """How right the same model is with float weights, if it labels in int8."""

    config: dict[str, Any]
    versions: dict[str, str]
    host: provenance.Host
    evaluated_at: str
    duration_s: float

    def saved(self) -> dict[str, Any]:
        """The content of `metrics.json`: the record without the command and the URLs."""
        return {name: value for name, value in self.to_dict().items() if name not in ("command", "output", "files")}

    def summary(self) -> list[str]:
        """The metrics with their 95 % confidence intervals, and the confusion matrix."""
        (cats_right, cats_wrong), (dogs_wrong, dogs_right) = self.confusion_matrix
        in_float = []
        if self.in_float is not None:
            accuracy = metrics.text(self.in_float["accuracy"], percent=True)
            log_loss = metrics.text(self.in_float["log_loss"])
            in_float = [f"  in float   accuracy {accuracy}, log loss {log_loss}"]
        return [
            f"Evaluated {self.num_images:,} {self.split} images in {self.duration_s:,.1f} s.",
            f"  accuracy   {metrics.text(self.accuracy, percent=True)}",
            f"  balanced   {metrics.text(self.balanced_accuracy, percent=True)}",
            f"  log loss   {metrics.text(self.log_loss)}",
            f"  ECE        {metrics.text(self.expected_calibration_error)}",
            f"  ROC AUC    {metrics.text(self.roc_auc)}",
            f"  cats       {cats_right:,} right, {cats_wrong:,} taken for dogs",
            f"  dogs       {dogs_right:,} right, {dogs_wrong:,} taken for cats",
            *in_float,
            f"Evaluation: {self.output}",
        ]


def evaluate(config: EvaluateConfig) -> EvaluationRecord:
    """Label a split of a dataset as `predict` would, and measure how right the labels are.

    Writes `predictions.parquet`, `confusion.png`, `reliability.png`, `predictions.png` and `metrics.json`. An earlier
    evaluation in the same directory is replaced.

    Raises:
        UsageError: the split holds no images, or the output holds something else.
        DatasetError: the dataset is missing or damaged, or a picture in it cannot be decoded.
        BundleError: the model cannot be used.
    """
    started = time.monotonic()
    output = storage.absolute(config.output)
    _refuse_foreign_output(output)
    info = load_info(config.data)
    if not info.num_images(config.split):
        raise UsageError(f"--split must name a split that holds images. Received: --split={config.split} of {info.url}")
    model = bundle.load(config.model)
    tables, gallery = [], Gallery()
    with load_labeller(model, config.engine, use_gpu=config.use_gpu) as labeller:
        for table, images in label_split(info, config.split, labeller, config.batch_size):
            tables.append(table)
            gallery.add(table, images)
    predictions = pa.concat_tables(tables)
    in_float = None
    if labeller.engine.arithmetic == "int8":
        in_float = _in_float(config, info, model, predictions)

    labels_B = pc.equal(predictions["true_label"], CLASS_NAMES[1]).to_numpy().astype(np.int64)
    prob_dog_B = predictions["prob_dog"].to_numpy()
    needs_review_B = predictions["needs_review"].to_numpy()
    measured = metrics.classification_metrics(labels_B, prob_dog_B)
    files = {name: storage.join(output, name) for name in OUTPUT_NAMES}
    record = EvaluationRecord(
        command="evaluate",
        output=output,
        files=files,
        format=FORMAT,
        split=config.split,
        **measured,
        review_threshold=model.review_threshold(labeller.engine.arithmetic),
        **metrics.review_metrics(labels_B, prob_dog_B, needs_review_B),
        suspects=suspects(predictions),
        model_id=model.model_id,
        data_digest=info.digest,
        engine=labeller.engine.name,
        arithmetic=labeller.engine.arithmetic,
        in_float=in_float,
        config=provenance.configuration(config),
        versions=provenance.versions(),
        host=provenance.host(),
        evaluated_at=datetime.now(UTC).isoformat(timespec="seconds"),
        duration_s=round(time.monotonic() - started, 1),
    )
    figures = {
        CONFUSION_NAME: report.confusion(measured["confusion_matrix"], CLASS_NAMES),
        RELIABILITY_NAME: report.reliability(labels_B, {"Reliability": prob_dog_B}),
        GRID_NAME: gallery.draw(),
    }
    storage.delete(files[METRICS_NAME])  # an earlier one must not lie beside files that it does not describe
    storage.publish_parquet(files[PREDICTIONS_NAME], predictions)
    for name, png in figures.items():
        storage.publish_bytes(files[name], png)
    storage.publish_json(files[METRICS_NAME], record.saved())
    return record


def _in_float(config: EvaluateConfig, info: DatasetInfo, model: bundle.Bundle, predictions: pa.Table) -> FloatFigures:
    """Label the split again, with the model's float weights, and compare the labels with `predictions`."""
    with load_labeller(model, "openvino-float") as labeller:
        tables = [table for table, _ in label_split(info, config.split, labeller, config.batch_size)]
    again = pa.concat_tables(tables)
    labels_B = pc.equal(again["true_label"], CLASS_NAMES[1]).to_numpy().astype(np.int64)
    measured = metrics.classification_metrics(labels_B, again["prob_dog"].to_numpy())
    return FloatFigures(
        arithmetic=labeller.engine.arithmetic,
        accuracy=measured["accuracy"],
        log_loss=measured["log_loss"],
        num_other_labels=pc.sum(pc.not_equal(again["label"], predictions["label"])).as_py(),
    )


def label_split(
    info: DatasetInfo, split: str, labeller: Labeller, batch_size: int
) -> Iterator[tuple[pa.Table, list[bytes]]]:
    """Label a split. Yields rows of `predictions.parquet` and their encoded images, in batches, in the dataset's order.

    Raises:
        DatasetError: a picture cannot be decoded, or a label is not that of a class.
    """
    pending: collections.deque[tuple[pa.RecordBatch, list[bytes], Future[Labelled]]] = collections.deque()
    for batch in iter_split(info, split, ["uri", "image_id", "label", "image"], batch_size=batch_size):
        images = batch["image"].to_pylist()
        labelling = labeller.submit(partial(iter, images), num_bytes=sum(map(len, images)))
        pending.append((batch, images, labelling))
        while pending and (pending[0][2].done() or len(pending) > MAX_PENDING):
            yield _prediction_rows(info, *pending.popleft())
    for each in pending:
        yield _prediction_rows(info, *each)


def _prediction_rows(
    info: DatasetInfo, batch: pa.RecordBatch, images: list[bytes], labelling: "Future[Labelled]"
) -> tuple[pa.Table, list[bytes]]:
    """The rows of `predictions.parquet` for a batch of the dataset, and its encoded images. Waits for the labels."""
    labels = batch["label"].to_pylist()
    if odd := set(labels) - set(range(len(CLASS_NAMES))):
        raise DatasetError(f"a dataset's labels must be 0 (cat) or 1 (dog). Received: {odd.pop()} in {info.url}")
    verdicts = labelling.result().verdicts
    for uri, verdict in zip(batch["uri"].to_pylist(), verdicts, strict=True):
        if verdict.error_code is not None:
            raise DatasetError(
                f"every picture of a dataset must decode. Received: {uri} of {info.url}: "
                f"{verdict.error_code}: {verdict.error_message}"
            )
    columns = {
        "uri": batch["uri"],
        # The id of the original file. If `prepare` encoded the image anew, the verdict has another one.
        "image_id": batch["image_id"],
        "true_label": [CLASS_NAMES[label] for label in labels],
        **{
            name: [getattr(verdict, name) for verdict in verdicts]
            for name in ("label", "prob_dog", "confidence", "needs_review")
        },
    }
    return pa.table(columns, schema=EVALUATION_SCHEMA), images


def suspects(predictions: pa.Table) -> list[Suspect]:
    """The images whose label is most likely to be wrong: the model disagrees, and its confidence is highest."""
    wrong = predictions.filter(pc.not_equal(predictions["true_label"], predictions["label"]))
    ranked = wrong.sort_by([("confidence", "descending"), ("image_id", "ascending")]).slice(0, NUM_SUSPECTS)
    return [
        Suspect(
            uri=row["uri"],
            image_id=row["image_id"],
            true_label=row["true_label"],
            label=row["label"],
            confidence=round(row["confidence"], 6),
        )
        for row in ranked.to_pylist()
    ]


RankedItem = tuple[float, str, report.GridItem]
"""(rank, image id, photograph). Photographs are shown in the order of rank and id."""


class Gallery:
    """Collects the photographs of `predictions.png`: the most confident wrong labels, and right labels drawn at random.

    It holds no more than `NUM_PICTURES` of each kind and one batch at a time.
    """

    def __init__(self) -> None:
        self._num_seen = Counter[bool]()
        self._wrong: list[RankedItem] = []
        self._right: list[RankedItem] = []

    def add(self, table: pa.Table, images: list[bytes]) -> None:
        """Take a batch into account: rows of `EVALUATION_SCHEMA` and their encoded images."""
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
        """Draw the photographs as a PNG."""
        num_wrong, num_images = self._num_seen[False], self._num_seen.total()
        title = f"{num_wrong:,} of {num_images:,} wrong"
        if num_wrong > len(self._wrong):
            title += f": the {len(self._wrong)} surest of them"
        if self._right:
            title += f"; {len(self._right)} of the right ones, at random"
        return report.predictions_grid([item for *_, item in self._wrong + self._right], title)


def _refuse_foreign_output(output: str) -> None:
    """Refuse an output that holds anything but an evaluation, whole, or left by a killed run."""
    names = set(storage.list_names(output))
    if METRICS_NAME in names:
        storage.refuse_foreign_output(output, (METRICS_NAME,), says={"format": FORMAT})
    else:
        storage.refuse_foreign_output(output, OUTPUT_NAMES if names <= set(OUTPUT_NAMES) else ())
