"""Which images are the same picture, and so what becomes of each file: kept in a split, or rejected.

Exact duplicates have the same bytes. Near-duplicates have perceptual hashes that differ in at most `MAX_DISTANCE` of
256 bits. Of 20,000 photographs of Dogs vs. Cats, the 39 pairs that look the same lie at 0 to 14 bits, the next pair
(two shots of one dog) at 66. Copies of 200 photographs: JPEG quality 30, half the size or 64 px at most 8 bits;
contrast up by 30 % at most 20; 1 % cropped off each side 14, 2 % 30 (medians). Mirror images are different pictures.

Everything is done in DuckDB, out of core. What is held in memory grows with the number of duplicates.

Tables, on top of those of `catdog.dataset.catalog`:
    scanned(row, image_id, hash_*, image_bytes, reason, message, part, split)  `split` is what the image alone would get
    hashes(hash_id, hash_*)                                                    distinct perceptual hashes
    groups(group_id, split, num_files, is_conflict)
    members(row, uri, label, image_id, split, group_id)                        images only
    fates(row, part, image_id, image_bytes, split, reason, message)            one of `split` and `reason` is NULL
"""

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

MAX_DISTANCE: Final = 24

_BAND_BITS: Final = 16
"""Hashes that differ in 15 bits or fewer have one of the 16 bands of 16 bits in common; of those that differ in 24,
99 in 100 have."""

_CREATE_SCANNED: Final = (
    "CREATE TABLE scanned (row BIGINT, image_id VARCHAR, "
    + "".join(f"{name} SMALLINT, " for name in BAND_COLUMNS)
    + "image_bytes BIGINT, reason VARCHAR, message VARCHAR, part VARCHAR, split VARCHAR)"
)


def create(connection: duckdb.DuckDBPyConnection) -> None:
    """Make the empty table that `add` fills."""
    connection.execute(_CREATE_SCANNED)


def add(connection: duckdb.DuckDBPyConnection, rows: pa.Table, config: PrepareConfig) -> None:
    """Append scanned rows (`catdog.dataset.scan.LIGHT_SCHEMA`), each with the split it would get by itself."""
    fractions = {"val_fraction": config.val_fraction, "test_fraction": config.test_fraction}
    splits = [
        image_id and split_of(image_id, seed=config.seed, **fractions) for image_id in rows["image_id"].to_pylist()
    ]
    insert(connection, "scanned", rows.append_column("split", pa.array(splits, pa.string())))


def decide(connection: duckdb.DuckDBPyConnection) -> None:
    """Make the table `fates` from `scanned` and `listing`."""
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
    """Pairs `a` < `b` of `hash_id` in the table `hashes` that are at most `MAX_DISTANCE` bits apart."""
    distance = " + ".join(f"bit_count(xor(a.{band}, b.{band}))::INTEGER" for band in BAND_COLUMNS)
    queries = [
        f"SELECT a.hash_id AS a, b.hash_id AS b FROM hashes a JOIN hashes b "
        f"ON a.{band} = b.{band} AND a.hash_id < b.hash_id WHERE {distance} <= {MAX_DISTANCE}"
        for band in BAND_COLUMNS
    ]
    pairs = [connection.sql(query).to_arrow_table() for query in queries]
    return pa.concat_tables(pairs).group_by(["a", "b"]).aggregate([])


def _components(pairs: pa.Table) -> pa.Table:
    """Each `hash_id` that is in a pair, with the smallest `hash_id` that it is connected to."""
    ends = np.stack([pairs["a"].to_numpy(), pairs["b"].to_numpy()])
    ids, positions = np.unique(ends, return_inverse=True)
    a, b = positions.reshape(ends.shape)
    graph = coo_array((np.ones(len(a), np.int8), (a, b)), shape=(len(ids), len(ids)))
    _, component = connected_components(graph, directed=False)
    _, first = np.unique(component, return_index=True)
    return pa.table({"hash_id": ids, "component": ids[first[component]]})
