"""The four jobs, one after the other, with everything in an S3 bucket."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import fsspec
import pyarrow.parquet as pq
import pytest
from s3_server import S3Server

from catdog import drawings

pytestmark = pytest.mark.slow

pytest_plugins = ["s3_server"]

NUM_PER_CLASS = 40


def run_job(*argv: str) -> dict[str, Any]:
    """Run `python -m jobs.COMMAND ...` and return its run record."""
    result = subprocess.run(
        [sys.executable, "-m", f"jobs.{argv[0]}", *argv[1:], "--json"],
        cwd=Path(__file__).resolve().parents[1],
        env=dict(os.environ),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    record: dict[str, Any] = json.loads(result.stdout)
    return record


def test_every_job_reads_and_writes_a_bucket(s3: S3Server) -> None:
    bucket = s3.new_bucket()
    for label in ("cat", "dog"):
        for index in range(NUM_PER_CLASS):
            encoded = io.BytesIO()
            drawings.draw(label, [index]).save(encoded, "JPEG")
            with fsspec.open(f"{bucket}/photos/{label}/{index}.jpg", "wb") as file:
                file.write(encoded.getvalue())
    data, model, predictions = f"{bucket}/data", f"{bucket}/model", f"{bucket}/predictions"

    prepared = run_job("prepare", "--images", f"{bucket}/photos", "--output", data, "--val-fraction", "0.2")
    assert prepared["listed"] == 2 * NUM_PER_CLASS

    small = ("--arch", "resnet", "--image-size", "32", "--batch-size", "16", "--epochs", "2", "--num-workers", "2")
    trained = run_job("train", "--data", data, "--output", model, *small)
    assert trained["epochs_trained"] == 2

    labelled = run_job("predict", "--images", f"{bucket}/photos", "--output", predictions, "--model", model)
    assert labelled["books"]["ok"] == labelled["books"]["listed"] == 2 * NUM_PER_CLASS
    again = run_job(
        "predict", "--images", f"{bucket}/photos", "--output", predictions, "--model", model, "--executor", "ray"
    )
    assert again["books"]["already_done"] == 2 * NUM_PER_CLASS

    filesystem = fsspec.filesystem("s3")
    parts = filesystem.glob(f"{predictions}/*.parquet")
    rows = [row for part in parts for row in pq.read_table(io.BytesIO(filesystem.cat_file(part))).to_pylist()]
    assert len({row["uri"] for row in rows}) == len(rows) == 2 * NUM_PER_CLASS
    assert {row["model_id"] for row in rows} == {trained["model_id"]}

    evaluated = run_job(
        "evaluate", "--data", data, "--output", f"{bucket}/evaluation", "--model", model, "--split", "val"
    )
    assert evaluated["model_id"] == trained["model_id"]
    assert {Path(name).name for name in filesystem.ls(f"{bucket}/evaluation", detail=False)} >= {
        "metrics.json",
        "confusion.png",
        "reliability.png",
        "predictions.png",
    }
