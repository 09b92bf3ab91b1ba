"""What `dataset.json` and `rejects.parquet` say: counts, rejects, duplicates and digest, from the catalogue."""

import hashlib
import logging
from collections.abc import Collection
from typing import Any, Final

import duckdb
import pyarrow as pa

from catdog.config import PrepareConfig
from catdog.dataset import catalog
from catdog.errors import DatasetError
from catdog.provenance import redact
from catdog.schema import CLASS_NAMES, REJECTS_SCHEMA, SPLITS

logger = logging.getLogger(__name__)


def counts(connection: duckdb.DuckDBPyConnection) -> dict[str, dict[str, int]]:
    """Number of images by split and class."""
    found = {
        (split, label): num
        for split, label, num in connection.execute(
            "SELECT split, label, count(*) FROM fates JOIN listing USING (row) WHERE split IS NOT NULL GROUP BY ALL"
        ).fetchall()
    }
    return {split: {name: found.get((split, label), 0) for label, name in enumerate(CLASS_NAMES)} for split in SPLITS}


def check_counts(counts: dict[str, dict[str, int]], config: PrepareConfig, given: Collection[str] = ()) -> None:
    """Check that there are training images of both classes, and images in every split that was asked for or given.

    Warns of a split to validate or to test with that has no images of a class.

    Raises:
        DatasetError: there are none.
    """
    for name, num in counts["train"].items():
        if not num and config.test_fraction < 1:
            raise DatasetError(
                f"The train split must have images of every class; bring more {name}s, or make a dataset to evaluate "
                f"with alone (--test-fraction 1). Received: no {name} in it; {counts}"
            )
    for split, fraction in (("val", config.val_fraction), ("test", config.test_fraction)):
        if split in given and not sum(counts[split].values()):
            raise DatasetError(
                f"A split that a table or folders name must hold an image that is kept. Received: none in {split}"
            )
        if fraction and not sum(counts[split].values()):
            raise DatasetError(
                f"--{split}-fraction must give the split at least one image; bring more images, or say "
                f"--{split}-fraction 0. Received: --{split}-fraction={fraction}, which gave it none of "
                f"{sum(sum(by_class.values()) for by_class in counts.values())} images"
            )
        _warn_of_missing(split, counts[split], is_given=split in given)


_NEEDS: Final = {
    "val": "catdog train refuses this dataset: it calibrates and chooses its model on both classes",
    "test": "catdog evaluate can measure little on it",
}
"""Split → what happens if it lacks a class."""


def _warn_of_missing(split: str, by_class: dict[str, int], *, is_given: bool) -> None:
    if not sum(by_class.values()):
        return
    for name in (name for name, num in by_class.items() if not num):
        logger.warning(
            "The split %s has no %s, and %s. Bring more %ss%s.",
            *(split, name, _NEEDS[split], name),
            ", or say --split random" if is_given else "",
        )


def rejects(connection: duckdb.DuckDBPyConnection) -> pa.Table:
    """The rejected files, as rows of `REJECTS_SCHEMA`, sorted by uri."""
    table = connection.sql(
        """
        SELECT uri, reason, coalesce(message, '') AS message
        FROM fates JOIN listing USING (row) WHERE reason IS NOT NULL
        UNION ALL
        SELECT uri, reason, message FROM others JOIN listing USING (row)
        ORDER BY uri, reason
        """
    ).to_arrow_table()
    return table.cast(REJECTS_SCHEMA)


def summary(connection: duckdb.DuckDBPyConnection, rejects: pa.Table) -> dict[str, Any]:
    """The numbers of a dataset: `listed` (`kept` + `rejected`), `reasons` for rejection, `counts`, `class_balance`."""
    by_split = counts(connection)
    by_class = {name: sum(by_split[split][name] for split in SPLITS) for name in CLASS_NAMES}
    num_kept = sum(by_class.values())
    (num_listed,) = catalog.one_row(connection, "SELECT count(*) FROM listing")
    return {
        "listed": num_listed,
        "kept": num_kept,
        "rejected": rejects.num_rows,
        "reasons": {row["values"]: row["counts"] for row in rejects["reason"].value_counts().to_pylist()},
        "counts": by_split,
        "class_balance": {name: num / num_kept for name, num in by_class.items()},
    }


def duplicates(connection: duckdb.DuckDBPyConnection) -> dict[str, Any]:
    """The groups of duplicates, that is, of more than one file.

    `duplicate_groups` has all of them, as sorted lists of uris. `conflicts` has the files that are labelled both cat
    and dog, as `{uri: label}` for each picture.
    """
    groups = connection.execute(
        """
        SELECT list(uri ORDER BY uri, row) FROM members JOIN groups USING (group_id) WHERE num_files > 1
        GROUP BY group_id ORDER BY 1
        """
    ).fetchall()
    conflicts = connection.execute(
        """
        SELECT list(uri ORDER BY uri, row), list(label ORDER BY uri, row) FROM members JOIN contradicted USING (rank)
        GROUP BY conflict ORDER BY 1
        """
    ).fetchall()
    return {
        "conflicts": [
            {uri: CLASS_NAMES[index] for uri, index in zip(uris, indices, strict=True)} for uris, indices in conflicts
        ],
        "duplicate_groups": [uris for (uris,) in groups],
    }


def remarks(connection: duckdb.DuckDBPyConnection) -> dict[str, str]:
    """What is wrong with images that are kept all the same: uri → remark. Warns of them."""
    found: dict[str, str] = dict(
        connection.execute(
            "SELECT uri, remark FROM scanned JOIN listing USING (row) JOIN fates USING (row) "
            "WHERE remark IS NOT NULL AND fates.split IS NOT NULL ORDER BY uri"
        ).fetchall()
    )
    if found:
        uri, remark = next(iter(found.items()))
        logger.warning("%d images are damaged, but kept; the first: %s: %s", len(found), redact(uri), remark)
    return found


_LARGE_SHARE: Final = 0.05
"""Share of the images in groups of near-duplicates above which `prepare` warns."""


def near_duplicates(connection: duckdb.DuckDBPyConnection) -> dict[str, int]:
    """How many images are in groups of near-duplicates, and how many of these groups lie in more than one split."""
    (num_images, num_in_groups) = catalog.one_row(
        connection, "SELECT sum(num_images), sum(num_images) FILTER (num_images > 1) FROM groups"
    )
    (num_straddling,) = catalog.one_row(
        connection,
        "SELECT count(*) FROM (SELECT group_id FROM members JOIN fates USING (row) WHERE split IS NOT NULL "
        "GROUP BY group_id HAVING count(DISTINCT split) > 1)",
    )
    num_images, num_in_groups = int(num_images or 0), int(num_in_groups or 0)
    if num_in_groups > _LARGE_SHARE * num_images:
        logger.warning(
            "%d of %d images look like another one. Look at duplicate_groups in dataset.json; with --near-duplicates "
            "keep, each counts as a picture of its own.",
            *(num_in_groups, num_images),
        )
    if num_straddling:
        logger.warning(
            "%d groups of near-duplicates lie in more than one split, as folders or --extends say. With "
            "--near-duplicates reject, one image of each is kept.",
            num_straddling,
        )
    return {"images": num_in_groups, "groups_in_several_splits": num_straddling}


def digest(connection: duckdb.DuckDBPyConnection) -> str:
    """SHA-256 over the split, id and label of every image that is kept.

    It does not depend on where the images are stored.
    """
    sha256 = hashlib.sha256()
    query = (
        "SELECT split, image_id, label FROM fates JOIN listing USING (row) "
        "WHERE split IS NOT NULL ORDER BY split, image_id"
    )
    for batch in catalog.stream(connection, query):
        for row in zip(*batch.to_pydict().values(), strict=True):
            sha256.update("{} {} {}\n".format(*row).encode())
    return sha256.hexdigest()
