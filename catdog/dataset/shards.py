"""The tasks of the stage `write`: each writes the staged images of one chunk to shards.

A chunk is a set of staging parts from all over the collection. The driver writes a plan for each chunk, which says
which rows of these parts go to which shard. The chunk's task reads each of its parts once, and no part that another
task reads. The images of a shard are in the order of `image_id`, which is a hash, so that the classes are mixed.
"""

from collections import Counter
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, Final

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from catdog import scratch, storage
from catdog.dataset import catalog, scan
from catdog.portions import portions
from catdog.schema import DATASET_SCHEMA

PLAN_DIR: Final = "plan"

SHARD_ROWS: Final = 2048
SHARD_BYTES: Final = 64 * 2**20
"""Size of a shard: it ends as soon as it has that many images, or that many bytes of them."""

ROW_GROUP_ROWS: Final = 256
"""Rows that are read together when only some rows of a shard are needed: about 10 MB of photographs."""

CHUNK_ROWS: Final = 10 * SHARD_ROWS
CHUNK_BYTES: Final = 10 * SHARD_BYTES
"""Size of a chunk: it ends as soon as it reaches either limit. A split with a tenth of the images gets about one full
shard from each chunk."""

PLAN_SCHEMA: Final = pa.schema(
    [
        pa.field("part", pa.string(), nullable=False),
        pa.field("row", pa.int64(), nullable=False),
        pa.field("shard", pa.string(), nullable=False),
    ]
)
"""`_staging/plan/*.parquet`: the image `row` of the staging part `part` goes to `shard`, such as
`train/part-00000.parquet`."""

SHARDS_SCHEMA: Final = pa.schema(
    [
        pa.field("shard", pa.string(), nullable=False),
        pa.field("num_rows", pa.int64(), nullable=False),
        *(pa.field(name, pa.list_(pa.float64(), 3), nullable=False) for name in scan.MOMENT_COLUMNS),
    ]
)
"""The columns that the driver gets, a row for each shard. `mean` and `mean_square` are averages over its images."""


def write_plans(connection: duckdb.DuckDBPyConnection, staging_url: str) -> int:
    """Write the plan of every chunk, from the table `fates`. Returns the number of chunks."""
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
            for portion in portions(images_of_split, lambda i: (1, i["image_bytes"]), SHARD_ROWS, SHARD_BYTES):
                shard = f"{split}/part-{num_shards[split]:05d}.parquet"
                num_shards[split] += 1
                plan += [{"part": image["part"], "row": image["row"], "shard": shard} for image in portion]
        url = storage.join(staging_url, PLAN_DIR, scan.part_name(chunk))
        storage.publish_parquet(url, pa.Table.from_pylist(plan, schema=PLAN_SCHEMA))
        num_chunks += 1
    return num_chunks


def _assign_chunks(connection: duckdb.DuckDBPyConnection) -> None:
    """Create the table `chunks(part, chunk)`.

    The parts are assigned in the order of a hash, because listings tend to be sorted by class.
    """
    parts = connection.execute(
        "SELECT part, count(*), sum(image_bytes) FROM fates WHERE split IS NOT NULL GROUP BY part ORDER BY md5(part)"
    ).fetchall()
    chunks = enumerate(portions(parts, lambda part: part[1:], CHUNK_ROWS, CHUNK_BYTES))
    rows = [{"part": part, "chunk": chunk} for chunk, portion in chunks for part, *_ in portion]
    connection.execute("CREATE TABLE chunks (part VARCHAR, chunk BIGINT)")
    catalog.insert(connection, "chunks", pa.Table.from_pylist(rows))


def write_chunk(index: int, staging_url: str, output_url: str) -> pa.Table:
    """Write the shards of chunk `index`. Returns `SHARDS_SCHEMA` rows, one for each shard."""
    plan = storage.read_parquet(storage.join(staging_url, PLAN_DIR, scan.part_name(index)))
    shards = sorted(pc.unique(plan["shard"]).to_pylist())
    # The images of a chunk could fill the memory of a small machine, so they are sorted into one local file per shard.
    with scratch.directory("prepare") as directory:
        paths = {shard: str(Path(directory, f"{number}.arrow")) for number, shard in enumerate(shards)}
        _distribute(plan, storage.join(staging_url, scan.SCAN_DIR), paths)
        return pa.Table.from_pylist(
            [_write_shard(shard, path, output_url) for shard, path in paths.items()], schema=SHARDS_SCHEMA
        )


def _distribute(plan: pa.Table, scan_url: str, paths: dict[str, str]) -> None:
    """Write the staged images of a plan to local Arrow streams: shard → path."""
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
    """Publish a shard from its local Arrow stream. Returns a row of `SHARDS_SCHEMA`."""
    with pa.memory_map(path) as file:
        images = pa.ipc.open_stream(file).read_all().sort_by("image_id")
    rows = images.select(DATASET_SCHEMA.names).cast(DATASET_SCHEMA)
    storage.publish_parquet(storage.join(output_url, shard), rows, row_group_rows=ROW_GROUP_ROWS)
    moments = {name: np.mean(images[name].to_pylist(), axis=0).tolist() for name in scan.MOMENT_COLUMNS}
    return {"shard": shard, "num_rows": images.num_rows, **moments}
