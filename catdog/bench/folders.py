"""The folders of measured commands: the pictures that they are given, and what they leave behind."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from catdog import storage
from catdog.errors import ImageError
from catdog.storage import SourceFile
from catdog.storage.urls import split_member

Rows = Mapping[str, tuple[Any, ...]]
"""Of an image by its name or URI: its label, and for ours all that must not depend on the executor."""


def write_pictures(files: Sequence[SourceFile], directory: str) -> dict[str, str]:
    """Write images as files of one folder, as the peers need them. Returns the URI of each by its new name.

    One that cannot be read becomes an empty file.
    """
    os.mkdir(directory)
    uris = {}
    for number, file in enumerate(files):
        member, _ = split_member(file.uri) or (file.uri, "")
        name = f"{number:08d}{Path(member).suffix}"
        try:
            data = storage.read_source(file.uri, file.num_bytes, file.version)
        except ImageError:
            data = b""
        Path(directory, name).write_bytes(data)
        uris[name] = file.uri
    return uris


def rows_of_ours(output: str) -> Rows:
    """What `catdog predict` says of each image."""
    columns = ("label", "prob_dog", "error_code", "image_id")
    found: dict[str, tuple[Any, ...]] = {}
    for name in storage.list_names(output, ".parquet"):
        table = storage.read_parquet(storage.join(output, name), ["uri", *columns])
        found |= {row["uri"]: tuple(row[column] for column in columns) for row in table.to_pylist()}
    return found


def rows_of_peer(output: str) -> Rows:
    """What a peer says of each image."""
    found: dict[str, tuple[Any, ...]] = {}
    for path in Path(output).rglob("*.parquet"):
        for row in storage.read_parquet(str(path), ["name", "prob_dog"]).to_pylist():
            found[row["name"]] = ("dog" if row["prob_dog"] >= 0.5 else "cat",)
    return found


def run_record(output: str) -> dict[str, Any]:
    """The record of the only run in an output of `catdog predict`."""
    runs = storage.join(output, "_runs")
    (name,) = storage.list_names(runs, ".json")
    record: dict[str, Any] = storage.read_json(storage.join(runs, name))
    return record
