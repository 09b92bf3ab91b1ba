"""`prepare` from end to end, on an embedded Ray, in local and object storage."""

import io
import itertools
import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from s3_server import S3Server, ray_that_finds
from test_dataset import encoded, picture

from catdog import images, storage
from catdog.config import PrepareConfig
from catdog.dataset import catalog, check_shards, iter_split, load_info, prepare, ray_tasks, scan
from catdog.errors import DatasetError, OutputRefusedError, StorageError
from catdog.schema import CLASS_NAMES, DATASET_SCHEMA, REJECTS_SCHEMA, SPLITS

pytest_plugins = ["s3_server"]

pytestmark = [
    pytest.mark.slow,
    # Ray Data's own, when its context is first made.
    pytest.mark.filterwarnings(r"ignore::DeprecationWarning:ray\.data\.context"),
]


@pytest.fixture(scope="module")
def ray(s3_process: S3Server) -> Iterator[None]:
    """One embedded Ray for the module; its workers find the S3 server."""
    with ray_that_finds(s3_process):
        yield


def rows_of(url: str) -> dict[str, dict[str, Any]]:
    """Every row of a dataset by uri, with its split."""
    return {
        row["uri"]: {**row, "split": split}
        for split in SPLITS
        for batch in iter_split(url, split)
        for row in batch.to_pylist()
    }


def write(path: Path, data: bytes) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return str(path)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirty good pictures of each class, and of everything that can be wrong, one."""
    root = tmp_path_factory.mktemp("photos")
    for number in range(60):
        write(root / CLASS_NAMES[number % 2] / f"{number:02d}.jpg", encoded(picture(number)))
    write(root / "cat/copy.jpg", (root / "cat/00.jpg").read_bytes())
    write(root / "cat/near.png", encoded(picture(2, 40), "PNG"))
    write(root / "cat/conflict.jpg", encoded(picture(100)))
    write(root / "dog/conflict.jpg", encoded(picture(100), quality=60))
    write(root / "cat/black.png", encoded(Image.new("RGB", (50, 50), "black"), "PNG"))
    write(root / "dog/black.png", encoded(Image.new("RGB", (60, 60), (2, 2, 2)), "PNG"))
    write(root / "cat/truncated.jpg", encoded(picture(101))[:700])
    write(root / "dog/Thumbs.db", b"not an image")
    write(root / "dog/empty.jpg", b"")
    write(root / "README.txt", b"neither labelled nor an image")
    exif = Image.Exif()
    exif[0x0112] = 6
    write(root / "dog/lying.jpg", encoded(picture(102).crop((0, 0, 64, 30)), exif=exif))
    write(root / "cat/cmyk.jpg", encoded(picture(103).convert("CMYK")))
    write(root / "cat/short.jpg", encoded(picture(104))[:-2])
    return root


def test_prepare(ray: None, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = str(tmp_path / "out")
    config = PrepareConfig(images=str(photos), output=output, val_fraction=0.2, test_fraction=0.2)
    record = prepare(config)

    assert sorted(os.listdir(output)) == ["dataset.json", "rejects.parquet", "samples.png", *sorted(SPLITS)]
    reasons = {"exact_duplicate": 1, "conflicting_label": 2, "truncated": 1, "empty_file": 1}
    reasons |= {"unsupported_format": 1, "not_an_image": 1}
    num_listed = len([path for path in photos.rglob("*") if path.is_file()])
    assert not record.already_done
    assert record.reasons == reasons
    assert record.listed == num_listed == record.kept + record.rejected
    assert record.rejected == sum(reasons.values())
    assert record.num_remarked == 1
    assert "  damaged  1 of those kept" in record.summary()

    check_shards(output)
    rows = rows_of(output)
    info = load_info(output)
    assert len(rows) == record.kept
    assert info.raw["remarks"].keys() == {f"{photos}/cat/short.jpg"}
    for split in SPLITS:
        found = [row["label"] for row in rows.values() if row["split"] == split]
        assert record.counts[split] == {name: found.count(label) for label, name in enumerate(CLASS_NAMES)}
    rejects = pq.read_table(f"{output}/rejects.parquet")
    assert rejects.schema.equals(REJECTS_SCHEMA)
    by_uri = {row["uri"].removeprefix(f"{photos}/"): row["reason"] for row in rejects.to_pylist()}
    assert by_uri == {
        "cat/conflict.jpg": "conflicting_label",
        "cat/copy.jpg": "exact_duplicate",
        "cat/truncated.jpg": "truncated",
        "dog/Thumbs.db": "unsupported_format",
        "dog/conflict.jpg": "conflicting_label",
        "dog/empty.jpg": "empty_file",
        "README.txt": "not_an_image",
    }
    assert {str(path) for path in photos.rglob("*") if path.is_file()} == rows.keys() | set(rejects["uri"].to_pylist())

    expected = [
        ["cat/00.jpg", "cat/copy.jpg"],
        ["cat/02.jpg", "cat/near.png"],
        ["cat/conflict.jpg", "dog/conflict.jpg"],
    ]
    assert info.raw["duplicate_groups"] == [[f"{photos}/{name}" for name in group] for group in expected]
    assert info.raw["conflicts"] == [{f"{photos}/cat/conflict.jpg": "cat", f"{photos}/dog/conflict.jpg": "dog"}]
    assert rows[f"{photos}/cat/02.jpg"]["split"] == rows[f"{photos}/cat/near.png"]["split"]

    lying = rows[f"{photos}/dog/lying.jpg"]
    assert (lying["width"], lying["height"]) == (30, 64)
    for row in rows.values():
        with Image.open(io.BytesIO(row["image"])) as image:
            assert image.mode == "RGB"
            assert image.size == (row["width"], row["height"])
    # The dataset's bytes give the same pixels as the file's.
    for name in ("dog/lying.jpg", "cat/cmyk.jpg", "cat/00.jpg"):
        file = images.decode((photos / name).read_bytes(), 32).pixels_HWC.astype(int)
        kept = images.decode(rows[f"{photos}/{name}"]["image"], 32).pixels_HWC.astype(int)
        assert np.abs(file - kept).max() <= 6

    train = [images.decode(row["image"], 128).pixels_HWC for row in rows.values() if row["split"] == "train"]
    pixels = np.stack(train).reshape(-1, 3).astype(float)
    assert info.mean == pytest.approx(pixels.mean(axis=0), abs=0.1)
    assert info.std == pytest.approx(pixels.std(axis=0), abs=0.1)
    with Image.open(f"{output}/samples.png") as samples:
        assert samples.format == "PNG"
        assert samples.width > 1000
    order = [row["label"] for batch in iter_split(output, "train") for row in batch.to_pylist()]
    assert 5 < sum(a != b for a, b in itertools.pairwise(order)) < len(order) - 5

    # Again: nothing to do. With other images or another configuration: refused. Either way nothing changes.
    before = {path: path.stat().st_mtime_ns for path in Path(output).rglob("*")}
    again = prepare(config)
    assert again.already_done
    assert again.digest == record.digest
    with pytest.raises(OutputRefusedError, match=r"prepared with --seed=0\. Received: --seed=1"):
        prepare(PrepareConfig(images=str(photos), output=output, val_fraction=0.2, test_fraction=0.2, seed=1))
    extra = Path(write(photos / "cat/new.jpg", encoded(picture(104))))
    with pytest.raises(OutputRefusedError, match=r"--output must be new where the images have changed"):
        prepare(config)
    extra.unlink()
    assert {path: path.stat().st_mtime_ns for path in Path(output).rglob("*")} == before

    # Files that were touched, or copied anew, are the same files: they are read once to see that.
    for path in photos.rglob("*.jpg"):
        path.touch()
    assert prepare(config).already_done
    with monkeypatch.context() as patched:
        patched.delattr(scan, "contents")
        assert prepare(config).already_done
    assert load_info(output).digest == record.digest
    honest = (photos / "cat/00.jpg").read_bytes()
    (photos / "cat/00.jpg").write_bytes(honest[:-1] + b"x")
    with pytest.raises(OutputRefusedError, match=r"--output must be new where the images have changed"):
        prepare(config)
    (photos / "cat/00.jpg").write_bytes(honest)


def test_labels_from_tables_and_manifest(ray: None, tmp_path: Path) -> None:
    names = [f"{number}.jpg" for number in range(12)]
    truth = {name: CLASS_NAMES[number % 2] for number, name in enumerate(names)}
    for number, name in enumerate(names):
        write(tmp_path / "photos" / name, encoded(picture(number)))
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
        for name in names:
            archive.write(tmp_path / "photos" / name, name)
    table = pa.table({"uri": names, "label": [truth[name] for name in names]})
    pq.write_table(table, tmp_path / "labels.parquet")
    (tmp_path / "labels.csv").write_text("label,uri\n" + "".join(f"{truth[name]},{name}\n" for name in names))
    pq.write_table(table, tmp_path / "photos" / "manifest.parquet")
    digests = set()
    for source, labels in [
        ("photos/*.jpg", "labels.csv"),
        ("photos.zip", "labels.parquet"),
        ("photos/manifest.parquet", "auto"),
    ]:
        output = str(tmp_path / Path(source).suffix)
        config = PrepareConfig(
            images=str(tmp_path / source),
            output=output,
            labels=labels if labels == "auto" else str(tmp_path / labels),
            val_fraction=0,
            test_fraction=0,
        )
        digests.add(prepare(config).digest)
        found = {Path(uri.split("::")[0]).name: CLASS_NAMES[row["label"]] for uri, row in rows_of(output).items()}
        assert found == truth
    assert len(digests) == 1  # the same images, labels and split, wherever they came from


def test_object_storage(ray: None, photos: Path, tmp_path: Path, s3_process: S3Server) -> None:
    bucket = s3_process.new_bucket()
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
        for path in sorted(photos.rglob("*")):
            if path.is_file():
                archive.write(path, path.relative_to(photos))
                storage.publish_bytes(f"{bucket}/raw/{path.relative_to(photos)}", path.read_bytes())
    storage.publish_file(f"{bucket}/photos.zip", str(tmp_path / "photos.zip"))
    local = prepare(PrepareConfig(images=str(photos), output=str(tmp_path / "local")))
    for source in (f"{bucket}/raw", f"{bucket}/photos.zip"):
        output = f"{bucket}/out-{source.rpartition('.')[2][-3:]}"
        remote = prepare(PrepareConfig(images=source, output=output))
        assert remote.digest == local.digest
        assert remote.reasons == local.reasons
        check_shards(output)
        assert storage.list_names(output) == ["dataset.json", "rejects.parquet", "samples.png", *sorted(SPLITS)]
        assert {uri.startswith((f"{bucket}/", "zip://")) for uri in rows_of(output)} == {True}


def test_too_few_images(ray: None, tmp_path: Path) -> None:
    for number in range(4):
        write(tmp_path / "photos" / f"{CLASS_NAMES[number % 2]}.{number}.jpg", encoded(picture(number)))
    output = tmp_path / "out"
    with pytest.raises(DatasetError, match="--test-fraction must give the split at least one image"):
        prepare(PrepareConfig(images=str(tmp_path / "photos"), output=str(output)))
    assert not output.exists() or not list(output.iterdir())


def test_odd_files_become_rejects(ray: None, shared_data: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(shared_data / "odd.zip") as odd:
        files = {info.filename: odd.read(info) for info in odd.infolist() if not info.is_dir()}
    with zipfile.ZipFile(tmp_path / "mixed.zip", "w") as mixed:
        for number, (name, data) in enumerate(sorted(files.items())):
            mixed.writestr(f"{CLASS_NAMES[number % 2]}.{number}.{Path(name).name}", data)
    record = prepare(PrepareConfig(images=str(tmp_path / "mixed.zip"), output=str(tmp_path / "out")))
    assert record.listed == len(files) == record.kept + record.rejected
    assert record.kept > 200
    assert {"truncated", "unsupported_format", "too_large", "decode_failed"} <= record.reasons.keys()
    check_shards(str(tmp_path / "out"))


def test_other_cameras(ray: None, shared_data: Path, tmp_path: Path) -> None:
    record = prepare(PrepareConfig(images=str(shared_data / "other-cameras.zip"), output=str(tmp_path / "out")))
    assert (record.listed, record.kept, record.num_duplicate_groups) == (600, 600, 0)


def test_failing_storage_ends_the_job_as_such(ray: None) -> None:
    def fail(number: int, bucket: str) -> pa.Table:
        if number == 2:
            raise StorageError(f"{bucket} is gone")
        return pa.table({"number": [number]})

    start = time.monotonic()
    with pytest.raises(StorageError, match=r"^s3://x is gone$"):
        list(ray_tasks.run(fail, 4, bucket="s3://x"))
    assert time.monotonic() - start < 30


def test_killed_and_run_again(ray: None, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalog, "SLICE_ROWS", 4)
    clean = prepare(PrepareConfig(images=str(photos), output=str(tmp_path / "clean")))
    output = tmp_path / "killed"
    command = (
        "from catdog.config import PrepareConfig; from catdog.dataset import catalog, prepare; catalog.SLICE_ROWS = 4; "
        f"prepare(PrepareConfig(images={str(photos)!r}, output={str(output)!r}))"
    )
    process = subprocess.Popen([sys.executable, "-c", command], start_new_session=True)
    try:
        deadline = time.monotonic() + 120
        while not list(output.glob("_staging/scan/*.parquet")) and time.monotonic() < deadline:
            time.sleep(0.02)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert not (output / "dataset.json").exists()
    staged = list(output.glob("_staging/scan/*.parquet"))
    assert staged
    # What a killed second pass leaves: shards that no dataset.json names.
    write(output / "train" / "part-99999.parquet", b"half")
    again = prepare(PrepareConfig(images=str(photos), output=str(output)))
    assert again.digest == clean.digest
    assert json.loads((output / "dataset.json").read_text())["parts"]["train"].keys() == {"part-00000.parquet"}
    assert sorted(os.listdir(output)) == ["dataset.json", "rejects.parquet", "samples.png", *sorted(SPLITS)]
    assert os.listdir(output / "train") == ["part-00000.parquet"]
    assert pq.read_schema(output / "train" / "part-00000.parquet").equals(DATASET_SCHEMA)


def test_a_given_split_an_extension_and_frames_of_one_camera(ray: None, tmp_path: Path) -> None:
    """Folders keep their split; a dataset that extends it moves no image; frames of one camera are kept."""
    root = tmp_path / "photos"
    for number in range(24):
        folder = ("train", "train", "validation")[number % 3]
        write(root / folder / f"{CLASS_NAMES[number % 2]}s" / f"{number}.jpg", encoded(picture(number)))
    write(root / "train/cats/copy.jpg", (root / "validation/cats/2.jpg").read_bytes())
    write(root / "train/setup.py", b"import sys\n")
    background = picture(500, 300)
    for number in range(12):
        frame = background.copy()
        frame.paste(picture(600 + number, 45), (20 * number, 100))
        write(root / "train" / f"{CLASS_NAMES[number % 2]}s" / f"camera{number}.jpg", encoded(frame, quality=90))
    first = prepare(PrepareConfig(images=str(root), output=str(tmp_path / "first"), test_fraction=0.3))
    assert first.given_splits == {"train": 29, "val": 8}
    assert first.reasons == {"exact_duplicate": 1, "not_an_image": 1}
    rows = rows_of(str(tmp_path / "first"))
    assert {uri for uri, row in rows.items() if row["split"] == "val"} == {
        str(path) for path in (root / "validation").rglob("*.jpg")
    }
    assert first.counts["test"]["cat"] + first.counts["test"]["dog"] > 0
    raw = load_info(str(tmp_path / "first")).raw
    assert raw["given_splits"] == first.given_splits
    assert raw["near_duplicates"]["groups_in_several_splits"] == 0

    # The same photographs, elsewhere, without folders that say anything, and near-duplicates of each.
    more = tmp_path / "more"
    for path in root.rglob("*.jpg"):
        write(more / path.parent.name / f"{path.parent.parent.name}-{path.name}", path.read_bytes())
    for number in range(24):
        write(more / f"{CLASS_NAMES[number % 2]}s" / f"new{number}.png", encoded(picture(number, 40), "PNG"))
    second = prepare(PrepareConfig(images=str(more), output=str(tmp_path / "second"), extends=str(tmp_path / "first")))
    before = {row["image_id"]: row["split"] for row in rows.values()}
    after = {row["image_id"]: row["split"] for row in rows_of(str(tmp_path / "second")).values()}
    assert before.items() <= after.items()
    assert load_info(str(tmp_path / "second")).raw["near_duplicates"]["groups_in_several_splits"] == 0
    assert second.kept == first.kept + 24
    again = prepare(PrepareConfig(images=str(more), output=str(tmp_path / "second"), extends=str(tmp_path / "first")))
    assert again.already_done

    # Version 0.1.0 knew none of these fields.
    path = tmp_path / "second" / "dataset.json"
    old = json.loads(path.read_text())
    for name in ("given_splits", "near_duplicates", "label_rows", "unmatched_label_rows"):
        del old[name]
    for name in ("split", "near_duplicates", "extends"):
        del old["config"][name]
    path.write_text(json.dumps(old))
    assert prepare(PrepareConfig(images=str(more), output=str(tmp_path / "second"))).already_done
