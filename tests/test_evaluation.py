"""`catdog.evaluation` on datasets whose right answers are known, with a model whose every probability is known.

Dogs are red here and cats are blue; the model looks at nothing else.
"""

import io
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from dataset_case import Row, row_of, write_splits
from inference_case import encoded_drawings
from PIL import Image

from catdog import architectures, bundle, evaluation, report, storage
from catdog.config import EvaluateConfig
from catdog.dataset import load_info
from catdog.errors import BundleError, CatdogError, DatasetError, OutputRefusedError, UsageError
from catdog.evaluation import EvaluationRecord
from catdog.labelling import load_labeller

pytestmark = pytest.mark.slow

SIZE_PX = 32
GAIN = 10.0
REVIEW_THRESHOLD = 0.9


def prob_dog_of(redness: int) -> float:
    """What the model makes of a picture with so much more red than blue, of 255."""
    return 1 / (1 + math.exp(-GAIN * redness / 255))


def picture(redness: int, width: int = 40) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, 30), (max(redness, 0), 0, max(-redness, 0))).save(buffer, "PNG")
    return buffer.getvalue()


def rows_of(labels_and_redness: Sequence[tuple[int, int]]) -> list[Row]:
    """A row per (label, redness); no two pictures are the same file."""
    return [
        row_of(picture(redness, width=40 + index), f"/photos/{index}.png", label)
        for index, (label, redness) in enumerate(labels_and_redness)
    ]


def write_dataset(url: str, parts: Sequence[list[Row]]) -> str:
    """A dataset with these parts in its test split, and nothing else in it."""
    return write_splits(url, {"test": parts})


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A bundle whose logit is `GAIN` times red minus blue."""
    import keras

    inputs = keras.Input((SIZE_PX, SIZE_PX, 3))
    means = keras.layers.GlobalAveragePooling2D()(keras.layers.Rescaling(1 / 255)(inputs))
    logits = keras.layers.Dense(1, name=architectures.LOGITS_LAYER)
    outputs = keras.layers.Activation("sigmoid", name=architectures.PROBABILITY_LAYER)(logits(means))
    logits.set_weights([np.array([[GAIN], [0.0], [-GAIN]]), np.zeros(1)])
    card = {"image_size": SIZE_PX, "temperature": 1.0, "review_threshold": REVIEW_THRESHOLD}
    url = str(tmp_path_factory.mktemp("evaluation") / "model")
    bundle.save(url, keras.Model(inputs, outputs), card)
    return url


# Four cats and five dogs; a cat labelled dog, a dog labelled cat, and a dog of which the model is not sure.
ANSWERS = [(0, -200), (0, -150), (0, -100), (0, 180), (1, 200), (1, 150), (1, 30), (1, 100), (1, -120)]


@pytest.fixture
def data(tmp_path: Path) -> str:
    rows = rows_of(ANSWERS)
    return write_dataset(str(tmp_path / "data"), [rows[:4], rows[4:]])


@pytest.fixture
def titles(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, list[report.GridItem]]]:
    """What every grid of photographs is asked to show."""
    asked: list[tuple[str, list[report.GridItem]]] = []
    draw = report.predictions_grid

    def recording(items: Sequence[report.GridItem], title: str = "") -> bytes:
        asked.append((title, list(items)))
        return draw(items, title)

    monkeypatch.setattr(report, "predictions_grid", recording)
    return asked


def evaluated(data: str, model: str, output: Path | str, **changes: Any) -> EvaluationRecord:
    return evaluation.evaluate(EvaluateConfig(data=data, model=model, output=str(output), **changes))


def test_evaluate_measures_and_writes(
    data: str, model: str, tmp_path: Path, titles: list[tuple[str, list[report.GridItem]]]
) -> None:
    output = tmp_path / "evaluation"
    record = evaluated(data, model, output)

    assert {path.name for path in output.iterdir()} == set(evaluation.OUTPUT_NAMES) == set(record.files)
    saved = json.loads((output / "metrics.json").read_text())
    assert record.saved() == saved
    assert list(saved)[:3] == ["format", "split", "num_images"]

    assert saved["split"] == "test"
    assert saved["num_images"] == 9
    assert saved["class_counts"] == {"cat": 4, "dog": 5}
    assert saved["confusion_matrix"] == [[3, 1], [1, 4]]
    assert saved["accuracy"]["value"] == pytest.approx(7 / 9)
    assert saved["per_class"]["dog"]["recall"]["value"] == pytest.approx(4 / 5)
    prob_true = [prob_dog_of(redness if label else -redness) for label, redness in ANSWERS]
    assert saved["log_loss"]["value"] == pytest.approx(-np.log(prob_true).mean(), rel=1e-3)
    # One of nine is left to a person; of the other eight, six are right.
    assert saved["review_threshold"] == REVIEW_THRESHOLD
    assert saved["coverage"]["value"] == pytest.approx(8 / 9)
    assert saved["selective_accuracy"]["value"] == pytest.approx(6 / 8)
    assert saved["model_id"] == bundle.read_card(model)[1]
    assert saved["data_digest"] == "0123"
    assert saved["config"]["batch_size"] == 64
    assert {"catdog", "tensorflow", "scipy"} <= set(saved["versions"])

    table = pq.read_table(output / "predictions.parquet")
    assert table.schema.equals(evaluation.EVALUATION_SCHEMA)
    assert table["uri"].to_pylist() == [f"/photos/{index}.png" for index in range(9)]
    assert table["image_id"].to_pylist() == [row["image_id"] for row in rows_of(ANSWERS)]
    assert table["true_label"].to_pylist() == ["cat"] * 4 + ["dog"] * 5
    assert table["label"].to_pylist() == ["cat"] * 3 + ["dog"] * 5 + ["cat"]
    assert table["prob_dog"].to_pylist() == pytest.approx([prob_dog_of(redness) for _, redness in ANSWERS], rel=1e-3)
    assert table["needs_review"].to_pylist() == [index == 6 for index in range(9)]

    # The surest disagreement first.
    assert [suspect["uri"] for suspect in saved["suspects"]] == ["/photos/3.png", "/photos/8.png"]
    assert saved["suspects"][0]["true_label"] == "cat"
    assert saved["suspects"][0]["label"] == "dog"
    assert saved["suspects"][0]["confidence"] == pytest.approx(prob_dog_of(180), abs=1e-5)

    for name in ("confusion.png", "reliability.png", "predictions.png"):
        Image.open(output / name).load()
    error = saved["expected_calibration_error"]
    low, high = error["ci95"]
    line = f"  ECE        {error['value']:.4f} (95 % interval {low:.4f} to {high:.4f})"
    assert line in record.summary()
    prob_dog = table["prob_dog"].to_numpy()
    labels = [label for label, _ in ANSWERS]
    assert (output / "reliability.png").read_bytes() == report.reliability(labels, {"Reliability": prob_dog})
    [(title, items)] = titles
    assert title == "2 of 9 wrong; 7 of the right ones, at random"
    assert [item.is_right for item in items] == [False] * 2 + [True] * 7
    assert items[0].image == rows_of(ANSWERS)[3]["image"]


def test_the_batch_size_changes_nothing(data: str, model: str, tmp_path: Path) -> None:
    evaluated(data, model, tmp_path / "all")
    for batch_size in (1, 2):
        evaluated(data, model, tmp_path / "batches", batch_size=batch_size)
        for name in ("predictions.parquet", "predictions.png", "confusion.png", "reliability.png"):
            assert (tmp_path / "all" / name).read_bytes() == (tmp_path / "batches" / name).read_bytes()


def test_no_more_than_a_batch_of_pictures_is_held(data: str, model: str) -> None:
    with load_labeller(bundle.load(model)) as labeller:
        batches = list(evaluation.label_split(load_info(data), "test", labeller, batch_size=3))
    sizes = [(len(table), len(images)) for table, images in batches]
    assert sizes == [(3, 3), (1, 1), (3, 3), (2, 2)]  # parts of four and of five


def test_the_grid_shows_the_surest_wrong_and_random_right_ones(
    model: str, tmp_path: Path, titles: list[tuple[str, list[report.GridItem]]]
) -> None:
    rng = np.random.default_rng(0)
    wrong = [(0, int(redness)) for redness in rng.permutation(np.arange(50, 90))]
    right = [(1, int(redness)) for redness in rng.integers(50, 200, 40)]
    rows = rows_of([*wrong, *right])
    evaluated(write_dataset(str(tmp_path / "data"), [rows]), model, tmp_path / "one", batch_size=7)
    evaluated(write_dataset(str(tmp_path / "turned"), [rows[::-1]]), model, tmp_path / "other", batch_size=16)

    (title, items), (other_title, other_items) = titles
    assert title == other_title == "40 of 80 wrong: the 12 surest of them; 12 of the right ones, at random"
    assert items == other_items  # whatever order the images come in
    shown = [item.image for item in items]
    surest = sorted(rows[:40], key=lambda row: -wrong[rows.index(row)][1])[:12]
    assert shown[:12] == [row["image"] for row in surest]
    assert len(set(shown)) == 24
    assert shown[12:] != [row["image"] for row in rows[40:52]]

    saved = json.loads((tmp_path / "one" / "metrics.json").read_text())
    assert [suspect["uri"] for suspect in saved["suspects"][:12]] == [row["uri"] for row in surest]
    assert len(saved["suspects"]) == 40


def test_nothing_wrong_and_one_class_only(
    model: str, tmp_path: Path, titles: list[tuple[str, list[report.GridItem]]]
) -> None:
    record = evaluated(write_dataset(str(tmp_path / "data"), [rows_of([(1, 100)] * 3)]), model, tmp_path / "evaluation")
    assert record.accuracy["value"] == 1
    assert record.roc_auc == {"value": None, "ci95": None, "reason": "every image is of one class"}
    assert record.suspects == []
    assert titles[0][0] == "0 of 3 wrong; 3 of the right ones, at random"
    json.loads((tmp_path / "evaluation" / "metrics.json").read_text(), parse_constant=pytest.fail)  # no NaN


def test_everything_wrong(model: str, tmp_path: Path, titles: list[tuple[str, list[report.GridItem]]]) -> None:
    record = evaluated(write_dataset(str(tmp_path / "data"), [rows_of([(0, 90), (1, -80)])]), model, tmp_path / "out")
    assert record.accuracy["value"] == 0
    assert record.roc_auc["value"] == 0
    assert titles[0][0] == "2 of 2 wrong"


def test_an_earlier_evaluation_is_replaced_and_other_files_are_left_alone(
    data: str, model: str, tmp_path: Path
) -> None:
    output = tmp_path / "evaluation"
    evaluated(data, model, output)
    (output / "notes.txt").write_text("mine")
    other = write_dataset(str(tmp_path / "other"), [rows_of([(0, -50), (1, 50)])])
    evaluated(other, model, output)
    assert json.loads((output / "metrics.json").read_text())["num_images"] == 2
    assert len(pq.read_table(output / "predictions.parquet")) == 2
    assert (output / "notes.txt").read_text() == "mine"


def test_an_evaluation_that_was_killed_while_it_was_written_is_done_again(
    data: str, model: str, tmp_path: Path
) -> None:
    output = tmp_path / "evaluation"
    evaluated(data, model, output)
    (output / "metrics.json").unlink()
    (output / "reliability.png").unlink()
    (output / "predictions.png").unlink()
    (output / ".predictions.png.0.tmp").write_bytes(b"half")
    evaluated(data, model, output)
    assert json.loads((output / "metrics.json").read_text())["num_images"] == 9


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("thesis.txt", "important"),
        ("metrics.json", '{"accuracy": 0.5}'),
        ("metrics.json", "[1, 2]"),
        ("metrics.json", "not JSON"),
    ],
)
def test_an_output_that_holds_something_else_is_refused(
    data: str, model: str, tmp_path: Path, name: str, content: str
) -> None:
    output = tmp_path / "mine"
    output.mkdir()
    (output / name).write_text(content)
    message = rf"--output must be empty.* Received: .*mine, which holds {name}"
    with pytest.raises(OutputRefusedError, match=message):
        evaluated(data, model, output)
    assert os.listdir(output) == [name]
    assert (output / name).read_text() == content


def test_a_split_without_images_is_refused(data: str, model: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--split must name a split that holds images\. Received: --split=val of "):
        evaluated(data, model, tmp_path / "evaluation", split="val")
    assert not (tmp_path / "evaluation").exists()


@pytest.mark.parametrize(("missing", "error"), [("data", DatasetError), ("model", BundleError)])
def test_a_missing_dataset_or_model_is_named(
    data: str, model: str, tmp_path: Path, missing: str, error: type[CatdogError]
) -> None:
    arguments = {"data": data, "model": model} | {missing: str(tmp_path / "nowhere")}
    with pytest.raises(error, match=r"Received: .*nowhere"):
        evaluated(output=tmp_path / "evaluation", **arguments)
    assert not (tmp_path / "evaluation").exists()


def test_a_picture_that_does_not_decode_is_a_damaged_dataset(model: str, tmp_path: Path) -> None:
    rows = rows_of([(0, -50), (1, 50), (1, 60)])
    rows[1]["image"] = rows[1]["image"][:40]
    data = write_dataset(str(tmp_path / "data"), [rows])
    with pytest.raises(
        DatasetError, match=r"every picture of a dataset must decode\. Received: /photos/1\.png of .*: "
    ):
        evaluated(data, model, tmp_path / "evaluation")
    assert not (tmp_path / "evaluation").exists()


def test_a_label_that_is_neither_class_is_a_damaged_dataset(model: str, tmp_path: Path) -> None:
    data = write_dataset(str(tmp_path / "data"), [rows_of([(0, -50), (2, 50)])])
    with pytest.raises(DatasetError, match=r"a dataset's labels must be 0 \(cat\) or 1 \(dog\)\. Received: 2 in "):
        evaluated(data, model, tmp_path / "evaluation")


def test_object_storage_for_everything(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    root = "memory://test_evaluation"
    for path in Path(model).rglob("*.*"):
        storage.publish_file(storage.join(root, "model", str(path.relative_to(model))), str(path))
    data = write_dataset(storage.join(root, "data"), [rows_of(ANSWERS)])
    for _ in range(2):  # the second replaces the first
        record = evaluated(data, storage.join(root, "model"), storage.join(root, "evaluation"))
        assert record.files["metrics.json"] == "memory://test_evaluation/evaluation/metrics.json"
        assert storage.read_json(record.files["metrics.json"])["accuracy"]["value"] == pytest.approx(7 / 9)
        assert set(storage.list_names(storage.join(root, "evaluation"))) == set(evaluation.OUTPUT_NAMES)


def test_a_hundred_pictures_of_every_colour(model: str, tmp_path: Path) -> None:
    rows = [row_of(image, f"/{index}.jpg", index % 2) for index, image in enumerate(encoded_drawings(100))]
    record = evaluated(write_dataset(str(tmp_path / "data"), [rows]), model, tmp_path / "evaluation")
    assert record.num_images == len(rows)
    assert np.sum(record.confusion_matrix) == len(rows)
    with Image.open(tmp_path / "evaluation" / "predictions.png") as grid:
        assert grid.size == (1476, 1242)
