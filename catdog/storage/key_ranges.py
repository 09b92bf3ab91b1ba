"""One listing of S3 by many requests at once, in order.

S3 lists the keys behind any name, but a page says where the next one begins. So a listing is cut into ranges of keys,
which lie one behind the other and are listed side by side. Where to cut is foreseen from the keys that were seen so
far (`key_space`), and how far apart follows from how many pages the ranges turned out to have. A range that is longer
than it should be is cut again while it is listed. Nothing depends on good guesses but the time: a cut may lie anywhere.

Pages are given in the order of their keys. Ranges are begun close behind what was given already, so that only a few
pages wait for those before them, and no more than `_MOST_PAGES`.
"""

import bisect
import collections
import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Condition, Event
from typing import Final

from catdog.errors import StorageError, UsageError
from catdog.storage import outages
from catdog.storage.key_space import WHOLE, KeySpace
from catdog.storage.s3_pages import Page

_PAGES: Final = 4
"""How many pages a range is meant to have. Each range costs about half a page that is asked for in vain."""

_MOST_PAGES: Final = 128
"""Pages that wait for others at most, which take some 25 MiB; four times as many if a guess was so bad that what was
foreseen as the next pages are the far ones."""

VARIABLE: Final = "CATDOG_S3_LISTS"
"""The environment variable that says another number of requests than `_NUM_LISTS`."""

_NUM_LISTS: Final = 16

_TELLING: Final = 2
"""So many pages of a range tell how far apart its keys lie."""

_MOST_CUTS: Final = 3
"""How far apart keys lie in a range is believed of so many ranges behind it."""

_LATELY: Final = 16
"""So many pages tell how far apart keys lie."""

Fetch = Callable[[str, str | None], Page]
"""Gives the first page behind a key, or the page of a token if there is one. Many threads call it at once."""


def _marks() -> "collections.deque[str]":
    return collections.deque(maxlen=_PAGES + 1)


@dataclasses.dataclass(eq=False)
class _Range:
    """A range of keys.

    Attributes:
        low: the range begins behind this key.
        high: the last key that belongs to it; None if it has no end.
        measured: where pages began and ended, of this range or of the one that it was cut from.
        num_cuts: how many cuts ago `measured` was measured.
        gaps: the `_Listing._gaps` by which `high` was foreseen; 0 if it was not.
        own: where the last pages of this range began and ended.
        reached: the greatest name found; `low` before the first page.
        token: asks for the next page; None before the first page.
        pages: that wait to be given.
        num_pages: that were found, of the last one only what belongs to the range.
    """

    low: str
    high: str | None = None
    measured: collections.deque[str] = dataclasses.field(default_factory=_marks)
    num_cuts: int = 0
    gaps: float = 0.0
    own: collections.deque[str] = dataclasses.field(default_factory=_marks)
    reached: str = ""
    token: str | None = None
    pages: collections.deque[Page] = dataclasses.field(default_factory=collections.deque)
    num_pages: float = 0.0
    is_running: bool = False
    is_done: bool = False

    def __post_init__(self) -> None:
        self.reached = self.low


def num_lists() -> int:
    """How many requests list one prefix at once: 16, or as `CATDOG_S3_LISTS` says."""
    text = os.environ.get(VARIABLE)
    if text is None:
        return _NUM_LISTS
    if not (text.isdecimal() and 1 <= int(text) <= outages.MAX_CONNECTIONS):
        raise UsageError(
            f"{VARIABLE} must be a number from 1 to {outages.MAX_CONNECTIONS}. Received: {VARIABLE}={text}"
        )
    return int(text)


def pages(prefix: str, fetch: Fetch, num_lists: int, *, is_ordered: bool = True) -> Iterator[Page]:
    """All pages of a listing, in the order of their keys. A page may be empty.

    The second page is asked for when the first one has been used, and more and more at once from then on.

    Args:
        prefix: what all keys begin with.
        fetch: asks for a page.
        num_lists: requests in flight at most. With 1, page follows page.
        is_ordered: False if it is known that the store lists keys in no order.

    Raises:
        StorageError: the keys were in order at first, but are not.
    """
    page = fetch("", None)
    yield page
    if num_lists > 1 and is_ordered and page.next_token is not None and page.keys and page.last == page.keys[-1]:
        # The second page proves that the store heeds the key after which it is to begin.
        second = fetch(page.last, None)
        if _is_in_order(page.keys, "") and second.keys and _is_in_order(second.keys, page.last):
            yield second
            if second.next_token is not None:
                yield from _Listing(prefix, fetch, num_lists, page, second).pages()
            return
    while page.next_token is not None:
        page = fetch("", page.next_token)
        yield page


def _is_in_order(keys: Sequence[str], low: str) -> bool:
    return not keys or (keys[0] > low and keys == sorted(keys))


class _Listing:
    """A listing that goes on behind its second page."""

    def __init__(self, prefix: str, fetch: Fetch, num_lists: int, *seen: Page) -> None:
        self._fetch, self._num_lists = fetch, num_lists
        self._space = KeySpace(prefix)
        for page in seen:
            self._space.learn(page.keys)
        self._lately = collections.deque([(page.keys[0], page.keys[-1]) for page in seen], _LATELY)
        """The first and the last key of the last pages. A page of one key tells nothing."""
        self._gaps = 1.0
        """By how much the numbers of keys grow more than within these pages, because of what lies between pages."""
        self._ranges = [_Range(seen[-1].last, token=seen[-1].next_token)]
        self._allowed = 1
        self._num_running = self._num_waiting = 0
        self._changed = Condition()
        self._failure: BaseException | None = None
        self._stop = Event()
        self._pool = ThreadPoolExecutor(num_lists, "catdog-list")

    def pages(self) -> Iterator[Page]:
        """The pages that follow."""
        try:
            while (page := self._next()) is not None:
                yield page
        finally:
            self._stop.set()
            self._pool.shutdown(wait=False, cancel_futures=True)

    def _next(self) -> Page | None:
        with self._changed:
            while True:
                self._begin_more()
                if self._failure is not None:
                    raise self._failure
                first = self._ranges[0]
                if first.pages:
                    self._num_waiting -= 1
                    return first.pages.popleft()
                if not first.is_done:
                    self._changed.wait()
                elif len(self._ranges) == 1:
                    return None
                else:
                    del self._ranges[0]

    def _begin_more(self) -> None:
        """Begin as many requests as may be in flight."""
        while self._failure is None and self._num_running < self._allowed and not self._stop.is_set():
            if (found := self._to_list()) is None:
                return
            found.is_running = True
            self._num_running += 1
            self._pool.submit(self._list, found)

    def _to_list(self) -> _Range | None:
        """The range that lacks a page most urgently. If all are being listed, one is cut."""
        num_before = self._num_running
        for place, each in enumerate(self._ranges):
            num_before += len(each.pages)
            has_room = num_before < _MOST_PAGES and self._num_waiting < 4 * _MOST_PAGES
            if each.is_done:
                continue
            if not each.is_running:
                return each if has_room or place == 0 else None
            if not has_room:
                return None
            if (rest := self._cut(each)) is not None:
                self._ranges.insert(place + 1, rest)
                return rest
        return None

    def _cut(self, long: _Range) -> _Range | None:
        """Cut off what lies behind the next `_PAGES` pages of a range; None if that is little."""
        space = self._space
        reached = space.number_of(long.reached)
        end = WHOLE if long.high is None else space.number_of(long.high)
        if len(long.measured) > _TELLING and long.num_cuts < _MOST_CUTS:
            grown = space.number_of(long.measured[-1]) - space.number_of(long.measured[0])
            step, gaps = grown * _PAGES // (len(long.measured) - 1), 0.0
        else:
            step, gaps = self._step(), self._gaps
        step = max(step, 1)
        if end - reached < step + step // 2:
            return None
        key = space.key_at(reached + step, max(step // 64, 1))
        if key <= long.reached or (long.high is not None and key >= long.high):
            return None
        if not gaps and long.gaps == self._gaps:  # its end was foreseen too far away
            self._gaps = max(self._gaps / 2, 1.0)
        rest = _Range(key, long.high, long.measured.copy(), long.num_cuts + 1)
        long.high, long.gaps = key, 0.0 if long.num_pages else gaps
        return rest

    def _step(self) -> int:
        """By how much the numbers of keys grow in a range of `_PAGES` pages, as it seems now."""
        number_of = self._space.number_of
        grown = sum(number_of(last) - number_of(first) for first, last in self._lately)
        return int(grown * self._gaps) * _PAGES // len(self._lately)

    def _list(self, each: _Range) -> None:
        """Ask for the next page of a range. Runs on a thread of the pool."""
        try:
            with outages.stoppable(self._stop):
                page = self._fetch(each.reached, each.token)
            with self._changed:
                self._take(each, page)
                each.is_running = False
                self._num_running -= 1
                self._allowed = min(self._allowed + 1, self._num_lists)
                self._begin_more()
                self._changed.notify()
        except BaseException as error:  # the thread that waits for the pages raises it
            with self._changed:
                self._failure = error
                self._changed.notify()

    def _take(self, each: _Range, page: Page) -> None:
        """Add a page to a range, and end the range if the page reaches its end."""
        if not _is_in_order(page.keys, each.reached):
            raise StorageError(
                f"S3 must list keys in the order of their characters, or {VARIABLE} must be 1. "
                f"Received: {page.keys[0]} and others after {each.reached}"
            )
        self._space.learn(page.keys)
        each.is_done = page.next_token is None or (each.high is not None and page.last > each.high)
        num_keys = len(page.keys)
        if each.is_done and each.high is not None:
            end = bisect.bisect_right(page.keys, each.high)
            folders = page.folders[: bisect.bisect_right(page.folders, each.high)]
            page = Page(page.keys[:end], page.versions[:end], page.sizes[:end], folders, page.last, None)
        each.num_pages += len(page.keys) / num_keys if num_keys else 0.0
        each.reached, each.token = max(each.reached, page.last), page.next_token
        if page.keys:
            each.own.extend(page.keys[-1:] if each.own else (page.keys[0], page.keys[-1]))
            if len(each.own) > _TELLING:
                each.measured, each.num_cuts = each.own, 0
        if page.keys or page.folders:
            each.pages.append(page)
            self._num_waiting += 1
        if page.next_token is not None and len(page.keys) == num_keys > 1:
            self._lately.append((page.keys[0], page.keys[-1]))
        if each.is_done and each.gaps == self._gaps:  # it shows how good the guess was that is still in use
            self._gaps *= min(_PAGES / max(each.num_pages, _PAGES / 2), 2.0)
