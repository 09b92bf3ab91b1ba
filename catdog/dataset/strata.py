"""Giving every split images of every class, if there are enough groups of duplicates.

The split of a group follows from a hash (`catdog.dataset.split`), so that it stays as data is added. In a small
collection a split may then lack a class, and cannot be trained or measured with. So a group is moved to it: the one
whose hash is the smallest. As data is added, a smaller hash may come, and that group goes back. `--extends` prevents
this, and nothing moves that an earlier dataset, a folder or a table has settled.
"""

from collections.abc import Collection
from typing import Final

import duckdb

from catdog.config import PrepareConfig
from catdog.dataset.catalog import one_row
from catdog.schema import CLASS_NAMES, SPLITS

_POSITION: Final = "sha256($seed || ':' || leader.image_id)"
"""Where `split_of` puts a group: the digests have the order of its positions."""


def fill(connection: duckdb.DuckDBPyConnection, config: PrepareConfig, given: Collection[str]) -> int:
    """Move groups in the table `fates`. Returns how many.

    Args:
        connection: the catalogue, after `catdog.dataset.grouping.decide`.
        config: the shares of the splits, and the seed.
        given: splits that the collection came with: nothing is moved to them.
    """
    connection.execute(
        """
        CREATE TABLE strata AS
        SELECT DISTINCT group_id, label, fates.split,
            group_id IN (SELECT group_id FROM members JOIN pictures USING (rank) WHERE fixed IS NOT NULL) AS is_settled
        FROM fates JOIN members USING (row) WHERE fates.split IS NOT NULL
        """
    )
    fractions = {"val": config.val_fraction, "test": config.test_fraction}
    wanted = ["train"] if config.test_fraction < 1 else []
    wanted += [split for split, fraction in fractions.items() if fraction and split not in given]
    moves = [(split, label) for label in range(len(CLASS_NAMES)) for split in wanted]
    return sum(_move(connection, config.seed, label, split) for split, label in moves)


def _move(connection: duckdb.DuckDBPyConnection, seed: int, label: int, split: str) -> bool:
    """Move a group of a class to a split that has none, from the split that has most. Whether one was moved.

    The only one of its class is moved only to a split that matters more: to `train`, else to `val`.
    """
    numbers = {
        name: (num, num_free)
        for name, num, num_free in connection.execute(
            "SELECT split, count(*), count(*) FILTER (NOT is_settled) FROM strata WHERE label = ? GROUP BY split",
            [label],
        ).fetchall()
    }
    donors = [
        name
        for name in SPLITS
        if name in numbers and numbers[name][1] and (numbers[name][0] > 1 or SPLITS.index(name) > SPLITS.index(split))
    ]
    if split in numbers or not donors:
        return False
    donor = max(donors, key=lambda name: numbers[name][0])
    (group,) = one_row(
        connection,
        f"SELECT arg_min(group_id, {_POSITION}) FROM strata JOIN pictures leader ON leader.rank = group_id "
        "WHERE strata.split = $donor AND label = $label AND NOT is_settled",
        {"seed": str(seed), "donor": donor, "label": label},
    )
    connection.execute("UPDATE strata SET split = ? WHERE group_id = ?", [split, group])
    connection.execute(
        "UPDATE fates SET split = ? WHERE split IS NOT NULL AND row IN (SELECT row FROM members WHERE group_id = ?)",
        [split, group],
    )
    return True
