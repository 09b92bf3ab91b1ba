"""Class order, error codes, and the versioned schemas of datasets and predictions.

The metadata of a Parquet file holds the name and version of its schema under `catdog.schema`, as `predictions/1`. A
file without that entry counts as version 1: the first files were written without it. To add a column, make it nullable
and increase the version.
"""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, Final

import numpy as np
import pyarrow as pa

CLASS_NAMES: Final = ("cat", "dog")
"""Class order. The model's one logit is that of class 1, `dog`."""

ERROR_CODES: Final = (
    "not_found",  # listed, but gone when it was read
    "permission_denied",
    "unreachable",  # on a storage that is not the job's own, and kept failing; or where the disk is damaged
    "empty_file",
    "unsupported_format",  # not an image, or one in a format or pixel mode that catdog does not read
    "truncated",
    "too_large",  # more pixels or bytes than the limits in catdog.images and catdog.storage
    "decode_failed",
    "decoder_died",  # the process that decoded it crashed, or ran out of memory
)
"""The reasons why an image has no label. The list is closed, so that programs may branch on its codes."""

REVIEW_REASONS: Final = (
    "damaged",  # pixels of the file are missing
    "neither",  # it looks like neither a cat nor a dog
    "unsure",  # the confidence is below the review threshold
)
"""The reasons why a person should look at a label. Of several that hold, the first one is given."""

REJECT_REASONS: Final = (*ERROR_CODES, "not_an_image", "exact_duplicate", "near_duplicate", "conflicting_label")
"""The reasons why a listed file is not in a dataset's shards."""

SPLITS: Final = ("train", "val", "test")

_VERSION_KEY: Final = b"catdog.schema"


def versioned(name: str, version: int, fields: list[pa.Field]) -> pa.Schema:
    """A schema whose metadata holds its name and version."""
    return pa.schema(fields, metadata={_VERSION_KEY: f"{name}/{version}"})


def check(found: pa.Schema, expected: pa.Schema) -> None:
    """Check that the schema of a file is `expected`, or an earlier version of it.

    Raises:
        ValueError: it is neither. The message says what differs.
    """
    name, version = _version_of(expected)
    found_name, found_version = _version_of(found, default=name)
    if found_name != name or found_version > version:
        raise ValueError(f"it is {found_name}/{found_version}, and this catdog reads {name}/1 to {name}/{version}")
    for field in expected:
        if field.name in found.names:
            if found.field(field.name).type != field.type:
                raise ValueError(f"its column {field.name} is {found.field(field.name).type}, not {field.type}")
        elif found_version == version or not field.nullable:
            raise ValueError(f"it lacks the column {field.name}")
    if extra := set(found.names) - set(expected.names):
        raise ValueError(f"it has the unknown column {min(extra)}")


def conformed(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """A table from a checked file, with exactly the columns of `schema`. A column that the file lacks is null."""
    for field in schema:
        if field.name not in table.schema.names:
            table = table.append_column(field, pa.nulls(len(table), field.type))
    return table.select(schema.names).cast(schema)


def _version_of(schema: pa.Schema, default: str = "") -> tuple[str, int]:
    """(name, version) from the metadata of a schema; (`default`, 1) where the metadata has neither."""
    name, _, version = (schema.metadata or {}).get(_VERSION_KEY, f"{default}/1".encode()).decode().rpartition("/")
    return name, int(version)


DATASET_SCHEMA: Final = versioned(
    "dataset",
    1,
    [
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("uri", pa.string(), nullable=False),
        pa.field("label", pa.int8(), nullable=False),
        pa.field("image", pa.binary(), nullable=False),
        pa.field("width", pa.int32(), nullable=False),
        pa.field("height", pa.int32(), nullable=False),
    ],
)
"""`train|val|test/part-*.parquet`: `label` is an index into `CLASS_NAMES`; `image` is an encoded, upright RGB image."""

REJECTS_SCHEMA: Final = versioned(
    "rejects",
    1,
    [
        pa.field("uri", pa.string(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
        pa.field("message", pa.string(), nullable=False),
    ],
)
"""`rejects.parquet`: `reason` is one of `REJECT_REASONS`."""

PREDICTIONS_SCHEMA: Final = versioned(
    "predictions",
    3,
    [
        pa.field("uri", pa.string(), nullable=False),
        pa.field("image_id", pa.string()),
        pa.field("source_version", pa.string(), nullable=False),
        pa.field("label", pa.string()),
        pa.field("prob_dog", pa.float32()),
        pa.field("confidence", pa.float32()),
        pa.field("needs_review", pa.bool_()),
        pa.field("review_reason", pa.string()),  # since version 3
        pa.field("status", pa.string(), nullable=False),
        pa.field("error_code", pa.string()),
        pa.field("error_message", pa.string()),
        pa.field("remark", pa.string()),  # since version 2
        pa.field("width", pa.int32()),
        pa.field("height", pa.int32()),
        pa.field("num_bytes", pa.int64()),
        pa.field("model_id", pa.string(), nullable=False),
        pa.field("run_id", pa.string(), nullable=False),
        pa.field("predicted_at", pa.timestamp("us", tz="UTC"), nullable=False),
    ],
)
"""`OUTPUT/part-*.parquet`: one row per image; `status` is `ok` or `error`, `review_reason` one of `REVIEW_REASONS`."""

_PREDICTIONS_SINCE: Final = {"remark": 2, "review_reason": 3}
"""Columns that the first version of the predictions did not have → the version that brought them."""

PLAN_SCHEMA: Final = versioned(
    "plan",
    1,
    [
        pa.field("part", pa.string(), nullable=False),
        pa.field("position", pa.int64(), nullable=False),
        pa.field("uri", pa.string(), nullable=False),
        pa.field("version", pa.string(), nullable=False),
        pa.field("num_bytes", pa.int64(), nullable=False),
        pa.field("known", pa.list_(pa.string()), nullable=False),
        pa.field("is_retry", pa.bool_(), nullable=False),
        pa.field("model_id", pa.string(), nullable=False),
    ],
)
"""`OUTPUT/_runs/<run_id>.plan-*.parquet`: a row for each image of a plan, slice by slice. `catdog.inference.plan.Slice`
says what the columns mean; `position` is the place of the image in its slice."""

INDEX_SCHEMA: Final = versioned(
    "index",
    1,
    [
        pa.field("uri", pa.string(), nullable=False),
        pa.field("source_version", pa.string(), nullable=False),
        pa.field("model_id", pa.string(), nullable=False),
        pa.field("error_code", pa.string()),
        pa.field("content", pa.string()),
        pa.field("part", pa.string(), nullable=False),
        pa.field("part_version", pa.string(), nullable=False),
    ],
)
"""`OUTPUT/_index/*.parquet`: a row for each row of the part files, sorted by uri (`catdog.inference.plan.index`)."""

TRIALS_SCHEMA: Final = versioned(
    "trials",
    1,
    [
        pa.field("trial", pa.int32(), nullable=False),
        pa.field("status", pa.string(), nullable=False),
        pa.field("learning_rate", pa.float64(), nullable=False),
        pa.field("weight_decay", pa.float64(), nullable=False),
        pa.field("label_smoothing", pa.float64(), nullable=False),
        pa.field("augment_strength", pa.float64(), nullable=False),
        pa.field("min_area", pa.float64(), nullable=False),
        pa.field("image_size", pa.int32(), nullable=False),
        pa.field("batch_size", pa.int32(), nullable=False),
        pa.field("depth", pa.int32()),
        pa.field("width", pa.float64()),
        pa.field("head_epochs", pa.int32(), nullable=False),
        pa.field("epochs", pa.int32(), nullable=False),
        pa.field("val_accuracy", pa.float64()),
        pa.field("val_log_loss", pa.float64()),
        pa.field("started_s", pa.float64(), nullable=False),
        pa.field("duration_s", pa.float64(), nullable=False),
        pa.field("error", pa.string()),
    ],
)
"""`trials.parquet`: a row for each trial of a search, with all the settings that it trained with."""


def predictions_with(columns: Sequence[str]) -> pa.Schema:
    """`PREDICTIONS_SCHEMA` in the version that has these of its columns."""
    version = max((since for name, since in _PREDICTIONS_SINCE.items() if name in columns), default=1)
    fields = [field for field in PREDICTIONS_SCHEMA if _PREDICTIONS_SINCE.get(field.name, 1) <= version]
    return versioned("predictions", version, fields)


_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND: Final = timedelta(microseconds=1)


def table_of(rows: Sequence[Mapping[str, Any]], schema: pa.Schema) -> pa.Table:
    """The same table as `pyarrow.Table.from_pylist`, which imports pandas if it is installed: a quarter of a second.

    Args:
        rows: a value, or None, for every field.
        schema: its types are strings, numbers, booleans, and microseconds in UTC.
    """
    return table_of_columns([[row[field.name] for row in rows] for field in schema], schema)


def table_of_columns(columns: Sequence[list[Any]], schema: pa.Schema) -> pa.Table:
    """As `table_of`, from a list of values, or None, for every field."""
    arrays = [_column(values, field.type) for values, field in zip(columns, schema, strict=True)]
    return pa.Table.from_arrays(arrays, schema=schema)


def _column(values: list[Any], data_type: pa.DataType) -> pa.Array:
    is_valid = np.array([value is not None for value in values], bool)
    bitmap = None if is_valid.all() else pa.py_buffer(np.packbits(is_valid, bitorder="little"))
    if pa.types.is_string(data_type):
        encoded = [b"" if value is None else value.encode() for value in values]
        offsets = np.cumsum([0, *map(len, encoded)], dtype=np.int32)
        return pa.Array.from_buffers(
            data_type, len(values), [bitmap, pa.py_buffer(offsets), pa.py_buffer(b"".join(encoded))]
        )
    if pa.types.is_boolean(data_type):
        data = np.packbits(np.array(values, bool), bitorder="little")
    elif pa.types.is_timestamp(data_type):
        data = np.array([0 if value is None else (value - _EPOCH) // _MICROSECOND for value in values], np.int64)
    else:
        data = np.array([0 if value is None else value for value in values], data_type.to_pandas_dtype())
    return pa.Array.from_buffers(data_type, len(values), [bitmap, pa.py_buffer(data)])
