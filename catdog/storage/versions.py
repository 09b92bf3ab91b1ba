"""What tells one version of a file from another."""

import datetime
import os
from collections.abc import Mapping
from typing import Any


def version_of(info: Mapping[str, Any]) -> str:
    """A file's version, from fsspec's or S3's description of the file: its ETag, else its size and time of change.

    Without either, "": a size alone is no evidence that a file is the same.
    """
    for key in ("ETag", "etag", "md5Hash", "Content-MD5"):
        if info.get(key):
            return str(info[key]).strip('"')
    for key in ("mtime", "LastModified", "Last-Modified", "last_modified", "updated", "modified", "created"):
        if changed := info.get(key):
            if isinstance(changed, datetime.datetime):
                changed = changed.timestamp()
            size = info.get("size", info.get("Size"))
            return f"{'' if size is None else size}-{int(changed * 1e9) if isinstance(changed, float) else changed}"
    return ""


def version_of_status(status: os.stat_result) -> str:
    """The version of a local file: its size and the time at which it was changed."""
    return f"{status.st_size}-{status.st_mtime_ns}"
