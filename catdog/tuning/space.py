"""What a search may vary: for each setting of a training a range, or a list of choices."""

from __future__ import annotations

import dataclasses
import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NoReturn

from catdog import architectures, storage
from catdog.config import TrainConfig, TuneConfig, flag
from catdog.errors import UsageError
from catdog.provenance import redact
from catdog.training import ResolvedTrainConfig, resolve

SETTINGS: Final[dict[str, type]] = {
    "learning_rate": float,
    "weight_decay": float,
    "label_smoothing": float,
    "augment_strength": float,
    "min_area": float,
    "image_size": int,
    "batch_size": int,
    "depth": int,
    "width": float,
    "head_epochs": int,
}
"""What can be searched, and what kind of number it is: flags of `catdog train`."""

_DIGITS: Final = 4
"""Significant digits of a setting. More of them would say nothing, and a command line would be hard to read."""

Number = int | float
Params = dict[str, Number]
"""Setting → its value."""


@dataclass(frozen=True, kw_only=True)
class Range:
    """Every number from `min` to `max`, both included; whole numbers where the setting is one."""

    min: Number
    max: Number
    log: bool = False
    """Whether to search orders of magnitude evenly, and not the numbers themselves."""

    def holds(self, value: Number) -> bool:
        """Whether a value lies in the range."""
        return self.min <= value <= self.max

    def ends(self) -> Sequence[Number]:
        """The values to validate: if these can be used, all others can."""
        return (self.min, self.max)


@dataclass(frozen=True, kw_only=True)
class Choices:
    """A few numbers."""

    choices: tuple[Number, ...]

    def holds(self, value: Number) -> bool:
        """Whether a value is one of the choices."""
        return value in self.choices

    def ends(self) -> Sequence[Number]:
        """The values to validate."""
        return self.choices


Space = dict[str, Range | Choices]
"""Setting → where to search it."""


def resolved(config: TuneConfig) -> tuple[ResolvedTrainConfig, Space]:
    """The training that a search varies, with nothing left to the recipe, and the space that it searches.

    Raises:
        UsageError: an unknown network, or a space that cannot be searched.
    """
    base = resolve(training_of(config))
    space = default_space(base, config) if config.space is None else read_space(config.space)
    for name in space:
        if getattr(config, name, None) is not None:
            raise UsageError(
                f"{flag(name)} must not be given where --space searches it. "
                f"Received: {flag(name)}={getattr(config, name)} and a table [{name}]"
            )
    check_values(base, space)
    return base, space


def training_of(config: TuneConfig) -> TrainConfig:
    """What every trial of a search trains, but for what the search varies."""
    return TrainConfig(
        data=config.data,
        output=config.output,
        arch=config.arch,
        weights=config.weights,
        epochs=config.epochs,
        batch_size=config.batch_size,
        image_size=config.image_size,
        class_weights=config.class_weights,
        cpus_per_worker=config.cpus_per_trial,
        use_gpu=config.use_gpu,
        precision=config.precision,
        seed=config.seed,
    )


def default_space(base: ResolvedTrainConfig, config: TuneConfig) -> Space:
    """The space that is searched unless the user gives another one: around the network's recipe.

    Args:
        base: the training to vary.
        config: what the user has fixed has no part in the space.
    """
    architecture = architectures.architecture(base.arch)
    rate = base.learning_rate
    space: Space = {
        "learning_rate": Range(min=rounded(float, rate / 10), max=rounded(float, rate * 10), log=True),
        "weight_decay": Range(min=1e-3, max=0.3, log=True),
        "label_smoothing": Range(min=0.0, max=0.2),
        "augment_strength": Range(min=0.0, max=2.0),
        "min_area": Range(min=0.2, max=1.0),
    }
    if architecture.has_backbone:
        if base.weights != "none":
            space["head_epochs"] = Range(min=0, max=min(2, base.epochs))
    elif config.image_size is None:
        sizes = (0.75, 1.0, 1.25)
        space["image_size"] = Choices(choices=tuple(2 * round(size * base.image_size / 2) for size in sizes))
    if architecture.usual_depth is not None:
        space["depth"] = Range(min=architecture.usual_depth - 2, max=architecture.usual_depth + 2)
        space["width"] = Choices(choices=(0.75, 1.0, 1.25))
    return space


def read_space(url: str) -> Space:
    """The space in a TOML file.

    Raises:
        UsageError: it is no such file, or says something that cannot be searched.
    """
    try:
        tables = tomllib.loads(storage.read_text(url))
    except FileNotFoundError:
        raise UsageError(f"--space must be a file that can be read. Received: --space={redact(url)}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"--space must be a TOML file. Received: {redact(url)}: {error}") from error
    return parse_space(tables)


def parse_space(tables: Mapping[str, Any]) -> Space:
    """The space that the tables of a TOML file describe.

    Raises:
        UsageError: they say something that cannot be searched.

    Example:
        >>> parse_space({"learning_rate": {"min": 1e-4, "max": 1e-2, "log": True}, "depth": {"choices": [3, 5]}})
        {'learning_rate': Range(min=0.0001, max=0.01, log=True), 'depth': Choices(choices=(3, 5))}
    """
    if not tables:
        raise UsageError(f"--space must have a table for a setting: {', '.join(SETTINGS)}. Received: an empty file")
    return {name: _parse_setting(name, table) for name, table in tables.items()}


def _parse_setting(name: str, table: Any) -> Range | Choices:
    if name not in SETTINGS:
        raise UsageError(f"--space must name only {', '.join(SETTINGS)}. Received: {name}")
    if not isinstance(table, dict):
        _refuse(name, "be a table", f"{name} = {table!r}")
    if unknown := sorted(table.keys() - {"min", "max", "log", "choices"}):
        _refuse(name, "have only the keys min, max, log and choices", unknown[0])
    if table.keys() not in ({"choices"}, {"min", "max"}, {"min", "max", "log"}):
        _refuse(name, "have min and max, or choices", " and ".join(table) or "nothing")
    if "choices" in table:
        choices = table["choices"]
        if not isinstance(choices, list) or not choices or len(set(map(str, choices))) < len(choices):
            _refuse(name, "have choices that are a list of different numbers", f"choices = {choices!r}")
        return Choices(choices=tuple(_number(name, "choices", each) for each in choices))
    low, high = (_number(name, key, table[key]) for key in ("min", "max"))
    log = table.get("log", False)
    if not isinstance(log, bool):
        _refuse(name, "have a log that is true or false", f"log = {log!r}")
    if low >= high:
        _refuse(name, "have a min below its max", f"min = {low}, max = {high}")
    if log and low <= 0:
        _refuse(name, "have a min above 0 with log = true", f"min = {low}")
    return Range(min=low, max=high, log=log)


def _number(name: str, key: str, value: Any) -> Number:
    kind = SETTINGS[name]
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not is_number or (kind is int and not isinstance(value, int)):
        _refuse(name, f"have {'whole ' if kind is int else ''}numbers as {key}", f"{key} = {value!r}")
    return kind(value)  # type: ignore[no-any-return]


def _refuse(name: str, rule: str, received: str) -> NoReturn:
    raise UsageError(f"[{name}] of --space must {rule}. Received: {received}")


def check_values(base: ResolvedTrainConfig, space: Space) -> None:
    """Check that a training takes the values of a space.

    Raises:
        UsageError: it does not. The message names the setting.
    """
    for name, where in space.items():
        for value in where.ends():
            try:
                apply(base, {name: value})
            except UsageError as error:
                raise UsageError(f"[{name}] of --space must have values that train takes: {error}") from error


def apply(base: ResolvedTrainConfig, params: Mapping[str, Number]) -> ResolvedTrainConfig:
    """The training with these settings, as a trial does it.

    Raises:
        UsageError: a training cannot have them.
    """
    changed: dict[str, Any] = {name: rounded(SETTINGS[name], value) for name, value in params.items()}
    return resolve(dataclasses.replace(base, **changed))


def rounded(kind: type, value: Number) -> Number:
    """A setting with the digits that a trial trains with.

    Example:
        >>> rounded(float, 0.00123456)
        0.001235
    """
    return int(value) if kind is int else float(f"{value:.{_DIGITS}g}")


def params_of(config: ResolvedTrainConfig, names: Sequence[str]) -> Params:
    """The values of these settings in a training."""
    return {name: getattr(config, name) for name in names}


def start_of(base: ResolvedTrainConfig, space: Space) -> Params | None:
    """The recipe's own settings, as a point of the space; None where the space does not hold them."""
    params = params_of(base, list(space))
    return params if all(where.holds(params[name]) for name, where in space.items()) else None


def plain(space: Space) -> dict[str, dict[str, Any]]:
    """A space as plain JSON values."""
    return {
        name: {key: list(value) if isinstance(value, tuple) else value for key, value in vars(where).items()}
        for name, where in space.items()
    }
