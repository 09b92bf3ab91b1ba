"""Pages of a listing of S3.

botocore takes 30 to 90 ms of CPU time to parse a page of 1,000 objects, which is as long as S3 takes to send it. So the
objects are taken out of the page here, in 1 to 2 ms, before botocore parses the rest. botocore says when: at its event
`before-parse`. A page that is written in another way than S3 writes it is left to botocore.
"""

import contextvars
import re
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from catdog.storage.versions import version_of

_TAKEN: Final = "CatdogObjects"
"""Where the answer that botocore gives has what `_take_objects` took out of the page."""

_EVENT: Final = "before-parse.*.ListObjectsV2"
"""Because of the asterisk, it comes before the event at which botocore itself parses the page, to look for an error."""

_ID: Final = "catdog-pages"

_KEY: Final = re.compile(r"<Key>([^<]+)</Key>")
_ETAG: Final = re.compile(r"<ETag>([^<]+)</ETag>")
_SIZE: Final = re.compile(r"<Size>([0-9]+)</Size>")
_GROUP: Final = re.compile(r"<CommonPrefixes>\s*<Prefix>([^<]+)</Prefix>\s*</CommonPrefixes>")
_QUOTE: Final = re.compile(r'"|&quot;|&#34;|&#x22;')

_is_ours: "contextvars.ContextVar[bool]" = contextvars.ContextVar("_is_ours", default=False)
"""Whether this module has asked for the page that is parsed."""

_prepared: "weakref.WeakSet[Any]" = weakref.WeakSet()
"""The clients that tell `_take_objects` of their pages."""


@dataclass(frozen=True, slots=True)
class Page:
    """One page of a listing.

    Attributes:
        keys: of the objects.
        versions: of the objects: their ETags; without one, as `version_of`.
        sizes: of the objects, in bytes.
        folders: of a flat listing, what has objects below it, with its slash.
        last: the greatest name in the page: a key or, in a flat listing, a folder with its slash; "" if there is none.
        next_token: asks for the next page; None after the last page.
    """

    keys: Sequence[str]
    versions: Sequence[str]
    sizes: Sequence[int]
    folders: Sequence[str]
    last: str
    next_token: str | None


def ask(fs: Any, request: dict[str, Any]) -> Page:
    """One page, as s3fs is given it for a request `list_objects_v2`. Errors as s3fs raises them."""
    from fsspec.asyn import sync

    return _page_of(sync(fs.loop, _answer, fs, request))


async def _answer(fs: Any, request: dict[str, Any]) -> dict[str, Any]:
    client = await fs.set_session()
    if client not in _prepared:
        _prepared.add(client)
        client.meta.events.register(_EVENT, _take_objects, unique_id=_ID)
    _is_ours.set(True)  # in this task alone: s3fs asks for pages of its own, and wants all that is in them
    answer: dict[str, Any] = await fs._call_s3("list_objects_v2", **request)
    return answer


def _page_of(answer: dict[str, Any]) -> Page:
    """The page, from botocore's answer."""
    if (taken := answer.get(_TAKEN)) is not None:
        keys, versions, sizes, groups = taken
        if answer.get("EncodingType") == "url":
            keys, groups = _decoded(keys), _decoded(groups)
    else:
        items = answer.get("Contents", ())
        keys, sizes = [item["Key"] for item in items], [item["Size"] for item in items]
        versions = [version_of(item) for item in items]
        groups = [group["Prefix"] for group in answer.get("CommonPrefixes", ())]
    last = max([*keys[-1:], *groups[-1:]], default="")
    return Page(
        keys, versions, sizes, groups, last, answer["NextContinuationToken"] if answer.get("IsTruncated") else None
    )


def _take_objects(response_dict: dict[str, Any], customized_response_dict: dict[str, Any], **_: Any) -> None:
    """Take the objects out of a page that botocore is about to parse, and put them beside what it parses."""
    if response_dict["status_code"] != 200 or not _is_ours.get():
        return
    try:
        text = response_dict["body"].decode()
    except UnicodeDecodeError:
        return
    begin, end = text.find("<Contents"), text.rfind("</Contents>")
    objects = text[begin : end + len("</Contents>")] if 0 <= begin < end else ""
    rest = text[:begin] + text[begin + len(objects) :] if objects else text
    taken = _objects_in(objects)
    groups = _GROUP.findall(rest)
    if len(groups) > 1:
        rest = _GROUP.sub("", rest)
    if taken is None or "Contents" in rest or len(groups) != text.count("<CommonPrefixes>") or "&" in "".join(groups):
        return
    response_dict["body"] = rest.encode()
    customized_response_dict[_TAKEN] = (*taken, groups)


def _objects_in(text: str) -> tuple[list[str], list[str], list[int]] | None:
    """Keys, ETags and sizes; None if they are written in a way that takes a parser of XML to read them."""
    keys, etags, sizes = _KEY.findall(text), _ETAG.findall(text), _SIZE.findall(text)
    if not len(keys) == len(etags) == len(sizes) == text.count("<Contents>") or "<![CDATA[" in text:
        return None
    versions = _QUOTE.sub("", "\n".join(etags)).split("\n") if etags else []
    if len(versions) != len(keys) or not all(versions) or "&" in "".join(keys) or "&" in "".join(versions):
        return None
    return keys, versions, list(map(int, sizes))


def _decoded(names: list[str]) -> list[str]:
    """Undo the encoding that botocore asks for, in the way in which botocore undoes it."""
    from botocore.compat import unquote_str

    text = "\n".join(names)
    if "%" not in text and "+" not in text:
        return names
    return [unquote_str(name) if "%" in name or "+" in name else name for name in names]
