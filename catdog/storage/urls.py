"""URLs as text. Nothing here touches a storage, except that the local disk is asked which of two readings is meant.

A local file whose name is not UTF-8 has a URL, too, so that the name can stand in Parquet and JSON without loss:
`file:///photos/caf%E9.jpg`. Every other local file is named by its path.
"""

import os
import posixpath
import re
import urllib.parse
from typing import Final

_LOCAL: Final = re.compile(r"(?i)(?:file|local):(?://localhost(?=/)|//|(?=/))")
"""How the URL of a local file begins: `file:///x`, `file://localhost/x`, `local:///x`, and Spark's `file:/x`."""

_SCHEME: Final = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*(?=://)")

_MEMBERS: Final = ("zip://", "tar://", "row://")
"""How the URL of a member of an archive begins, or that of a row of a table (`embedded`). They are of one length."""

_NEXT_ARCHIVE: Final = re.compile(r"::(?=(?:zip|tar)://)")
"""What lies between a member and the archive that holds it, if this archive is a member of another one."""

_OLD: Final = {"s3n": "s3"}
"""Schemes that are seen, but that fsspec does not know."""

_ALIASES: Final = {"s3a": "s3", "s3n": "s3", "gcs": "gs", "abfss": "abfs", "az": "abfs"}
"""Schemes that are other names of the same storage."""


def absolute(url: str, *, keep_slash: bool = False) -> str:
    """A local path or `file:` URL as an absolute path; any other URL as it is, without slashes at its end.

    A `%41` in a `file:` URL means `A`, unless there is a file whose name has these very characters.

    Args:
        url: a path or URL.
        keep_slash: leave a slash at the end of a URL that is not local. For a collection it has a meaning: see
            `list_images`.
    """
    if (chained := split_member(url)) is not None:
        return url.removesuffix(chained[1]) + absolute(chained[1])
    if (begin := _LOCAL.match(url)) is not None:
        path = _unquoted(url[begin.end() :])
        return path_uri(os.path.abspath(os.path.expanduser(path)))
    if is_local(url):
        return path_uri(os.path.abspath(os.path.expanduser(url)))
    if scheme := _SCHEME.match(url):
        url = _OLD.get(scheme[0].lower(), scheme[0].lower()) + url[scheme.end() :]
    if url.endswith("://"):
        return url
    stripped = url.rstrip("/")
    return stripped + "/" if keep_slash and stripped != url else stripped


def _unquoted(path: str) -> str:
    if "%" not in path or os.path.lexists(path):
        return path
    return os.fsdecode(urllib.parse.unquote_to_bytes(os.fsencode(path)))


def path_uri(path: str) -> str:
    """The URL of an absolute local path: the path itself, or a `file:` URL if the path is not UTF-8."""
    try:
        path.encode()
    except UnicodeEncodeError:
        return "file://" + _quoted(path)
    return path


def _quoted(path: str) -> str:
    return urllib.parse.quote(os.fsencode(path), safe="/*?[]")  # what makes a glob stays readable


def local_path(url: str) -> str:
    """The path of a URL for which `is_local` is true, as Python's functions for files take it."""
    if not url.startswith("file://"):
        return url
    return os.fsdecode(urllib.parse.unquote_to_bytes(url.removeprefix("file://")))


def resolve(uri: str, directory: str) -> str:
    """The absolute URL of a file that a table names.

    A relative name starts at `directory`, which `absolute` returned, and is normalised: `x`, `./x`, `d//x` and
    `d/../x` name what a listing of the directory calls `x`. So is an absolute local path. The URL of an object is
    taken as it is, because `d//x` and `d/x` may be two objects.
    """
    if uri.startswith("s3://") and not uri.endswith("/"):  # of most of the rows of large tables
        return uri
    if (chained := split_member(uri)) is not None:
        return uri.removesuffix(chained[1]) + resolve(chained[1], directory)
    if not is_relative(uri):
        return absolute(uri)
    if is_local(directory):
        return path_uri(os.path.normpath(os.path.join(local_path(directory), uri)))
    scheme, _, path = directory.partition("://")
    bucket, _, folder = path.partition("/")
    key = posixpath.normpath(posixpath.join("/", folder, uri)).lstrip("/")
    return f"{scheme}://{bucket}/{key}"


def is_relative(uri: str) -> bool:
    """Whether a name in a table is neither an absolute path nor a URL."""
    return not (uri.startswith("/") or "://" in uri or _LOCAL.match(uri))


def join(url: str, *names: str) -> str:
    """The URL of `names` under `url`."""
    base = url if url.endswith("://") else url.rstrip("/") + "/"
    return base + "/".join(map(_quoted, names) if url.startswith("file://") else names)


def is_local(url: str) -> bool:
    """Whether a URL that `absolute` returned is a path on this machine."""
    return "://" not in url or url.startswith("file://")


def is_inside(inner: str, outer: str) -> bool:
    """Whether a file or directory lies in a directory or prefix, or is this directory.

    Local paths are compared by what their symbolic links lead to. `s3://`, `s3a://` and `s3n://` are one storage.

    >>> is_inside("s3a://bucket/photos/out/", "s3://bucket/photos")
    True
    >>> is_inside("s3://bucket/photos-out", "s3://bucket/photos")
    False
    """
    return location(inner).startswith(location(outer))


def location(url: str) -> str:
    """A text that is the same for every spelling of a place that `is_inside` knows. It ends with a slash."""
    url = absolute(url)
    url = outermost(url)
    if is_local(url):
        return os.path.realpath(local_path(url)).rstrip("/") + "/"
    scheme, _, path = url.partition("://")
    return f"{_ALIASES.get(scheme, scheme)}://{path.rstrip('/')}/"


def storage_of(url: str) -> str:
    """The storage that holds a file: scheme and host or bucket; "" for this machine. Two buckets are two storages.

    >>> storage_of("zip://cat.jpg::s3a://bucket/photos/train.zip")
    's3://bucket'
    >>> storage_of("https://user:password@example.org/cat.jpg?size=2")
    'https://example.org'
    >>> storage_of("/photos/cat.jpg")
    ''
    """
    url = outermost(url)
    if is_local(url) or _LOCAL.match(url):
        return ""
    scheme, _, path = url.partition("://")
    scheme = scheme.lower()
    host = re.split(r"[/?#]", path, maxsplit=1)[0]
    if scheme in ("http", "https", "ftp", "sftp", "ssh"):  # elsewhere an @ may be a part of the name
        host = host.rpartition("@")[2].lower()
    return f"{_ALIASES.get(scheme, scheme)}://{host}"


def split_member(uri: str) -> tuple[str, str] | None:
    """`(member, archive)` of the URL of a member of an archive; None for any other URL.

    >>> split_member("zip://train/cat.1.jpg::s3://bucket/train.zip")
    ('train/cat.1.jpg', 's3://bucket/train.zip')
    >>> split_member("zip://cat.1.jpg::zip://train.zip::/data/dogs-vs-cats.zip")
    ('cat.1.jpg', 'zip://train.zip::/data/dogs-vs-cats.zip')
    """
    if not uri.startswith(_MEMBERS) or "::" not in uri:
        return None
    begin = len(_MEMBERS[0])
    if (nested := _NEXT_ARCHIVE.search(uri, begin)) is not None:
        return uri[begin : nested.start()], uri[nested.end() :]
    member, _, archive = uri[begin:].rpartition("::")
    return member, archive


def member_uri(member: str, archive: str, scheme: str = "zip") -> str:
    """The fsspec chained URL of a member of an archive. `scheme` is `zip` or `tar`."""
    return f"{scheme}://{member}::{archive}"


def outermost(uri: str) -> str:
    """The file that holds a member of an archive, also of an archive in an archive; any other URL as it is.

    >>> outermost("zip://cat.1.jpg::zip://train.zip::/data/dogs-vs-cats.zip")
    '/data/dogs-vs-cats.zip'
    """
    while (chained := split_member(uri)) is not None:
        uri = chained[1]
    return uri
