"""Class order, error codes and the schema of every Parquet file that catdog writes."""

from typing import Final

import pyarrow as pa

CLASS_NAMES: Final = ("cat", "dog")
"""Class order. The model's one logit is that of class 1, `dog`."""

ERROR_CODES: Final = (
    "not_found",  # listed, but gone when it was read
    "permission_denied",
    "empty_file",
    "unsupported_format",  # not an image, or one in a format or pixel mode that catdog does not read
    "truncated",
    "too_large",  # more pixels or bytes than the limits in catdog.images and catdog.storage
    "decode_failed",
)
"""Why an image has no label. A closed list: consumers may switch on it."""

REJECT_REASONS: Final = (*ERROR_CODES, "exact_duplicate", "conflicting_label")
"""Why an image is not in a dataset's shards."""

SPLITS: Final = ("train", "val", "test")

DATASET_SCHEMA: Final = pa.schema(
    [
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("uri", pa.string(), nullable=False),
        pa.field("label", pa.int8(), nullable=False),
        pa.field("image", pa.binary(), nullable=False),
        pa.field("width", pa.int32(), nullable=False),
        pa.field("height", pa.int32(), nullable=False),
    ]
)
"""`train|val|test/part-*.parquet`: `label` is an index into `CLASS_NAMES`; `image` is an encoded, upright RGB image."""

REJECTS_SCHEMA: Final = pa.schema(
    [
        pa.field("uri", pa.string(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
        pa.field("message", pa.string(), nullable=False),
    ]
)
"""`rejects.parquet`: `reason` is one of `REJECT_REASONS`."""

PREDICTIONS_SCHEMA: Final = pa.schema(
    [
        pa.field("uri", pa.string(), nullable=False),
        pa.field("image_id", pa.string()),
        pa.field("source_version", pa.string(), nullable=False),
        pa.field("label", pa.string()),
        pa.field("prob_dog", pa.float32()),
        pa.field("confidence", pa.float32()),
        pa.field("needs_review", pa.bool_()),
        pa.field("status", pa.string(), nullable=False),
        pa.field("error_code", pa.string()),
        pa.field("error_message", pa.string()),
        pa.field("width", pa.int32()),
        pa.field("height", pa.int32()),
        pa.field("num_bytes", pa.int64()),
        pa.field("model_id", pa.string(), nullable=False),
        pa.field("run_id", pa.string(), nullable=False),
        pa.field("predicted_at", pa.timestamp("us", tz="UTC"), nullable=False),
    ]
)
"""`OUTPUT/part-*.parquet`: one row per image; `status` is `ok` or `error`."""
