"""Second pass, on the workers: staged images to the shards of their splits.

A chunk is a number of staging parts from all over the collection. Its plan, which the driver writes, says which of
their rows go to which shard; its task reads every part once, and no task needs what another one holds. Inside a shard,
images stand in the order of `image_id`, which is that of a hash: the classes are mixed.
"""

import tempfile
from collections import Counter
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, Final

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from catdog import storage
from catdog.dataset import catalog, scan
from catdog.schema import DATASET_SCHEMA

PLAN_DIR: Final = "plan"

SHARD_ROWS: Final = 2048
SHARD_BYTES: Final = 64 * 2**20
"""A shard ends where it has so many images, or reaches so many bytes of them."""

ROW_GROUP_ROWS: Final = 256
"""What a reader of a part of a shard gets at once: some 10 MB of photographs."""

CHUNK_ROWS: Final = 10 * SHARD_ROWS
CHUNK_BYTES: Final = 10 * SHARD_BYTES
"""A chunk ends likewise: a split that gets a tenth of the images fills one shard from each."""

PLAN_SCHEMA: Final = pa.schema(
    [
        pa.field("part", pa.string(), nullable=False),
        pa.field("row", pa.int64(), nullable=False),
        pa.field("shard", pa.string(), nullable=False),
    ]
)
"""`_staging/plan/*.parquet`: `row` of the staging part `part` goes to `shard`: `train/part-00000.parquet`, ..."""

SHARDS_SCHEMA: Final = pa.schema(
    [
        pa.field("shard", pa.string(), nullable=False),
        pa.field("num_rows", pa.int64(), nullable=False),
        *(pa.field(name, pa.list_(pa.float64(), 3), nullable=False) for name in scan.MOMENT_COLUMNS),
    ]
)
"""What the driver gets to know of each shard that was written; its moments are averaged over its images."""


def write_plans(connection: duckdb.DuckDBPyConnection, staging_url: str) -> int:
    """Write the plan of every chunk, from the table `fates`; the number of chunks."""
    _assign_chunks(connection)
    query = (
        "SELECT chunk, split, part, row, image_bytes FROM fates JOIN chunks USING (part) "
        "WHERE split IS NOT NULL ORDER BY chunk, split, image_id"
    )
    images = (image for batch in catalog.stream(connection, query) for image in batch.to_pylist())
    num_shards = Counter[str]()
    num_chunks = 0
    for chunk, images_of_chunk in groupby(images, itemgetter("chunk")):
        plan: list[dict[str, Any]] = []
        for split, images_of_split in groupby(images_of_chunk, itemgetter("split")):
            for run in catalog.runs(images_of_split, lambda i: (1, i["image_bytes"]), SHARD_ROWS, SHARD_BYTES):
                shard = f"{split}/part-{num_shards[split]:05d}.parquet"
                num_shards[split] += 1
                plan += [{"part": image["part"], "row": image["row"], "shard": shard} for image in run]
        url = storage.join(staging_url, PLAN_DIR, scan.part_name(chunk))
        storage.publish_parquet(url, pa.Table.from_pylist(plan, schema=PLAN_SCHEMA))
        num_chunks += 1
    return num_chunks


def _assign_chunks(connection: duckdb.DuckDBPyConnection) -> None:
    """Make the table `chunks(part, chunk)`. A hash draws the parts of a chunk: listings tend to go class by class."""
    parts = connection.execute(
        "SELECT part, count(*), sum(image_bytes) FROM fates WHERE split IS NOT NULL GROUP BY part ORDER BY md5(part)"
    ).fetchall()
    chunks = enumerate(catalog.runs(parts, lambda part: part[1:], CHUNK_ROWS, CHUNK_BYTES))
    rows = [{"part": part, "chunk": chunk} for chunk, run in chunks for part, *_ in run]
    connection.execute("CREATE TABLE chunks (part VARCHAR, chunk BIGINT)")
    catalog.insert(connection, "chunks", pa.Table.from_pylist(rows))


def write_chunk(index: int, staging_url: str, output_url: str) -> pa.Table:
    """Write the shards of one chunk; `SHARDS_SCHEMA` rows, one per shard."""
    plan = storage.read_parquet(storage.join(staging_url, PLAN_DIR, scan.part_name(index)))
    shards = sorted(pc.unique(plan["shard"]).to_pylist())
    # A chunk's images would fill the memory of a small machine: they are sorted into one local file per shard.
    with tempfile.TemporaryDirectory(prefix="catdog-prepare-") as directory:
        paths = {shard: str(Path(directory, f"{number}.arrow")) for number, shard in enumerate(shards)}
        _distribute(plan, storage.join(staging_url, scan.SCAN_DIR), paths)
        return pa.Table.from_pylist(
            [_write_shard(shard, path, output_url) for shard, path in paths.items()], schema=SHARDS_SCHEMA
        )


def _distribute(plan: pa.Table, scan_url: str, paths: dict[str, str]) -> None:
    columns = [*DATASET_SCHEMA.names, *scan.MOMENT_COLUMNS]
    schema = pa.schema([scan.SCAN_SCHEMA.field(name) for name in columns])
    sinks = {shard: pa.ipc.new_stream(path, schema) for shard, path in paths.items()}
    for part in sorted(pc.unique(plan["part"]).to_pylist()):
        planned = plan.filter(pc.equal(plan["part"], part))
        staged = storage.read_parquet(storage.join(scan_url, part), columns=["row", *columns])
        images = staged.take(pc.index_in(planned["row"], staged["row"].combine_chunks())).select(columns)
        for shard in pc.unique(planned["shard"]).to_pylist():
            sinks[shard].write_table(images.filter(pc.equal(planned["shard"], shard)))
    for sink in sinks.values():
        sink.close()


def _write_shard(shard: str, path: str, output_url: str) -> dict[str, Any]:
    with pa.memory_map(path) as file:
        images = pa.ipc.open_stream(file).read_all().sort_by("image_id")
    rows = images.select(DATASET_SCHEMA.names).cast(DATASET_SCHEMA)
    storage.publish_parquet(storage.join(output_url, shard), rows, row_group_rows=ROW_GROUP_ROWS)
    moments = {name: np.mean(images[name].to_pylist(), axis=0).tolist() for name in scan.MOMENT_COLUMNS}
    return {"shard": shard, "num_rows": images.num_rows, **moments}
