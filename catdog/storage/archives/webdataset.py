"""WebDataset: tar archives in which the members of one sample follow each other and share a key.

The key is the path up to the first dot of the name: `0/17.jpg`, `0/17.cls` and `0/17.json` are one sample.
"""

import itertools
import json
from collections.abc import Iterator
from typing import Final

from catdog.storage import archives
from catdog.storage.filesystems import SourceFile
from catdog.storage.names import is_image_suffix, suffix_of
from catdog.storage.urls import split_member

LABEL_FIELDS: Final = ("label", "cls", "class", "category", "class_name")
"""Fields of a sample's JSON that hold the label, the first of them that is there."""

_LABEL_SUFFIXES: Final = ("cls", "json", "txt")
"""Suffixes of the members that may hold the label, the first of them that does."""

_MAX_LABEL_BYTES: Final = 2**16


def labels(archive: str) -> Iterator[tuple[SourceFile, str]]:
    """Each image of an archive whose sample has a label, and the label as it is written there.

    Errors as `catdog.storage.archives.list_members`. The archive is read once from its beginning to its end.
    """
    members = ((file, _key(file.uri), head) for file, is_file, head in archives.list_members(archive) if is_file)
    for _, sample in itertools.groupby(members, key=lambda member: member[1]):
        images: list[SourceFile] = []
        found: dict[str, str] = {}
        for file, _, head in sample:
            suffix = suffix_of(file.uri)
            if is_image_suffix(suffix):
                images.append(file)
            elif suffix in _LABEL_SUFFIXES and 0 < file.num_bytes <= _MAX_LABEL_BYTES:
                label = _label(suffix, head(file.num_bytes).decode("utf-8", "replace"))
                if label is not None:
                    found[suffix] = label
        label = next((found[suffix] for suffix in _LABEL_SUFFIXES if suffix in found), None)
        if label is not None:
            yield from ((image, label) for image in images)


def _key(uri: str) -> str:
    member, _ = split_member(uri) or (uri, "")
    folder, slash, name = member.rpartition("/")
    return folder + slash + name.partition(".")[0]


def _label(suffix: str, text: str) -> str | None:
    if suffix != "json":
        return text.strip() or None
    try:
        value = json.loads(text)
    except ValueError:
        return None
    if isinstance(value, dict):
        value = next((value[name] for name in LABEL_FIELDS if name in value), None)
    return str(value).strip() if isinstance(value, (str, int)) else None
