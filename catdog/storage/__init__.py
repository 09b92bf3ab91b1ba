"""Listing, reading and publishing at any fsspec URL. Only this package knows fsspec; only its module `s3` knows s3fs.

A URL is a local path, or anything that fsspec opens (`s3://bucket/prefix`, `memory://x`, ...). A member of a `.zip` is
named by fsspec's chained URL, `zip://train/cat.1.jpg::s3://bucket/train.zip`. Endpoints and credentials come from the
usual environment variables: `AWS_ENDPOINT_URL`, `AWS_ACCESS_KEY_ID`, `AWS_PROFILE`, ...

If one image cannot be read, that is an `ImageError`. If a storage fails, that is a `StorageError`, which names the URL
and says for how long it was tried. If a file is missing, `list_images` raises `UsageError`, and the functions that read
what catdog wrote raise Python's `FileNotFoundError`.

What can pass (HTTP status 5xx, throttling, a connection cut or timed out; keys that have expired, or a clock that is
wrong, where requests had been taken before) is tried again until a storage has given nothing for five minutes. The
environment variable `CATDOG_STORAGE_PATIENCE_S` says another number of seconds. An address where nobody has listened
since the process began ends within seconds. See `catdog.storage.outages`.
"""

from catdog.storage.claims import Claim, claimed, holder, is_held
from catdog.storage.filesystems import SourceFile
from catdog.storage.listing import Listing, exists, list_files, list_images, list_names
from catdog.storage.publishing import (
    create_bytes,
    create_parquet,
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
from catdog.storage.urls import absolute, is_inside, join, storage_of

__all__ = [
    "MAX_BYTES",
    "Claim",
    "Listing",
    "SourceFile",
    "absolute",
    "claimed",
    "create_bytes",
    "create_parquet",
    "delete",
    "delete_temporaries",
    "exists",
    "holder",
    "is_held",
    "is_inside",
    "join",
    "list_files",
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
    "refuse_foreign_output",
    "storage_of",
]
