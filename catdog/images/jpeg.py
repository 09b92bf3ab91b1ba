"""What sets JPEG apart: huge ones can be decoded at a fraction of their size, and those cut short can still be shown.

A JPEG is one scan, or several that add up. A decoder turns a single scan into pixels as it reads, and holds a few rows.
Of several scans (every progressive JPEG has them) it holds all coefficients until the last scan has come.
"""

import io
import random
import re
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from PIL import JpegImagePlugin

MAX_MISSING: Final = 0.1
"""Largest share of the rows that may be missing at the end of a JPEG that is cut short, for it still to be shown."""

_START: Final = b"\xff\xd8\xff"
_END: Final = b"\xff\xd9"
_MARKER: Final = re.compile(rb"\xff([^\x00\x01\xd0-\xd8\xff])", re.DOTALL)
"""A marker that ends coded data: neither an escaped 0xFF nor one that may stand within the data."""

_NO_FRAMES: Final = (0xC4, 0xC8, 0xCC)
_FRAMES: Final = tuple(code for code in range(0xC0, 0xD0) if code not in _NO_FRAMES)
_PROGRESSIVE_FRAMES: Final = (0xC2, 0xC6, 0xCA, 0xCE)
_RESTARTS: Final = range(0xD0, 0xD8)
_RESTART_INTERVAL: Final = 0xDD
_SCAN: Final = 0xDA
_END_OF_IMAGE: Final = 0xD9

_BAND_PX: Final = 8
"""Rows are compared in bands of this height."""

_LARGE_PIXELS: Final = 2**25
"""Of larger pictures of one scan, the bands' means are compared, which takes a 64th of the memory. That a block lacks
details, but not its mean, goes unseen."""

_NUM_PADDINGS: Final = 3
_PADDING_BYTES: Final = 256


def is_jpeg(data: bytes) -> bool:
    """Whether the first bytes are those of a JPEG."""
    return data.startswith(_START)


def num_held(image: JpegImagePlugin.JpegImageFile, data: bytes) -> int:
    """Number of coefficients that a decoder of this JPEG holds at a time; 0 for a few rows of them."""
    layers = [(horizontal, vertical) for _, horizontal, vertical, _ in image.layer]
    first = next((part for part in _parts(data) if part.code == _SCAN), None)
    is_one_scan = first is not None and not _is_progressive(data) and first.body[:1] == bytes([len(layers)])
    if is_one_scan:
        return 0
    densest = max(horizontal for horizontal, _ in layers) * max(vertical for _, vertical in layers)
    return image.width * image.height * sum(horizontal * vertical for horizontal, vertical in layers) // densest


@dataclass(frozen=True, slots=True)
class Mended:
    """A JPEG that is cut short, with an end.

    Attributes:
        data: the encoded bytes.
        remark: what is missing, in one line.
    """

    data: bytes
    remark: str


def mended(data: bytes) -> Mended | None:
    """A JPEG that is cut short, with an end, if it shows nearly the whole picture; else None.

    At most `MAX_MISSING` of its rows may be missing, and no scan: without its last scans a picture is coarse all over.
    """
    body = _without_filling(data)
    if not is_jpeg(body) or not _is_in_last_scan(body):
        return None
    # Where the data ends, a decoder goes on with a fixed value. What it makes of other data from there on differs from
    # the first missing row on: nowhere, if nothing is missing.
    try:
        header = JpegImagePlugin.JpegImageFile(io.BytesIO(body))
        height = header.height
        scale = 8 if header.width * height > _LARGE_PIXELS and not _is_progressive(body) else 1
        shown = _bands(body + _END, scale)
        num_whole = min(_num_equal(shown, _bands(body + padding + _END, scale)) for padding in _paddings(body))
    except (OSError, SyntaxError, ValueError):
        return None
    if num_whole == len(shown):
        return Mended(body + _END, "the file is cut short, but shows the whole picture")
    missing = height - num_whole * _BAND_PX
    if missing > MAX_MISSING * height:
        return None
    return Mended(body + _END, f"the file is cut short: of its {height} rows, the last {missing} are not whole")


def _without_filling(data: bytes) -> bytes:
    """The data without the zeros with which a file system or a download fills what never came, and half a marker."""
    body = data.rstrip(b"\0")
    if body.endswith(b"\xff") and len(data) == len(body) + 1:
        return data  # an escaped 0xFF, which is coded data
    return body.rstrip(b"\xff")


def _paddings(body: bytes) -> Iterator[bytes]:
    """Data that could follow. Where a restart marker is due, a decoder looks at nothing that stands before it."""
    starts = [b""]
    if any(part.code == _RESTART_INTERVAL for part in _parts(body)):
        last_scan = body.rfind(bytes((0xFF, _SCAN)))
        place, code = max((body.rfind(bytes((0xFF, code)), last_scan), code) for code in _RESTARTS)
        starts.append(bytes((0xFF, _RESTARTS[0] if place < 0 or code == _RESTARTS[-1] else code + 1)))
    for seed in range(_NUM_PADDINGS):
        coded = bytes(random.Random(seed).choices(range(0xFF), k=_PADDING_BYTES))
        yield from (start + coded for start in starts)


def _bands(data: bytes, scale: int) -> list[int]:
    """A checksum of each band of `_BAND_PX` rows of a JPEG, which is decoded at 1/`scale` of its size."""
    image = JpegImagePlugin.JpegImageFile(io.BytesIO(data))
    image.draft(image.mode, (max(1, image.width // scale), max(1, image.height // scale)))
    image.load()
    step = _BAND_PX // scale
    return [
        zlib.crc32(image.crop((0, top, image.width, min(top + step, image.height))).tobytes())
        for top in range(0, image.height, step)
    ]


def _num_equal(one: list[int], other: list[int]) -> int:
    """How many bands are equal, from the first on."""
    return next((index for index, (a, b) in enumerate(zip(one, other, strict=True)) if a != b), len(one))


@dataclass(frozen=True, slots=True)
class _Part:
    """A marker of a JPEG with its parameters; coded data, which may follow, is left out."""

    code: int
    body: bytes


def _parts(data: bytes) -> Iterator[_Part]:
    """The markers of a JPEG up to its end, without those whose parameters are cut short."""
    position = 2
    while (marker := _MARKER.search(data, position)) and marker[1][0] != _END_OF_IMAGE:
        start = marker.end()
        end = start + int.from_bytes(data[start : start + 2], "big")
        if end > len(data):
            return
        yield _Part(marker[1][0], data[start + 2 : end])
        position = max(end, start + 2)


def _is_progressive(data: bytes) -> bool:
    frame = next((part.code for part in _parts(data) if part.code in _FRAMES), None)
    return frame in _PROGRESSIVE_FRAMES


def _is_in_last_scan(data: bytes) -> bool:
    """Whether each coefficient of each component stands, to its last bit, in a scan that has begun."""
    is_progressive, open_ = False, set[tuple[int, int]]()
    num_scans = 0
    try:
        for part in _parts(data):
            if part.code in _FRAMES:
                is_progressive = part.code in _PROGRESSIVE_FRAMES
                components = [part.body[6 + 3 * index] for index in range(part.body[5])]
                open_ = {(component, number) for component in components for number in range(64)}
            elif part.code == _SCAN:
                num_scans += 1
                components = [part.body[1 + 2 * index] for index in range(part.body[0])]
                first, last, bits = struct.unpack("3B", part.body[1 + 2 * len(components) :][:3])
                numbers = range(first, last + 1) if is_progressive else range(64)
                if not is_progressive or bits & 0xF == 0:
                    open_ -= {(component, number) for component in components for number in numbers}
    except (IndexError, struct.error):
        return False
    return num_scans > 0 and not open_
