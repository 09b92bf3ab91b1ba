"""What `dataset.json` and `rejects.parquet` say: counts, rejects, duplicates and digest, from the catalogue."""

import hashlib
from typing import Any

import duckdb
import pyarrow as pa

from catdog.config import PrepareConfig
from catdog.dataset import catalog
from catdog.errors import DatasetError
from catdog.schema import CLASS_NAMES, REJECTS_SCHEMA, SPLITS

_NOT_AN_IMAGE = "neither labelled nor an image by its name"


def counts(connection: duckdb.DuckDBPyConnection) -> dict[str, dict[str, int]]:
    """Number of images by split and class."""
    found = {
        (split, label): num
        for split, label, num in connection.execute(
            "SELECT split, label, count(*) FROM fates JOIN listing USING (row) WHERE split IS NOT NULL GROUP BY ALL"
        ).fetchall()
    }
    return {split: {name: found.get((split, label), 0) for label, name in enumerate(CLASS_NAMES)} for split in SPLITS}


def check_counts(counts: dict[str, dict[str, int]], config: PrepareConfig) -> None:
    """Check that there are training images of both classes, and images in every split that was asked for.

    Raises:
        DatasetError: there are none.
    """
    for name, num in counts["train"].items():
        if not num:
            raise DatasetError(f"The train split must have images of every class. Received: no {name} in it; {counts}")
    for split, fraction in (("val", config.val_fraction), ("test", config.test_fraction)):
        if fraction and not sum(counts[split].values()):
            raise DatasetError(
                f"--{split}-fraction must give the split at least one image. Received: --{split}-fraction={fraction}, "
                f"which gave it none of {sum(sum(by_class.values()) for by_class in counts.values())} images"
            )


def rejects(connection: duckdb.DuckDBPyConnection) -> pa.Table:
    """The rejected files, as rows of `REJECTS_SCHEMA`, sorted by uri."""
    table = connection.sql(
        """
        SELECT uri, reason, coalesce(message, '') AS message
        FROM fates JOIN listing USING (row) WHERE reason IS NOT NULL
        UNION ALL
        SELECT uri, 'unsupported_format', ? FROM listing WHERE label IS NULL
        ORDER BY uri, reason
        """,
        params=[_NOT_AN_IMAGE],
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

    `duplicate_groups` has all of them, as sorted lists of uris. `conflicts` has those that are labelled both cat and
    dog, as `{uri: label}`.
    """
    groups, conflicts = [], []
    for uris, class_indices, is_conflict in connection.execute(
        """
        SELECT list(uri ORDER BY uri, row), list(label ORDER BY uri, row), any_value(is_conflict)
        FROM members JOIN groups USING (group_id) WHERE num_files > 1
        GROUP BY group_id ORDER BY 1
        """
    ).fetchall():
        groups.append(uris)
        if is_conflict:
            conflicts.append({uri: CLASS_NAMES[index] for uri, index in zip(uris, class_indices, strict=True)})
    return {"conflicts": conflicts, "duplicate_groups": groups}


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
