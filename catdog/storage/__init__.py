"""Listing, reading and publishing at any fsspec URL: the one place that knows fsspec and s3fs.

A URL is a local path, or anything that fsspec opens (`s3://bucket/prefix`, `memory://x`, ...). A member of a `.zip` is
named by its fsspec chained URL, `zip://train/cat.1.jpg::s3://bucket/train.zip`. Endpoints and credentials come from the
usual environment: `AWS_ENDPOINT_URL`, `AWS_ACCESS_KEY_ID`, `AWS_PROFILE`, ...

One image that cannot be read is an `ImageError`. A storage that cannot be reached, or keeps failing, is a
`StorageError` that names the URL, after some seconds of retries. A missing file is a `UsageError` from `list_images`,
and Python's `FileNotFoundError` from the functions that read what catdog wrote.
"""

from catdog.storage.filesystems import SourceFile
from catdog.storage.listing import exists, list_images, list_names
from catdog.storage.publishing import (
    delete,
    delete_temporaries,
    publish_bytes,
    publish_file,
    publish_json,
    publish_parquet,
    refuse_foreign_output,
)
from catdog.storage.reading import (
    MAX_BYTES,
    open_read,
    read_bytes,
    read_json,
    read_parquet,
    read_source,
    read_sources,
    read_text,
)
from catdog.storage.urls import absolute, join, redact

__all__ = [
    "MAX_BYTES",
    "SourceFile",
    "absolute",
    "delete",
    "delete_temporaries",
    "exists",
    "join",
    "list_images",
    "list_names",
    "open_read",
    "publish_bytes",
    "publish_file",
    "publish_json",
    "publish_parquet",
    "read_bytes",
    "read_json",
    "read_parquet",
    "read_source",
    "read_sources",
    "read_text",
    "redact",
    "refuse_foreign_output",
]
