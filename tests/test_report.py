"""`catdog.report`: the figures are whole PNGs, drawn the same every time, and show what they are given."""

import io
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import matplotlib.axes
import matplotlib.collections
import matplotlib.colors
import matplotlib.figure
import matplotlib.lines
import matplotlib.patches
import matplotlib.text
import numpy as np
import pytest
from inference_case import encoded_drawings
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


def xy(line: matplotlib.lines.Line2D) -> np.ndarray:
    """The points of a line."""
    return np.asarray(line.get_xydata())


def heights(axes: matplotlib.axes.Axes) -> list[float]:
    """Those of the bars."""
    bars = [patch for patch in axes.patches if isinstance(patch, matplotlib.patches.Rectangle)]
    assert len(bars) == len(axes.patches)
    return [bar.get_height() for bar in bars]


@pytest.mark.parametrize("num_epochs", [1, 2, 300])
def test_curves_show_every_epoch_and_mark_the_last(
    num_epochs: int, drawn_figures: list[matplotlib.figure.Figure]
) -> None:
    rows = history(num_epochs)
    opened(report.curves(rows))
    for axes, name in zip(drawn_figures[0].axes, ("accuracy", "loss"), strict=True):
        train_curve, train_end, val_curve, val_end = (xy(line).tolist() for line in axes.lines)
        for curve, end, split in ((train_curve, train_end, "train"), (val_curve, val_end, "val")):
            assert curve == [[row["epoch"], row[f"{split}_{name}"]] for row in rows]
            assert end == curve[-1:]
        values = [value for _, value in train_curve + val_curve]
        low, high = axes.get_ylim()
        assert low <= min(values) <= max(values) <= high
        assert axes.get_xlim() == (0.5, num_epochs + 0.5)
        assert all(tick == round(tick) for tick in axes.get_xticks())


def test_curves_of_a_perfect_training(drawn_texts: list[str], drawn_figures: list[matplotlib.figure.Figure]) -> None:
    perfect = {"epoch": 1, "train_loss": 0.0, "train_accuracy": 1.0, "val_loss": 0.0, "val_accuracy": 1.0}
    opened(report.curves([perfect, perfect | {"epoch": 2}]))
    accuracy, loss = drawn_figures[0].axes
    assert accuracy.get_ylim() == (0.9, 1)
    assert loss.get_ylim() == (0, 1)
    assert {"epoch 2: validation 100.0%", "epoch 2: validation 0.000"} <= set(drawn_texts)


def test_confusion_shows_counts_and_shares_of_the_true_class(drawn_texts: list[str]) -> None:
    opened(report.confusion([[1180, 20], [300, 500]], ("cat", "dog")))
    assert {"1,180", "20", "300", "500", "98.3%", "1.7%", "37.5%", "62.5%"} <= set(drawn_texts)
    assert {"cat", "dog", "cat\n1,200", "dog\n800", "predicted", "labelled"} <= set(drawn_texts)
    assert "84.0% right: 1,680 of 2,000 images" in drawn_texts


def test_confusion_of_one_class_only(drawn_texts: list[str]) -> None:
    opened(report.confusion(np.array([[3, 1], [0, 0]]), ("cat", "dog")))
    assert drawn_texts[:8] == ["3", "75.0%", "1", "25.0%", "0", "0.0%", "0", "0.0%"]
    assert {"cat\n4", "dog\n0", "75.0% right: 3 of 4 images"} <= set(drawn_texts)


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
    report.reliability(labels, {"": np.repeat(np.array([0.1, 0.8, 1.0], np.float32), 10)})
    points, bars = drawn_figures[0].axes
    marks = [line for line in points.lines if line.get_marker() == "o"]
    end = np.log(0.9999 / 0.0001)
    expected = [[np.log(1 / 9), np.log(1 / 9)], [np.log(4), np.log(6 / 4)], [end, end]]
    assert np.array([line.get_xydata() for line in marks])[:, 0] == pytest.approx(np.array(expected), abs=1e-6)
    assert [line.get_markerfacecolor() == "white" for line in marks] == [False, False, True]
    for num_dogs, interval, (x, _) in zip((1, 6, 10), points.collections, expected, strict=True):
        low, high = metrics.share(num_dogs, 10)["ci95"]
        segment = [[x, np.log(low / (1 - low))], [x, np.log(high / (1 - high)) if high < 0.9999 else end]]
        assert isinstance(interval, matplotlib.collections.LineCollection)
        assert interval.get_segments()[0] == pytest.approx(np.array(segment), abs=1e-6)
    assert [height for height in heights(bars) if height] == [10, 10, 10]
    assert points.get_xlim() == points.get_ylim() == bars.get_xlim() == pytest.approx((-end, end))


@pytest.mark.parametrize(
    ("labels", "prob_dog", "expected"),
    [
        ([1], [0.5], [(0, 1)]),
        ([0, 1], [1.0, 0.0], [(-1, 1), (1, -1)]),
        ([0, 0, 0], [0.0] * 3, [(-1, -1)]),
        ([1] * 100, [0.999999] * 100, [(1, 1)]),
    ],
)
def test_reliability_of_few_and_of_extreme_probabilities(
    labels: list[int],
    prob_dog: list[float],
    expected: list[tuple[int, int]],
    drawn_figures: list[matplotlib.figure.Figure],
) -> None:
    """`expected`: the points, where 0 is the middle of an axis and -1 and 1 are its ends."""
    opened(report.reliability(labels, {"Reliability": prob_dog}))
    points, bars = drawn_figures[0].axes
    _, end = points.get_xlim()
    marks = [line for line in points.lines if line.get_marker() == "o"]
    assert np.array([xy(line)[0] for line in marks]) == pytest.approx(np.array(expected) * end)
    assert {line.get_markerfacecolor() for line in marks} == {"white"}
    assert sum(heights(bars)) == len(labels)


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


def test_a_sheet_shows_its_sections_one_below_the_other(drawn_figures: list[matplotlib.figure.Figure]) -> None:
    cats = [report.Tile(image=picture("#ff0000"), caption=f"cat {index}") for index in range(7)]  # two rows
    dog = report.Tile(image=picture("#0000ff"), caption="60 × 40 px", note="a note", mark="✓", colour="#008000")
    sections = [report.Section(heading="Cats", tiles=cats), report.Section(heading="Dogs", tiles=[dog])]
    image = np.asarray(opened(report.sheet(sections, "A title")))

    [axes] = drawn_figures[0].axes
    below = {text.get_text(): text.get_position()[1] for text in axes.texts}
    captions = [f"cat {index}" for index in range(7)]
    assert list(below) == ["A title", "Cats", *captions, "Dogs", "✓", "60 × 40 px", "a note"]
    heights = [below[name] for name in ("A title", "Cats", "cat 0", "cat 6", "Dogs", "60 × 40 px", "a note")]
    assert heights == sorted(set(heights))
    for colour, first, last in (((255, 0, 0), "Cats", "cat 6"), ((0, 0, 255), "Dogs", "60 × 40 px")):
        rows, _ = np.nonzero((image == colour).all(axis=2))
        assert below[first] < rows.min() < rows.max() < below[last]
    assert below["a note"] < image.shape[0]

    [frame] = axes.patches  # of the only tile that has a colour
    assert isinstance(frame, matplotlib.patches.Rectangle)
    assert frame.get_edgecolor() == matplotlib.colors.to_rgba("#008000")
    assert below["Dogs"] < frame.get_y() < below["60 × 40 px"]


def test_what_only_reads_and_labels_does_not_load_matplotlib() -> None:
    names = "catdog.dataset.pipeline", "catdog.inference.executors", "catdog.calibration"
    code = f"import sys, {', '.join(names)}; print('matplotlib' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout == "False\n"


@pytest.mark.slow
def test_the_same_input_gives_the_same_bytes() -> None:
    items = [item("red", "cat", "dog"), item("green", "dog", "dog")]
    drawings: tuple[Callable[[], bytes], ...] = (
        lambda: report.curves(history(5)),
        lambda: report.confusion([[5, 1], [2, 6]], ("cat", "dog")),
        lambda: report.reliability([0, 1, 1], {"before": [0.1, 0.9, 0.4], "after": [0.2, 0.8, 0.4]}),
        lambda: report.predictions_grid(items, "title"),
        lambda: report.sheet([report.Section(tiles=[report.Tile(image=picture("red"), caption="caption")])]),
    )
    for draw in drawings:
        first = draw()
        assert first == draw()
        assert b"atplotlib" not in first


@pytest.mark.slow
def test_grid_of_many_pictures() -> None:
    items = [
        report.GridItem(image=image, label="cat", predicted_label="dog", confidence=0.75)
        for image in encoded_drawings(15)
    ]
    image = opened(report.predictions_grid(items, "Fifteen drawings"))
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
