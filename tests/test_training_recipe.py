"""The flags of `train` that stand in the place of a network's recipe: their defaults, their limits, the fingerprint."""

from typing import Any

import pytest

from catdog import bundle, provenance
from catdog.architectures import ARCHITECTURES
from catdog.config import TrainConfig
from catdog.errors import UsageError
from catdog.training import request, resolve


def config(**changes: Any) -> TrainConfig:
    return TrainConfig(data="/data", output="/model", **changes)


def fingerprint(**changes: Any) -> str:
    return request.fingerprint(provenance.configuration(resolve(config(**changes))), "digest")


@pytest.mark.parametrize("arch", list(ARCHITECTURES))
def test_what_a_recipe_says_has_no_part_in_the_fingerprint(arch: str) -> None:
    """Older versions had no such flags, and what they began is resumed."""
    resolved = resolve(config(arch=arch))
    recipe = ARCHITECTURES[arch].recipe
    same = {name: getattr(resolved, name) for name in ("weight_decay", "label_smoothing", "min_area", "depth", "width")}
    assert (same["weight_decay"], same["label_smoothing"]) == (recipe.weight_decay, recipe.label_smoothing)
    assert fingerprint(arch=arch, augment_strength=1.0, **same) == fingerprint(arch=arch)


@pytest.mark.parametrize(
    "change",
    [
        {"weight_decay": 0.02},
        {"label_smoothing": 0.1},
        {"min_area": 0.5},
        {"augment_strength": 0.5},
        {"depth": 6},
        {"width": 0.5},
    ],
)
def test_another_value_is_another_training(change: dict[str, Any]) -> None:
    assert fingerprint(arch="resnet", **change) != fingerprint(arch="resnet")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight_decay": -0.1}, "--weight-decay must be a finite number of at least 0. Received: --weight-decay=-0.1"),
        ({"label_smoothing": 1}, "--label-smoothing must be at least 0 and below 1. Received: --label-smoothing=1"),
        ({"augment_strength": 4}, "--augment-strength must lie between 0 and 3. Received: --augment-strength=4"),
        ({"min_area": 0}, "--min-area must be above 0 and at most 1. Received: --min-area=0"),
        ({"depth": 0}, "--depth must be at least 1. Received: --depth=0"),
        ({"width": 9}, "--width must lie between 0.125 and 8. Received: --width=9"),
        ({"depth": 4, "arch": "cnn"}, "--depth needs --arch resnet. Received: --depth=4 --arch=cnn"),
        ({"width": 0.5, "arch": "vgg16"}, "--width needs --arch resnet. Received: --width=0.5 --arch=vgg16"),
    ],
)
def test_what_cannot_be_is_one_error(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        resolve(config(**change))
    assert str(caught.value) == message


def test_a_model_to_start_from_keeps_its_depth_and_width(monkeypatch: pytest.MonkeyPatch) -> None:
    card = {"arch": "resnet", "image_size": 160, "training_config": {"depth": 3, "width": 0.5}}
    monkeypatch.setattr(bundle, "read_card", lambda url: (card, "0123"))
    resolved = resolve(config(from_="/parent"))
    assert (resolved.depth, resolved.width) == (3, 0.5)
    with pytest.raises(UsageError, match=r"^--depth must be that of the model to start from, 3\. Received: --depth=5$"):
        resolve(config(from_="/parent", depth=5))
    older: dict[str, Any] = {"arch": "resnet", "image_size": 160, "training_config": {}}
    monkeypatch.setattr(bundle, "read_card", lambda url: (older, "0123"))
    assert resolve(config(from_="/parent")).depth == 5
