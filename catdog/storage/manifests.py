"""Manifests: tables whose rows name the images of a collection."""

import concurrent.futures
from collections.abc import Callable, Iterator
from typing import Final

import pyarrow as pa
import pyarrow.parquet as pq

from catdog.errors import UsageError
from catdog.provenance import redact
from catdog.storage import archives
from catdog.storage.filesystems import SourceFile
from catdog.storage.outages import MAX_CONNECTIONS
from catdog.storage.reading import open_read
from catdog.storage.urls import is_local, resolve, split_member

_LOOKED_UP_ROWS: Final = 1024
"""Rows of a manifest whose files are looked up together."""


def list_manifest(url: str, look_up: Callable[[str], SourceFile | None]) -> Iterator[SourceFile]:
    """The files that the rows of a manifest name, in the order of the rows.

    Args:
        url: the manifest.
        look_up: finds the file of a URL; None if what is there is no file. Called by many threads at once.
    """
    directory = url.rpartition("/")[0]
    seen: set[str] = set()

    def found(uri: str) -> SourceFile:
        return look_up(uri) or SourceFile(uri, "", 0)

    with open_read(url) as file, concurrent.futures.ThreadPoolExecutor(MAX_CONNECTIONS) as pool:
        try:
            parquet = pq.ParquetFile(file)
        except pa.ArrowInvalid as error:
            raise UsageError(f"A manifest must be a Parquet file: {error}. Received: {redact(url)}") from error
        if "uri" not in parquet.schema_arrow.names:
            raise UsageError(
                "A manifest must have a column named uri. "
                f"Received: {redact(url)} with the columns {', '.join(parquet.schema_arrow.names)}"
            )
        for batch in parquet.iter_batches(_LOOKED_UP_ROWS, columns=["uri"]):
            uris = [_named(uri, directory) for uri in batch.column(0).to_pylist()]
            named = {chained[1] for uri in uris if (chained := split_member(uri)) is not None}
            for archive in named - seen:
                archives.forget(archive)
            seen |= named
            yield from (map(found, uris) if all(map(is_local, uris)) else pool.map(found, uris))


def _named(uri: object, directory: str) -> str:
    if not isinstance(uri, str):
        raise UsageError(f"Each uri of a manifest must be text. Received: {uri!r}")
    return resolve(uri, directory)
