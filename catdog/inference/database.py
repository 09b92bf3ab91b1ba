"""DuckDB, which plans a run and recounts an output, and spills to the local temporary directory."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import duckdb

from catdog import scratch

_MEMORY_LIMIT: Final = "1GB"


@contextlib.contextmanager
def open_database() -> Iterator[tuple[duckdb.DuckDBPyConnection, Path]]:
    """An empty database in memory, and the temporary directory to which it spills, for the length of a `with` block.

    Whoever reads a file there says `hive_partitioning = false`. Without it, DuckDB takes a directory above that is
    named `uri=x` for a column, which replaces the file's own.
    """
    with scratch.directory("plan") as directory:
        settings: dict[str, str | bool | int | float | list[str]] = {
            "memory_limit": _MEMORY_LIMIT,
            "temp_directory": directory,
            "preserve_insertion_order": False,
            "python_enable_replacements": False,  # they would import pandas, too
        }
        with duckdb.connect(config=settings) as database:
            yield database, Path(directory)
