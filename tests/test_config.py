"""Configurations refuse what cannot work, in one line that states the rule and what came."""

import dataclasses
from typing import Any

import pytest

from catdog.config import DemoConfig, EvaluateConfig, PredictConfig, PrepareConfig, TrainConfig, flag
from catdog.errors import UsageError

REQUIRED: dict[type, dict[str, str]] = {
    DemoConfig: {},
    PrepareConfig: {"images": "i", "output": "o"},
    TrainConfig: {"data": "d", "output": "o"},
    EvaluateConfig: {"data": "d", "output": "o", "model": "m"},
    PredictConfig: {"images": "i", "output": "o", "model": "m"},
}


@pytest.mark.parametrize("config_type", REQUIRED)
def test_defaults_are_valid_and_frozen(config_type: type) -> None:
    config = config_type(**REQUIRED[config_type])
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.output = "elsewhere"


@pytest.mark.parametrize(
    ("config_type", "fields", "message"),
    [
        (PrepareConfig, {"images": " "}, "--images must be a path or a URL. Received: --images=' '"),
        (
            PrepareConfig,
            {"val_fraction": -0.1},
            "--val-fraction must lie between 0 and 1. Received: --val-fraction=-0.1",
        ),
        (
            PrepareConfig,
            {"test_fraction": float("nan")},
            "--test-fraction must lie between 0 and 1. Received: --test-fraction=nan",
        ),
        (
            PrepareConfig,
            {"val_fraction": 0.5, "test_fraction": 0.5},
            "--val-fraction and --test-fraction must leave a share for training. "
            "Received: --val-fraction=0.5 --test-fraction=0.5",
        ),
        (TrainConfig, {"epochs": 0}, "--epochs must be at least 1. Received: --epochs=0"),
        (TrainConfig, {"num_workers": 0}, "--num-workers must be at least 1. Received: --num-workers=0"),
        (TrainConfig, {"image_size": 31}, "--image-size must be at least 32. Received: --image-size=31"),
        (TrainConfig, {"max_failures": -1}, "--max-failures must be at least 0. Received: --max-failures=-1"),
        (
            TrainConfig,
            {"learning_rate": float("inf")},
            "--learning-rate must be a finite number above 0. Received: --learning-rate=inf",
        ),
        (
            TrainConfig,
            {"batch_size": 3, "num_workers": 4},
            "--num-workers must be at most --batch-size. Received: --num-workers=4 --batch-size=3",
        ),
        (
            TrainConfig,
            {"num_workers": 2, "min_workers": 3},
            "--min-workers must be at most --num-workers. Received: --min-workers=3 --num-workers=2",
        ),
        (
            TrainConfig,
            {"epochs": 2, "head_epochs": 3},
            "--head-epochs must be at most --epochs. Received: --head-epochs=3 --epochs=2",
        ),
        (TrainConfig, {"min_workers": 0}, "--min-workers must be at least 1. Received: --min-workers=0"),
        (TrainConfig, {"checkpoint_steps": 0}, "--checkpoint-steps must be at least 1. Received: --checkpoint-steps=0"),
        (TrainConfig, {"seed": -1}, "--seed must be at least 0. Received: --seed=-1"),
        (TrainConfig, {"seed": 2**31}, "--seed must be below 2147483648. Received: --seed=2147483648"),
        (TrainConfig, {"weights": ""}, "--weights must be a path or a URL. Received: --weights=''"),
        (
            TrainConfig,
            {"review_precision": 1.0},
            "--review-precision must be at least 0.5 and below 1. Received: --review-precision=1.0",
        ),
        (EvaluateConfig, {"batch_size": 0}, "--batch-size must be at least 1. Received: --batch-size=0"),
        (PredictConfig, {"batch_size": 0}, "--batch-size must be at least 1. Received: --batch-size=0"),
        (PredictConfig, {"model": ""}, "--model must be a path or a URL. Received: --model=''"),
        (
            PredictConfig,
            {"max_failed_fraction": 1.5},
            "--max-failed-fraction must lie between 0 and 1. Received: --max-failed-fraction=1.5",
        ),
        (PredictConfig, {"min_failures": 0}, "--min-failures must be at least 1. Received: --min-failures=0"),
        (PredictConfig, {"include": ("*.jpg", " ")}, "--include must be a glob. Received: --include=' '"),
        (PredictConfig, {"images": ("photos", "")}, "--images must be a path or a URL. Received: --images=''"),
        (PrepareConfig, {"images": ()}, "--images must name a place. Received: --images=()"),
        (PrepareConfig, {"exclude": ("",)}, "--exclude must be a glob. Received: --exclude=''"),
        (
            PredictConfig,
            {"executor": "inline", "ray_address": "auto"},
            "--ray-address needs --executor ray or auto. Received: --executor=inline --ray-address=auto",
        ),
        (DemoConfig, {"output": ""}, "--output must be a path or a URL. Received: --output=''"),
    ],
)
def test_bad_value_is_refused(config_type: type, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as refused:
        config_type(**{**REQUIRED[config_type], **fields})
    assert str(refused.value) == message


def test_flag_names() -> None:
    assert flag("max_failed_fraction") == "--max-failed-fraction"
