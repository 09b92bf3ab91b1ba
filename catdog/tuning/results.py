"""What a search leaves: a table of its trials, a page to look at, and the command line of the best of them."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Final

from catdog import schema, storage
from catdog.config import TrainConfig, TuneConfig, flag
from catdog.provenance import redact
from catdog.training import ResolvedTrainConfig
from catdog.tuning.journal import Trial, best_of
from catdog.tuning.space import SETTINGS, Number, Params, Space, apply, params_of, start_of

if TYPE_CHECKING:
    from catdog.report import TrialRow

TABLE_NAME: Final = "trials.parquet"
PAGE_NAME: Final = "tune.html"


def publish(trials: Sequence[Trial], config: TuneConfig, base: ResolvedTrainConfig, space: Space) -> None:
    """Write the table and the page of the trials so far.

    Raises:
        StorageError: the storage failed.
    """
    from catdog import report  # heavy, and --dry-run does without

    rows = [row_of(trial, base) for trial in trials]
    storage.publish_parquet(storage.join(config.output, TABLE_NAME), schema.table_of(rows, schema.TRIALS_SCHEMA))
    best = best_of(trials)
    recipe = recipe_of(trials, base, space)
    page = report.SearchPage(
        arch=base.arch,
        num_epochs=base.epochs,
        settings={name: getattr(where, "log", False) for name, where in space.items()},
        rows=[_page_row(trial, base, space) for trial in trials],
        best=None if best is None else best.number,
        recipe=None if recipe is None else recipe.number,
        command_line="" if best is None else command_line(base, best.params, config),
    )
    storage.publish_bytes(storage.join(config.output, PAGE_NAME), report.search_page(page))


def row_of(trial: Trial, base: ResolvedTrainConfig) -> dict[str, Any]:
    """A trial as in `trials.parquet`, with all the settings that it trained with."""
    last = trial.last or {}
    return {
        "trial": trial.number,
        "status": trial.status,
        **params_of(apply(base, trial.params), list(SETTINGS)),
        "epochs": len(trial.epochs),
        "val_accuracy": last.get("val_accuracy"),
        "val_log_loss": last.get("val_log_loss"),
        "started_s": trial.started_s,
        "duration_s": round(trial.seen_s - trial.started_s, 1),
        "error": trial.error,
    }


def _page_row(trial: Trial, base: ResolvedTrainConfig, space: Space) -> TrialRow:
    from catdog import report

    row = row_of(trial, base)
    return report.TrialRow(
        number=trial.number,
        status=trial.status,
        settings={name: row[name] for name in space},
        num_epochs=row["epochs"],
        val_log_loss=row["val_log_loss"],
        val_accuracy=row["val_accuracy"],
        started_s=trial.started_s,
        duration_s=row["duration_s"],
        error=trial.error,
    )


def recipe_of(trials: Iterable[Trial], base: ResolvedTrainConfig, space: Space) -> Trial | None:
    """The trial with the network's own settings, if there is one with a result."""
    start = start_of(base, space)
    found = (trial for trial in trials if trial.params == start and trial.last is not None)
    return next(found, None)


def train_config(base: ResolvedTrainConfig, params: Params, config: TuneConfig) -> TrainConfig:
    """The training of a whole model with the settings of a trial."""
    trained = apply(base, params)
    return TrainConfig(
        data=config.data,
        output=storage.join(config.output, "model"),
        num_workers=config.num_workers,
        cpus_per_worker=config.cpus_per_trial,
        use_gpu=config.use_gpu,
        ray_address=config.ray_address,
        **_flags(base, params, config),
        **{name: getattr(trained, name) for name in params},
    )


def command_line(base: ResolvedTrainConfig, params: Params, config: TuneConfig) -> str:
    """The command that trains a model with the settings of a trial. It says nothing that is train's default."""
    trained = apply(base, params)
    values: dict[str, Any] = {
        "data": config.data,
        "output": storage.join(config.output, "model"),
        **_flags(base, params, config),
        **{name: getattr(trained, name) for name in params},
    }
    defaults = {field.name: field.default for field in dataclasses.fields(TrainConfig)}
    given = [
        f"{flag(name)} {shlex.quote(_spelt(value))}"
        for name, value in values.items()
        if value != defaults[name] or name in params
    ]
    return redact(" ".join(["catdog train", *given]))


def _flags(base: ResolvedTrainConfig, params: Params, config: TuneConfig) -> dict[str, Any]:
    """What all trials have in common, as flags of `catdog train`: without what a recipe says of itself."""
    return {
        "arch": base.arch,
        "weights": config.weights,
        "epochs": base.epochs,
        "class_weights": config.class_weights,
        "precision": config.precision,
        "seed": config.seed,
        **{name: getattr(config, name) for name in ("batch_size", "image_size") if name not in params},
    }


def _spelt(value: Number | str) -> str:
    """A flag's value as one would write it."""
    return f"{value:g}" if isinstance(value, float) else str(value)
