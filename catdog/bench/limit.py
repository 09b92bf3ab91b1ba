"""How fast a core can label: a role, which returns the seconds per image of each part of the work.

Each part is done alone, on one thread, for the same images, which lie all over the collection.
"""

from __future__ import annotations

import time
from typing import Final

import numpy as np
import numpy.typing as npt

from catdog import bundle, images, storage
from catdog.bench import processes
from catdog.engines import Engine, load_engine
from catdog.errors import ImageError, UsageError

NUM_IMAGES: Final = 256
"""Largest number of images that are measured."""

BATCH_SIZES: Final = (16, 64)
"""Images per call of the engine. The faster number counts."""

PARTS: Final = ("read", "decode", "forward")
"""Reading bytes; decoding them, and resizing the picture to the model's size; computing the model."""


def limit(settings: processes.Settings) -> dict[str, float]:
    """The seconds per image of each of `PARTS` on one core. The settings are `images` and `model`, URLs.

    Raises:
        UsageError: no image can be decoded.
    """
    files = list(storage.list_images(settings["images"]))
    files = files[:: -(-len(files) // NUM_IMAGES)]
    model = bundle.load(settings["model"])
    engine = load_engine(model, num_parallel=1)
    started = time.perf_counter()
    contents = []
    for file in files:
        try:
            contents.append(storage.read_source(file.uri, file.num_bytes, file.version))
        except ImageError:
            contents.append(b"")
    read_s = time.perf_counter() - started
    started = time.perf_counter()
    pixels = []
    for data in contents:
        try:
            pixels.append(images.decode(data, model.image_size).pixels_HWC)
        except ImageError:
            continue
    decode_s = time.perf_counter() - started
    if not pixels:
        raise UsageError(f"--images must hold an image that can be decoded. Received: --images={settings['images']}")
    images_BHWC = np.stack(pixels)
    forward_s = min(_forward_s(engine, images_BHWC, batch_size) for batch_size in BATCH_SIZES)
    return {name: seconds / len(files) for name, seconds in zip(PARTS, (read_s, decode_s, forward_s), strict=True)}


def _forward_s(engine: Engine, images_BHWC: npt.NDArray[np.uint8], batch_size: int) -> float:
    started = time.perf_counter()
    for start in range(0, len(images_BHWC), batch_size):
        engine.predict(images_BHWC[start : start + batch_size])
    return time.perf_counter() - started


if __name__ == "__main__":
    processes.main(limit)
