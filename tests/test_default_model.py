"""The model that ships with the package: it is whole, and the card says how it was made."""

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from inference_case import encoded_drawings

from catdog import bundle
from catdog.cli import main
from catdog.config import EngineName
from catdog.engines import load_engine
from catdog.schema import CLASS_NAMES

NUM_PHOTOGRAPHS = 40
NAMES: tuple[EngineName, ...] = ("openvino", "openvino-float", "tensorflow")


@pytest.mark.slow
def test_it_loads_and_computes_what_it_did_when_it_was_saved() -> None:
    engines = {name: load_engine(bundle.load(None), name) for name in NAMES}  # which compares golden logits
    assert engines["openvino"].arithmetic == "int8"
    assert load_engine(bundle.load(None)).name == "openvino"


def test_it_is_small_and_says_where_it_is_from() -> None:
    files = [path for path in Path(bundle.DEFAULT_URL).rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 32 * 2**20
    card, _ = bundle.read_card(None)
    names = {str(path.relative_to(bundle.DEFAULT_URL)) for path in files}
    assert names == {*card["files"], bundle.CARD_NAME, "README.md"}
    assert card["pretrained_weights"].startswith("efficientnet_lite")
    assert not any(isinstance(value, str) and value.startswith("/") for value in card["training_config"].values())
    text = (Path(bundle.DEFAULT_URL) / "README.md").read_text()
    assert "Apache-2.0" in text
    assert "Dogs vs. Cats" in text
    assert card["data_digest"][:16] in text


@pytest.fixture
def predicted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[[Path], list[dict[str, Any]]]:
    """Runs `predict` without --model, and gives the rows."""

    def predict(pictures: Path) -> list[dict[str, Any]]:
        assert main(["predict", "--images", str(pictures), "--output", str(tmp_path / "predictions"), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["config"]["model"] is None
        rows: list[dict[str, Any]] = pq.read_table(tmp_path / "predictions").to_pylist()
        return rows

    return predict


@pytest.mark.slow
def test_photographs_of_other_things_need_review(
    predicted: Callable[[Path], list[dict[str, Any]]], shared_data: Path, tmp_path: Path
) -> None:
    pictures = tmp_path / "pictures"
    with zipfile.ZipFile(shared_data / "neither.zip") as archive:
        members = sorted(name for name in archive.namelist() if not name.endswith("/"))
        archive.extractall(pictures, members[:: 2 * len(members) // (2 * NUM_PHOTOGRAPHS)])
    rows = predicted(pictures)
    assert len(rows) >= NUM_PHOTOGRAPHS
    assert sum(row["review_reason"] in ("neither", "unsure") for row in rows) / len(rows) >= 0.85


@pytest.mark.slow
def test_predict_without_a_model_takes_it(predicted: Callable[[Path], list[dict[str, Any]]], tmp_path: Path) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for number, picture in enumerate(encoded_drawings(8)):
        (pictures / f"{number}.jpg").write_bytes(picture)
    rows = predicted(pictures)
    assert {(row["model_id"], row["status"]) for row in rows} == {(bundle.read_card(None)[1], "ok")}
    assert len(rows) == len({row["prob_dog"] for row in rows}) == 8


@pytest.mark.slow
def test_it_tells_photographs_of_cats_from_those_of_dogs(
    predicted: Callable[[Path], list[dict[str, Any]]], shared_data: Path, tmp_path: Path
) -> None:
    pictures = tmp_path / "pictures"
    with zipfile.ZipFile(shared_data / "other-cameras.zip") as archive:
        by_class = {name: sorted(n for n in archive.namelist() if n.startswith(f"{name}/")) for name in CLASS_NAMES}
        for members in by_class.values():
            step = len(members) // (NUM_PHOTOGRAPHS // 2)
            archive.extractall(pictures, [n for n in members[::step] if not n.endswith("/")])
    rows = predicted(pictures)
    assert len(rows) >= NUM_PHOTOGRAPHS
    num_right = sum(Path(row["uri"]).parent.name == row["label"] for row in rows)
    assert num_right / len(rows) >= 0.95
