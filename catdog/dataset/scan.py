"""The tasks of the stage `scan`: each reads a slice of the listing, and stages its images and the reasons for rejects.

A slice becomes one staging part, whose name follows from the content of the slice. After a kill, the next run finds the
parts that are there, and does not read their files again.
"""

import hashlib
import socket
from typing import Any, Final

import imagehash
import numpy as np
import pyarrow as pa
from PIL import Image, ImageStat

from catdog import images, storage
from catdog.errors import ImageError, UsageError
from catdog.provenance import redact

LISTING_DIR: Final = "listing"
SCAN_DIR: Final = "scan"

HASH_SIDE: Final = 12
BAND_BITS: Final = 16
BAND_COLUMNS: Final = tuple(f"band_{band}" for band in range(HASH_SIDE**2 // BAND_BITS))
"""Columns of the perceptual hash, which is cut into bands of 16 bits."""

MOMENT_COLUMNS: Final = ("mean", "mean_square")

THUMBNAIL_PX: Final = 16
"""Pixels per side of the thumbnail, which is RGB, one byte per value. Each is the mean of 8 x 8 pixels."""

_SIDE_PX: Final = 128
"""Pixels per side to which an image is resized before its hash and its pixel statistics are computed."""

_BLANK_STD: Final = 5.0
"""A picture whose grey values (0..255) have a smaller standard deviation counts as blank: its hash would be that of
noise. The smallest among 20,000 photographs of Dogs vs. Cats is 14."""

_FORMAT: Final = "scan-v4"
"""Version of what is staged. It enters into the name of every staging part, so that parts of another version are not
used."""

LIGHT_SCHEMA: Final = pa.schema(
    [
        pa.field("row", pa.int64(), nullable=False),
        pa.field("image_id", pa.string()),
        pa.field("content", pa.string(), nullable=False),
        *(pa.field(name, pa.int16()) for name in BAND_COLUMNS),
        pa.field("image_bytes", pa.int64()),
        pa.field("reason", pa.string()),
        pa.field("message", pa.string()),
        pa.field("remark", pa.string()),
        pa.field("part", pa.string(), nullable=False),
    ]
)
"""The columns that the driver gets, a row for each file. `content` is what `content_of` says. `reason` and `message`
are null for an image; `remark` says what is wrong with an image that is kept all the same; `image_id`, the hash and
`image_bytes` are null for a file that is rejected. The hash is also null for a blank picture. `image_bytes` is the size
of the encoded image."""

SCAN_SCHEMA: Final = pa.schema(
    [
        *LIGHT_SCHEMA,
        pa.field("uri", pa.string(), nullable=False),
        pa.field("label", pa.int8(), nullable=False),
        pa.field("image", pa.binary()),
        pa.field("width", pa.int32()),
        pa.field("height", pa.int32()),
        *(pa.field(name, pa.list_(pa.float64(), 3)) for name in MOMENT_COLUMNS),
        pa.field("thumbnail", pa.binary()),
    ]
)
"""`_staging/scan/*.parquet`: `mean` and `mean_square` are means of the pixels, 0..255, and of their squares, per
channel."""


def part_name(index: int) -> str:
    """Name of the file that holds slice `index` of the listing, or the plan of chunk `index`."""
    return f"{index:07d}.parquet"


def scan_slice(index: int, staging_url: str) -> pa.Table:
    """Stage slice `index` of the listing. Returns `LIGHT_SCHEMA` rows, one for each file."""
    try:
        listing = storage.read_parquet(storage.join(staging_url, LISTING_DIR, part_name(index)))
    except FileNotFoundError as error:  # the driver has written it
        raise UsageError(
            "--output must be where every node of the cluster finds it: a shared directory, or object storage. "
            f"Received: --output={redact(staging_url.rpartition('/')[0])}, which {socket.gethostname()} does not see"
        ) from error
    part = f"{index:07d}-{_digest(listing)}.parquet"
    url = storage.join(staging_url, SCAN_DIR, part)
    if storage.exists(url):
        return storage.read_parquet(url, columns=LIGHT_SCHEMA.names).cast(LIGHT_SCHEMA)
    files = listing.select(["row", "uri", "label"]).to_pylist()
    uris, sizes, versions = (listing[name].to_pylist() for name in ("uri", "num_bytes", "version"))
    sources = storage.read_sources(uris, sizes, versions)
    rows = [
        {**file, "part": part, "content": content_of(data), **_scan(data)}
        for file, data in zip(files, sources, strict=True)
    ]
    staged = pa.Table.from_pylist(rows, schema=SCAN_SCHEMA)
    storage.publish_parquet(url, staged)
    return staged.select(LIGHT_SCHEMA.names)


def content_of(data: bytes | ImageError) -> str:
    """The SHA-256 of the bytes of a file, in hex; if they could not be read, the code of the error."""
    return data.code if isinstance(data, ImageError) else hashlib.sha256(data).hexdigest()


def contents(files: pa.Table) -> pa.Table:
    """The columns `row` and `content` (`content_of`) of files of the listing, which are read."""
    sources = storage.read_sources(*(files[name].to_pylist() for name in ("uri", "num_bytes", "version")))
    return pa.table({"row": files["row"], "content": [content_of(data) for data in sources]})


def read_thumbnails(part: str, staging_url: str) -> pa.Table:
    """The columns `row` and `thumbnail` of a staging part."""
    return storage.read_parquet(storage.join(staging_url, SCAN_DIR, part), columns=["row", "thumbnail"])


def _digest(listing: pa.Table) -> str:
    """A digest of a slice of the listing and of `_FORMAT`."""
    digest = hashlib.sha256(_FORMAT.encode())
    for row in listing.to_pylist():
        digest.update(repr(row).encode())
    return digest.hexdigest()[:16]


def _scan(data: bytes | ImageError) -> dict[str, Any]:
    """The columns of `SCAN_SCHEMA` that depend on the content of a file."""
    try:
        if isinstance(data, ImageError):
            raise data
        image = images.canonical_bytes(data)
        decoded = images.decode(data, _SIDE_PX)
    except ImageError as error:
        return {"reason": error.code, "message": str(error)}
    pixels = Image.fromarray(decoded.pixels_HWC)
    statistics = ImageStat.Stat(pixels)
    return {
        "remark": decoded.remark,
        "image_id": content_of(data),
        "image": image.data,
        "image_bytes": len(image.data),
        "width": image.width,
        "height": image.height,
        "mean": statistics.mean,
        "mean_square": [total / count for total, count in zip(statistics.sum2, statistics.count, strict=True)],
        "thumbnail": thumbnail(pixels),
        **dict(zip(BAND_COLUMNS, perceptual_hash(pixels), strict=True)),
    }


def thumbnail(picture: Image.Image) -> bytes:
    """The pixels of a small copy of a square picture, with which `catdog.dataset.grouping` compares pictures."""
    return picture.resize((THUMBNAIL_PX, THUMBNAIL_PX), Image.Resampling.BOX).tobytes()


def perceptual_hash(picture: Image.Image) -> list[int] | list[None]:
    """The perceptual hash of a picture, 144 bits, as signed 16-bit bands. For a blank picture all bands are None.

    Pictures that look the same have nearly the same bits. The bits say which of the 12 x 12 lowest frequencies of the
    grey picture's cosine transform lie above their median (`imagehash.phash`). With 16 x 16, the bits of a blurred
    picture would be mostly noise. With 8 x 8, different pictures of one kind would be too close to each other.
    """
    grey = picture.convert("L")
    bits = imagehash.phash(grey, hash_size=HASH_SIDE).hash
    # Half of the bits are set, unless the picture lacks most frequencies, as stripes do: such a hash says too little.
    if ImageStat.Stat(grey).stddev[0] < _BLANK_STD or bits.sum() < bits.size // 2:
        return [None] * len(BAND_COLUMNS)
    bands: list[int] = np.packbits(bits).view("<i2").tolist()
    return bands
