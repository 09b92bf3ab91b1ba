"""Making items in a thread before they are used."""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Iterator
from typing import TypeVar

ItemT = TypeVar("ItemT")


def prefetched(items: Iterator[ItemT], depth: int) -> Generator[ItemT]:
    """The same items. A thread makes them, up to `depth` of them before they are used."""
    ready: queue.Queue[tuple[ItemT | None, BaseException | None]] = queue.Queue(depth)
    left = threading.Event()

    def hand_over(item: ItemT | None, error: BaseException | None = None) -> bool:
        while not left.is_set():
            try:
                ready.put((item, error), timeout=0.1)
            except queue.Full:
                continue
            return True
        return False

    def make() -> None:
        try:
            for item in items:
                if not hand_over(item):
                    return
        except BaseException as error:  # raised again where the items are used
            hand_over(None, error)
        else:
            hand_over(None)

    thread = threading.Thread(target=make, name="catdog-prefetch", daemon=True)
    thread.start()
    try:
        while True:
            item, error = ready.get()
            if error is not None:
                raise error
            if item is None:
                return
            yield item
    finally:
        left.set()
        thread.join()
