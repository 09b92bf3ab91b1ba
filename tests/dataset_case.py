"""What tests that write a dataset by hand share, without `prepare` and its Ray."""

import hashlib
import io
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
from PIL import Image

from catdog import storage
from catdog.schema import CLASS_NAMES, DATASET_SCHEMA, SPLITS

Row = dict[str, Any]


def row_of(image: bytes, uri: str, label: int) -> Row:
    width, height = Image.open(io.BytesIO(image)).size
    image_id = hashlib.sha256(image).hexdigest()
    return {"image_id": image_id, "uri": uri, "label": label, "image": image, "width": width, "height": height}


def write_splits(url: str, splits: Mapping[str, Sequence[list[Row]]]) -> str:
    """A dataset with these shards in its splits, and nothing in those that are not named."""
    counts = {split: dict.fromkeys(CLASS_NAMES, 0) for split in SPLITS}
    parts: dict[str, dict[str, int]] = {split: {} for split in SPLITS}
    for split, shards in splits.items():
        for index, rows in enumerate(shards):
            name = f"part-{index:05}.parquet"
            storage.publish_parquet(storage.join(url, split, name), pa.Table.from_pylist(rows, schema=DATASET_SCHEMA))
            parts[split][name] = len(rows)
            for row in rows:
                counts[split][CLASS_NAMES[row["label"] != 0]] += 1
    info = {
        "format": "catdog-dataset",
        "format_version": 1,
        "class_names": [*CLASS_NAMES],
        "counts": counts,
        "parts": parts,
        "mean": [128.0, 128.0, 128.0],
        "std": [64.0, 64.0, 64.0],
        "digest": "0123",
    }
    storage.publish_json(storage.join(url, "dataset.json"), info)
    return url
