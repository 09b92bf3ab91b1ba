"""`catdog convert`: an older bundle gets OpenVINO's files, and its int8 model is judged on the validation split."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dataset_case import row_of, write_splits
from inference_case import encoded_drawings, save_model

from catdog import architectures, bundle, calibration, conversion, neither, quantization
from catdog.cli import main
from catdog.config import ConvertConfig, EvaluateConfig
from catdog.conversion import ConversionRecord
from catdog.engines import load_engine
from catdog.errors import BundleError, DatasetError, OutputRefusedError, UsageError
from catdog.evaluation import evaluate

pytestmark = pytest.mark.slow

NUM = {"train": 40, "val": 30, "test": 30}


def write_dataset(url: str, num: dict[str, int], picture: bytes | None = None) -> str:
    """A dataset of drawings whose labels take turns; `picture` is there in place of every drawing."""
    drawings = iter(encoded_drawings(sum(num.values())))
    splits = {}
    for split, num_images in num.items():
        rows = [row_of(next(drawings), f"/{split}/{index}.png", index % 2) for index in range(num_images)]
        splits[split] = [[row | {"image": picture or row["image"]} for row in rows]] if rows else []
    return write_splits(url, splits)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_dataset(str(tmp_path_factory.mktemp("conversion") / "data"), NUM)


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A bundle as an older catdog wrote it."""
    path = tmp_path / "model"
    save_model(str(path))
    for name in bundle.ir_names("float").values():
        (path / name).unlink()
    card = json.loads((path / bundle.CARD_NAME).read_text())
    card["files"] = {bundle.MODEL_NAME: card["files"][bundle.MODEL_NAME]}
    (path / bundle.CARD_NAME).write_text(json.dumps(card))
    return path


@pytest.fixture
def judgement(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Sets what is asked of an int8 model: nothing, or what none can do. This model knows nothing."""

    def judge(*, accept: bool) -> None:
        monkeypatch.setattr(quantization, "MAX_ACCURACY_LOSS", 1.0 if accept else -2.0)
        monkeypatch.setattr(quantization, "MAX_LOG_LOSS_RATIO", 1000.0)

    return judge


def convert(model: Path, **fields: Any) -> ConversionRecord:
    return conversion.convert(ConvertConfig(model=str(model), **fields))


def files(model: Path) -> set[str]:
    return {str(path.relative_to(model)) for path in model.rglob("*") if path.is_file()}


FLOAT, INT8 = ({*bundle.ir_names("float").values()}, {*bundle.ir_names("int8").values()})


def test_an_accepted_int8_model_labels(old: Path, data: str, judgement: Any, tmp_path: Path) -> None:
    judgement(accept=True)
    before = bundle.load(str(old))
    network = bundle.load_model(before)
    assert load_engine(before).name == "tensorflow"
    record = convert(old, data=data)
    after = bundle.load(str(old))
    assert record.previous_model_id == before.model_id
    assert record.model_id == after.model_id
    assert len({before.model_id, after.model_id}) == 2
    assert files(old) == {bundle.CARD_NAME, bundle.MODEL_NAME, bundle.NEITHER_NAME} | FLOAT | INT8
    pictures_BHWC = bundle.golden_images(before.image_size).astype("float32")
    logits_B = np.asarray(architectures.logits_model(network)(pictures_BHWC))[:, 0]
    prob_dog_B = np.asarray(bundle.load_model(after)(pictures_BHWC))[:, 0]
    expected_B = calibration.probabilities(logits_B, before.temperature("float32"))
    np.testing.assert_allclose(prob_dog_B, expected_B, rtol=1e-5)
    assert after.card["golden_logits"] == before.card["golden_logits"]
    assert after.int8 is not None
    assert record.int8 is not None
    assert after.int8 == {**record.int8}
    assert (after.int8["num_float"], after.int8["num_late_float"]) == quantization.NUM_FLOAT[0]
    assert after.int8["validation"]["num_images"] == NUM["val"]
    for arithmetic in ("float32", "int8"):
        score = after.neither(arithmetic)
        assert score is not None
        assert score["flagged"]["value"] <= neither.MAX_FLAGGED
    engine = load_engine(after)
    assert (engine.name, engine.arithmetic) == ("openvino", "int8")
    assert "int8       made" in "\n".join(record.summary())

    evaluated = evaluate(EvaluateConfig(data=data, model=str(old), output=str(tmp_path / "evaluation")))
    assert evaluated.arithmetic == "int8"
    assert evaluated.review_threshold == after.review_threshold("int8")
    in_float = evaluated.in_float
    assert in_float is not None
    in_float_alone = evaluate(
        EvaluateConfig(data=data, model=str(old), output=str(tmp_path / "float"), engine="openvino-float")
    )
    assert in_float_alone.in_float is None
    assert in_float["arithmetic"] == in_float_alone.arithmetic
    assert (in_float["accuracy"], in_float["log_loss"]) == (in_float_alone.accuracy, in_float_alone.log_loss)
    assert 0 <= in_float["num_other_labels"] <= NUM["test"]


def test_a_refused_int8_model_is_left_out_and_its_figures_are_kept(
    old: Path, data: str, judgement: Any, tmp_path: Path
) -> None:
    judgement(accept=False)
    kept = files(old)
    record = convert(old, data=data, output=str(tmp_path / "new"))
    assert files(old) == kept  # the original stays
    after = bundle.load(str(tmp_path / "new"))
    assert files(tmp_path / "new") == {bundle.CARD_NAME, bundle.MODEL_NAME, bundle.NEITHER_NAME} | FLOAT
    assert after.int8 is None
    tried = (after.card["int8"]["num_float"], after.card["int8"]["num_late_float"])
    assert tried == quantization.NUM_FLOAT[-1]  # the last
    assert {*after.card["int8"]["validation"]} == {"num_images", "accuracy", "log_loss"}
    assert load_engine(after).arithmetic != "int8"
    assert "int8       refused" in "\n".join(record.summary())


def test_without_data_there_is_no_int8_model(old: Path, judgement: Any, data: str) -> None:
    judgement(accept=True)
    convert(old, data=data)
    score = bundle.load(str(old)).neither("float32")
    record = convert(old)
    assert record.int8 is None
    assert bundle.load(str(old)).neither("float32") == score is not None
    assert bundle.load(str(old)).int8 is None
    assert load_engine(bundle.load(str(old))).name == "openvino"
    assert "not made: it needs --data" in "\n".join(record.summary())


def test_bad_input_is_one_error_and_changes_nothing(old: Path, tmp_path: Path) -> None:
    before = {name: (old / name).read_bytes() for name in files(old)}
    empty = write_dataset(str(tmp_path / "empty"), NUM | {"val": 0})
    with pytest.raises(
        UsageError, match=r"^--data must hold images in the splits train and val\. Received: none in val$"
    ):
        convert(old, data=empty)
    broken = write_dataset(str(tmp_path / "broken"), NUM, picture=b"no picture")
    with pytest.raises(DatasetError, match=r"^every picture of a dataset must decode\. Received: "):
        convert(old, data=broken)
    with pytest.raises(BundleError, match=r"a model bundle is a directory with a bundle.json"):
        convert(tmp_path / "nothing")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(OutputRefusedError):
        convert(old, output=str(tmp_path / "mine"))
    assert {name: (old / name).read_bytes() for name in files(old)} == before
    assert files(tmp_path / "mine") == {"thesis.txt"}


def test_from_the_shell(old: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", str(old), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["model_id"] == bundle.load(str(old)).model_id
    assert main(["convert", str(old.parent / "nothing")]) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1
