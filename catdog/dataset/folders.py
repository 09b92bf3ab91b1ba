"""What the folders of the listed files say: classes and splits."""

from itertools import takewhile
from typing import Final

import duckdb
import pyarrow as pa

from catdog.dataset import catalog
from catdog.dataset.catalog import insert, stream
from catdog.dataset.labels import Classes, folders, parent
from catdog.dataset.split import named_split

FOLDER: Final = r"regexp_replace(uri, '[^/]*(::|$)', '\1')"
"""The folder of a `uri`, in SQL. The members of a folder of an archive have one, and so have the rows of a table."""

_SCHEMA: Final = pa.schema([("folder", pa.string()), ("label", pa.int8()), ("split", pa.string())])


def create(connection: duckdb.DuckDBPyConnection, classes: Classes) -> None:
    """Create the table `folders(folder, label, split)` from the table `listing`.

    The nearest folder decides that is named after a class, or a split. Only folders below the one that all files share
    count: what lies above says where the collection is. The folder that holds a file always counts as to its class.
    """
    connection.execute(f"CREATE TABLE places AS SELECT DISTINCT {FOLDER} AS folder FROM listing")
    catalog.create(connection, "folders", _SCHEMA)
    num_shared = _num_shared(connection)
    for batch in stream(connection, "SELECT folder FROM places"):
        rows = []
        for folder in batch["folder"].to_pylist():
            below = folders(folder)[num_shared:]
            label = classes.by_folders([parent(folder), *below])
            rows.append({"folder": folder, "label": label, "split": named_split(below)})
        insert(connection, "folders", pa.Table.from_pylist(rows, schema=_SCHEMA))


def _num_shared(connection: duckdb.DuckDBPyConnection) -> int:
    """How many folders, from the outermost, all files share."""
    shared: list[str] | None = None
    for batch in stream(connection, "SELECT folder FROM places"):
        for folder in batch["folder"].to_pylist():
            parts = folders(folder)
            if shared is None:
                shared = parts
            pairs = takewhile(lambda pair: pair[0] == pair[1], zip(shared, parts, strict=False))
            shared = [ours for ours, _ in pairs]
    return len(shared or ())
