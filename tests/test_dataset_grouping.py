"""Which pictures count as the same, which are rejected for it, and which split they get: without Ray."""

import itertools
import time
import tracemalloc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import duckdb
import numpy as np
import pyarrow as pa
import pytest
from PIL import Image, ImageEnhance
from test_dataset import encoded, picture

from catdog import images
from catdog.config import PrepareConfig
from catdog.dataset import catalog, grouping, looks, outcome, scan
from catdog.dataset.split import split_of

Mode = Literal["keep", "group", "reject"]


@dataclass
class Files:
    """A collection of pictures, and what `grouping` makes of it."""

    connection: duckdb.DuckDBPyConnection
    rows: list[dict[str, object]] = field(default_factory=list)
    listing: list[dict[str, object]] = field(default_factory=list)
    looks: list[bytes] = field(default_factory=list)
    given: dict[int, str] = field(default_factory=dict)

    def add(
        self, image_id: str, label: int, look: bytes, bands: Sequence[int | None], given: str | None = None
    ) -> None:
        row = len(self.rows)
        columns = dict(zip(scan.BAND_COLUMNS, bands, strict=True))
        self.rows.append({"row": row, "image_id": image_id, "image_bytes": 1, "part": "p", **columns})
        self.listing.append({"row": row, "uri": f"/{row:06d}", "version": "", "num_bytes": 1, "label": label})
        self.looks.append(look)
        if given:
            self.given[row] = given

    def photograph(self, name: str, label: int, photo: Image.Image, given: str | None = None) -> None:
        """Add a picture, as `scan` sees it; its id begins with `name`."""
        square = Image.fromarray(images.decode(encoded(photo, quality=90), 128).pixels_HWC)
        self.add(name.ljust(64, "0"), label, scan.thumbnail(square), scan.perceptual_hash(square), given)

    def decide(
        self, mode: Mode = "group", settled: dict[str, str] | None = None
    ) -> list[tuple[str | None, str | None]]:
        """(split, reason) of every file."""
        config = PrepareConfig(images="x", output="y", val_fraction=0.3, test_fraction=0.3, near_duplicates=mode)
        connection = self.connection
        connection.execute(
            "CREATE TABLE listing (row BIGINT, uri VARCHAR, version VARCHAR, num_bytes BIGINT, label TINYINT)"
        )
        catalog.insert(connection, "listing", pa.Table.from_pylist(self.listing, schema=catalog.LISTING_SCHEMA))
        connection.execute("CREATE TABLE given (row BIGINT, split VARCHAR)")
        connection.executemany("INSERT INTO given VALUES (?, ?)", [*self.given.items()] or [(-1, "val")])
        grouping.create(connection)
        connection.executemany("INSERT INTO settled VALUES (?, ?)", [*(settled or {}).items()] or [("none", "val")])
        rows = pa.Table.from_pylist(self.rows, schema=scan.LIGHT_SCHEMA)
        grouping.add(connection, rows, config, set(self.given.values()))
        thumbnails = pa.table({"row": range(len(self.looks)), "thumbnail": self.looks})
        grouping.decide(connection, mode, lambda _: thumbnails)
        return connection.execute("SELECT split, reason FROM fates ORDER BY row").fetchall()


@pytest.fixture
def files() -> Iterator[Files]:
    with duckdb.connect() as connection:
        connection.execute("SET threads = 2")
        yield Files(connection)


def own_split(name: str) -> str:
    return split_of(name.ljust(64, "0"), seed=0, val_fraction=0.3, test_fraction=0.3)


def name_with(split: str, start: int = 0) -> str:
    """The first number, as the begin of an id, that gets a split by itself."""
    return next(f"{n:04d}" for n in itertools.count(start) if own_split(f"{n:04d}") == split)


def scene(seed: int) -> Image.Image:
    """A background with coarse and fine structure, 400 x 300 px."""
    coarse = picture(seed, 400).crop((0, 0, 400, 300))
    grain = np.random.default_rng(seed).integers(0, 60, (75, 100, 3), dtype=np.uint8)
    return Image.blend(coarse, Image.fromarray(grain).resize((400, 300)), 0.25)


def with_animal(background: Image.Image, seed: int, width_px: int) -> Image.Image:
    """The background with something else somewhere in it."""
    frame = background.copy()
    rng = np.random.default_rng(seed)
    x, y = rng.integers(0, 400 - width_px), rng.integers(0, 300 - width_px)
    frame.paste(picture(seed + 1000, width_px), (int(x), int(y)))
    return frame


def lit(photo: Image.Image, factor: float) -> Image.Image:
    return ImageEnhance.Brightness(photo).enhance(factor)


@pytest.mark.parametrize("width_px", [40, 60, 100])
def test_frames_of_one_camera_with_other_animals_are_other_pictures(files: Files, width_px: int) -> None:
    """Fault 12: 485 of 600 such frames were rejected."""
    background = scene(1)
    for number in range(40):
        frame = lit(with_animal(background, number, width_px), 1 + number % 3 / 20)
        files.photograph(f"{number:04d}", number % 2, frame)
    fates = files.decide()
    num_candidates = files.connection.execute("SELECT count(*) FROM candidates").fetchall()[0][0]
    assert num_candidates > 20 or width_px > 40, "the hashes alone would tell these frames apart"
    assert [reason for _, reason in fates if reason] == []


@pytest.mark.parametrize(
    "copied",
    [
        lambda photo: Image.open(__import__("io").BytesIO(encoded(photo, quality=30))).convert("RGB"),
        lambda photo: photo.resize((133, 100)),
        lambda photo: photo.resize((64, 64)),
        lambda photo: lit(photo, 0.8),
        lambda photo: lit(photo, 1.1),
        lambda photo: photo.crop((2, 2, 398, 298)),
    ],
    ids=["encoded anew", "a third", "64 px", "darker", "lighter", "cropped"],
)
def test_a_changed_copy_with_the_other_label_is_a_contradiction(files: Files, copied: object) -> None:
    assert callable(copied)
    for number in range(8):
        files.photograph(f"a{number}", 0, scene(number))
        files.photograph(f"b{number}", 1, copied(scene(number)))
    reasons = [reason for _, reason in files.decide()]
    assert reasons.count("conflicting_label") >= 14
    assert set(reasons) <= {"conflicting_label", None}


BANDS = [[0] * 9, [63, 63] + [0] * 7, [63, 63, 63, 63] + [0] * 5]
"""0 and 1, and 1 and 2, are near, by 12 bits; 0 and 2 are not, by 24."""


def test_likeness_is_not_chained(files: Files) -> None:
    look = scan.thumbnail(picture(1, 128))
    names = [name_with("train"), "b", "c"]  # the first leads the second; the third leads itself
    for name, label, bands in zip(names, (0, 0, 1), (BANDS[0], BANDS[1], BANDS[2]), strict=True):
        files.add(name.ljust(64, "0"), label, look, bands)
    fates = files.decide()
    # b and c look the same, and are labelled differently; a says nothing against c.
    assert fates == [("train", None), (None, "conflicting_label"), (None, "conflicting_label")]
    conflicts = outcome.duplicates(files.connection)
    assert conflicts["conflicts"] == [{"/000001": "cat", "/000002": "dog"}]
    assert conflicts["duplicate_groups"] == [["/000000", "/000001"]]


@pytest.mark.parametrize(
    ("mode", "reasons"),
    [
        ("keep", [None] * 4),
        ("group", [None, None, "conflicting_label", "conflicting_label"]),
        ("reject", [None, "near_duplicate", "conflicting_label", "conflicting_label"]),
    ],
)
def test_what_becomes_of_near_duplicates(files: Files, mode: Mode, reasons: list[str | None]) -> None:
    for name, label, photo in [("a", 0, 1), ("b", 0, 1), ("c", 0, 2), ("d", 1, 2)]:
        files.photograph(name, label, scene(photo).resize((200 + ord(name), 200)))
    fates = files.decide(mode)
    assert [reason for _, reason in fates] == reasons
    if mode == "group":
        assert fates[0] == fates[1]
    if mode == "keep":
        assert [split for split, _ in fates] == [own_split(name) for name in "abcd"]


def test_exact_duplicates_with_two_labels_are_rejected_whatever_the_mode(files: Files) -> None:
    files.photograph("a", 0, scene(1))
    files.photograph("a", 1, scene(1))
    assert files.decide("keep") == [(None, "conflicting_label")] * 2


@pytest.mark.parametrize("old", ["train", "val", "test"])
def test_a_settled_image_never_moves(files: Files, old: str) -> None:
    """Fault 14: a near-duplicate with a smaller id took an old image with it."""
    other = "train" if old == "test" else "test"
    newer, older = name_with(other), name_with(old, 5000)
    files.photograph(older, 0, scene(1))
    for number in range(3):  # newcomers that come first in the order of ids
        files.photograph(f"{newer}{number}", 0, scene(1).resize((300 - number, 220)))
    files.photograph(name_with(other, 7000), 0, scene(2))
    fates = files.decide(settled={older.ljust(64, "0"): old})
    assert fates[:4] == [(old, None)] * 4
    assert fates[4] == (other, None)


def test_old_images_stay_where_they_were_when_near_duplicates_come(files: Files) -> None:
    """As `--extends` does it: first some photographs, then these and copies of all."""
    names = [f"{number:04d}" for number in range(5000, 5030)]
    for number, name in enumerate(names):
        files.photograph(name, 0, scene(number))
    first = [split for split, _ in files.decide()]
    with duckdb.connect() as connection:
        more = Files(connection)
        for number, name in enumerate(names):
            more.photograph(name, 0, scene(number))
            for copy in range(2):
                more.photograph(f"{2 * number + copy:04d}", 0, scene(number).resize((200 + copy, 150)))
        fates = more.decide(settled={n.ljust(64, "0"): s for n, s in zip(names, first, strict=True) if s is not None})
    assert [split for split, _ in fates[::3]] == first
    assert fates[1::3] == fates[2::3] == fates[::3]


def test_given_splits_are_kept_and_exact_duplicates_leave_train(files: Files) -> None:
    """Fault 15."""
    files.photograph("a", 0, scene(1))
    files.photograph("a", 0, scene(1), given="test")
    files.photograph("b", 1, scene(2), given="val")
    files.photograph("b", 1, scene(2), given="test")
    files.photograph("c", 1, scene(3))
    files.photograph("d", 1, scene(3).resize((300, 200)), given="val")  # like c, which is for training
    for number in range(20):
        files.photograph(f"e{number:02d}f", 0, scene(10 + number))
    fates = files.decide()
    dup = (None, "exact_duplicate")
    assert fates[:6] == [dup, ("test", None), dup, ("test", None), ("train", None), ("val", None)]
    assert {split for split, _ in fates[6:]} == {"train"}
    messages = files.connection.execute("SELECT message FROM fates WHERE row IN (0, 2) ORDER BY row").fetchall()
    assert messages == [("the same bytes as /000001, in test",), ("the same bytes as /000003, in test",)]
    assert outcome.near_duplicates(files.connection) == {"images": 2, "groups_in_several_splits": 1}


def test_rejecting_near_duplicates_keeps_the_one_that_is_held_out(files: Files) -> None:
    files.photograph("a", 0, scene(1))
    files.photograph("b", 0, scene(1).resize((300, 200)), given="test")
    assert files.decide("reject") == [(None, "near_duplicate"), ("test", None)]


def candidates(num_images: int, num_scenes: int, num_bits: int) -> tuple[int, float, Files]:
    """The number of pairs that are compared, and the seconds, for bursts of scenes with hashes that differ a little."""
    rng = np.random.default_rng(0)
    scenes = rng.integers(0, 256, (num_scenes, 18), dtype=np.uint8)
    hashes = scenes[np.arange(num_images) % num_scenes].copy()
    for _ in range(num_bits):  # within four bands, so that all share the five others
        hashes[np.arange(num_images), rng.integers(0, 8, num_images)] ^= np.uint8(1) << rng.integers(
            0, 8, num_images
        ).astype(np.uint8)
    table = pa.table(
        {
            "rank": np.arange(num_images),
            **{name: hashes.view("<i2")[:, band] for band, name in enumerate(scan.BAND_COLUMNS)},
        }
    )
    connection = duckdb.connect()
    connection.execute(f"SET memory_limit = '{catalog.MEMORY_LIMIT}'")
    connection.execute("SET threads = 2")
    connection.register("burst", table)
    connection.execute("CREATE TABLE pictures AS SELECT *, 'p' AS part, rank AS row FROM burst")
    start = time.perf_counter()
    grouping.find_candidates(connection)
    (num,) = connection.execute("SELECT count(*) FROM candidates").fetchall()[0]
    return num, time.perf_counter() - start, Files(connection)


@pytest.mark.parametrize(("num_scenes", "num_bits"), [(1, 2), (1, 8), (3, 4)])
def test_comparisons_of_a_burst_grow_with_its_length_not_with_its_square(num_scenes: int, num_bits: int) -> None:
    """Fault 13: with 5,000 frames of one scene there were 12 million pairs."""
    small, _, _ = candidates(2000, num_scenes, num_bits)
    large, _, _ = candidates(4000, num_scenes, num_bits)
    assert large <= 2.8 * small
    assert large <= 4000 * 36 * (grouping.NUM_FIRST + grouping.NUM_NEXT)
    assert large <= 4000 * 120


def test_a_burst_is_one_group_in_bounded_memory() -> None:
    num, _, burst = candidates(1000, 1, 3)
    look = scan.thumbnail(picture(1, 128))
    connection = burst.connection
    connection.execute("CREATE TABLE near (a BIGINT, b BIGINT)")
    thumbnails = pa.table({"row": range(1000), "thumbnail": [look] * 1000})
    tracemalloc.start()
    grouping._compare(connection, lambda _: thumbnails)
    grouping._gather(connection)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert connection.execute("SELECT count(*) FROM near").fetchall() == [(num,)]
    sizes = connection.execute("SELECT count(*) FROM gathered GROUP BY group_id ORDER BY 1 DESC").fetchall()
    assert sizes == [(1000,)]
    assert peak < 64 * 2**20
    connection.close()


def test_a_likeness_is_symmetric() -> None:
    pictures = [
        picture(1),
        lit(picture(1), 0.8),
        picture(2),
        Image.new("RGB", (64, 64)),
        scene(1),
        with_animal(scene(1), 1, 60),
    ]
    looks_PNC = np.stack(
        [np.frombuffer(scan.thumbnail(p.resize((128, 128))), np.uint8).reshape(-1, 3) for p in pictures]
    )
    pairs = np.array(list(itertools.product(range(len(pictures)), repeat=2)))
    same = looks.look_same(looks_PNC[pairs[:, 0]], looks_PNC[pairs[:, 1]]).reshape(len(pictures), -1)
    assert (same == same.T).all()
    assert same.diagonal().all()
    assert same[0, 1]
    assert same.sum() == len(pictures) + 2


def test_how_often_a_newcomer_moves_an_old_image() -> None:
    """README's 17 %: without `--extends`, the smaller id decides for both."""

    def alone(image_id: str) -> str:
        return split_of(image_id, seed=0, val_fraction=0.1, test_fraction=0.1)

    ids = np.random.default_rng(0).bytes(32 * 20_000)
    names = [ids[32 * n : 32 * n + 32].hex() for n in range(20_000)]
    moved = [alone(old) != alone(min(old, new)) for old, new in zip(names[::2], names[1::2], strict=True)]
    assert np.mean(moved) == pytest.approx(0.17, abs=0.015)
