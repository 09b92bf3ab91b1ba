"""What a run finds in its rows beside their numbers: how sure the model is, which photographs to look at, a checksum.

A worker sums up the rows of each slice, and the driver adds the sums up. So nothing is read again at the end of a run,
and nothing grows with its rows.
"""

import bisect
import hashlib
import heapq
import math
from typing import Any, Final, TypedDict

import pyarrow as pa

from catdog.schema import CLASS_NAMES

CONFIDENCE_EDGES: Final = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 0.999, 1.0)
"""Edges of the bins of a histogram of confidence. A good model is mostly above 99 %, so the bins get narrower there."""

NUM_UNCERTAIN: Final = 12
"""How many of the photographs with the least confidence are kept."""

NUM_NEITHER: Final = 12
"""How many of the photographs are kept that show neither animal."""

NUM_ERRORS: Final = 3
"""How many examples of each error are kept."""


class Example(TypedDict):
    """A row to show."""

    uri: str
    source_version: str
    num_bytes: int | None
    label: str | None
    confidence: float | None
    text: str | None
    """What was wrong with it."""


class Findings(TypedDict):
    """What was found in some rows of a run. Plain JSON values: a worker sends them to the driver."""

    confidence: dict[str, list[int]]
    """Label → number of rows in each bin of `CONFIDENCE_EDGES`."""

    judged: int
    """Number of labels that count for the accuracy to be expected: those of photographs that show a cat or a dog."""

    confidence_sum: float
    """Sum of the confidences of those labels: the number of them that are right, if the model is calibrated."""

    confidence_variance: float
    """Sum of c (1 - c) over the confidences c of those labels: the variance of the number of them that are right."""

    review_reasons: dict[str, int]
    """Review reason → number of rows."""

    checksum: int
    """Sum over all labels of a number that depends on the image and what was said of it (`_row_number`), modulo 2^64.
    It does not depend on the order of the rows, nor on the files in which they lie."""

    uncertain: list[Example]
    """The photographs with the least confidence, the least first."""

    neither: list[Example]
    """Some photographs that show neither animal, always the same of the same rows."""

    errors: dict[str, list[Example]]
    """Error code → some of its rows."""


def nothing() -> Findings:
    """The findings of no rows."""
    return Findings(
        confidence={name: [0] * (len(CONFIDENCE_EDGES) - 1) for name in CLASS_NAMES},
        judged=0,
        confidence_sum=0.0,
        confidence_variance=0.0,
        review_reasons={},
        checksum=0,
        uncertain=[],
        neither=[],
        errors={},
    )


_READ: Final = (
    *("uri", "source_version", "num_bytes", "label", "confidence", "error_message"),
    *("image_id", "prob_dog", "error_code", "model_id"),
)


def findings(rows: pa.Table) -> Findings:
    """What is found in rows of `PREDICTIONS_SCHEMA`."""
    found = nothing()
    columns = [*_READ, *(["review_reason"] if "review_reason" in rows.column_names else [])]
    for row in rows.select(columns).to_pylist():
        confidence, reason = row["confidence"], row.get("review_reason")
        if row["error_code"] is not None:
            found["errors"].setdefault(row["error_code"], []).append(_example(row))
            continue
        found["confidence"][row["label"]][_bin(confidence)] += 1
        found["checksum"] += _row_number(row)
        if reason is not None:
            found["review_reasons"][reason] = found["review_reasons"].get(reason, 0) + 1
        if reason == "neither":
            found["neither"].append(_example(row))
            continue
        found["judged"] += 1
        found["confidence_sum"] += confidence
        found["confidence_variance"] += confidence * (1 - confidence)
        found["uncertain"].append(_example(row))
    _cut(found)
    return found


def add(total: Findings, more: Findings) -> None:
    """Add the findings of further rows to `total`."""
    for name, counts in more["confidence"].items():
        total["confidence"][name] = [a + b for a, b in zip(total["confidence"][name], counts, strict=True)]
    total["judged"] += more["judged"]
    total["confidence_sum"] += more["confidence_sum"]
    total["confidence_variance"] += more["confidence_variance"]
    for reason, count in more["review_reasons"].items():
        total["review_reasons"][reason] = total["review_reasons"].get(reason, 0) + count
    total["checksum"] += more["checksum"]
    total["uncertain"] += more["uncertain"]
    total["neither"] += more["neither"]
    for code, examples in more["errors"].items():
        total["errors"].setdefault(code, []).extend(examples)
    _cut(total)


def _cut(found: Findings) -> None:
    """Keep of the examples only those that are shown, and of the checksum its lower 64 bits."""
    found["checksum"] %= 2**64
    found["uncertain"] = heapq.nsmallest(NUM_UNCERTAIN, found["uncertain"], key=_doubt)
    found["neither"] = heapq.nsmallest(NUM_NEITHER, found["neither"], key=_draw)
    for code, examples in found["errors"].items():
        found["errors"][code] = heapq.nsmallest(NUM_ERRORS, examples, key=lambda each: each["uri"])


def _bin(confidence: float) -> int:
    """The bin of a confidence: each has its lower edge, and the last one also its upper edge."""
    return min(max(bisect.bisect_right(CONFIDENCE_EDGES, confidence) - 1, 0), len(CONFIDENCE_EDGES) - 2)


def _example(row: dict[str, Any]) -> Example:
    return Example(
        uri=row["uri"],
        source_version=row["source_version"],
        num_bytes=row["num_bytes"],
        label=row["label"],
        confidence=row["confidence"],
        text=row["error_message"],
    )


def _doubt(example: Example) -> tuple[float, str]:
    return example["confidence"] or 0.0, example["uri"]


def _draw(example: Example) -> bytes:
    """A number that has nothing to do with the photograph, so that the first few by it are a fair sample."""
    return hashlib.md5(example["uri"].encode(), usedforsecurity=False).digest()


ROW_NUMBER_SQL: Final = (
    "md5_number_lower(concat_ws(chr(9), uri, source_version, coalesce(image_id, ''), label, "
    "floor(prob_dog::DOUBLE * 1e9)::BIGINT, model_id))"
)
"""`_row_number` in DuckDB's SQL, over columns of the predictions."""


def _row_number(row: dict[str, Any]) -> int:
    """The lower half of the MD5 of what identifies a label, as a number."""
    what = (row["uri"], row["source_version"], row["image_id"] or "", row["label"])
    text = "\t".join([*what, str(math.floor(row["prob_dog"] * 1e9)), row["model_id"]])
    return int.from_bytes(hashlib.md5(text.encode(), usedforsecurity=False).digest()[8:], "little")
