"""First pass, on the workers: read each listed file once; stage what is a valid image, name what is not.

A slice of the listing becomes one staging part, published under a name that follows from the slice's content: after a
kill, the next run finds the parts that are there, and reads none of their files again.
"""

import hashlib
from typing import Any, Final

import imagehash
import numpy as np
import pyarrow as pa
from PIL import Image, ImageStat

from catdog import images, storage
from catdog.errors import ImageError

LISTING_DIR: Final = "listing"
SCAN_DIR: Final = "scan"

HASH_SIDE: Final = 12
BAND_BITS: Final = 16
BAND_COLUMNS: Final = tuple(f"band_{band}" for band in range(HASH_SIDE**2 // BAND_BITS))
"""The perceptual hash, in bands of 16 bits."""

MOMENT_COLUMNS: Final = ("mean", "mean_square")

_PIXELS: Final = 128
"""Side of the square, by `catdog.images.decode`, that the hash and the pixel statistics are taken from."""

_PLAIN_STD: Final = 5.0
"""A picture whose grey values (0..255) deviate less is as good as blank: its hash would be that of noise. The least of
20,000 photographs of Dogs vs. Cats is 14."""

_FORMAT: Final = "scan-v1"
"""Part of every staging part's name: change what is staged, change the name."""

LIGHT_SCHEMA: Final = pa.schema(
    [
        pa.field("row", pa.int64(), nullable=False),
        pa.field("image_id", pa.string()),
        *(pa.field(name, pa.int16()) for name in BAND_COLUMNS),
        pa.field("image_bytes", pa.int64()),
        pa.field("reason", pa.string()),
        pa.field("message", pa.string()),
        pa.field("part", pa.string(), nullable=False),
    ]
)
"""What the driver gets to know of each file: `reason` and `message` are null for an image, the columns before them for
a file that is none; the hash is null for a plain picture too. `image_bytes` is the size of the encoded image."""

SCAN_SCHEMA: Final = pa.schema(
    [
        *LIGHT_SCHEMA,
        pa.field("uri", pa.string(), nullable=False),
        pa.field("label", pa.int8(), nullable=False),
        pa.field("image", pa.binary()),
        pa.field("width", pa.int32()),
        pa.field("height", pa.int32()),
        *(pa.field(name, pa.list_(pa.float64(), 3)) for name in MOMENT_COLUMNS),
    ]
)
"""`_staging/scan/*.parquet`: `mean` and `mean_square` are those of the pixels, 0..255, per channel."""


def part_name(index: int) -> str:
    """File name of the slice's part of the listing."""
    return f"{index:07d}.parquet"


def scan_slice(index: int, staging_url: str) -> pa.Table:
    """Stage one slice of the listing; `LIGHT_SCHEMA` rows, one per file."""
    listing = storage.read_parquet(storage.join(staging_url, LISTING_DIR, part_name(index)))
    part = f"{index:07d}-{_digest(listing)}.parquet"
    url = storage.join(staging_url, SCAN_DIR, part)
    if storage.exists(url):
        return storage.read_parquet(url, columns=LIGHT_SCHEMA.names).cast(LIGHT_SCHEMA)
    files = listing.select(["row", "uri", "label"]).to_pylist()
    sources = storage.read_sources(listing["uri"].to_pylist(), listing["num_bytes"].to_pylist())
    rows = [{**file, "part": part, **_scan(data)} for file, data in zip(files, sources, strict=True)]
    staged = pa.Table.from_pylist(rows, schema=SCAN_SCHEMA)
    storage.publish_parquet(url, staged)
    return staged.select(LIGHT_SCHEMA.names)


def _digest(listing: pa.Table) -> str:
    digest = hashlib.sha256(_FORMAT.encode())
    for row in listing.to_pylist():
        digest.update(repr(row).encode())
    return digest.hexdigest()[:16]


def _scan(data: bytes | ImageError) -> dict[str, Any]:
    try:
        if isinstance(data, ImageError):
            raise data
        image = images.canonical_bytes(data)
        pixels = Image.fromarray(images.decode(data, _PIXELS).pixels_HWC)
    except ImageError as error:
        return {"reason": error.code, "message": str(error)}
    statistics = ImageStat.Stat(pixels)
    return {
        "image_id": hashlib.sha256(data).hexdigest(),
        "image": image.data,
        "image_bytes": len(image.data),
        "width": image.width,
        "height": image.height,
        "mean": statistics.mean,
        "mean_square": [total / count for total, count in zip(statistics.sum2, statistics.count, strict=True)],
        **dict(zip(BAND_COLUMNS, perceptual_hash(pixels), strict=True)),
    }


def perceptual_hash(picture: Image.Image) -> list[int] | list[None]:
    """144 bits, nearly the same for pictures that look the same, as signed 16-bit bands; Nones for a plain picture.

    The bits say which of the 12 x 12 lowest frequencies of the grey picture's cosine transform lie above their median
    (`imagehash.phash`). With 16 x 16, those of a blurred picture are mostly noise; with 8 x 8, pictures of one kind are
    too close.
    """
    grey = picture.convert("L")
    bits = imagehash.phash(grey, hash_size=HASH_SIDE).hash
    # Half of the bits are set, unless most frequencies are missing altogether, as from stripes.
    if ImageStat.Stat(grey).stddev[0] < _PLAIN_STD or bits.sum() < bits.size // 2:
        return [None] * len(BAND_COLUMNS)
    bands: list[int] = np.packbits(bits).view("<i2").tolist()
    return bands
