"""What a search may vary: default spaces, spaces in TOML files, and what is told of a wrong one."""

import json
import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest

from catdog import cli
from catdog.architectures import ARCHITECTURES
from catdog.config import TrainConfig, TuneConfig
from catdog.errors import UsageError
from catdog.training import resolve
from catdog.tuning import results, space
from catdog.tuning.space import Choices, Range


def config(**changes: Any) -> TuneConfig:
    fields: dict[str, Any] = {"data": "/d", "output": "/o", "num_trials": 3}
    return TuneConfig(**(fields | changes))


@pytest.mark.parametrize("arch", list(ARCHITECTURES))
def test_the_default_space_of_every_network_holds_its_recipe(arch: str) -> None:
    base, found = space.resolved(config(arch=arch))
    start = space.start_of(base, found)
    assert start is not None
    assert space.apply(base, start) == base
    assert {"learning_rate", "weight_decay", "label_smoothing", "augment_strength", "min_area"} <= found.keys()
    architecture = ARCHITECTURES[arch]
    assert ("head_epochs" in found) == architecture.has_backbone
    assert ("image_size" in found) == (not architecture.has_backbone)
    assert ("depth" in found and "width" in found) == (arch == "resnet")


def test_what_is_given_is_not_searched() -> None:
    assert "image_size" not in space.resolved(config(arch="cnn", image_size=100))[1]
    assert "head_epochs" not in space.resolved(config(arch="vgg16", weights="none"))[1]


GOOD = """
[learning_rate]
min = 1e-4
max = 1e-2
log = true

[depth]
min = 3
max = 7

[image_size]
choices = [96, 128]
"""


def test_a_space_is_read_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "space.toml"
    path.write_text(GOOD)
    base, found = space.resolved(config(space=str(path)))
    assert found == {
        "learning_rate": Range(min=1e-4, max=1e-2, log=True),
        "depth": Range(min=3, max=7),
        "image_size": Choices(choices=(96, 128)),
    }
    assert space.start_of(base, found) is None  # 160 px is no choice
    assert space.parse_space(space.plain({"depth": Range(min=3, max=7)})) == {"depth": Range(min=3, max=7)}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "--space must have a table for a setting: learning_rate, .*. Received: an empty file"),
        ("[momentum]\nmin = 0.1\nmax = 1", "--space must name only learning_rate, .*. Received: momentum"),
        ("depth = 3", r"\[depth\] of --space must be a table. Received: depth = 3"),
        ("[depth]\nmin = 3", r"\[depth\] of --space must have min and max, or choices. Received: min"),
        ("[depth]\nmin = 3\nmax = 5\nchoices = [3]", r"\[depth\] of --space must have min and max, or choices. .*"),
        (
            "[depth]\nmin = 3\nmax = 5\nstep = 2",
            r"\[depth\] of --space must have only the keys min, max, log and choices. Received: step",
        ),
        ("[depth]\nmin = 3.5\nmax = 5", r"\[depth\] of --space must have whole numbers as min. Received: min = 3.5"),
        ("[width]\nmin = '1'\nmax = 5", r"\[width\] of --space must have numbers as min. Received: min = '1'"),
        ("[width]\nmin = 1\nmax = inf", r"\[width\] of --space must have numbers as max. Received: max = inf"),
        ("[depth]\nchoices = [3, true]", r"\[depth\] of --space must have whole numbers as choices. .*"),
        ("[depth]\nchoices = [3, 3]", r"\[depth\] of --space must have choices that are a list of different .*"),
        (
            "[depth]\nmin = 5\nmax = 3",
            r"\[depth\] of --space must have a min below its max. Received: min = 5, max = 3",
        ),
        (
            "[label_smoothing]\nmin = 0\nmax = 0.1\nlog = true",
            r"\[label_smoothing\] of --space must have a min above 0 with log = true. Received: min = 0.0",
        ),
        ("[width]\nmin = 1\nmax = 2\nlog = 1", r"\[width\] of --space must have a log that is true or false. .*"),
        (
            "[label_smoothing]\nmin = 0\nmax = 1",
            r"\[label_smoothing\] of --space must have values that train takes: --label-smoothing must be at least 0 "
            "and below 1. Received: --label-smoothing=1.0",
        ),
        (
            "[head_epochs]\nmin = 0\nmax = 2",
            r"\[head_epochs\] of --space must have values that train takes: --head-epochs needs pretrained --weights. "
            "Received: --head-epochs=2",
        ),
        ("[image_size]\nchoices = [16]", r"\[image_size\] of --space must have values that train takes: .*"),
        ("[depth", "--space must be a TOML file. Received: .*space.toml: .*"),
    ],
)
def test_a_wrong_space_is_one_error_that_names_the_key(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "space.toml"
    path.write_text(text)
    with pytest.raises(UsageError) as caught:
        space.resolved(config(space=str(path), epochs=4))
    assert re.fullmatch(message, str(caught.value)), caught.value


def test_a_space_that_is_not_there_and_a_setting_that_is_fixed_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "space.toml"
    with pytest.raises(UsageError, match=r"^--space must be a file that can be read\. Received: --space=.*"):
        space.resolved(config(space=str(path)))
    path.write_text("[image_size]\nchoices = [96, 128]")
    with pytest.raises(UsageError, match=r"^--image-size must not be given where --space searches it\. Received: .*"):
        space.resolved(config(space=str(path), image_size=96))


def test_depth_and_width_are_resnets(tmp_path: Path) -> None:
    path = tmp_path / "space.toml"
    path.write_text("[depth]\nmin = 3\nmax = 5")
    with pytest.raises(UsageError, match=r"--depth needs --arch resnet\. Received: --depth=3 --arch=cnn$"):
        space.resolved(config(space=str(path), arch="cnn"))


def test_the_command_line_of_a_trial_is_one_that_trains_so() -> None:
    """It has no quotes to trip over, says nothing that is train's default, and is parsed to the trial's training."""
    tuned = config(data="/my data", output="/o", arch="resnet", epochs=7, seed=3, class_weights="auto")
    base, found = space.resolved(tuned)
    params = {"learning_rate": 0.00123456, "weight_decay": 0.1, "depth": 4, "width": 0.75, "image_size": 128}
    line = results.command_line(base, params, tuned)
    assert line == (
        "catdog train --data '/my data' --output /o/model --arch resnet --epochs 7 --class-weights auto --seed 3 "
        "--learning-rate 0.001235 --weight-decay 0.1 --depth 4 --width 0.75 --image-size 128"
    )
    name, invocation = cli.parse(shlex.split(line)[1:])
    assert (name, type(invocation.config)) == ("train", TrainConfig)
    trained = space.apply(base, params)
    parsed = resolve(invocation.config)
    differing = {field for field in vars(trained) if getattr(trained, field) != getattr(parsed, field)}
    assert differing == {"output"}
    assert results.train_config(base, params, tuned) == invocation.config
    assert found["depth"] == Range(min=3, max=7)


def test_a_dry_run_prints_the_space(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "space.toml"
    path.write_text(GOOD)
    line = ["tune", "--data", "d", "--output", "o", "--num-trials", "9", "--space", str(path), "--dry-run"]
    assert cli.main(line) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["plan"]["space"]["depth"] == {"min": 3, "max": 7, "log": False}
    assert printed["plan"]["train"]["learning_rate"] == ARCHITECTURES["resnet"].recipe.learning_rate
    assert tomllib.loads(GOOD).keys() == printed["plan"]["space"].keys()
