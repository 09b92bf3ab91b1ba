"""A model can learn from the drawings, and the demo runs every job on them."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from catdog import cli, demo, drawings
from catdog.schema import CLASS_NAMES


def test_a_drawing_is_determined_by_label_and_seed() -> None:
    pictures = {
        (label, seed): drawings.draw(label, seed).tobytes()
        for label in CLASS_NAMES
        for seed in [(0, 0), (0, 1), (1, 0)]
    }
    assert len(set(pictures.values())) == len(pictures)
    assert drawings.draw("dog", (0, 1)).tobytes() == pictures["dog", (0, 1)]


@pytest.mark.slow
def test_colours_do_not_give_the_animal_away() -> None:
    """A model that sees colour histograms alone does hardly better than guessing."""
    features, labels = [], []
    for index in range(240):
        picture = drawings.draw(CLASS_NAMES[index % 2], (5, index))
        assert picture.mode == "RGB"
        assert 150 <= min(picture.size) <= max(picture.size) < 260
        pixels_HWC = np.asarray(picture)
        histograms = [np.histogram(pixels_HWC[..., channel], 8, (0, 256))[0] for channel in range(3)]
        features.append(np.concatenate(histograms) / pixels_HWC.size)
        labels.append(index % 2)
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    assert cross_val_score(model, features, labels, cv=5).mean() < 0.65


@pytest.mark.slow
def test_demo_learns_the_drawings_and_leaves_other_files_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "demo"
    (output / "model").mkdir(parents=True)
    (output / "demo.json").write_text('{"command": "demo"}')
    for name in ("model/of-an-earlier-demo", "notes.txt"):
        (output / name).write_text("{}")
    line = [sys.executable, "-m", "catdog", "demo"]
    run = subprocess.run([*line, "--output", str(output), "--json"], capture_output=True, text=True, timeout=500)
    assert run.returncode == 0, run.stderr
    record = json.loads(run.stdout)
    assert record == json.loads((output / "demo.json").read_text())
    assert record["accuracy"]["value"] > 0.9
    assert record["evaluate"]["num_images"] > 90
    assert record["train"]["config"]["num_workers"] == 2
    num_files = demo.NUM_DRAWINGS + 2
    assert record["prepare"]["listed"] == num_files
    assert sum(record["prepare"]["reasons"].values()) == 2
    books = record["predict"]["books"]
    sums = {"listed": num_files, "ok": num_files - 2, "error": 2}
    assert books == {**sums, "already_done": 0, "duplicate": 0, "skipped": 0, "remaining": 0}
    assert record["predict"]["errors"] == {"truncated": 1, "unsupported_format": 1}
    assert (output / "notes.txt").exists()
    assert not (output / "model" / "of-an-earlier-demo").exists()
    for path in ("drawings", "data/samples.png", "model/curves.png", "evaluation/predictions.png"):
        assert (output / path).exists()

    # What the demo leaves behind is what any other command leaves, and is met with as such.
    monkeypatch.chdir(output)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    again = ["predict", "--images", "drawings", "--model", "model", "--output", "predictions"]
    assert cli.main([*again, "--dry-run"]) == 0
    plan = json.loads(capsys.readouterr().out)["plan"]
    assert (plan["listed"], plan["to_label"], plan["already_done"]) == (num_files, 0, num_files)
    assert cli.main(again) == 0
    assert capsys.readouterr().out.startswith("Nothing to label: everything listed is labelled already.\n")
    retried = ["--retry-errors", "--max-failed-fraction", "0.5", "--min-failures", "1"]
    assert cli.main([*again, *retried]) == 3
    assert capsys.readouterr().err.splitlines()[-1] == (
        "error: --max-failed-fraction allows 0.5 of the images to fail. Received: 2 of 2 failed"
    )
    with (output / "model" / "model.keras").open("r+b") as weights:
        weights.seek(1000)
        weights.write(b"damage")
    assert cli.main([*again, "--retry-errors"]) == 1
    assert capsys.readouterr().err.startswith("error: model/model.keras is damaged: its SHA-256 must be ")


@pytest.mark.parametrize("name", ["thesis.txt", "demo.json"])
def test_demo_refuses_what_is_no_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    (tmp_path / name).write_text("mine")
    assert cli.main(["demo", "--output", str(tmp_path)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines()[-1] == (
        "error: --output must be empty, or hold what this command wrote earlier. "
        f"Received: --output={tmp_path}, which holds {name}"
    )
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]
