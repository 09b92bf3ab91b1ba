"""The `prepare` job, from start to end.

    1. list     The driver lists all files with their labels in the catalogue.
    2. stage    The driver cuts the listing into slices, and writes them to `_staging/listing/`.
    3. scan     Ray tasks read each slice once, check and hash its images, and write them to `_staging/scan/`.
    4. group    The driver finds duplicates, and decides which images are rejected, and which split the others get. It
                writes to `_staging/plan/`, for each chunk of scanned slices, which image goes to which shard.
    5. write    Ray tasks write the shards of each chunk, `train|val|test/part-*.parquet`.
    6. check    The driver reads the shards back, and compares them with what was to be written.
    7. finish   The driver writes `rejects.parquet`, `samples.png` and, last, `dataset.json`, and deletes `_staging/`.

From `stage` on, the run holds a claim of the output (`storage.claimed`), so that no other run writes there. Until
`dataset.json` is written, `_staging/prepare.json` marks the output as one of this command. If the command is killed and
run again, it starts over, but does not scan a slice again that was scanned.
"""

import contextlib
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from operator import itemgetter
from typing import Any, Final

import duckdb
import numpy as np
import pyarrow as pa

from catdog import provenance, records, storage
from catdog.config import PrepareConfig, flag
from catdog.dataset import catalog, check, grouping, outcome, ray_tasks, scan, shards, strata
from catdog.dataset.collection import Collection, list_collection
from catdog.dataset.labels import RULES
from catdog.dataset.reading import FORMAT, FORMAT_VERSION, INFO_NAME, DatasetInfo, iter_split, load_info, parse_info
from catdog.dataset.samples import sample_sheet
from catdog.dataset.split import RULE as SPLIT_RULE
from catdog.errors import DatasetError, OutputRefusedError, UsageError
from catdog.provenance import redact
from catdog.ray_session import connect
from catdog.schema import CLASS_NAMES, SPLITS

logger = logging.getLogger(__name__)

STAGING_DIR: Final = "_staging"
MARKER_NAME: Final = "prepare.json"
REJECTS_NAME: Final = "rejects.parquet"
SAMPLES_NAME: Final = "samples.png"

_LOG_EVERY_S: Final = 10.0


class _Stopwatch:
    """Measures how many seconds each stage takes."""

    def __init__(self) -> None:
        self.durations_s: dict[str, float] = {}

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.durations_s[name] = round(time.perf_counter() - start, 3)
        logger.info("%s: %.1f s", name, self.durations_s[name])


@dataclass(frozen=True, kw_only=True)
class PrepareRecord(records.Record):
    """What a run of `prepare` did."""

    command: str
    output: str
    already_done: bool
    """Whether the dataset, with this configuration and listing, had been prepared before."""

    listed: int
    """Number of files: the sum of `kept` and `rejected`."""

    kept: int
    rejected: int
    reasons: dict[str, int]
    """Reason for rejection → number of files."""

    counts: dict[str, dict[str, int]]
    """Split → class → number of images."""

    digest: str
    config: dict[str, Any]
    versions: dict[str, str]
    num_duplicate_groups: int
    num_conflicts: int
    durations_s: dict[str, float]
    """Stage → seconds."""

    images_per_s: float

    given_splits: dict[str, int] = field(default_factory=dict)
    """Split → number of files that a table or their folders give to it; empty if neither decided."""

    num_remarked: int = 0
    """Number of images that are kept although something is wrong with their files: a JPEG that is cut short."""

    unmatched_label_rows: int | None = None
    """Number of rows of the table of labels that name no listed file, or lack a label; None if there is no table."""

    def summary(self) -> list[str]:
        """The numbers of images that were kept, by split and class, and rejected, by reason."""
        if self.already_done:
            head = f"Nothing to do: the dataset is there, {self.kept:,} of {self.listed:,} files."
        else:
            took = records.rate(sum(self.durations_s.values()), self.images_per_s)
            head = f"Prepared {self.kept:,} of {self.listed:,} files in {took}."
        return [
            head,
            *(f"  {split:<9}{records.counted(counts)}" for split, counts in self.counts.items()),
            f"  rejected {self.rejected:,}" + (f": {records.counted(self.reasons)}" if self.reasons else ""),
            *([f"  damaged  {self.num_remarked:,} of those kept"] if self.num_remarked else []),
            f"  groups   {self.num_duplicate_groups:,} of duplicates, {self.num_conflicts:,} labelled both ways",
            f"Dataset: {self.output}",
        ]


def run(config: PrepareConfig) -> PrepareRecord:
    """Prepare a dataset.

    Raises:
        UsageError: the input cannot be used, the output holds something else, or another run is at work there. Nothing
            was written.
        DatasetError: a split has no images, or the training split none of a class; or what was written is not what was
            to be written.
        StorageError: a storage failed. The same command goes on where this one stopped.
    """
    output = storage.absolute(config.output)
    _finished(output, config)
    watch = _Stopwatch()
    with contextlib.ExitStack() as stack:
        connection = stack.enter_context(catalog.open_catalog())
        grouping.create(connection)
        with watch.stage("list"):
            collection = list_collection(connection, config)
            listing_digest = catalog.listing_digest(connection)
            if config.extends is not None:
                _settle(connection, config.extends)
        claim = stack.enter_context(storage.claimed(output, "prepare"))
        return _prepare(connection, config, collection, listing_digest, claim, watch)


def _prepare(
    connection: duckdb.DuckDBPyConnection,
    config: PrepareConfig,
    collection: Collection,
    listing_digest: str,
    claim: storage.Claim,
    watch: _Stopwatch,
) -> PrepareRecord:
    """Everything that comes after the listing, under the claim of the output."""
    output = storage.absolute(config.output)
    staging = storage.join(output, STAGING_DIR)
    if done := _finished(output, config):
        _check_listing(connection, done, listing_digest)
        storage.delete(staging)
        return _record(done, watch, already_done=True)
    with watch.stage("stage"):
        num_slices = _start(connection, output, config)
    with contextlib.ExitStack() as stack:
        with watch.stage("start_ray"):
            stack.enter_context(connect(config.ray_address))
        with watch.stage("scan"):
            _scan(connection, num_slices, staging, config, collection)
        with watch.stage("group"):
            grouping.decide(connection, config.near_duplicates, partial(scan.read_thumbnails, staging_url=staging))
            strata.fill(connection, config, collection.given)
            counts = outcome.counts(connection)
            try:
                outcome.check_counts(counts, config, collection.given)
            except DatasetError:
                storage.delete(staging)
                raise
            num_chunks = shards.write_plans(connection, staging)
        with watch.stage("write"):
            tables = ray_tasks.run(shards.write_chunk, num_chunks, staging_url=staging, output_url=output)
            written = sorted((row for table in tables for row in table.to_pylist()), key=itemgetter("shard"))
        with watch.stage("check"):
            parts = _parts(written)
            check.check_shards(output, parts, counts)
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
                "content_digest": catalog.content_digest(connection, "scanned"),
                "config": provenance.configuration(config),
                "versions": provenance.versions(),
                **outcome.duplicates(connection),
                "parts": parts,
                "remarks": outcome.remarks(connection),
                "near_duplicates": outcome.near_duplicates(connection),
                "split_rule": SPLIT_RULE,
                "given_splits": collection.given,
                "label_rows": collection.label_rows,
                "unmatched_label_rows": collection.unmatched_label_rows,
            }
            info = parse_info(output, raw)
            claim.check()
            storage.publish_parquet(storage.join(output, REJECTS_NAME), rejects)
            storage.publish_bytes(storage.join(output, SAMPLES_NAME), sample_sheet(info))
            check.check_rejects(storage.join(output, REJECTS_NAME), rejects)
            storage.publish_json(storage.join(output, INFO_NAME), raw)
            check.check_info(output, raw)
            storage.delete(staging)
    return _record(info, watch, already_done=False)


def _settle(connection: duckdb.DuckDBPyConnection, dataset: str) -> None:
    """Fill the table `settled` with the images of a dataset and their splits."""
    info = load_info(dataset)
    for split in SPLITS:
        for batch in iter_split(info, split, ["image_id"], catalog.BATCH_ROWS):
            rows = pa.Table.from_batches([batch])
            catalog.insert(connection, "settled", rows.append_column("split", pa.array([split] * len(rows))))


def _finished(output: str, config: PrepareConfig) -> DatasetInfo | None:
    """The finished dataset that the output holds; None if it holds none, or an unfinished one.

    Raises:
        UsageError: the output lies within the images.
        OutputRefusedError: the output holds something else, or a dataset of another configuration.
    """
    for source in config.sources:
        if not storage.is_inside(output, source):
            continue
        raise UsageError(
            f"--output must not lie inside --images. Received: --images={redact(source)} "
            f"--output={redact(config.output)}"
        )
    is_begun = storage.exists(storage.join(output, STAGING_DIR, MARKER_NAME))
    storage.refuse_foreign_output(output, (INFO_NAME, STAGING_DIR) if is_begun else (INFO_NAME,))
    if not storage.exists(storage.join(output, INFO_NAME)):
        return None
    try:
        info = load_info(output)
    except DatasetError as error:
        raise OutputRefusedError(f"--output must be empty, or hold a dataset of this command. {error}") from error
    before, now = _identity({**_ADDED, **info.raw["config"]}), _identity(provenance.configuration(config))
    changed = [name for name in now if before.get(name) != now[name]]
    if changed:
        was = " ".join(f"{flag(name)}={before.get(name)}" for name in changed)
        received = " ".join(f"{flag(name)}={now[name]}" for name in changed)
        raise OutputRefusedError(
            f"--output must be new for another configuration: {output} was prepared with {was}. Received: {received}"
        )
    return info


_ADDED: Final[dict[str, Any]] = {
    "split": "auto",
    "near_duplicates": "group",
    "extends": None,
    "include": [],
    "exclude": [],
    "class_names": [],
    "uri_column": None,
    "label_column": None,
    "split_column": None,
}
"""What the configurations in the datasets of version 0.1.0 lack, and how these datasets are to be taken."""


def _identity(config: dict[str, Any]) -> dict[str, Any]:
    """The fields of a configuration that decide the content of the dataset: not its place, nor the cluster."""
    labels, extends = config["labels"], config["extends"]
    return {
        **{name: value for name, value in config.items() if name not in ("output", "ray_address")},
        "images": _absolute(config["images"]),
        "labels": labels if labels in RULES else storage.absolute(labels),
        "extends": None if extends is None else storage.absolute(extends),
        "split": "keep" if config["split"] == "folders" else config["split"],  # as it was called before
    }


def _absolute(images: str | Sequence[str]) -> str | list[str]:
    return storage.absolute(images) if isinstance(images, str) else [storage.absolute(each) for each in images]


def _check_listing(connection: duckdb.DuckDBPyConnection, info: DatasetInfo, listing_digest: str) -> None:
    """Check that a finished dataset was made from the files that are listed now.

    Where they have other versions, they are read: a file that was touched, or copied anew, is the same file. The
    dataset then remembers the new versions.
    """
    if info.raw["listing_digest"] == listing_digest:
        return
    if not _holds_the_same(connection, info):
        raise OutputRefusedError(
            "--output must be new where the images have changed. "
            f"Received: --output={info.url}, prepared from another listing of --images={info.raw['config']['images']}"
        )
    storage.publish_json(storage.join(info.url, INFO_NAME), {**info.raw, "listing_digest": listing_digest})


def _holds_the_same(connection: duckdb.DuckDBPyConnection, info: DatasetInfo) -> bool:
    """Whether the files that are listed now hold what those of a dataset held. They are read."""
    (num_listed,) = catalog.one_row(connection, "SELECT count(*) FROM listing")
    if num_listed != info.raw["listed"] or "content_digest" not in info.raw:
        return False
    logger.info("The files have other versions: all %d are read, to see whether they are the same", num_listed)
    connection.execute("CREATE TABLE contents (row BIGINT, content VARCHAR)")
    for files in catalog.slices(connection):
        catalog.insert(connection, "contents", scan.contents(files))
    return bool(catalog.content_digest(connection, "contents") == info.raw["content_digest"])


def _start(connection: duckdb.DuckDBPyConnection, output: str, config: PrepareConfig) -> int:
    """Mark the output as ours, delete shards of a killed run, stage the listing, and return the number of slices."""
    staging = storage.join(output, STAGING_DIR)
    storage.publish_json(
        storage.join(staging, MARKER_NAME), {"format": FORMAT, "config": provenance.configuration(config)}
    )
    for split in SPLITS:
        for name in storage.list_names(storage.join(output, split), ".parquet"):
            if name.startswith("part-"):
                storage.delete(storage.join(output, split, name))
    num_slices = 0
    for num_slices, rows in enumerate(catalog.slices(connection), start=1):
        storage.publish_parquet(storage.join(staging, scan.LISTING_DIR, scan.part_name(num_slices - 1)), rows)
    return num_slices


def _scan(
    connection: duckdb.DuckDBPyConnection,
    num_slices: int,
    staging: str,
    config: PrepareConfig,
    collection: Collection,
) -> None:
    """Scan all slices on the cluster, and fill the table `scanned`."""
    (num_files,) = catalog.one_row(connection, "SELECT count(*) FROM listing WHERE label IS NOT NULL")
    num_scanned, logged_at = 0, time.monotonic()
    for rows in ray_tasks.run(scan.scan_slice, num_slices, staging_url=staging):
        grouping.add(connection, rows, config, collection.given)
        num_scanned += rows.num_rows
        if time.monotonic() - logged_at >= _LOG_EVERY_S:
            logged_at = time.monotonic()
            logger.info("Scanned %d of %d files", num_scanned, num_files)


def _parts(written: list[dict[str, Any]]) -> dict[str, dict[str, int]]:
    """Number of rows of each shard, by split and file name."""
    parts: dict[str, dict[str, int]] = {split: {} for split in SPLITS}
    for row in written:
        split, name = row["shard"].split("/")
        parts[split][name] = row["num_rows"]
    return parts


def _statistics(written: list[dict[str, Any]]) -> dict[str, list[float]]:
    """Mean and standard deviation of the training images' pixels, per channel; of all, if there is nothing to train."""
    train = [row for row in written if row["shard"].startswith("train/")] or written
    weights = [row["num_rows"] for row in train]
    mean, mean_square = (
        np.average([row[name] for row in train], axis=0, weights=weights) for name in scan.MOMENT_COLUMNS
    )
    return {"mean": mean.tolist(), "std": np.sqrt(mean_square - mean**2).tolist()}


def _record(info: DatasetInfo, watch: _Stopwatch, *, already_done: bool) -> PrepareRecord:
    raw = info.raw
    return PrepareRecord(
        command="prepare",
        output=info.url,
        already_done=already_done,
        listed=raw["listed"],
        kept=raw["kept"],
        rejected=raw["rejected"],
        reasons=raw["reasons"],
        counts=raw["counts"],
        digest=raw["digest"],
        config=raw["config"],
        versions=raw["versions"],
        num_duplicate_groups=len(raw["duplicate_groups"]),
        num_conflicts=len(raw["conflicts"]),
        durations_s=watch.durations_s,
        images_per_s=round(raw["listed"] / max(sum(watch.durations_s.values()), 1e-9), 1),
        given_splits=dict(raw.get("given_splits", {})),
        num_remarked=len(raw.get("remarks", {})),
        unmatched_label_rows=raw.get("unmatched_label_rows"),
    )
