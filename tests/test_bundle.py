"""Model bundles: what is saved is loaded, and what is damaged is refused."""

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from catdog import architectures, bundle, storage
from catdog.errors import BundleError

CARD = {"arch": "resnet", "image_size": 48, "temperature": 1.0, "review_threshold": 0.9}


def fresh_model() -> Any:
    return architectures.exported(architectures.build_model("resnet", 48), "resnet")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bundle") / "model"
    bundle.save(str(path), fresh_model(), CARD, extra_files={"history.csv": b"epoch\n1\n"})
    return path


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """A copy of the bundle that ships with the package."""
    return Path(shutil.copytree(bundle.DEFAULT_URL, tmp_path / "copy"))


@pytest.mark.slow
def test_a_bundle_loads_as_it_was_saved(saved: Path) -> None:
    loaded = bundle.load(str(saved))
    assert loaded.image_size == 48
    for arithmetic in ("float32", "bfloat16"):
        assert (loaded.temperature(arithmetic), loaded.review_threshold(arithmetic)) == (1.0, 0.9)
    assert loaded.int8 is None
    with pytest.raises(BundleError, match=r"bundle.json must accept the int8 model. Received: "):
        loaded.temperature("int8")
    assert loaded.model_id == bundle.read_card(str(saved))[1]
    model = bundle.load_model(loaded)
    logits_B = np.asarray(architectures.logits_model(model)(bundle.golden_images(48).astype("float32")))[:, 0]
    np.testing.assert_allclose(logits_B, loaded.card["golden_logits"], atol=1e-3)


def test_whole_numbers_are_numbers(copied: Path) -> None:
    path = copied / bundle.CARD_NAME
    path.write_text(json.dumps(json.loads(path.read_text()) | {"temperature": 1, "review_threshold": 1}))
    assert bundle.load(str(copied)).temperature("float32") == 1.0


@pytest.mark.slow
def test_a_remote_bundle_lies_in_the_cache(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for path in saved.rglob("*.*"):
        storage.publish_file(f"memory://test_bundle/{path.relative_to(saved)}", str(path))
    loaded = bundle.load("memory://test_bundle")
    assert set(loaded.paths) == {bundle.MODEL_NAME, "history.csv", *bundle.ir_names("float").values()}
    for name, path in loaded.paths.items():
        assert path.is_relative_to(tmp_path / "catdog" / "models" / loaded.model_id)
        assert path.read_bytes() == (saved / name).read_bytes()
    loaded.paths[bundle.MODEL_NAME].write_bytes(b"damaged")
    again = bundle.load("memory://test_bundle")
    assert again.paths[bundle.MODEL_NAME].read_bytes() == (saved / bundle.MODEL_NAME).read_bytes()


def test_a_remote_bundle_needs_no_home(copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file" / "cache"))  # no directory can be made there
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for path in copied.rglob("*.*"):
        storage.publish_file(f"memory://test_bundle/homeless/{path.relative_to(copied)}", str(path))
    for path in bundle.load("memory://test_bundle/homeless").paths.values():
        assert path.is_relative_to(tmp_path / f"catdog-cache-{os.getuid()}")
        assert path.is_file()


def test_golden_images_differ_and_are_full_of_detail() -> None:
    images_BHWC = bundle.golden_images(64)
    assert images_BHWC.shape == (4, 64, 64, 3)
    assert len({image.tobytes() for image in images_BHWC}) == 4
    assert images_BHWC.std(axis=(1, 2)).min() > 20


@pytest.mark.slow
def test_the_model_id_follows_the_weights(saved: Path, tmp_path: Path) -> None:
    other = bundle.save(str(tmp_path), fresh_model(), CARD)
    assert other != bundle.read_card(str(saved))[1]


@pytest.mark.parametrize("name", [bundle.MODEL_NAME, "history.csv"])
def test_a_damaged_file_is_named(copied: Path, name: str) -> None:
    data = (copied / name).read_bytes()
    (copied / name).write_bytes(data[:-1])
    with pytest.raises(BundleError, match=rf"{name} is damaged: its SHA-256 must be \w+\. Received: \w+$"):
        bundle.load(str(copied))


def test_a_missing_file_is_named(copied: Path) -> None:
    (copied / bundle.MODEL_NAME).unlink()
    with pytest.raises(BundleError, match=r"Received: .*model\.keras is missing$"):
        bundle.load(str(copied))


def test_a_directory_without_a_card_is_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"^a model bundle is a directory with a bundle\.json\. Received: "):
        bundle.load(str(tmp_path / "nowhere"))


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"format": "catdog-bundle/99"}, "format must be 'catdog-bundle/1'"),
        ({"class_names": ["dog", "cat"]}, r"class_names must be \['cat', 'dog'\]"),
        ({"resize_rule": "crop"}, "resize_rule must be "),
        ({"image_size": "150"}, "image_size must be an integer of at least 1"),
        ({"image_size": True}, "image_size must be an integer of at least 1"),
        ({"image_size": -3}, "image_size must be an integer of at least 1"),
        ({"temperature": 0}, "temperature must be a number above 0"),
        ({"temperature": float("nan")}, "temperature must be a number above 0"),
        ({"review_threshold": None}, "review_threshold must be a number of at least 0"),
        ({"golden_logits": ["a"]}, "golden_logits must be a list of numbers"),
        ({"int8": []}, "int8 must be null, or an object with is_accepted"),
        ({"int8": {"is_accepted": 1}}, "int8 must be null, or an object with is_accepted"),
        ({"int8": {"is_accepted": True, "temperature": 1}}, "int8 must be null, or an object with is_accepted"),
        ({"neither": {"threshold": "high", "golden_scores": [1]}}, "neither must be null, or an object with threshold"),
        ({"neither": {"threshold": 1.0, "golden_scores": []}}, "neither must be null, or an object with threshold"),
        ({"neither": {"threshold": 1.0}}, "neither must be null, or an object with threshold"),
        ({"files": {}}, r"files must list model\.keras"),
        ({"files": {"model.keras": "0123"}}, "files must be an object of names within the bundle"),
        ({"files": {"../secret": {"sha256": "0123"}}}, "files must be an object of names within the bundle"),
        ({"files": {"/etc/passwd": {"sha256": "0123"}}}, "files must be an object of names within the bundle"),
    ],
)
def test_a_card_that_is_not_understood_is_refused(copied: Path, change: dict[str, object], rule: str) -> None:
    path = copied / bundle.CARD_NAME
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(BundleError, match=rf"{rule}.* Received: "):
        bundle.load(str(copied))


def test_a_card_that_is_no_json_is_refused(copied: Path) -> None:
    (copied / bundle.CARD_NAME).write_text("{")
    with pytest.raises(BundleError, match=r"^bundle\.json must be JSON\. Received: "):
        bundle.load(str(copied))
