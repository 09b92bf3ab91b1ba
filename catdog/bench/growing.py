"""A collection of pictures that grows night by night, on a local disk or a remote storage."""

from __future__ import annotations

import io
import itertools
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

from catdog import drawings, storage
from catdog.bench.opened import Opened
from catdog.errors import UsageError
from catdog.schema import CLASS_NAMES
from catdog.storage.urls import is_local, local_path

NUM_DRAWINGS: Final = 48
_SIGNATURES: Final = (b"\xff\xd8\xff", b"\x89PNG")
"""Of the formats whose decoders do not read what follows a picture. A number there makes a file unlike all others."""

_WRITERS: Final = 16


class Growing:
    """A directory in which each night is a directory of so many pictures, none of which is like another."""

    def __init__(self, url: str, images: str | None, night_size: int, opened: Opened | None) -> None:
        """Draw pictures, or read up to as many from `images`, of which the nights are made.

        Raises:
            UsageError: there is no JPEG or PNG file among the images.
        """
        self.url = url
        self.nights: list[str] = []
        self._pictures = _drawn() if images is None else _read(images)
        self.night_size = night_size
        self._opened = opened

    @property
    def num_pictures(self) -> int:
        """How many there are."""
        return len(self.nights) * self.night_size

    def add_night(self) -> None:
        """Add a night. On a local disk its pictures appear all at once."""
        name = f"night-{len(self.nights) + 1:03d}"
        night = storage.join(self.url, name)
        first = self.num_pictures
        files = {f"{number:07d}.jpg": self._picture(number) for number in range(first, first + self.night_size)}
        if is_local(self.url):
            self._write(Path(local_path(self.url)), name, files)
        else:
            with ThreadPoolExecutor(_WRITERS) as pool:
                list(pool.map(lambda file: storage.publish_bytes(storage.join(night, file[0]), file[1]), files.items()))
        self.nights.append(night)

    def _picture(self, number: int) -> bytes:
        return self._pictures[number % len(self._pictures)] + str(number).encode()

    def _write(self, directory: Path, name: str, files: dict[str, bytes]) -> None:
        hidden = directory / f".{name}"
        hidden.mkdir(parents=True)
        for file, data in files.items():
            (hidden / file).write_bytes(data)
        if self._opened is not None:
            self._opened.watch(str(hidden), known_as=str(directory / name))
        os.rename(hidden, directory / name)


def _drawn() -> list[bytes]:
    pictures = []
    for number in range(NUM_DRAWINGS):
        buffer = io.BytesIO()
        drawings.draw(CLASS_NAMES[number % 2], [number]).save(buffer, "JPEG", quality=85)
        pictures.append(buffer.getvalue())
    return pictures


def _read(images: str) -> list[bytes]:
    files = itertools.islice(storage.list_images(images), NUM_DRAWINGS)
    found = [storage.read_source(file.uri, file.num_bytes, file.version) for file in files]
    pictures = [data for data in found if data.startswith(_SIGNATURES)]
    if not pictures:
        raise UsageError(f"--images must hold JPEG or PNG files. Received: --images={images}")
    return pictures
