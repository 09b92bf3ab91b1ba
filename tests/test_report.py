"""`catdog.report`: the figures are whole PNGs, drawn the same every time, and show what they are given."""

import io
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.figure
import numpy as np
import pytest
from PIL import Image

from catdog import metrics, report
from catdog.errors import ImageError, UsageError


def history(num_epochs: int) -> list[dict[str, float]]:
    """A training that gets better, but for its validation loss at the end."""
    return [
        {
            "epoch": epoch,
            "learning_rate": 1e-3,
            "train_loss": 1 / (1 + epoch),
            "train_accuracy": 1 - 0.4 / epoch,
            "val_loss": 0.3 + 0.01 * abs(epoch - (num_epochs - 2)),
            "val_accuracy": 1 - 0.5 / epoch,
            "seconds": 1.0,
        }
        for epoch in range(1, num_epochs + 1)
    ]


def picture(colour: str, size: tuple[int, int] = (60, 40), **save: Any) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "PNG", **save)
    return buffer.getvalue()


def item(colour: str, label: str, predicted_label: str, confidence: float = 0.9) -> report.GridItem:
    return report.GridItem(image=picture(colour), label=label, predicted_label=predicted_label, confidence=confidence)


def opened(png: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(png))
    image.load()
    assert image.format == "PNG"
    return image.convert("RGB")


def on_save(monkeypatch: pytest.MonkeyPatch, look: Callable[[matplotlib.figure.Figure], None]) -> None:
    """Look at every figure that is saved."""
    save = matplotlib.figure.Figure.savefig

    def recording(figure: matplotlib.figure.Figure, *args: Any, **kwargs: Any) -> None:
        save(figure, *args, **kwargs)
        look(figure)

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", recording)


@pytest.fixture
def drawn_figures(monkeypatch: pytest.MonkeyPatch) -> list[matplotlib.figure.Figure]:
    """The figures that are saved."""
    figures: list[matplotlib.figure.Figure] = []
    on_save(monkeypatch, figures.append)
    return figures


@pytest.fixture
def drawn_texts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every text on the figures that are saved."""
    texts: list[str] = []

    def look(figure: matplotlib.figure.Figure) -> None:
        texts.extend(text.get_text() for text in figure.findobj(matplotlib.text.Text) if text.get_text())

    on_save(monkeypatch, look)
    return texts


def test_curves_name_the_last_epoch(drawn_texts: list[str]) -> None:
    image = opened(report.curves(history(12)))
    assert image.width > image.height > 400
    assert {"Accuracy", "Loss (cross-entropy)", "epoch", "training", "validation"} <= set(drawn_texts)
    assert "epoch 12: validation 95.8%" in drawn_texts
    assert "epoch 12: validation 0.320" in drawn_texts


@pytest.mark.parametrize("num_epochs", [1, 2, 300])
def test_curves_of_few_and_of_many_epochs(num_epochs: int) -> None:
    opened(report.curves(history(num_epochs)))


def test_curves_of_a_perfect_training() -> None:
    perfect = {"epoch": 1, "train_loss": 0.0, "train_accuracy": 1.0, "val_loss": 0.0, "val_accuracy": 1.0}
    opened(report.curves([perfect, perfect | {"epoch": 2}]))


def test_confusion_shows_counts_and_shares_of_the_true_class(drawn_texts: list[str]) -> None:
    opened(report.confusion([[1180, 20], [300, 500]], ("cat", "dog")))
    assert {"1,180", "20", "300", "500", "98.3%", "1.7%", "37.5%", "62.5%"} <= set(drawn_texts)
    assert {"cat", "dog", "cat\n1,200", "dog\n800", "predicted", "labelled"} <= set(drawn_texts)
    assert "84.0% right: 1,680 of 2,000 images" in drawn_texts


def test_confusion_of_one_class_only() -> None:
    opened(report.confusion(np.array([[3, 1], [0, 0]]), ("cat", "dog")))


def overconfident(num_images: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels, probabilities that are too sure, and such as are right."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, num_images)
    log_odds = rng.normal(np.where(labels, 7, -7), np.sqrt(14))
    too_sure, right = (1 / (1 + np.exp(-sharpness * log_odds)) for sharpness in (2, 1))
    return labels, too_sure, right


def test_reliability_names_its_panels_and_their_calibration_errors(drawn_texts: list[str]) -> None:
    labels, too_sure, right = overconfident(3000)
    both = opened(report.reliability(labels, {"before": too_sure, "after": right}))
    assert {"before", "after", "probability of dog", "share of dogs", "images"} <= set(drawn_texts)
    for prob_dog in (too_sure, right):
        assert f"ECE {metrics.expected_calibration_error(labels, prob_dog):.4f}" in drawn_texts
    assert {"0.01%", "1%", "50%", "99%", "99.99%"} <= set(drawn_texts)
    one = opened(report.reliability(labels, {"Reliability": right}))
    assert "Reliability" in drawn_texts
    assert one.height == both.height > one.width
    assert both.width > 1.5 * one.width


def test_reliability_shows_shares_and_intervals_on_the_scale_of_log_odds(
    drawn_figures: list[matplotlib.figure.Figure],
) -> None:
    # Said to be dogs with 10 %, 80 % and for sure; 1 of 10, 6 of 10 and 10 of 10 are.
    labels = [1] + [0] * 9 + [1] * 6 + [0] * 4 + [1] * 10
    report.reliability(labels, {"": np.repeat(np.float32([0.1, 0.8, 1.0]), 10)})
    points, bars = drawn_figures[0].axes
    marks = [line for line in points.lines if line.get_marker() == "o"]
    end = np.log(0.9999 / 0.0001)
    expected = [[np.log(1 / 9), np.log(1 / 9)], [np.log(4), np.log(6 / 4)], [end, end]]
    assert np.array([line.get_xydata() for line in marks])[:, 0] == pytest.approx(np.array(expected), abs=1e-6)
    assert [line.get_markerfacecolor() == "white" for line in marks] == [False, False, True]
    for num_dogs, interval, (x, _) in zip((1, 6, 10), points.collections, expected, strict=True):
        low, high = metrics.proportion(num_dogs, 10, "")["ci95"]
        segment = [[x, np.log(low / (1 - low))], [x, np.log(high / (1 - high)) if high < 0.9999 else end]]
        assert interval.get_segments()[0] == pytest.approx(np.array(segment), abs=1e-6)
    assert [patch.get_height() for patch in bars.patches if patch.get_height()] == [10, 10, 10]
    assert points.get_xlim() == points.get_ylim() == bars.get_xlim() == pytest.approx((-end, end))


@pytest.mark.parametrize(
    ("labels", "prob_dog"), [([1], [0.5]), ([0, 1], [1.0, 0.0]), ([0, 0, 0], [0.0] * 3), ([1] * 100, [0.999999] * 100)]
)
def test_reliability_of_few_and_of_extreme_probabilities(labels: list[int], prob_dog: list[float]) -> None:
    opened(report.reliability(labels, {"Reliability": prob_dog}))


def test_reliability_shows_what_it_is_given() -> None:
    labels, too_sure, right = overconfident(200)
    drawings = [
        report.reliability(labels, {"": too_sure}),
        report.reliability(labels, {"": right}),
        report.reliability(1 - labels, {"": right}),
        report.reliability(labels, {"another title": right}),
    ]
    assert len({opened(png).tobytes() for png in drawings}) == 4
    order = np.random.default_rng(1).permutation(200)
    assert report.reliability(labels[order], {"": right[order]}) == drawings[1]


def test_grid_marks_right_and_wrong_by_more_than_colour(drawn_texts: list[str]) -> None:
    opened(report.predictions_grid([item("red", "cat", "dog", 0.987), item("blue", "dog", "dog", 0.6)], "Two of them"))
    assert drawn_texts == ["Two of them", "✗", "dog 98.7%", "labelled cat", "✓", "dog 60.0%"]


def test_grid_shows_every_photograph_in_reading_order() -> None:
    colours = ["#ff0000", "#00ff00", "#0000ff", "#ffff00", "#ff00ff", "#00ffff", "#800000", "#008000"]
    image = np.asarray(opened(report.predictions_grid([item(colour, "cat", "cat") for colour in colours])))
    found = []
    for colour in colours:
        mask = (image == np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)])).all(axis=2)
        # 3 : 2 in a square of 220 px: the whole picture, not a part of it. The frame covers a little of its ends.
        assert 200 * 140 < mask.sum() <= 220 * 148
        top, left = np.argwhere(mask).min(axis=0)
        found.append((top, left))
    assert found == sorted(found)
    assert len({top for top, _ in found}) == 2


def test_grid_shows_photographs_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    sideways = report.GridItem(image=picture("#ff0000", exif=exif), label="cat", predicted_label="cat", confidence=0.9)
    image = np.asarray(opened(report.predictions_grid([sideways])))
    rows, columns = np.nonzero((image == (255, 0, 0)).all(axis=2))
    assert np.ptp(rows) > np.ptp(columns)


def test_the_same_input_gives_the_same_bytes() -> None:
    items = [item("red", "cat", "dog"), item("green", "dog", "dog")]
    for draw in (
        lambda: report.curves(history(5)),
        lambda: report.confusion([[5, 1], [2, 6]], ("cat", "dog")),
        lambda: report.reliability([0, 1, 1], {"before": [0.1, 0.9, 0.4], "after": [0.2, 0.8, 0.4]}),
        lambda: report.predictions_grid(items, "title"),
    ):
        first = draw()
        assert first == draw()
        assert b"atplotlib" not in first


def test_grid_of_real_photographs(shared_data: Path) -> None:
    items = []
    with zipfile.ZipFile(shared_data / "other-cameras.zip") as archive:
        for name in [name for name in archive.namelist() if name.endswith(".jpg")][::40]:
            items.append(
                report.GridItem(
                    image=archive.read(name), label=name.split("/")[0], predicted_label="dog", confidence=0.75
                )
            )
    image = opened(report.predictions_grid(items, "Every fortieth"))
    assert len(np.unique(np.asarray(image).reshape(-1, 3), axis=0)) > 10_000


def test_input_that_makes_no_sense_is_refused() -> None:
    with pytest.raises(UsageError, match=r"at least one epoch. Received: none"):
        report.curves([])
    with pytest.raises(UsageError, match=r"at least one photograph. Received: none"):
        report.predictions_grid([])
    with pytest.raises(UsageError, match=r"a row and a column per class, and an image. Received: \[\[1, 2, 3\]\]"):
        report.confusion([[1, 2, 3]], ("cat", "dog"))
    with pytest.raises(UsageError, match=r"Received: \[\[0, 0\], \[0, 0\]\]"):
        report.confusion([[0, 0], [0, 0]], ("cat", "dog"))
    with pytest.raises(UsageError, match=r"at least one panel. Received: none"):
        report.reliability([0, 1], {})
    with pytest.raises(UsageError, match=r"probabilities must lie between 0 and 1. Received: 1.5"):
        report.reliability([0, 1], {"before": [0.5, 0.5], "after": [0.5, 1.5]})
    with pytest.raises(UsageError, match=r"labels and probabilities must be two lists of one length"):
        report.reliability([0, 1], {"Reliability": [0.5]})
    with pytest.raises(ImageError):
        report.predictions_grid([report.GridItem(image=b"no", label="cat", predicted_label="cat", confidence=0.9)])
