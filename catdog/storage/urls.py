"""URLs as text: nothing here touches a storage."""

import os
from typing import Final

_LOCAL_SCHEMES: Final = ("file://", "local://")


def absolute(url: str) -> str:
    """A local path or `file://` URL as an absolute path; any other URL as it is, without slashes at its end."""
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
    """`(member, archive)` of the URL `zip://member::archive`; None for any other URL."""
    if not uri.startswith("zip://") or "::" not in uri:
        return None
    member, _, archive = uri.removeprefix("zip://").rpartition("::")
    return member, archive


def member_uri(member: str, archive: str) -> str:
    """The fsspec chained URL of a member of an archive."""
    return f"zip://{member}::{archive}"
