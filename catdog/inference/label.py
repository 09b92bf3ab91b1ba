"""Encoded images to rows of predictions: the one labelling path of every executor, and of evaluation.

Shapes: `B` images in the batch, `H` = `W` = the bundle's image size, `C` = 3 (RGB).
"""

import hashlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from catdog.bundle import Bundle
from catdog.engines import Engine
from catdog.errors import BundleError, ImageError
from catdog.images import decode
from catdog.schema import CLASS_NAMES, PREDICTIONS_SCHEMA
from catdog.storage import SourceFile

_MESSAGE_CHARS: Final = 300


@dataclass(frozen=True)
class DecodedBatch:
    """Images on their way to the model.

    Attributes:
        rows: one per file, in order, less what the model says.
        pixels_BHWC: uint8, of the rows whose status is `ok`.
    """

    rows: list[dict[str, Any]]
    pixels_BHWC: npt.NDArray[np.uint8]  # noqa: N815


class Labeller:
    """Labels images with one bundle. Thread-safe.

    A row depends on its image alone: not on the others in its batch, nor on who labels it.
    """

    def __init__(self, bundle: Bundle, engine: Engine, batch_size: int, run_id: str = "") -> None:
        """Label with `engine`, which computes `bundle`, up to `batch_size` images per call."""
        self.batch_size = batch_size
        self._bundle = bundle
        self._engine = engine
        self._run_id = run_id

    def label_bytes(self, files: Sequence[SourceFile], contents: Iterable[bytes | ImageError]) -> pa.Table:
        """Rows of images whose bytes, or why there are none, are at hand; `PREDICTIONS_SCHEMA`, in the same order."""
        remaining = iter(contents)
        batches = (self.decode(batch, remaining) for batch in self.batches(files))
        return pa.concat_tables([PREDICTIONS_SCHEMA.empty_table(), *map(self.score, batches)])

    def batches(self, files: Sequence[SourceFile]) -> Iterator[Sequence[SourceFile]]:
        """Files in the portions that `decode` and `score` take."""
        for start in range(0, len(files), self.batch_size):
            yield files[start : start + self.batch_size]

    def decode(self, files: Sequence[SourceFile], contents: Iterable[bytes | ImageError]) -> DecodedBatch:
        """Decode one batch, image by image. Takes only as many of `contents` as there are files."""
        size = self._bundle.image_size
        pixels_BHWC = np.empty((len(files), size, size, 3), np.uint8)
        rows = []
        num_decoded = 0
        for file, content in zip(files, itertools.islice(contents, len(files)), strict=True):
            row: dict[str, Any] = {
                "uri": file.uri,
                "source_version": file.version,
                "num_bytes": file.num_bytes,
                "model_id": self._bundle.model_id,
                "run_id": self._run_id,
            }
            try:
                if isinstance(content, ImageError):
                    raise content
                row |= {"image_id": hashlib.sha256(content).hexdigest(), "num_bytes": len(content)}
                image = decode(content, size)
            except ImageError as error:
                row |= {"status": "error", "error_code": error.code, "error_message": _one_line(error)}
            else:
                row |= {"status": "ok", "width": image.width, "height": image.height}
                pixels_BHWC[num_decoded] = image.pixels_HWC
                num_decoded += 1
            rows.append(row)
        return DecodedBatch(rows, pixels_BHWC[:num_decoded])

    def score(self, batch: DecodedBatch) -> pa.Table:
        """Rows of one batch, in `PREDICTIONS_SCHEMA`.

        Raises:
            BundleError: the model gives something that is not a number.
        """
        if len(batch.pixels_BHWC):
            logits_B = self._engine.predict(batch.pixels_BHWC)
            decoded = [row for row in batch.rows if row["status"] == "ok"]
            for row, verdict in zip(decoded, self._verdicts(logits_B), strict=True):
                row |= verdict
        now = datetime.now(UTC)
        for row in batch.rows:
            row["predicted_at"] = now
        return pa.Table.from_pylist(batch.rows, schema=PREDICTIONS_SCHEMA)

    def _verdicts(self, logits_B: npt.NDArray[np.float32]) -> Iterator[dict[str, Any]]:
        if not np.isfinite(logits_B).all():
            raise BundleError(f"{self._bundle.url}: the model must give numbers. Received: {logits_B}")
        scaled_B = logits_B.astype(np.float64) / self._bundle.temperature
        # sigmoid(x) = exp(-log(1 + exp(-x))), which keeps its digits at both ends.
        prob_dog_B = np.exp(-np.logaddexp(0, -scaled_B)).astype(np.float32)
        prob_cat_B = np.exp(-np.logaddexp(0, scaled_B)).astype(np.float32)
        for prob_dog, prob_cat in zip(prob_dog_B.tolist(), prob_cat_B.tolist(), strict=True):
            is_dog = prob_dog >= prob_cat
            confidence = prob_dog if is_dog else prob_cat
            yield {
                "label": CLASS_NAMES[is_dog],
                "prob_dog": prob_dog,
                "confidence": confidence,
                "needs_review": confidence < self._bundle.review_threshold,
            }


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())[:_MESSAGE_CHARS]
    return text.encode("utf-8", "backslashreplace").decode("utf-8")  # a file name may not be UTF-8
