"""URLs as text: nothing here touches a storage."""

import os
import re
from typing import Final

_LOCAL_SCHEMES: Final = ("file://", "local://")
_USER_INFO: Final = re.compile(r"(?<=://)[^/@\s]+@")
_QUERY: Final = re.compile(r"(?<=[^/\s])\?[^\s:]*(X-Amz-Signature|sig|token|key)=[^\s]*", re.IGNORECASE)


def absolute(url: str) -> str:
    """Local paths (also `file://`) as absolute paths without a scheme; other URLs unchanged, less a trailing slash."""
    if (member := split_member(url)) is not None:
        return member_uri(member[0], absolute(member[1]))
    for scheme in _LOCAL_SCHEMES:
        url = url.removeprefix(scheme)
    if is_local(url):
        return os.path.abspath(os.path.expanduser(url))
    return url if url.endswith("://") else url.rstrip("/")


def join(url: str, *names: str) -> str:
    """The URL of `names` under `url`."""
    base = url if url.endswith("://") else url.rstrip("/") + "/"
    return base + "/".join(names)


def is_local(url: str) -> bool:
    """Whether a URL that `absolute` returned is a path on this machine."""
    return "://" not in url


def split_member(uri: str) -> tuple[str, str] | None:
    """(member, archive) of `zip://member::archive`; None for any other URL."""
    if not uri.startswith("zip://") or "::" not in uri:
        return None
    member, _, archive = uri.removeprefix("zip://").rpartition("::")
    return member, archive


def member_uri(member: str, archive: str) -> str:
    """The fsspec chained URL of a member of an archive."""
    return f"zip://{member}::{archive}"


def redact(text: str) -> str:
    """`text`, a URL or a message that holds some, without passwords and signatures."""
    return _QUERY.sub("?***", _USER_INFO.sub("***@", text))
