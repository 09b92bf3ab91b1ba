"""Finding images that are the same picture, and deciding for each file: kept in a split, or rejected.

Exact duplicates have the same bytes. Near-duplicates have perceptual hashes that differ in at most `MAX_DISTANCE` of
144 bits, and look the same (`catdog.dataset.looks`). Measured distances: of 20,000 photographs of Dogs vs. Cats, the 39
pairs that look the same differ in 0 to 8 bits, the next pair in 34; of 1,000 drawings, the nearest pair differs in 30.
Changed copies of 200 photographs differ from the originals in at most 4 bits (JPEG quality 30, half the size, or 64
px), in at most 10 (30 % more contrast), and in the median in 6 (1 % cropped off each side) or 12 (2 %). A mirror image
is a different picture.

That is a relation between two images, and is never chained: if A looks like B, and B like C, that says nothing about A
and C. A group is a leader, which is its first image, and those near-duplicates of the leader that are in no earlier
group. Images come in the order of their `image_id`, but first those of the dataset that is extended. Two images
contradict each other if they are the same picture with different labels; each is rejected for a contradiction of its
own, not for one in its group.

DuckDB does most of this out of core. How much is compared is bounded: of the images that share two bands of the hash,
each is compared with at most 47 others, and where there are more, with 12 on average; an image is in at most 36 such
buckets. So time and temporary disk grow with the number of images, not with its square, also if all of them show one
scene: with 15,000 frames of one scene among 200,000 images, a million pairs were compared, in 42 s and 200 MB on two
busy cores. The price: in a bucket with more images than `LARGE_BUCKET`, some near-duplicates are not compared, and may
end up in two groups. In memory are 8 bytes for each image that has a near-duplicate, and the pairs that contradict each
other; thumbnails, 768 bytes each, are on local disk.

The tables, besides those of `catdog.dataset.catalog`:
    scanned(row, image_id, content, band_*, image_bytes, reason, message, remark, part, split)
                                                              `split`: as if without duplicates
    settled(image_id, split)                                  the images of the dataset that is extended
    pictures(rank, image_id, band_*, part, row, split, fixed) the distinct images. `split`: what it gets alone; `fixed`:
                                                              the split that was settled or given, else NULL
    candidates(a, b)                                          ranks `a` < `b`, whose hashes are near
    near(a, b)                                                those that also look the same
    members(row, uri, label, rank, image_id, group_id)        the files that are images; `group_id`: the leader's rank
    groups(group_id, split, num_files, num_images)            images that are the same picture
    contradicted(rank, conflict)                              images with two labels, or near one with another label
    fates(row, part, image_id, image_bytes, split, reason, message)            either `split` or `reason` is NULL
"""

import concurrent.futures
import tempfile
from collections.abc import Callable, Collection, Iterator
from itertools import combinations
from typing import Final

import duckdb
import numpy as np
import numpy.typing as npt
import pyarrow as pa
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from catdog.config import PrepareConfig
from catdog.dataset.catalog import insert, one_row, stream
from catdog.dataset.looks import NUM_VALUES, look_same
from catdog.dataset.scan import BAND_COLUMNS
from catdog.dataset.split import split_of

MAX_DISTANCE: Final = 12
"""Largest number of bits by which the perceptual hashes of near-duplicates differ."""

LARGE_BUCKET: Final = 48
"""A bucket holds the images whose hashes share two given bands. In one with more images than that, each is compared
only with the first `NUM_FIRST` of the bucket, and with the `NUM_NEXT` before and after it in the order of their
hashes. So in a burst of frames that look the same, all meet the first; and in one of frames that do not, each meets
those with the same hash, or nearly."""

NUM_FIRST: Final = 8
NUM_NEXT: Final = 4

_SHARED_BANDS: Final = 2
"""Number of bands, of the 9 bands of 16 bits, that two hashes must share to be compared. That finds all pairs that
differ in 7 bits or fewer, and 99 % of those that differ in 8, 90 % in 10, 72 % in 12. One shared band would find more,
but the number of comparisons would grow with the square of the collection: a million images took 16 s instead of 3 s,
on two cores."""

_NUM_READERS: Final = 16
"""Staging parts whose thumbnails are read together."""

_PORTION: Final = 4096
"""Pairs of thumbnails that are read together: 6 MiB."""

_CREATE_SCANNED: Final = (
    "CREATE TABLE scanned (row BIGINT, image_id VARCHAR, content VARCHAR, "
    + "".join(f"{name} SMALLINT, " for name in BAND_COLUMNS)
    + "image_bytes BIGINT, reason VARCHAR, message VARCHAR, remark VARCHAR, part VARCHAR, "
    "split VARCHAR)"
)

_BANDS: Final = ", ".join(BAND_COLUMNS)
_DISTANCE: Final = " + ".join(f"bit_count(xor(a.{band}, b.{band}))::INTEGER" for band in BAND_COLUMNS)


def create(connection: duckdb.DuckDBPyConnection) -> None:
    """Create the empty tables `scanned`, which `add` fills, and `settled`."""
    connection.execute(_CREATE_SCANNED)
    connection.execute("CREATE TABLE settled (image_id VARCHAR, split VARCHAR)")


def add(
    connection: duckdb.DuckDBPyConnection, rows: pa.Table, config: PrepareConfig, given: Collection[str] = ()
) -> None:
    """Append rows of `catdog.dataset.scan.LIGHT_SCHEMA` to `scanned`, each with the split that it would get alone.

    Args:
        connection: the catalogue.
        rows: the rows.
        config: the shares of the splits, and the seed.
        given: splits that folders name, which get no other image.
    """
    fractions = {
        "val_fraction": 0.0 if "val" in given else config.val_fraction,
        "test_fraction": 0.0 if "test" in given else config.test_fraction,
    }
    splits = [
        image_id and split_of(image_id, seed=config.seed, **fractions) for image_id in rows["image_id"].to_pylist()
    ]
    insert(connection, "scanned", rows.append_column("split", pa.array(splits, pa.string())))


def decide(connection: duckdb.DuckDBPyConnection, mode: str, thumbnails: Callable[[str], pa.Table]) -> None:
    """Create the table `fates` from `scanned`, `settled`, and the catalogue's `listing` and `given`.

    Args:
        connection: the catalogue.
        mode: what becomes of near-duplicates, as in `PrepareConfig.near_duplicates`.
        thumbnails: reads the columns `row` and `thumbnail` of a staging part.
    """
    _number_pictures(connection)
    connection.execute("CREATE TABLE near (a BIGINT, b BIGINT)")
    if mode != "keep":
        find_candidates(connection)
        _compare(connection, thumbnails)
    _gather(connection)
    connection.execute(
        """
        CREATE TABLE members AS
        SELECT scanned.row, uri, label, rank, scanned.image_id, group_id
        FROM scanned JOIN listing USING (row) JOIN pictures ON scanned.image_id = pictures.image_id
            JOIN gathered USING (rank)
        WHERE reason IS NULL
        """
    )
    _find_contradictions(connection)
    connection.execute(
        """
        CREATE TABLE groups AS
        SELECT group_id, any_value(num_files) AS num_files, count(*) AS num_images,
            coalesce(arg_min(coalesce(settled.split, pictures.split), rank)
                FILTER (fixed IS NULL OR settled.split IS NOT NULL), '') AS split,
            arg_min(rank, (CASE fixed WHEN 'test' THEN 0 WHEN 'val' THEN 1 ELSE 2 END, rank))
                FILTER (contradicted.rank IS NULL) AS chosen
        FROM gathered JOIN pictures USING (rank) LEFT JOIN settled ON settled.image_id = pictures.image_id
            LEFT JOIN contradicted USING (rank)
            JOIN (SELECT group_id, count(*) AS num_files FROM members GROUP BY group_id) USING (group_id)
        GROUP BY group_id
        """
    )
    connection.execute(
        """
        CREATE TABLE kept AS
        SELECT image_id, arg_min((uri, row, given.split), (CASE given.split WHEN 'test' THEN 0 WHEN 'val' THEN 1
            ELSE 2 END, uri, row)) AS first
        FROM members LEFT JOIN given USING (row) GROUP BY image_id
        """
    )
    connection.execute(
        """
        CREATE TABLE fates AS
        SELECT row, part, image_id, image_bytes, reason,
            CASE WHEN reason IS NULL THEN split END AS split,
            CASE reason
                WHEN 'conflicting_label' THEN 'the same picture is labelled both cat and dog'
                WHEN 'exact_duplicate' THEN 'the same bytes as ' || first_uri
                    || CASE WHEN first_given IS DISTINCT FROM given THEN ', in ' || first_given ELSE '' END
                WHEN 'near_duplicate' THEN 'looks the same as ' || chosen_uri
                ELSE message
            END AS message
        FROM (
            SELECT scanned.row, scanned.part, scanned.image_id, scanned.image_bytes, message,
                coalesce(pictures.fixed, groups.split) AS split,
                kept.first[1] AS first_uri, kept.first[3] AS first_given, given.split AS given,
                chosen.first[1] AS chosen_uri,
                CASE
                    WHEN scanned.reason IS NOT NULL THEN scanned.reason
                    WHEN contradicted.rank IS NOT NULL THEN 'conflicting_label'
                    WHEN kept.first[2] <> scanned.row THEN 'exact_duplicate'
                    WHEN ? = 'reject' AND groups.chosen <> members.rank THEN 'near_duplicate'
                END AS reason
            FROM scanned LEFT JOIN members USING (row) LEFT JOIN groups USING (group_id)
                LEFT JOIN pictures ON pictures.rank = members.rank
                LEFT JOIN contradicted ON contradicted.rank = members.rank
                LEFT JOIN kept ON kept.image_id = scanned.image_id
                LEFT JOIN pictures chosen_picture ON chosen_picture.rank = groups.chosen
                LEFT JOIN kept chosen ON chosen.image_id = chosen_picture.image_id
                LEFT JOIN given ON given.row = scanned.row
        )
        """,
        [mode],
    )


def _number_pictures(connection: duckdb.DuckDBPyConnection) -> None:
    """Create the table `pictures`."""
    bands = ", ".join(f"arg_min({band}, row) AS {band}" for band in BAND_COLUMNS)
    connection.execute(
        f"""
        CREATE TABLE pictures AS
        SELECT row_number() OVER (ORDER BY settled.split IS NULL, image_id) - 1 AS rank,
            image_id, {_BANDS}, part, row, images.split,
            coalesce(settled.split, given_split) AS fixed
        FROM (
            SELECT image_id, {bands}, arg_min(part, row) AS part, min(row) AS row, any_value(scanned.split) AS split,
                min(given.split) AS given_split  -- of `test` and `val`, the alphabet's first is the cleaner one
            FROM scanned LEFT JOIN given USING (row) WHERE reason IS NULL GROUP BY image_id
        ) images LEFT JOIN settled USING (image_id)
        """
    )


def find_candidates(connection: duckdb.DuckDBPyConnection) -> None:
    """Create the table `candidates` from `pictures`."""
    connection.execute("CREATE TABLE found (a BIGINT, b BIGINT)")
    hashed = f"SELECT rank, {_BANDS} FROM pictures WHERE {BAND_COLUMNS[0]} IS NOT NULL"
    for one, two in combinations(BAND_COLUMNS, _SHARED_BANDS):
        # `band_*` of the tables below are those of `pictures`; x and y name the bucket.
        connection.execute(
            f"""
            CREATE OR REPLACE TEMP TABLE buckets AS
            SELECT {one} AS x, {two} AS y, count(*) AS num FROM ({hashed}) GROUP BY ALL HAVING count(*) > 1
            """
        )
        (largest,) = one_row(connection, "SELECT coalesce(max(num), 0) FROM buckets")
        if not largest:
            continue
        connection.execute(
            f"""
            CREATE OR REPLACE TEMP TABLE shared AS
            SELECT rank, {_BANDS}, x, y, num FROM ({hashed}) JOIN buckets ON {one} = x AND {two} = y
            """
        )
        connection.execute(
            f"""
            INSERT INTO found SELECT a.rank, b.rank
            FROM (SELECT * FROM shared WHERE num <= {LARGE_BUCKET}) a
                JOIN (SELECT * FROM shared WHERE num <= {LARGE_BUCKET}) b ON a.x = b.x AND a.y = b.y AND a.rank < b.rank
            WHERE {_DISTANCE} <= {MAX_DISTANCE}
            """
        )
        if largest > LARGE_BUCKET:
            _find_in_large_buckets(connection)
    connection.execute("CREATE TABLE candidates AS SELECT DISTINCT a, b FROM found")
    connection.execute("DROP TABLE found")


def _find_in_large_buckets(connection: duckdb.DuckDBPyConnection) -> None:
    """Append to `found` what is compared in the large buckets of `shared`."""
    connection.execute(
        f"""
        CREATE OR REPLACE TEMP TABLE large AS
        SELECT *, row_number() OVER (PARTITION BY x, y ORDER BY rank) AS place,
            row_number() OVER (PARTITION BY x, y ORDER BY {_BANDS}, rank) AS place_by_hash
        FROM shared WHERE num > {LARGE_BUCKET}
        """
    )
    connection.execute(
        f"""
        INSERT INTO found SELECT a.rank, b.rank
        FROM (SELECT * FROM large WHERE place <= {NUM_FIRST}) a JOIN large b
            ON a.x = b.x AND a.y = b.y AND a.rank < b.rank
        WHERE {_DISTANCE} <= {MAX_DISTANCE}
        """
    )
    connection.execute(
        f"""
        INSERT INTO found SELECT least(a.rank, b.rank), greatest(a.rank, b.rank)
        FROM (SELECT *, unnest(range(place_by_hash + 1, place_by_hash + {NUM_NEXT} + 1)) AS next FROM large) a
            JOIN large b ON a.x = b.x AND a.y = b.y AND a.next = b.place_by_hash
        WHERE {_DISTANCE} <= {MAX_DISTANCE}
        """
    )


def _compare(connection: duckdb.DuckDBPyConnection, thumbnails: Callable[[str], pa.Table]) -> None:
    """Fill the table `near` with those of the `candidates` that look the same."""
    connection.execute(
        """
        CREATE TABLE involved AS
        SELECT rank, part, row, row_number() OVER (ORDER BY rank) - 1 AS place
        FROM pictures WHERE rank IN (SELECT a FROM candidates UNION SELECT b FROM candidates)
        """
    )
    (num_involved,) = one_row(connection, "SELECT count(*) FROM involved")
    if not num_involved:
        return
    with tempfile.TemporaryFile(prefix="catdog-prepare-") as file:
        looks_NNC = np.memmap(file, np.uint8, "w+", shape=(num_involved, NUM_VALUES // 3, 3))
        _read_thumbnails(connection, thumbnails, looks_NNC)
        pairs = stream(
            connection,
            "SELECT candidates.a, candidates.b, one.place AS place_a, two.place AS place_b FROM candidates "
            "JOIN involved one ON candidates.a = one.rank JOIN involved two ON candidates.b = two.rank",
        )
        for batch in pairs:
            for start in range(0, batch.num_rows, _PORTION):
                portion = batch.slice(start, _PORTION)
                is_same = look_same(looks_NNC[portion["place_a"].to_numpy()], looks_NNC[portion["place_b"].to_numpy()])
                insert(connection, "near", portion.select(["a", "b"]).filter(pa.array(is_same)))
        del looks_NNC


def _read_thumbnails(
    connection: duckdb.DuckDBPyConnection, thumbnails: Callable[[str], pa.Table], looks_NNC: npt.NDArray[np.uint8]
) -> None:
    """Read the thumbnails of the pictures in `involved` into their places."""

    def read(wanted: tuple[str, list[int], list[int]]) -> None:
        part, rows, places = wanted
        found = thumbnails(part)
        by_row = dict(zip(found["row"].to_pylist(), found["thumbnail"].to_pylist(), strict=True))
        for row, place in zip(rows, places, strict=True):
            looks_NNC[place] = np.frombuffer(by_row[row], np.uint8).reshape(-1, 3)

    with connection.cursor() as cursor, concurrent.futures.ThreadPoolExecutor(_NUM_READERS) as pool:
        cursor.execute("SELECT part, list(row), list(place) FROM involved GROUP BY part")
        while wanted := cursor.fetchmany(_NUM_READERS):
            for _ in pool.map(read, wanted):
                pass


def _gather(connection: duckdb.DuckDBPyConnection) -> None:
    """Create the table `gathered(rank, group_id)` from `pictures` and `near`: the leader of each picture."""
    connection.execute("CREATE TABLE led (rank BIGINT, group_id BIGINT)")
    connection.execute(
        """
        CREATE TABLE paired AS
        SELECT rank, row_number() OVER (ORDER BY rank) - 1 AS place
        FROM (SELECT a AS rank FROM near UNION SELECT b FROM near)
        """
    )
    (num_paired,) = one_row(connection, "SELECT count(*) FROM paired")
    leaders = np.arange(num_paired)
    ordered = (
        "SELECT one.place AS a, two.place AS b FROM near JOIN paired one ON near.a = one.rank "
        "JOIN paired two ON near.b = two.rank ORDER BY b, a"
    )
    for batch in stream(connection, ordered):
        for a, b in zip(batch["a"].to_pylist(), batch["b"].to_pylist(), strict=True):
            # What becomes of `a`, which comes before `b`, is settled by now.
            if leaders[b] == b and leaders[a] == a:
                leaders[b] = a
    for table in _batches(leaders):
        insert(connection, "led", table)
    connection.execute(
        """
        CREATE TABLE gathered AS
        SELECT pictures.rank, coalesce(leader.rank, pictures.rank) AS group_id
        FROM pictures LEFT JOIN paired ON paired.rank = pictures.rank
            LEFT JOIN led ON led.rank = paired.place
            LEFT JOIN paired leader ON leader.place = led.group_id
        """
    )


def _batches(leaders: npt.NDArray[np.int64], size: int = 2**16) -> Iterator[pa.Table]:
    for start in range(0, len(leaders), size):
        portion = leaders[start : start + size]
        yield pa.table({"rank": np.arange(start, start + len(portion)), "group_id": portion})


def _find_contradictions(connection: duckdb.DuckDBPyConnection) -> None:
    """Create the table `contradicted`. Images that contradict each other, directly or not, have the same `conflict`."""
    connection.execute(
        "CREATE TABLE labelled AS SELECT rank, min(label) AS low, max(label) AS high FROM members GROUP BY rank"
    )
    pairs = connection.sql(
        """
        SELECT a, b FROM near JOIN labelled one ON a = one.rank JOIN labelled two ON b = two.rank
        WHERE least(one.low, two.low) <> greatest(one.high, two.high)
        UNION ALL SELECT rank, rank FROM labelled WHERE low <> high
        """
    ).to_arrow_table()
    connection.execute("CREATE TABLE contradicted (rank BIGINT, conflict BIGINT)")
    if pairs.num_rows:
        ends = np.stack([pairs["a"].to_numpy(), pairs["b"].to_numpy()])
        ranks, positions = np.unique(ends, return_inverse=True)
        a, b = positions.reshape(ends.shape)
        graph = coo_array((np.ones(len(a), np.int8), (a, b)), shape=(len(ranks), len(ranks)))
        _, conflicts = connected_components(graph, directed=False)
        insert(connection, "contradicted", pa.table({"rank": ranks, "conflict": conflicts.astype(np.int64)}))
