"""What the training's workers are fed, on a real Ray: the same images whatever the workers, and after a restart."""

import contextlib
import dataclasses
import io
import itertools
import json
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest
import ray
from PIL import Image

from catdog import storage
from catdog.dataset.reading import load_info
from catdog.errors import DatasetError, StorageError
from catdog.schema import DATASET_SCHEMA, SPLITS
from catdog.training import decoding, feed
from catdog.training.decoding import Batch, Source
from catdog.training.feed import Feed, Share
from catdog.training.prefetch import prefetched

pytestmark = pytest.mark.slow

SIZE = 8
SHARDS = (21, 13, 11)
NUM_IMAGES = sum(SHARDS)
CHUNK_ROWS = 5
NUM_CHUNKS = 5 + 3 + 3


@pytest.fixture(scope="module", autouse=True)
def small_ray() -> Iterator[None]:
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "CHUNK_ROWS", CHUNK_ROWS)
    monkeypatch.setattr(feed, "NUM_AHEAD", 2)


def picture(index: int) -> bytes:
    """One whose number can be read off its pixels."""
    buffer = io.BytesIO()
    Image.new("RGB", (SIZE, SIZE), (3 * index, index, 255 - index)).save(buffer, "PNG")
    return buffer.getvalue()


def write_dataset(path: Path) -> None:
    """`SHARDS` of numbered pictures in several row groups each; every third is a dog."""
    index = itertools.count()
    parts = {}
    for number, num_rows in enumerate(SHARDS):
        rows = [
            {"image_id": str(i), "uri": f"/{i}.png", "label": int(i % 3 == 0), "image": picture(i)}
            for i in itertools.islice(index, num_rows)
        ]
        table = pa.Table.from_pylist([row | {"width": 1, "height": 1} for row in rows], schema=DATASET_SCHEMA)
        name = f"part-{number:05}.parquet"
        storage.publish_parquet(str(path / "train" / name), table, row_group_rows=4)
        parts[name] = num_rows
    num_dogs = len(range(0, NUM_IMAGES, 3))
    info = {
        "format": "catdog-dataset",
        "format_version": 1,
        "class_names": ["cat", "dog"],
        "counts": {split: {"cat": 0, "dog": 0} for split in SPLITS}
        | {"train": {"cat": NUM_IMAGES - num_dogs, "dog": num_dogs}},
        "parts": {split: {} for split in SPLITS} | {"train": parts},
        "mean": [1, 2, 3],
        "std": [4, 5, 6],
        "digest": "d",
    }
    (path / "dataset.json").write_text(json.dumps(info))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("dataset")
    write_dataset(path)
    return str(path)


def opened(dataset: str, *, in_memory: bool) -> Source:
    source = decoding.source(load_info(dataset), "train", SIZE, in_memory=in_memory)
    assert (len(source.chunks), source.num_images) == (NUM_CHUNKS, NUM_IMAGES)
    return source


@pytest.fixture
def held(dataset: str) -> Source:
    source = opened(dataset, in_memory=True)
    decoding.wait_until_decoded(source)
    return source


@pytest.fixture
def streamed(dataset: str) -> Source:
    return opened(dataset, in_memory=False)


def numbers(batch: Batch) -> list[int]:
    """Which pictures these are; checks pixels and labels."""
    images, labels = batch
    assert images.dtype == np.uint8
    assert labels.dtype == np.int8
    assert images.shape == (len(labels), SIZE, SIZE, 3)
    found: npt.NDArray[np.int64] = images[:, 0, 0, 1].astype(int)
    np.testing.assert_array_equal(
        images, np.broadcast_to(images[:, :1, :1], images.shape), err_msg="one colour per image"
    )
    np.testing.assert_array_equal(images[:, 0, 0, 2], 255 - found)
    np.testing.assert_array_equal(labels, found % 3 == 0)
    return [int(number) for number in found]


def flat(steps: Iterable[list[int]]) -> list[int]:
    return list(itertools.chain.from_iterable(steps))


def shares(num_workers: int, batch_size: int) -> list[Share]:
    return [Share(rank=rank, num_workers=num_workers, batch_size=batch_size) for rank in range(num_workers)]


def steps_of(source: Source, share: Share, steps: range, *, seed: int | None = 3, epoch: int = 0) -> list[list[int]]:
    """The pictures of each of a worker's steps."""
    batches = Feed(source, share).train_batches(seed=seed, epoch=epoch, steps=steps)
    return [numbers(batch) for batch in batches]


@pytest.mark.parametrize(("num_workers", "batch_size"), [(1, 8), (2, 7), (3, 7), (5, 5), (4, 1000)])
def test_shares_make_up_the_batch(num_workers: int, batch_size: int) -> None:
    rows = [row for share in shares(num_workers, batch_size) for row in range(share.start, share.stop)]
    assert rows == list(range(batch_size))
    sizes = [share.stop - share.start for share in shares(num_workers, batch_size)]
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("batch_size", [7, 20, NUM_IMAGES])
def test_held_in_memory_the_batches_are_the_same_whatever_the_number_of_workers(held: Source, batch_size: int) -> None:
    steps = range(NUM_IMAGES // batch_size)
    epochs = []
    for epoch in (0, 1):
        (alone,) = (steps_of(held, share, steps, epoch=epoch) for share in shares(1, batch_size))
        assert [len(step) for step in alone] == [batch_size] * len(steps)
        seen = flat(alone)
        assert len(set(seen)) == len(seen)
        for num_workers in (2, 3):
            parts = [steps_of(held, share, steps, epoch=epoch) for share in shares(num_workers, batch_size)]
            assert [flat(step) for step in zip(*parts, strict=True)] == alone
        epochs.append(seen)
    assert epochs[0] != epochs[1]
    assert epochs[0] != sorted(epochs[0])


def test_without_shuffling_the_order_is_the_shards(held: Source, streamed: Source) -> None:
    for source in (held, streamed):
        (share,) = shares(1, 6)
        found = steps_of(source, share, range(NUM_IMAGES // 6), seed=None)
        assert flat(found) == list(range(NUM_IMAGES // 6 * 6))


@pytest.mark.parametrize(("num_workers", "batch_size"), [(1, 4), (2, 7), (3, 12), (NUM_CHUNKS + 4, 30), (2, 26)])
def test_a_resumed_epoch_goes_on_with_what_it_would_have_seen(
    held: Source, streamed: Source, num_workers: int, batch_size: int
) -> None:
    # Streamed, these are up to three rounds through a worker's chunks, and so many windows.
    num_steps = {True: NUM_IMAGES // batch_size, False: 3 * NUM_IMAGES // batch_size}
    for source in (held, streamed):
        steps = range(num_steps[source is held])
        for share in (shares(num_workers, batch_size)[0], shares(num_workers, batch_size)[-1]):
            whole = steps_of(source, share, steps)
            for first in range(0, len(steps) + 1, 1 if len(steps) < 8 else 3):
                assert steps_of(source, share, steps[first:]) == whole[first:]


@pytest.mark.parametrize(("num_workers", "batch_size"), [(1, 4), (2, 7), (3, 12), (3, NUM_IMAGES)])
def test_streamed_every_worker_goes_round_its_own_chunks(streamed: Source, num_workers: int, batch_size: int) -> None:
    seen_by = []
    for share in shares(num_workers, batch_size):
        size = share.stop - share.start
        found = flat(steps_of(streamed, share, range(2 * NUM_IMAGES // size)))
        own = set(found)
        # Round after round, each of its images once.
        for start in range(0, len(found), len(own)):
            lap = found[start : start + len(own)]
            assert len(set(lap)) == len(lap)
        assert found[: len(own)] != found[len(own) : 2 * len(own)]
        seen_by.append(own)
    assert sum(map(len, seen_by)) == NUM_IMAGES
    assert set().union(*seen_by) == set(range(NUM_IMAGES))
    (share, *_) = shares(num_workers, batch_size)
    assert steps_of(streamed, share, range(1), epoch=0) != steps_of(streamed, share, range(1), epoch=1)


def test_more_workers_than_chunks_are_fed_too(streamed: Source) -> None:
    num_workers = NUM_CHUNKS + 4
    found = [flat(steps_of(streamed, share, range(3))) for share in shares(num_workers, 3 * num_workers)]
    assert all(len(each) == 9 for each in found)
    assert len(set().union(*found[:NUM_CHUNKS])) == NUM_IMAGES


@pytest.mark.parametrize("num_workers", [1, 2, 3, NUM_CHUNKS + 4])
@pytest.mark.parametrize("batch_size", [2, 5, 100])
def test_all_batches_have_each_image_once_in_its_place(
    held: Source, streamed: Source, num_workers: int, batch_size: int
) -> None:
    for source in (held, streamed):
        places: list[int] = []
        for share in shares(num_workers, 64):
            for place, images, labels in Feed(source, share).all_batches(batch_size):
                assert len(labels) <= batch_size
                assert numbers((images, labels)) == list(range(place, place + len(labels)))
                places += range(place, place + len(labels))
        assert sorted(places) == list(range(NUM_IMAGES))


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize("damage", ["image", "page", "shard"])
def test_what_cannot_be_decoded_is_an_error_where_it_is_used(tmp_path: Path, in_memory: bool, damage: str) -> None:
    write_dataset(tmp_path)
    shard = tmp_path / "train" / "part-00001.parquet"
    if damage != "image":
        if damage == "shard":
            shard.unlink()
        else:
            column = pa.parquet.read_metadata(shard).row_group(1).column(3)
            with shard.open("r+b") as file:
                file.seek(column.data_page_offset)
                file.write(b"\xff" * column.total_compressed_size)
        message = r"^Every shard in dataset\.json must be there and whole\. Received: .*part-00001\.parquet"
    else:
        rows = pa.parquet.read_table(shard).to_pylist()
        rows[7]["image"] = rows[7]["image"][:40]
        storage.publish_parquet(str(shard), pa.Table.from_pylist(rows, schema=DATASET_SCHEMA))
        message = r"^a prepared dataset holds only images that decode\. Received: /28\.png: "
    source = opened(str(tmp_path), in_memory=in_memory)
    decoding.wait_until_decoded(source)
    (share,) = shares(1, 4)
    with pytest.raises(DatasetError, match=message):
        steps_of(source, share, range(11))
    with pytest.raises(DatasetError, match=message):
        list(Feed(source, share).all_batches(4))
    assert not feeding()


@pytest.mark.parametrize("failed", [range(1), range(2, 4), range(NUM_CHUNKS)])
def test_a_fault_of_the_storage_while_a_split_was_decoded_into_memory_does_not_last(
    held: Source, failed: range
) -> None:
    assert held.decoded is not None
    fault = ray.put(StorageError("503"))
    refs = [fault if index in failed else ref for index, ref in enumerate(held.decoded)]
    (share,) = shares(1, 4)
    found = steps_of(dataclasses.replace(held, decoded=refs), share, range(3))
    assert found == steps_of(held, share, range(3))


def feeding() -> bool:
    return any(thread.name == "catdog-prefetch" for thread in threading.enumerate())


@pytest.mark.parametrize("in_memory", [True, False])
def test_leaving_early_ends_the_thread(dataset: str, in_memory: bool) -> None:
    (share,) = shares(1, 4)
    batches = Feed(opened(dataset, in_memory=in_memory), share).train_batches(seed=0, epoch=0, steps=range(11))
    next(batches)
    assert feeding()
    batches.close()
    assert not feeding()


@pytest.mark.parametrize("in_memory", [True, False])
def test_a_worker_decodes_itself_where_no_cpu_is_left_for_a_task(
    dataset: str, in_memory: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    (share,) = shares(1, 4)
    expected = steps_of(opened(dataset, in_memory=in_memory), share, range(11))
    monkeypatch.setattr(feed, "PATIENCE_S", 0.5)
    monkeypatch.setattr(feed, "_PULL_S", 0.1)
    all_cpus = ray.util.placement_group([{"CPU": 2}])
    assert all_cpus.wait(60)
    try:
        # In memory, as if what was there had gone with its node.
        starved = opened(dataset, in_memory=in_memory)
        assert steps_of(starved, share, range(11)) == expected
    finally:
        ray.util.remove_placement_group(all_cpus)
    assert steps_of(starved, share, range(11)) == expected


def test_what_is_streamed_ahead_at_the_end_of_an_epoch_is_used_in_the_next(
    streamed: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched: list[int] = []
    fetch = Source.fetch

    def counted(source: Source, index: int) -> ray.ObjectRef[Batch]:
        fetched.append(index)
        return fetch(source, index)

    for share in shares(2, 9):
        steps = range(NUM_IMAGES // 9)
        alone = [steps_of(streamed, share, steps, epoch=epoch) for epoch in range(4)]
        with monkeypatch.context() as patch:
            patch.setattr(Source, "fetch", counted)
            one = Feed(streamed, share)
            epochs = [
                [numbers(batch) for batch in one.train_batches(seed=3, epoch=epoch, steps=steps)] for epoch in range(3)
            ]
            assert epochs == alone[:3]
            num_used = sum(len(window.chunks) for window in _windows_of(one, steps, num_epochs=3))
            assert num_used <= len(fetched) <= num_used + feed.NUM_AHEAD
            # An epoch that is left early, and one out of turn, are read from their own beginning.
            with contextlib.closing(one.train_batches(seed=3, epoch=3, steps=steps)) as batches:
                assert numbers(next(batches)) == alone[3][0]
            for epoch in (3, 0):
                assert [numbers(batch) for batch in one.train_batches(seed=3, epoch=epoch, steps=steps)] == alone[epoch]
        fetched.clear()


def _windows_of(one: Feed, steps: range, *, num_epochs: int) -> list[feed._Window]:
    windows = one._windows(3, 0, steps)
    return list(itertools.takewhile(lambda window: window.seed is not None and window.seed[1] < num_epochs, windows))


def test_items_come_in_order_and_errors_after_them() -> None:
    def items() -> Iterator[int]:
        yield from range(5)
        raise ZeroDivisionError

    ahead = prefetched(items(), 2)
    assert list(itertools.islice(ahead, 5)) == list(range(5))
    with pytest.raises(ZeroDivisionError):
        next(ahead)
    assert list(prefetched(iter(range(7)), 2)) == list(range(7))
    assert list(prefetched(iter(()), 2)) == []
    assert not feeding()


@pytest.mark.parametrize(("spaces", "fits"), [([100.0], True), ([100.0, 95.0], False), ([100.0, None], False)])
def test_what_fits_leaves_half_of_the_smallest_object_store(spaces: list[float | None], fits: bool) -> None:
    needed = 10 * 32 * 32 * 3
    nodes = [
        {"Alive": True, "Resources": {} if space is None else {"object_store_memory": 2 * needed * space / 100}}
        for space in spaces
    ]
    dead = {"Alive": False, "Resources": {}}
    assert decoding.fits_in_memory(10, 32, [*nodes, dead]) is fits
