"""The slices of a plan: what they are, and reading them from a file of `PLAN_SCHEMA`."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pyarrow.parquet as pq

from catdog.inference.sources import Root
from catdog.storage import SourceFile

PASSING_CODES: Final = ("not_found", "permission_denied", "unreachable")
"""The error codes that tell of the storage at one moment, and nothing of the image. The next run tries it again."""

CONTENT_VERSION: Final = "sha256-"
"""How what tells of an image's bytes begins: a digest of them follows. So does the `source_version` of an image that
has no version in its storage."""

SLICE_SIZE: Final = 512
"""Number of images in a slice: a second or two of work for a core or two, and a file of some 60 kB."""

_READ_ROWS: Final = 4096


@dataclass(frozen=True, kw_only=True)
class Slice:
    """The unit of work: images that are labelled by one worker and published together, as one part file.

    Attributes:
        part: name of the part file.
        files: the images to label, at least one, in the order of the rows in the part file.
        known: for each image, what the output holds of it: error codes, and digests of bytes that begin with
            `CONTENT_VERSION`. An image of which the worker finds one of these is already done.
        is_retry: whether the part file exists, and its rows of other images are to be kept.
        roots: local places of the images that `Plan.roots` does not name.
    """

    part: str
    files: list[SourceFile]
    known: list[list[str]]
    is_retry: bool = False
    roots: tuple[Root, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Numbers of images in a plan, as far as the listing has come.

    Attributes:
        listed: all entries of the listing, and the images of slices that were taken over and are not listed any more.
            What the listing passed over is counted elsewhere (`Collection.skipped`).
        duplicate: entries whose image was listed before.
        already_done: images that have a row in the output for the same version and model, unless they are tried again.
        to_label: all other images.
    """

    listed: int
    duplicate: int
    already_done: int
    to_label: int


def read_slices(path: Path, roots: tuple[Root, ...] = ()) -> Iterator[Slice]:
    """The slices in a local file of `PLAN_SCHEMA`, one after the other. `roots` are those of all of them."""
    columns = ["part", "uri", "version", "num_bytes", "known", "is_retry"]
    with pq.ParquetFile(path) as file:
        batches = file.iter_batches(batch_size=_READ_ROWS, columns=columns)
        rows: Iterator[dict[str, Any]] = itertools.chain.from_iterable(batch.to_pylist() for batch in batches)
        for (part, is_retry), group in itertools.groupby(rows, key=lambda row: (row["part"], row["is_retry"])):
            files, known = [], []
            for row in group:
                files.append(SourceFile(row["uri"], row["version"], row["num_bytes"]))
                known.append(row["known"])
            yield Slice(part=part, files=files, known=known, is_retry=is_retry, roots=roots)
