"""The `prepare` job, from start to end.

    1. list     driver: every file, with its label, into the catalogue; slices of it to `_staging/listing/`
    2. scan     Ray Data: each slice read once, images validated and hashed, to `_staging/scan/`
    3. group    driver: duplicates, splits, what is rejected; a plan per chunk of staging parts to `_staging/plan/`
    4. write    Ray Data: each chunk to shards, `train|val|test/part-*.parquet`
    5. finish   driver: `rejects.parquet`, `samples.png`, then `dataset.json`; `_staging/` goes

Until `dataset.json` is there, `_staging/prepare.json` marks the output as ours: the same command starts over, and finds
the slices that were scanned already.
"""

import contextlib
import importlib.metadata
import logging
import time
from collections.abc import Iterator
from operator import itemgetter
from typing import Any, Final

import duckdb
import numpy as np

from catdog import __version__, storage
from catdog.config import PrepareConfig, flag, to_dict
from catdog.dataset import catalog, grouping, outcome, ray_tasks, scan, shards
from catdog.dataset.labels import RULES
from catdog.dataset.reading import FORMAT, FORMAT_VERSION, INFO_NAME, DatasetInfo, load_info, parse_info
from catdog.dataset.samples import sample_grid
from catdog.errors import DatasetError, OutputRefusedError, UsageError
from catdog.ray_session import connect
from catdog.schema import CLASS_NAMES, SPLITS

logger = logging.getLogger(__name__)

STAGING_DIR: Final = "_staging"
MARKER_NAME: Final = "prepare.json"
REJECTS_NAME: Final = "rejects.parquet"
SAMPLES_NAME: Final = "samples.png"

_LOG_EVERY_S: Final = 10.0

_LIBRARIES: Final = ("duckdb", "ImageHash", "numpy", "pillow", "pyarrow", "ray")


class _Stopwatch:
    """Seconds per stage."""

    def __init__(self) -> None:
        self.durations_s: dict[str, float] = {}

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.durations_s[name] = round(time.perf_counter() - start, 3)
        logger.info("%s: %.1f s", name, self.durations_s[name])


def run(config: PrepareConfig) -> dict[str, Any]:
    """Prepare a dataset and return the run record.

    The record holds `listed` = `kept` + `rejected`, `reasons` (files per reason for rejection), `counts` (images per
    split and class), `durations_s` per stage, and `already_done`: the dataset was there, of this configuration and
    listing.

    Raises:
        UsageError: the input cannot be used, or the output holds something else; nothing was written.
        DatasetError: the images do not fill the splits.
        StorageError: a storage failed; the same command goes on where this one stopped.
    """
    output = storage.absolute(config.output)
    staging = storage.join(output, STAGING_DIR)
    done = _finished(output, config)
    watch = _Stopwatch()
    with contextlib.ExitStack() as stack:
        connection = stack.enter_context(catalog.open_catalog())
        with watch.stage("list"):
            catalog.list_collection(connection, config)
            listing_digest = catalog.listing_digest(connection)
        if done:
            _check_listing(done, listing_digest)
            storage.delete(staging)
            return _record(done, watch, already_done=True)
        with watch.stage("stage"):
            num_slices = _start(connection, output, config)
        with watch.stage("start_ray"):
            stack.enter_context(connect(config.ray_address))
        with watch.stage("scan"):
            _scan(connection, num_slices, staging, config)
        with watch.stage("group"):
            grouping.decide(connection)
            try:
                outcome.check_counts(outcome.counts(connection), config)
            except DatasetError:
                storage.delete(staging)
                raise
            num_chunks = shards.write_plans(connection, staging)
        with watch.stage("write"):
            tables = ray_tasks.run(shards.write_chunk, num_chunks, staging_url=staging, output_url=output)
            written = sorted((row for table in tables for row in table.to_pylist()), key=itemgetter("shard"))
        with watch.stage("finish"):
            rejects = outcome.rejects(connection)
            raw = {
                "format": FORMAT,
                "format_version": FORMAT_VERSION,
                "class_names": list(CLASS_NAMES),
                **outcome.summary(connection, rejects),
                **_statistics(written),
                "digest": outcome.digest(connection),
                "listing_digest": listing_digest,
                "config": to_dict(config),
                "versions": {"catdog": __version__, **{name: importlib.metadata.version(name) for name in _LIBRARIES}},
                **outcome.duplicates(connection),
                "parts": _parts(written),
            }
            info = parse_info(output, raw)
            storage.publish_parquet(storage.join(output, REJECTS_NAME), rejects)
            storage.publish_bytes(storage.join(output, SAMPLES_NAME), sample_grid(info))
            storage.publish_json(storage.join(output, INFO_NAME), raw)
            storage.delete(staging)
    return _record(info, watch, already_done=False)


def _finished(output: str, config: PrepareConfig) -> DatasetInfo | None:
    """The dataset that the output holds, of this configuration; None where there is none yet, or half of one."""
    if output.startswith(storage.absolute(config.images) + "/"):
        raise UsageError(f"--output must not lie in --images. Received: --output={output}")
    is_begun = storage.exists(storage.join(output, STAGING_DIR, MARKER_NAME))
    storage.refuse_foreign_output(output, (INFO_NAME, STAGING_DIR) if is_begun else (INFO_NAME,))
    if not storage.exists(storage.join(output, INFO_NAME)):
        return None
    try:
        info = load_info(output)
    except DatasetError as error:
        raise OutputRefusedError(f"--output must be empty, or a dataset of this command. {error}") from error
    before, now = _identity(info.raw["config"]), _identity(to_dict(config))
    changed = [name for name in now if before.get(name) != now[name]]
    if changed:
        was = " ".join(f"{flag(name)}={before.get(name)}" for name in changed)
        received = " ".join(f"{flag(name)}={now[name]}" for name in changed)
        raise OutputRefusedError(
            f"--output must be new for another configuration: {output} was prepared with {was}. Received: {received}"
        )
    return info


def _identity(config: dict[str, Any]) -> dict[str, Any]:
    """What of a configuration decides what the dataset is: not where it lies, nor where it was computed."""
    labels = config["labels"]
    return {
        **{name: value for name, value in config.items() if name not in ("output", "ray_address")},
        "images": storage.absolute(config["images"]),
        "labels": labels if labels in RULES else storage.absolute(labels),
    }


def _check_listing(info: DatasetInfo, listing_digest: str) -> None:
    if info.raw["listing_digest"] != listing_digest:
        raise OutputRefusedError(
            "--output must be new where the images have changed. "
            f"Received: --output={info.url}, prepared from another listing of --images={info.raw['config']['images']}"
        )


def _start(connection: duckdb.DuckDBPyConnection, output: str, config: PrepareConfig) -> int:
    """Mark the output as ours, clear what a killed run left of its shards, stage the listing; the number of slices."""
    staging = storage.join(output, STAGING_DIR)
    storage.publish_json(storage.join(staging, MARKER_NAME), {"format": FORMAT, "config": to_dict(config)})
    for split in SPLITS:
        for name in storage.list_names(storage.join(output, split), ".parquet"):
            if name.startswith("part-"):
                storage.delete(storage.join(output, split, name))
    num_slices = 0
    for num_slices, rows in enumerate(catalog.slices(connection), start=1):
        storage.publish_parquet(storage.join(staging, scan.LISTING_DIR, scan.part_name(num_slices - 1)), rows)
    return num_slices


def _scan(connection: duckdb.DuckDBPyConnection, num_slices: int, staging: str, config: PrepareConfig) -> None:
    """First pass: fill the table `scanned`."""
    grouping.create(connection)
    (num_files,) = catalog.one_row(connection, "SELECT count(*) FROM listing WHERE label IS NOT NULL")
    num_scanned, logged_at = 0, time.monotonic()
    for rows in ray_tasks.run(scan.scan_slice, num_slices, staging_url=staging):
        grouping.add(connection, rows, config)
        num_scanned += rows.num_rows
        if time.monotonic() - logged_at >= _LOG_EVERY_S:
            logged_at = time.monotonic()
            logger.info("scanned %d of %d files", num_scanned, num_files)


def _parts(written: list[dict[str, Any]]) -> dict[str, dict[str, int]]:
    """Rows per shard, by split and file name."""
    parts: dict[str, dict[str, int]] = {split: {} for split in SPLITS}
    for row in written:
        split, name = row["shard"].split("/")
        parts[split][name] = row["num_rows"]
    return parts


def _statistics(written: list[dict[str, Any]]) -> dict[str, list[float]]:
    """Mean and standard deviation per channel over the training images."""
    train = [row for row in written if row["shard"].startswith("train/")]
    weights = [row["num_rows"] for row in train]
    mean, mean_square = (
        np.average([row[name] for row in train], axis=0, weights=weights) for name in scan.MOMENT_COLUMNS
    )
    return {"mean": mean.tolist(), "std": np.sqrt(mean_square - mean**2).tolist()}


def _record(info: DatasetInfo, watch: _Stopwatch, *, already_done: bool) -> dict[str, Any]:
    copied = ("listed", "kept", "rejected", "reasons", "counts", "digest", "config", "versions")
    return {
        "command": "prepare",
        "output": info.url,
        "already_done": already_done,
        **{name: info.raw[name] for name in copied},
        "num_duplicate_groups": len(info.raw["duplicate_groups"]),
        "num_conflicts": len(info.raw["conflicts"]),
        "durations_s": watch.durations_s,
        "images_per_s": round(info.raw["listed"] / max(sum(watch.durations_s.values()), 1e-9), 1),
    }
