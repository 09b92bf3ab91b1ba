"""The model that ships with the package."""

import json
import zipfile
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from catdog import bundle
from catdog.cli import main
from catdog.schema import CLASS_NAMES

NUM_PHOTOGRAPHS = 40


def test_it_loads_and_computes_what_it_did_when_it_was_saved() -> None:
    bundle.load_model(bundle.load(None))


def test_it_is_small_and_says_where_it_is_from() -> None:
    files = [path for path in Path(bundle.DEFAULT_URL).iterdir() if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 16 * 2**20
    card, _ = bundle.read_card(None)
    assert {path.name for path in files} == {*card["files"], bundle.CARD_NAME, "README.md"}
    assert card["pretrained_weights"].startswith("efficientnet_lite")
    assert not any(isinstance(value, str) and value.startswith("/") for value in card["training_config"].values())
    text = (Path(bundle.DEFAULT_URL) / "README.md").read_text()
    assert "Apache-2.0" in text
    assert "Dogs vs. Cats" in text
    assert card["data_digest"][:16] in text


def test_predict_without_a_model_takes_it(
    shared_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures = tmp_path / "pictures"
    with zipfile.ZipFile(shared_data / "other-cameras.zip") as archive:
        by_class = {name: sorted(n for n in archive.namelist() if n.startswith(f"{name}/")) for name in CLASS_NAMES}
        for members in by_class.values():
            step = len(members) // (NUM_PHOTOGRAPHS // 2)
            archive.extractall(pictures, [n for n in members[::step] if not n.endswith("/")])
    assert main(["predict", "--images", str(pictures), "--output", str(tmp_path / "predictions"), "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["config"]["model"] is None
    rows = pq.read_table(tmp_path / "predictions").to_pylist()
    assert len(rows) >= NUM_PHOTOGRAPHS
    num_right = sum(Path(row["uri"]).parent.name == row["label"] for row in rows)
    assert num_right / len(rows) >= 0.95
    assert {row["model_id"] for row in rows} == {bundle.read_card(None)[1]}
