"""`catdog.dataset` without Ray: labels, the split, duplicates, what is refused, and reading."""

import dataclasses
import io
import json
import zipfile
from collections.abc import Sequence
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from catdog import images, report, storage
from catdog.config import PrepareConfig
from catdog.dataset import (
    catalog,
    check_shards,
    grouping,
    iter_split,
    load_info,
    prepare,
    reading,
    samples,
    scan,
)
from catdog.dataset.split import split_of
from catdog.errors import DatasetError, OutputRefusedError, UsageError
from catdog.portions import portions
from catdog.schema import CLASS_NAMES, DATASET_SCHEMA, SPLITS


def picture(seed: int, size: int = 64) -> Image.Image:
    """A picture that looks like no other: coarse random colours, smoothly enlarged."""
    coarse = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@given(st.text("0123456789abcdef", min_size=64, max_size=64), st.integers(0, 5), st.floats(0, 0.5), st.floats(0, 0.49))
def test_split_depends_on_group_and_seed_alone(key: str, seed: int, val: float, test: float) -> None:
    split = split_of(key, seed=seed, val_fraction=val, test_fraction=test)
    assert split == split_of(key, seed=seed, val_fraction=val, test_fraction=test)
    assert (val, split) != (0, "val")
    assert (test, split) != (0, "test")
    # A larger share for the test split takes no image out of it.
    assert split != "test" or split_of(key, seed=seed, val_fraction=val, test_fraction=test + 0.01) == "test"


def test_split_has_the_shares_that_were_asked_for() -> None:
    splits = [split_of(f"{i:064x}", seed=1, val_fraction=0.1, test_fraction=0.3) for i in range(20_000)]
    shares = [splits.count(split) / len(splits) for split in SPLITS]
    assert shares == pytest.approx([0.6, 0.1, 0.3], abs=0.01)


HASHES: list[Sequence[int | None] | None] = [
    [0] * 9,
    [63] + [0] * 8,
    [63, 63] + [0] * 7,
    [-1] * 9,
    [-1] * 8 + [-8],
    [0] * 4 + [-1] * 5,
    None,
]
"""By index: 0-1, 1-2, 0-2 (by 12 bits) and 3-4 are near; 5 is near none; the last is a plain picture."""

NEAR = {0: 0, 1: 0, 2: 0, 3: 1, 4: 1, 5: 2}


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 11), st.integers(0, 1), st.booleans()), min_size=1, max_size=30))
def test_duplicates_never_straddle_and_every_file_has_one_fate(files: list[tuple[int, int, bool]]) -> None:
    """`files`: number of the picture, its label, and whether it cannot be read. Two pictures each share a hash."""
    config = PrepareConfig(images="x", output="y", val_fraction=0.3, test_fraction=0.3)
    rows = []
    for row, (number, _, is_bad) in enumerate(files):
        bands = HASHES[number // 2 % len(HASHES)] or [None] * len(scan.BAND_COLUMNS)
        image = {"image_id": f"{number:064x}", "image_bytes": 1, **dict(zip(scan.BAND_COLUMNS, bands, strict=True))}
        rejected = {"reason": "truncated", "message": "x"}
        rows.append({"row": row, "part": "p", **(rejected if is_bad else image)})
    listing = [
        {"row": row, "uri": f"/{row % 7}", "version": "", "num_bytes": 1, "label": label}
        for row, (_, label, _) in enumerate(files)
    ]
    with duckdb.connect() as connection:
        connection.execute(
            "CREATE TABLE listing (row BIGINT, uri VARCHAR, version VARCHAR, num_bytes BIGINT, label TINYINT)"
        )
        connection.execute("CREATE TABLE given (row BIGINT, split VARCHAR)")
        catalog.insert(connection, "listing", pa.Table.from_pylist(listing, schema=catalog.LISTING_SCHEMA))
        grouping.create(connection)
        grouping.add(connection, pa.Table.from_pylist(rows, schema=scan.LIGHT_SCHEMA), config)
        looks = pa.table({"row": range(len(files)), "thumbnail": [scan.thumbnail(picture(0))] * len(files)})
        grouping.decide(connection, "group", lambda _: looks)
        fates = connection.sql("SELECT row, image_id, split, reason, message FROM fates ORDER BY row").fetchall()
    assert [row for row, *_ in fates] == list(range(len(files)))
    groups: dict[object, list[int]] = {}
    for row, (number, _, is_bad) in enumerate(files):
        if is_bad:
            assert fates[row][2:] == (None, "truncated", "x")
        else:
            groups.setdefault(NEAR.get(number // 2 % len(HASHES), f"plain {number}"), []).append(row)
    for members in groups.values():
        if len({files[row][1] for row in members}) == 2:
            assert {fates[row][2:4] for row in members} == {(None, "conflicting_label")}
            continue
        key = min(fates[row][1] for row in members)
        split = split_of(key, seed=0, val_fraction=0.3, test_fraction=0.3)
        by_image: dict[str, list[int]] = {}
        for row in members:
            by_image.setdefault(fates[row][1], []).append(row)
        for same in by_image.values():
            first, *others = sorted(same, key=lambda row: (listing[row]["uri"], row))
            assert fates[first][2:] == (split, None, None)
            assert all(fates[row][2:4] == (None, "exact_duplicate") for row in others)


def test_copies_of_a_photograph_are_near_and_others_are_not(shared_data: Path) -> None:
    with zipfile.ZipFile(shared_data / "originals.zip") as archive:
        names = [info.filename for info in archive.infolist() if not info.is_dir()][:60]
        originals = [images.open_upright(archive.read(name)) for name in names]

    def hashes(pictures: list[Image.Image]) -> np.ndarray:
        squares = [Image.fromarray(images.decode(encoded(p, quality=40), 128).pixels_HWC) for p in pictures]
        return np.array([scan.perceptual_hash(square) for square in squares], "<i2").view(np.uint8)

    small = [picture.resize((picture.width // 2, picture.height // 3)) for picture in originals]
    distances = np.bitwise_count(hashes(originals)[:, None] ^ hashes(small)[None]).sum(axis=2)
    is_same = np.eye(len(names), dtype=bool)
    assert distances[is_same].max() <= grouping.MAX_DISTANCE
    assert distances[~is_same].min() > 2 * grouping.MAX_DISTANCE


def test_a_staged_slice_is_not_read_again(photos: Path, tmp_path: Path) -> None:
    rows = [
        {"row": row, "uri": f"{photos}/{name}", "version": "", "num_bytes": 1, "label": 0}
        for row, name in enumerate(["cat/a.jpg", "cat/gone.jpg", "cat/b.jpg"])
    ]
    listing = pa.Table.from_pylist(rows, schema=catalog.LISTING_SCHEMA)
    storage.publish_parquet(f"{tmp_path}/{scan.LISTING_DIR}/{scan.part_name(7)}", listing)
    first = scan.scan_slice(7, str(tmp_path))
    assert first["reason"].to_pylist() == [None, "not_found", None]
    (photos / "cat/b.jpg").unlink()
    assert scan.scan_slice(7, str(tmp_path)).equals(first)
    # Another listing is another part.
    storage.publish_parquet(f"{tmp_path}/{scan.LISTING_DIR}/{scan.part_name(7)}", listing.slice(1))
    assert scan.scan_slice(7, str(tmp_path))["reason"].to_pylist() == ["not_found", "not_found"]


def test_plain_and_striped_pictures_have_no_hash() -> None:
    black = Image.new("RGB", (128, 128), "black")
    stripes = Image.linear_gradient("L").resize((128, 128)).convert("RGB")
    assert scan.perceptual_hash(black) == scan.perceptual_hash(stripes) == [None] * len(scan.BAND_COLUMNS)
    assert None not in scan.perceptual_hash(picture(1, 128))


@given(st.lists(st.integers(0, 9)), st.integers(1, 5), st.integers(1, 20))
def test_runs_hold_every_item_and_end_at_a_limit(sizes: list[int], max_rows: int, max_bytes: int) -> None:
    runs = list(portions(sizes, lambda size: (1, size), max_rows, max_bytes))
    assert [size for run in runs for size in run] == sizes
    assert all(len(run) == max_rows or sum(run) >= max_bytes for run in runs[:-1])
    assert all(len(run) <= max_rows and sum(run[:-1]) < max_bytes for run in runs)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Two labelled pictures of each class."""
    for number, name in enumerate(["cat/a.jpg", "cat/b.jpg", "dog/a.jpg", "dog/b.jpg"]):
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(picture(number)))
    return tmp_path / "photos"


def refused(tmp_path: Path, images: Path | str, labels: str = "auto") -> str:
    """The message with which `prepare` refuses, before it starts Ray or writes anything."""
    with pytest.raises(UsageError) as error:
        prepare(PrepareConfig(images=str(images), output=str(tmp_path / "out"), labels=labels))
    assert not (tmp_path / "out").exists()
    return str(error.value)


def test_what_cannot_be_labelled_is_refused(tmp_path: Path, photos: Path) -> None:
    (photos / "bird").mkdir()
    (photos / "bird/1.jpg").write_bytes(encoded(picture(9)))
    (photos / "README.txt").write_text("not an image: no reason to refuse")
    assert f"Received: 1 of 6 files without one, the first: {photos}/bird/1.jpg" in refused(tmp_path, photos)
    assert f"Received: 5 of 6 files without one, the first: {photos}/bird/1.jpg" in refused(tmp_path, photos, "prefix")
    assert "none labelled dog among 2 files" in refused(tmp_path, photos / "cat")
    assert "must exist" in refused(tmp_path, photos / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "at least one file" in refused(tmp_path, tmp_path / "empty")
    assert "Received: --labels=nonsense" in refused(tmp_path, photos, labels="nonsense")


def test_tables_of_labels_that_are_refused(tmp_path: Path, photos: Path) -> None:
    table = tmp_path / "labels.csv"
    rows = ["uri,label", "cat/a.jpg,cat", "cat/b.jpg,Cats", f"{photos}/dog/a.jpg,dog"]
    table.write_text("\n".join([*rows, "dog/b.jpg,bird"]))
    assert f"Received: 1 that are not, the first in row 4 of {table}: 'bird' of {photos}/dog/b.jpg" in refused(
        tmp_path, photos, str(table)
    )
    table.write_text("\n".join([*rows, "dog/b.jpg,dog", "dog/b.jpg,cat"]))
    assert f"with two in {table}, the first: {photos}/dog/b.jpg, in row 4 of {table} and row 5 of {table}" in refused(
        tmp_path, photos, str(table)
    )
    table.write_text("\n".join(rows))
    assert f"1 of 4 files without one, the first: {photos}/dog/b.jpg" in refused(tmp_path, photos, str(table))
    table.write_text("key,class\na,cat")
    assert "must have a column named uri, path," in refused(tmp_path, photos, str(table))
    table.write_text("path,kind\na,cat")
    assert "must have a column named label, labels, class, category, or" in refused(tmp_path, photos, str(table))
    table.write_text("path,label,class\na,cat,0")
    assert "--label-column must say which column is meant" in refused(tmp_path, photos, str(table))
    table.write_text("")
    assert "must have a column named" in refused(tmp_path, photos, str(table))
    assert "must exist" in refused(tmp_path, photos, str(tmp_path / "nowhere.csv"))


def test_foreign_output_is_refused(tmp_path: Path, photos: Path) -> None:
    output = tmp_path / "thesis"
    output.mkdir()
    (output / "chapter1.tex").write_text("x")
    with pytest.raises(OutputRefusedError, match=r"chapter1\.tex"):
        prepare(PrepareConfig(images=str(photos), output=str(output)))
    (output / "_staging").mkdir()  # like ours, but without our mark
    with pytest.raises(OutputRefusedError, match=r"chapter1\.tex"):
        prepare(PrepareConfig(images=str(photos), output=str(output)))
    (output / "dataset.json").write_text('{"title": "thesis"}')
    with pytest.raises(OutputRefusedError, match="must be one that prepare wrote"):
        prepare(PrepareConfig(images=str(photos), output=str(output)))
    with pytest.raises(UsageError, match="--output must not lie inside --images"):
        prepare(PrepareConfig(images=str(photos), output=str(photos / "out")))
    assert sorted(path.name for path in output.iterdir()) == ["_staging", "chapter1.tex", "dataset.json"]


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """A small dataset, written by hand: three images in two shards."""
    path = tmp_path / "dataset"
    rows = [
        {"image_id": str(i), "uri": f"/{i}", "label": i % 2, "image": b"x", "width": 1, "height": 1} for i in range(3)
    ]
    table = pa.Table.from_pylist(rows, schema=DATASET_SCHEMA)
    for name, part in [("part-00000.parquet", table.slice(0, 2)), ("part-00001.parquet", table.slice(2))]:
        storage.publish_parquet(str(path / "train" / name), part)
    nothing = dict.fromkeys(CLASS_NAMES, 0)
    info = {
        "format": "catdog-dataset",
        "format_version": 1,
        "class_names": ["cat", "dog"],
        "counts": {"train": {"cat": 2, "dog": 1}, "val": nothing, "test": nothing},
        "parts": {"train": {"part-00000.parquet": 2, "part-00001.parquet": 1}, "val": {}, "test": {}},
        "mean": [1, 2, 3],
        "std": [4, 5, 6],
        "digest": "d",
    }
    (path / "dataset.json").write_text(json.dumps(info))
    return path


def test_reading(dataset: Path) -> None:
    info = load_info(str(dataset))
    assert dataclasses.replace(info, raw={}).mean == (1.0, 2.0, 3.0)
    assert info.num_images("train") == 3
    shards = [(Path(path).name, num_rows) for path, num_rows in reading.shards(info, "train")]
    assert shards == [("part-00000.parquet", 2), ("part-00001.parquet", 1)]
    batches = list(iter_split(str(dataset), "train", columns=["label"], batch_size=1))
    assert [batch.to_pydict() for batch in batches] == [{"label": [0]}, {"label": [1]}, {"label": [0]}]
    assert list(iter_split(info, "val")) == []
    check_shards(str(dataset))


def test_samples_show_the_first_images_of_each_class(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    num_cats, num_dogs = samples.NUM_PER_CLASS + 8, 5
    rows = [
        {
            "image_id": str(i),
            "uri": f"/{i}",
            "label": int(i % 4 == 3 and i < 4 * num_dogs),
            "width": 30 + i,
            "height": 40,
        }
        for i in range(num_cats + num_dogs)
    ]
    for row in rows:
        row["image"] = encoded(picture(int(str(row["image_id"]))))
    name = "part-00000.parquet"
    storage.publish_parquet(str(dataset / "train" / name), pa.Table.from_pylist(rows, schema=DATASET_SCHEMA))
    counts = {"train": {"cat": num_cats, "dog": num_dogs}}
    info = dataclasses.replace(load_info(str(dataset)), counts=counts, parts={"train": {name: len(rows)}})
    drawn: list[report.Section] = []
    sheet = report.sheet

    def recording(sections: list[report.Section]) -> bytes:
        drawn.extend(sections)
        return sheet(sections)

    monkeypatch.setattr(report, "sheet", recording)
    with Image.open(io.BytesIO(samples.sample_sheet(info))) as sheet_image:
        assert sheet_image.format == "PNG"
    assert [section.heading for section in drawn] == ["cat: 20 for training", "dog: 5 for training"]
    for label, section in enumerate(drawn):
        shown = [row for row in rows if row["label"] == label][: samples.NUM_PER_CLASS]
        assert [tile.image for tile in section.tiles] == [row["image"] for row in shown]
        assert [tile.caption for tile in section.tiles] == [f"{row['width']} × 40 px" for row in shown]


@pytest.mark.parametrize("row_group_rows", [1, 3, 4, 100])
def test_rows_are_read_from_the_row_groups_that_hold_them(tmp_path: Path, row_group_rows: int) -> None:
    num_rows = 10
    rows = [
        {"image_id": "", "uri": f"/{i}", "label": 0, "image": b"x", "width": 1, "height": 1} for i in range(num_rows)
    ]
    path = str(tmp_path / "part.parquet")
    storage.publish_parquet(path, pa.Table.from_pylist(rows, schema=DATASET_SCHEMA), row_group_rows=row_group_rows)
    assert pq.ParquetFile(path).num_row_groups == -(-num_rows // row_group_rows)
    for start in range(num_rows):
        for stop in range(start, num_rows + 1):
            table = reading.read_rows(path, num_rows, start, stop, ["uri"])
            assert table.to_pydict() == {"uri": [f"/{i}" for i in range(start, stop)]}
    with pytest.raises(DatasetError, match=r"as dataset\.json says, 11\. Received: .*part\.parquet with 10"):
        reading.read_rows(path, num_rows + 1, 0, 1, ["uri"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "other"}, "must have format, version, classes"),
        ({"format_version": 2}, "must have format, version, classes"),
        ({"class_names": ["dog", "cat"]}, "must have format, version, classes"),
        ({"mean": [1, 2]}, "must be one that prepare wrote"),
        ({"counts": {}}, "must be one that prepare wrote"),
        ({"parts": {"train": {}, "val": {}, "test": {}}}, "must hold as many rows"),
    ],
)
def test_an_info_that_is_none(dataset: Path, change: dict[str, object], message: str) -> None:
    path = dataset / "dataset.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(DatasetError, match=message):
        load_info(str(dataset))


def test_damaged_datasets(dataset: Path) -> None:
    with pytest.raises(DatasetError, match="which prepare writes last"):
        load_info(str(dataset / "train"))
    shard = dataset / "train" / "part-00001.parquet"
    pq.write_table(pa.table({"uri": ["x"]}), shard)
    with pytest.raises(DatasetError, match="must have the columns"):
        check_shards(str(dataset))
    shard.write_bytes((dataset / "train" / "part-00000.parquet").read_bytes())
    with pytest.raises(DatasetError, match=r"Received: .*part-00001\.parquet with 2"):
        check_shards(str(dataset))
    shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(DatasetError, match="must be there and whole"):
        check_shards(str(dataset))
    shard.unlink()
    with pytest.raises(DatasetError, match="must be there and whole"):
        list(iter_split(str(dataset), "train"))
    (dataset / "dataset.json").write_text("{")
    with pytest.raises(DatasetError, match="must be JSON"):
        load_info(str(dataset))
