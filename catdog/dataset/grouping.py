"""Finding images that are the same picture, and deciding for each file: kept in a split, or rejected.

Exact duplicates have the same bytes. Near-duplicates have perceptual hashes that differ in at most `MAX_DISTANCE` of
144 bits. Measured distances: of 20,000 photographs of Dogs vs. Cats, the 39 pairs that look the same differ in 0 to 8
bits, the next pair in 34; of 1,000 drawings, the nearest pair differs in 30. Changed copies of 200 photographs differ
from the originals in at most 4 bits (JPEG quality 30, half the size, or 64 px), in at most 10 (30 % more contrast), and
in the median in 6 (1 % cropped off each side) or 12 (2 %). A mirror image is a different picture.

DuckDB does all of this out of core. Only the pairs of duplicates are held in memory.

The tables, besides those of `catdog.dataset.catalog`:
    scanned(row, image_id, band_*, image_bytes, reason, message, part, split)  `split`: as if without duplicates
    hashes(hash_id, band_*)                                                    the distinct perceptual hashes
    components(hash_id, component)                                             hashes that are near to another one
    members(row, uri, label, image_id, split, group_id)                        the files that are images
    groups(group_id, split, num_files, is_conflict)                            images that are the same picture
    kept(image_id, first)                                                      (uri, row) of the file that is kept
    fates(row, part, image_id, image_bytes, split, reason, message)            either `split` or `reason` is NULL
"""

from itertools import combinations
from typing import Final

import duckdb
import numpy as np
import pyarrow as pa
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from catdog.config import PrepareConfig
from catdog.dataset.catalog import insert
from catdog.dataset.scan import BAND_COLUMNS
from catdog.dataset.split import split_of

MAX_DISTANCE: Final = 12
"""Largest number of bits by which the perceptual hashes of near-duplicates differ."""

_SHARED_BANDS: Final = 2
"""Number of bands, of the 9 bands of 16 bits, that two hashes must share to be compared. That finds all pairs that
differ in 7 bits or fewer, and 99 % of those that differ in 8, 90 % in 10, 72 % in 12. One shared band would find more,
but the number of comparisons would grow with the square of the collection: a million images took 16 s instead of 3 s,
on two cores."""

_CREATE_SCANNED: Final = (
    "CREATE TABLE scanned (row BIGINT, image_id VARCHAR, "
    + "".join(f"{name} SMALLINT, " for name in BAND_COLUMNS)
    + "image_bytes BIGINT, reason VARCHAR, message VARCHAR, part VARCHAR, split VARCHAR)"
)


def create(connection: duckdb.DuckDBPyConnection) -> None:
    """Create the empty table `scanned`, which `add` fills."""
    connection.execute(_CREATE_SCANNED)


def add(connection: duckdb.DuckDBPyConnection, rows: pa.Table, config: PrepareConfig) -> None:
    """Append rows of `catdog.dataset.scan.LIGHT_SCHEMA` to `scanned`, each with the split that it would get alone."""
    fractions = {"val_fraction": config.val_fraction, "test_fraction": config.test_fraction}
    splits = [
        image_id and split_of(image_id, seed=config.seed, **fractions) for image_id in rows["image_id"].to_pylist()
    ]
    insert(connection, "scanned", rows.append_column("split", pa.array(splits, pa.string())))


def decide(connection: duckdb.DuckDBPyConnection) -> None:
    """Create the table `fates` from `scanned` and `listing`."""
    bands = ", ".join(BAND_COLUMNS)
    connection.execute(
        f"CREATE TABLE hashes AS SELECT row_number() OVER () AS hash_id, * "
        f"FROM (SELECT DISTINCT {bands} FROM scanned WHERE {BAND_COLUMNS[0]} IS NOT NULL)"
    )
    connection.execute("CREATE TABLE components (hash_id BIGINT, component BIGINT)")
    insert(connection, "components", _components(near_pairs(connection)))
    connection.execute(
        f"""
        CREATE TABLE members AS
        SELECT row, uri, label, image_id, split,
            CASE WHEN hash_id IS NULL THEN image_id ELSE coalesce(component, hash_id)::VARCHAR END AS group_id
        FROM scanned JOIN listing USING (row)
            LEFT JOIN hashes USING ({bands}) LEFT JOIN components USING (hash_id)
        WHERE reason IS NULL
        """
    )
    connection.execute(
        """
        CREATE TABLE groups AS
        SELECT group_id, arg_min(split, image_id) AS split, count(*) AS num_files,
            min(label) <> max(label) AS is_conflict
        FROM members GROUP BY group_id
        """
    )
    connection.execute("CREATE TABLE kept AS SELECT image_id, min((uri, row)) AS first FROM members GROUP BY image_id")
    connection.execute(
        """
        CREATE TABLE fates AS
        SELECT row, part, image_id, image_bytes, reason,
            CASE WHEN reason IS NULL THEN split END AS split,
            CASE reason
                WHEN 'conflicting_label' THEN 'the same picture is labelled both cat and dog'
                WHEN 'exact_duplicate' THEN 'the same bytes as ' || first_uri
                ELSE message
            END AS message
        FROM (
            SELECT scanned.row, part, scanned.image_id, image_bytes, groups.split, message,
                kept.first[1] AS first_uri,
                CASE
                    WHEN scanned.reason IS NOT NULL THEN scanned.reason
                    WHEN is_conflict THEN 'conflicting_label'
                    WHEN kept.first[2] <> scanned.row THEN 'exact_duplicate'
                END AS reason
            FROM scanned LEFT JOIN members USING (row) LEFT JOIN groups USING (group_id)
                LEFT JOIN kept ON kept.image_id = scanned.image_id
        )
        """
    )


def near_pairs(connection: duckdb.DuckDBPyConnection) -> pa.Table:
    """The pairs `a` < `b` of `hash_id` whose hashes differ in at most `MAX_DISTANCE` bits and share `_SHARED_BANDS`."""
    distance = " + ".join(f"bit_count(xor(a.{band}, b.{band}))::INTEGER" for band in BAND_COLUMNS)
    pairs = []
    for bands in combinations(BAND_COLUMNS, _SHARED_BANDS):
        shared = " AND ".join(f"a.{band} = b.{band}" for band in bands)
        query = (
            f"SELECT a.hash_id AS a, b.hash_id AS b FROM hashes a JOIN hashes b ON {shared} AND a.hash_id < b.hash_id"
        )
        pairs.append(connection.sql(f"{query} WHERE {distance} <= {MAX_DISTANCE}").to_arrow_table())
    return pa.concat_tables(pairs).group_by(["a", "b"]).aggregate([])


def _components(pairs: pa.Table) -> pa.Table:
    """Each `hash_id` that is in a pair, with the smallest `hash_id` that pairs connect it to as its `component`."""
    ends = np.stack([pairs["a"].to_numpy(), pairs["b"].to_numpy()])
    ids, positions = np.unique(ends, return_inverse=True)
    a, b = positions.reshape(ends.shape)
    graph = coo_array((np.ones(len(a), np.int8), (a, b)), shape=(len(ids), len(ids)))
    _, component = connected_components(graph, directed=False)
    _, first = np.unique(component, return_index=True)
    return pa.table({"hash_id": ids, "component": ids[first[component]]})
