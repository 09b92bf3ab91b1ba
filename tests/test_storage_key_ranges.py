"""`catdog.storage.key_ranges`: a listing by many requests at once is the listing by one."""

import bisect
import contextvars
import dataclasses
import heapq
import itertools
import random
import string
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar
from unittest.mock import ANY

import fsspec
import pytest
from fsspec.asyn import sync
from s3_server import S3Server

from catdog import storage
from catdog.bench import simulated_s3
from catdog.errors import StorageError, UsageError
from catdog.storage import key_ranges, key_space, s3_pages, walking
from catdog.storage import s3 as storage_s3
from catdog.storage.s3_pages import Page

pytest_plugins = ["s3_server", "storage_case"]

LAST = "\U0010ffff"


class Store:
    """Gives pages of sorted keys, as `key_ranges` asks for them. Counts how often."""

    def __init__(self, keys: Sequence[str], prefix: str = "p/", page_keys: int = 10) -> None:
        self.num_requests = 0
        self._keys, self._prefix, self._page_keys = keys, prefix, page_keys
        self._lock = threading.Lock()

    def fetch(self, after: str, token: str | None) -> Page:
        with self._lock:
            self.num_requests += 1
        low = after if token is None else token
        begin = max(bisect.bisect_right(self._keys, low), bisect.bisect_left(self._keys, self._prefix))
        end = bisect.bisect_left(self._keys, self._prefix + LAST)
        keys = list(self._keys[begin : min(begin + self._page_keys, end)])
        is_last = begin + self._page_keys >= end
        return Page(
            keys, [f"v{key}" for key in keys], [len(key) for key in keys], [], keys[-1] if keys else "",
            None if is_last else keys[-1],
        )  # fmt: skip


def listed(fetch: key_ranges.Fetch, num_lists: int = 16, prefix: str = "p/") -> list[str]:
    return [key for page in key_ranges.pages(prefix, fetch, num_lists) for key in page.keys]


ODD = [" ", "%", "+", "&", "<", "/", "//", "é", "中", "\U0001f600", "\ue000", "a", "0", "%2F", "\x7f", "Z"]


def many_kinds(chance: random.Random) -> Iterator[str]:
    """Names as one finds them, of one kind."""
    number = chance.choice([0, 1, 9, 70, 900])
    letters = string.ascii_lowercase
    kinds: list[Callable[[int], str]] = [
        lambda i: f"img_{i:06d}.jpg",
        lambda i: f"img_{i}.jpg",
        lambda i: f"{chance.getrandbits(64):016x}.jpg",
        lambda i: f"{chance.choice(letters)}/{chance.randrange(40)}/{chance.randrange(3 * number)}.JPG",
        lambda i: "".join(chance.choices(ODD, k=chance.randrange(1, 9))),
        lambda i: f"a/{'x' * chance.randrange(30)}{chance.randrange(9)}",
        lambda i: f"{int(chance.expovariate(1) * 1e6):09d}.jpg",
        lambda i: f"2026/{chance.randrange(1, 13):02d}/cam{chance.randrange(3)}/{int(chance.paretovariate(1))}.jpg",
        lambda i: "".join(chance.choices("ABCdefgh0123456789-_", k=chance.randrange(1, 30))),
    ]
    kind = chance.choice(kinds)
    return map(kind, range(number))


@pytest.mark.parametrize("seed", range(60))
def test_the_listing_is_the_same_as_page_by_page(seed: int) -> None:
    chance = random.Random(seed)
    prefix = chance.choice(["", "p/", "photos/x/"])
    names = itertools.chain(many_kinds(chance), many_kinds(chance), many_kinds(chance))
    keys = sorted({prefix + name for name in names if name} | {"o", "zz/1"})
    store = Store(keys, prefix, chance.choice([1, 3, 10, 100]))
    pages = list(key_ranges.pages(prefix, store.fetch, chance.choice([2, 5, 16])))
    found = [each for page in pages for each in zip(page.keys, page.versions, page.sizes, strict=True)]
    assert found == [(key, f"v{key}", len(key)) for key in keys if key.startswith(prefix)]


@pytest.mark.parametrize("num_pages", [0, 1, 2])
def test_a_small_listing_costs_no_more_requests_than_page_by_page(num_pages: int) -> None:
    store = Store([f"p/{i:04d}" for i in range(10 * num_pages)])
    assert len(listed(store.fetch)) == 10 * num_pages
    assert store.num_requests == max(num_pages, 1)


def test_nothing_is_asked_for_before_it_is_wanted() -> None:
    store = Store([f"p/{i:04d}" for i in range(1000)])
    pages = key_ranges.pages("p/", store.fetch, 16)
    assert next(pages).keys[0] == "p/0000"
    assert store.num_requests == 1
    pages.close()  # type: ignore[attr-defined]
    assert store.num_requests == 1


def test_only_so_many_pages_wait() -> None:
    store = Store([f"p/{i:06d}" for i in range(10_000)])
    pages = key_ranges.pages("p/", store.fetch, 16)
    for _ in range(3):
        next(pages)
    for thread in threading.enumerate():
        if thread.name.startswith("catdog-list"):
            thread.join(0.01)
    assert store.num_requests < 2 * key_ranges._MOST_PAGES
    pages.close()  # type: ignore[attr-defined]


def test_an_error_of_any_request_ends_the_listing() -> None:
    store = Store([f"p/{i:06d}" for i in range(10_000)])

    def fetch(after: str, token: str | None) -> Page:
        page = store.fetch(after, token)
        if "p/005000" in page.keys:
            raise StorageError("the storage failed")
        return page

    with pytest.raises(StorageError, match="the storage failed"):
        listed(fetch)


@pytest.mark.parametrize("begins_again", [False, True])
def test_a_store_that_does_not_heed_where_to_begin_is_listed_page_by_page(begins_again: bool) -> None:
    keys = [f"p/{i:04d}" for i in range(200)]
    store = Store(keys)

    def fetch(after: str, token: str | None) -> Page:
        if after and token is None and not begins_again:
            return Page([], [], [], [], "", None)
        return store.fetch("", token)

    assert listed(fetch) == keys


def test_a_store_in_another_order_is_listed_page_by_page() -> None:
    keys = [f"p/{i:04d}" for i in reversed(range(200))]

    def fetch(after: str, token: str | None) -> Page:
        begin = int(token or 0)
        page = keys[begin : begin + 10]
        return Page(page, page, [1] * 10, [], max(page), str(begin + 10) if begin + 10 < len(keys) else None)

    assert listed(fetch) == keys


def test_a_store_that_turns_out_to_have_another_order_is_an_error() -> None:
    store = Store([f"p/{i:04d}" for i in range(500)])

    def fetch(after: str, token: str | None) -> Page:
        page = store.fetch(after, token)
        is_late = "p/0300" in page.keys
        return dataclasses.replace(page, keys=page.keys[::-1]) if is_late else page

    with pytest.raises(StorageError, match=r"must list keys in the order of .* or CATDOG_S3_LISTS must be 1. Received"):
        listed(fetch)
    assert len(listed(fetch, 1)) == 500


@pytest.mark.parametrize("text", ["0", "33", "x", "1.5", ""])
def test_the_number_of_requests_is_a_number(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert key_ranges.num_lists() == 16
    monkeypatch.setenv(key_ranges.VARIABLE, "4")
    assert key_ranges.num_lists() == 4
    monkeypatch.setenv(key_ranges.VARIABLE, text)
    with pytest.raises(UsageError, match=rf"^CATDOG_S3_LISTS must be a number from 1 to 32. Received: .*={text}$"):
        key_ranges.num_lists()


class Clock:
    """Threads and their lock, in a time in which each request takes 1 and nothing else takes any."""

    now: ClassVar[int] = 0
    _coming: ClassVar[list[tuple[int, int, Callable[..., None], tuple[Any, ...]]]] = []
    _numbers: ClassVar[Iterator[int]] = itertools.count()

    def __init__(self, *_: object) -> None:
        pass

    def submit(self, action: Callable[..., None], *arguments: Any) -> None:
        heapq.heappush(Clock._coming, (Clock.now + 1, next(Clock._numbers), action, arguments))

    def wait(self) -> None:
        Clock.now, _, action, arguments = heapq.heappop(Clock._coming)
        action(*arguments)

    def notify(self) -> None:
        pass

    def shutdown(self, **_: object) -> None:
        Clock._coming.clear()

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass


def word(chance: random.Random, length: int) -> str:
    return "".join(chance.choices(string.ascii_lowercase, k=length))


COLLECTIONS: dict[str, Callable[[random.Random, int], str]] = {
    "numbers": lambda chance, i: f"img_{i:08d}.jpg",
    "numbers of any length": lambda chance, i: f"img_{i}.jpg",
    "digests": lambda chance, i: f"{chance.getrandbits(64):016x}.jpg",
    "days": lambda chance, i: simulated_s3.Objects(10**7, "deep")[i * 100][7:],
    "two folders": lambda chance, i: f"{'cat' if i % 2 else 'dog'}/{i}.jpg",
    "a folder of each": lambda chance, i: f"{chance.getrandbits(32):08x}/original.jpg",
    "seconds, most of them at noon": lambda chance, i: (
        f"{i // 500 * 86400 + int(chance.expovariate(1e-3)):08d}-{i}.jpg"
    ),
    "names of people": lambda chance, i: f"{word(random.Random(i % 700), 3 + i % 5)}/{chance.randrange(10**6)}.png",
    "most in one folder": lambda chance, i: (
        f"{word(random.Random(min(i % 1000, 30)), 6)}/{chance.randrange(10**7)}.jpg"
    ),
}


@pytest.mark.parametrize("kind", COLLECTIONS)
def test_16_requests_at_once_are_8_times_as_fast(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    chance = random.Random(7)
    keys = sorted({"p/" + COLLECTIONS[kind](chance, i) for i in range(100_000)})
    store = Store(keys, page_keys=100)
    monkeypatch.setattr(key_ranges, "ThreadPoolExecutor", Clock)
    monkeypatch.setattr(key_ranges, "Condition", Clock)
    monkeypatch.setattr(Clock, "now", 2)
    assert listed(store.fetch) == keys
    num_pages = len(keys) / 100
    assert num_pages / (6 if kind == "most in one folder" else 8) > Clock.now > num_pages / 16
    assert store.num_requests < 1.6 * num_pages


def test_numbers_grow_with_keys() -> None:
    chance = random.Random(3)
    names = [name for _ in range(20) for name in many_kinds(chance)]
    keys = sorted("p/" + name for name in names)
    space = key_space.KeySpace("p/")
    space.learn(chance.sample(keys, 300))
    numbers = [space.number_of(key) for key in keys]
    assert numbers == sorted(numbers)
    assert 0 <= numbers[0] < numbers[-1] <= key_space.WHOLE


def test_half_way_between_numbered_names() -> None:
    space = key_space.KeySpace("p/")
    space.learn([f"p/img_{i:04d}.jpg" for i in range(1000)])
    low, high = space.number_of("p/img_0000.jpg"), space.number_of("p/img_9000.jpg")
    assert space.key_at((low + high) // 2, (high - low) // 4000).startswith("p/img_45")


@pytest.mark.slow
@pytest.mark.parametrize("layout", simulated_s3.LAYOUTS)
def test_a_simulated_store_is_listed_whole(
    layout: str, no_s3_server: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with simulated_s3.serving(25_300, layout, 0.0) as environment:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        bucket = f"s3://{simulated_s3.BUCKET}"
        found = list(storage.list_images(f"{bucket}/{simulated_s3.PREFIX}"))
        monkeypatch.setenv(key_ranges.VARIABLE, "1")
        assert list(storage.list_images(f"{bucket}/{simulated_s3.PREFIX}")) == found
    keys = simulated_s3.Objects(25_300, layout)
    assert [file.uri for file in found] == [f"{bucket}/{key}" for key in keys]
    assert [file.version for file in found] == [simulated_s3.etag_of(i) for i in range(25_300)]
    assert [file.num_bytes for file in found] == [simulated_s3.num_bytes_of(i) for i in range(25_300)]


def odd_keys(seed: int) -> list[str]:
    chance = random.Random(seed)
    odd = {"".join(chance.choices(ODD, k=chance.randrange(1, 7))) for _ in range(250)}
    plain = {f"day {i:02d}/img+{n}.jpg" for i in range(9) for n in range(12)}
    return sorted(name for name in odd | plain if not name.startswith("/") and "/." not in name)


@pytest.mark.slow
def test_a_real_server_gives_the_same_listing(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage_s3, "_PAGE_OBJECTS", 7)
    root = s3.new_bucket()
    fs, bucket = fsspec.core.url_to_fs(root, skip_instance_cache=True)
    names = odd_keys(1)
    for number, name in enumerate(names):
        fs.call_s3("put_object", Bucket=bucket, Key=f"a/{name}", Body=b"x" * number)
    skipped: list[str] = []
    for flat in (False, True):
        depth = walking.Depth.of(f"{root}/a/*" if flat else f"{root}/a/**", f"{root}/a")
        found = list(walking.walk(f"{root}/a", lambda *_: skipped.append("x"), depth))
        monkeypatch.setenv(key_ranges.VARIABLE, "1")
        assert list(walking.walk(f"{root}/a", lambda *_: skipped.append("x"), depth)) == found
        monkeypatch.delenv(key_ranges.VARIABLE)
        expected = [
            (f"{root}/a/{name}", number)
            for number, name in enumerate(names)
            if not name.endswith("/") and not (flat and "/" in name)
        ]
        assert [(file.uri, file.num_bytes) for file in found] == expected
        assert all(file.version for file in found)


@pytest.mark.slow
@pytest.mark.parametrize("flat", [False, True])
def test_pages_are_as_botocore_parses_them(flat: bool, s3: S3Server) -> None:
    root = s3.new_bucket()
    fs, bucket = storage_s3.url_to_fs(root, 4)
    for name in [*odd_keys(2), "<&amp;>", "a&quot;"]:
        fs.call_s3("put_object", Bucket=bucket, Key=name, Body=name.encode())

    request = {"Bucket": bucket, "Delimiter": "/" if flat else ""}

    def answer() -> dict[str, Any]:
        found: dict[str, Any] = sync(fs.loop, s3_pages._answer, fs, request)
        return found

    taken = answer()
    assert s3_pages._TAKEN in taken
    fs.s3.meta.events.unregister(s3_pages._EVENT, unique_id=s3_pages._ID)
    parsed = answer()
    fs.s3.meta.events.register(s3_pages._EVENT, s3_pages._take_objects, unique_id=s3_pages._ID)
    assert s3_pages._TAKEN not in parsed
    assert s3_pages._page_of(taken) == s3_pages._page_of(parsed)
    assert fs.call_s3("list_objects_v2", **request) == parsed | {"ResponseMetadata": ANY}  # as s3fs itself asks


def body(contents: str) -> bytes:
    begin = "<ListBucketResult><IsTruncated>false</IsTruncated><EncodingType>url</EncodingType>"
    return f"{begin}{contents}</ListBucketResult>".encode()


def take(response: dict[str, Any], customized: dict[str, Any]) -> None:
    s3_pages._take_objects(response, customized)
    assert not customized
    s3_pages._is_ours.set(True)
    s3_pages._take_objects(response, customized)


ONE = "<Contents><Key>a%20b</Key><ETag>&quot;e&quot;</ETag><Size>3</Size></Contents>"


@pytest.mark.parametrize(
    ("contents", "taken"),
    [
        ("", ([], [], [], [])),
        (ONE, (["a%20b"], ["e"], [3], [])),
        (ONE.replace("&quot;", '"'), (["a%20b"], ["e"], [3], [])),
        (ONE + "<CommonPrefixes><Prefix>c/</Prefix></CommonPrefixes>", (["a%20b"], ["e"], [3], ["c/"])),
        (ONE.replace("<ETag>&quot;e&quot;</ETag>", ""), None),
        (ONE.replace("&quot;e&quot;", ""), None),
        (ONE.replace("a%20b", "a&amp;b"), None),
        (ONE.replace("a%20b", "<![CDATA[a]]>"), None),
        (ONE.replace("<Contents>", '<Contents x="y">'), None),
        (ONE.replace("Contents", "s3:Contents"), None),
        (ONE + "<CommonPrefixes><Prefix>c/</Prefix></CommonPrefixes>" + ONE, None),
        (ONE + "<CommonPrefixes><Prefix>&lt;</Prefix></CommonPrefixes>", None),
    ],
)
def test_what_is_written_in_another_way_is_left_to_botocore(contents: str, taken: object) -> None:
    response, customized = {"status_code": 200, "body": body(contents)}, dict[str, Any]()
    contextvars.copy_context().run(take, response, customized)
    assert customized.get(s3_pages._TAKEN) == taken
    assert (response["body"] == body(contents)) == (taken is None or contents == "")


@pytest.mark.slow
def test_botocore_parses_little(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    import botocore.handlers

    says = "botocore moved the events of its parser, or parses pages before them: mend catdog/storage/s3_pages.py"
    root = s3.new_bucket()
    fs, bucket = storage_s3.url_to_fs(root, 4)
    fs.pipe({f"{bucket}/{i:03d}.jpg": b"x" for i in range(100)})
    lengths: list[int] = []

    def note(status: int, body: bytes) -> bool:
        lengths.append(len(body))
        return False

    assert hasattr(botocore.handlers, "_looks_like_special_case_error"), says
    monkeypatch.setattr(botocore.handlers, "_looks_like_special_case_error", note)
    assert len(storage_s3.list_page(fs, root, None, flat=False).keys) == 100
    assert lengths, says
    assert max(lengths) < 2_000, says
