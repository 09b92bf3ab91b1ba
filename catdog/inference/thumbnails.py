"""Small pictures of a few photographs, for the pages that labelling writes."""

import queue
import threading
import time
from collections.abc import Sequence
from typing import Final

from catdog import images, storage
from catdog.errors import CatdogError, ImageError
from catdog.inference.findings import Example

SIZE_PX: Final = 160
"""Largest width and height of a picture."""

PATIENCE_S: Final = 5.0
"""How long all pictures of a page may take. Those that are not there by then are left out."""

_READERS: Final = 4


def thumbnails(examples: Sequence[Example], *, patience_s: float = PATIENCE_S) -> list[bytes | None]:
    """A small JPEG file of each photograph; None where it cannot be read within the time.

    A storage that hangs holds up nobody: the threads that wait for it are daemons, and nobody waits for them.
    """
    deadline = time.monotonic() + patience_s
    found: list[bytes | None] = [None] * len(examples)
    waiting = iter(enumerate(examples))
    lock = threading.Lock()
    done: queue.Queue[tuple[int, bytes | None] | None] = queue.Queue()

    def work() -> None:
        while time.monotonic() < deadline:
            with lock:
                task = next(waiting, None)
            if task is None:
                break
            done.put((task[0], _thumbnail(task[1], max(0.0, deadline - time.monotonic()))))
        done.put(None)

    threads = [threading.Thread(target=work, name="catdog-thumbnail", daemon=True) for _ in range(_READERS)]
    for thread in threads:
        thread.start()
    num_working = len(threads)
    while num_working:
        try:
            result = done.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            break
        if result is None:
            num_working -= 1
        else:
            found[result[0]] = result[1]
    return found


def _thumbnail(example: Example, patience_s: float) -> bytes | None:
    try:
        data = storage.read_source(
            example["uri"], example["num_bytes"], example["source_version"], patience_s=patience_s
        )
        return images.thumbnail(data, SIZE_PX)
    except (ImageError, CatdogError, OSError, MemoryError):
        return None
