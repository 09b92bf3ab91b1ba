"""The driver of a search: from its configuration to its record."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import logging
import time
from dataclasses import dataclass
from typing import Any, Final

from catdog import hardware, provenance, storage
from catdog.config import TuneConfig
from catdog.dataset import reading
from catdog.errors import OutputRefusedError, TrainingError
from catdog.ray_session import connect
from catdog.records import Record, percent, plural
from catdog.training import ResolvedTrainConfig, train
from catdog.training.request import check_data, for_few_images
from catdog.tuning import results
from catdog.tuning.journal import FINISHED, Journal, Trial, best_of
from catdog.tuning.space import Space, apply, plain, resolved

logger = logging.getLogger(__name__)

CONFIG_NAME: Final = "search.json"
"""The configuration that an output's trials belong to. It is written first, and makes the output a search's."""

RECORD_NAME: Final = "tune.json"
MODEL_DIRECTORY: Final = "model"

_NOT_THE_RESULT: Final = (
    "data",
    "output",
    "num_trials",
    "max_hours",
    "space",
    "cpus_per_trial",
    "use_gpu",
    "train_best",
    "num_workers",
    "ray_address",
)
"""Fields that may differ when a search goes on: they say where, how fast and how long it searches. The space itself is
compared, not its file."""


@dataclass(frozen=True, kw_only=True)
class TuneRecord(Record):
    """What a search came to: the content of `tune.json`."""

    command: str = "tune"
    output: str
    arch: str
    resumed: bool
    """Whether the output held trials of this search before."""

    wall_seconds: float
    """How long this run of the command took."""

    search_seconds: float
    """How long the search took, in all the runs that were necessary."""

    trials: dict[str, int]
    """Number of trials by status."""

    num_val_images: int
    """Images that every trial was measured on."""

    best: dict[str, Any]
    """The row of the best trial, as in `trials.parquet`."""

    recipe: dict[str, Any] | None
    """The row of the trial with the network's own settings; None if the space does not hold them."""

    command_line: str
    """What trains a model with the best settings."""

    model_id: str | None
    """Of the model that `--train-best` trained."""

    space: dict[str, dict[str, Any]]
    config: dict[str, Any]
    versions: dict[str, str]
    host: provenance.Host

    def summary(self) -> list[str]:
        """How many trials there were, the best of them beside the recipe, and how to train it."""
        names = {"ok": "trained to the end", "stopped": "stopped early", "cut": "cut short", "error": "failed"}
        counts = ", ".join(f"{self.trials[status]} {text}" for status, text in names.items() if self.trials[status])
        recipe = [] if self.recipe is None else [_line("recipe", self.recipe)]
        settings = ", ".join(f"{name} {self.best[name]:g}" for name in self.space)
        model = [] if self.model_id is None else [f"Model: {storage.join(self.output, MODEL_DIRECTORY)}"]
        return [
            f"Tried {plural(sum(self.trials.values()), 'setting')} of {self.arch} in {self.search_seconds:,.0f} s: "
            f"{counts}.",
            _line("best", self.best),
            *recipe,
            f"  settings    {settings}",
            f"  beware      the best of many looks too good on the {self.num_val_images:,} images that chose it: "
            "measure on the test split",
            f"  train it    {self.command_line}",
            *model,
            f"Search: {self.output}",
        ]


def _line(name: str, row: dict[str, Any]) -> str:
    return (
        f"  {name:<11} trial {row['trial']}: validation log loss {row['val_log_loss']:.4f}, "
        f"accuracy {percent(row['val_accuracy'])}, {plural(row['epochs'], 'epoch')}"
    )


def tune(config: TuneConfig) -> TuneRecord:
    """Search the settings that suit a dataset best, and write what every trial came to.

    Raises:
        UsageError: the data, the network or the space cannot be used.
        OutputRefusedError: the output holds something else, or another search.
        OutputClaimedError: another run is at work there.
        ClaimLostError: another run took over the output.
        StorageError: a storage kept failing.
        TrainingError: no trial came to a result, or the cluster cannot hold one.
    """
    started = time.monotonic()
    base, space = resolved(config)
    data, output = storage.absolute(config.data), storage.absolute(config.output)
    base = dataclasses.replace(base, data=data, output=output)
    config = dataclasses.replace(config, data=data, output=output)
    info = reading.load_info(data)
    base = _for_data(base, space, config, info)
    _refuse_foreign(output)
    with storage.claimed(output, "tune") as claim:
        is_resumed = _begin(config, base, space, info.digest)
        journal = Journal(output, claim)
        num_cpus = max(config.cpus_per_trial, config.num_workers) + hardware.num_cores()
        is_done = config.num_trials <= sum(trial.status in FINISHED for trial in journal.trials)
        is_idle = is_done and not config.train_best  # then only the results are written again
        with contextlib.nullcontext() if is_idle else connect(config.ray_address, min_cpus=num_cpus):
            if not is_done:
                from catdog.tuning import trials

                trials.run(
                    config, base, space, info, journal, lambda: results.publish(journal.trials, config, base, space)
                )
            best = _published(journal, config, base, space)
            model_id = None
            if config.train_best:
                model_id = train(results.train_config(base, best.params, config)).model_id
        record = TuneRecord(
            output=provenance.redact(output),
            arch=base.arch,
            resumed=is_resumed,
            wall_seconds=round(time.monotonic() - started, 1),
            search_seconds=round(max(trial.seen_s for trial in journal.trials), 1),
            num_val_images=info.num_images("val"),
            model_id=model_id,
            space=plain(space),
            config=provenance.configuration(config),
            versions=provenance.versions(),
            host=provenance.host(),
            **_outcome(journal, best, config, base, space),
        )
        claim.check()
        storage.publish_json(storage.join(output, RECORD_NAME), record.to_dict())
    return record


def _for_data(
    base: ResolvedTrainConfig, space: Space, config: TuneConfig, info: reading.DatasetInfo
) -> ResolvedTrainConfig:
    """The training to vary, with a batch that suits the number of images.

    Raises:
        UsageError: the dataset cannot be trained on.
    """
    if config.batch_size is None:
        base = for_few_images(base, info.num_images("train"))
    largest = {name: max(where.ends()) for name, where in space.items() if name == "batch_size"}
    check_data(apply(base, largest), info)
    return base


def _refuse_foreign(output: str) -> None:
    storage.refuse_foreign_output(output, (CONFIG_NAME,), says={"command": "tune"})


def _begin(config: TuneConfig, base: ResolvedTrainConfig, space: Space, data_digest: str | None) -> bool:
    """Take note of what is searched. Whether the output holds this very search already.

    Raises:
        OutputRefusedError: it holds another one.
    """
    _refuse_foreign(config.output)
    published = provenance.configuration(config)
    decisive = {name: value for name, value in published.items() if name not in _NOT_THE_RESULT}
    settled = {"epochs": base.epochs, "batch_size": base.batch_size, "arch": base.arch}
    search = {"config": decisive | settled, "space": plain(space), "data_digest": data_digest}
    url = storage.join(config.output, CONFIG_NAME)
    if not storage.exists(url):
        storage.publish_json(url, {"command": "tune", "search": search, "config": published})
        return False
    found = storage.read_json(url).get("search")
    if found != search:
        raise OutputRefusedError(
            "--output must be empty, or hold a search with the same configuration, space and data. "
            f"Received: {provenance.redact(config.output)} with {_difference(found, search)}"
        )
    return True


def _difference(found: Any, wanted: dict[str, Any]) -> str:
    """What differs between two searches, in words."""
    found = found if isinstance(found, dict) else {}
    configs = found.get("config") or {}
    differing = [
        f"{name}={configs.get(name)!r} instead of {value!r}"
        for name, value in wanted["config"].items()
        if configs.get(name) != value
    ]
    if found.get("space") != wanted["space"]:
        differing.append("another space")
    return ", ".join(differing) or "other data"


def _published(journal: Journal, config: TuneConfig, base: ResolvedTrainConfig, space: Space) -> Trial:
    """Publish the trials, and return the best one.

    Raises:
        TrainingError: no trial came to a result.
    """
    results.publish(journal.trials, config, base, space)
    best = best_of(journal.trials)
    if best is not None:
        return best
    failed = [trial.error for trial in journal.trials if trial.status == "error"]
    if failed:
        raise TrainingError(f"a trial must come to a result. Received: {plural(len(failed), 'failure')}: {failed[0]}")
    raise TrainingError(
        f"--max-hours must suffice for an epoch of a trial. Received: --max-hours={config.max_hours}, and none is done"
    )


def _outcome(
    journal: Journal, best: Trial, config: TuneConfig, base: ResolvedTrainConfig, space: Space
) -> dict[str, Any]:
    """What the trials came to, as fields of the record."""
    counts = collections.Counter(trial.status for trial in journal.trials)
    recipe = results.recipe_of(journal.trials, base, space)
    return {
        "trials": {status: counts[status] for status in ("ok", "stopped", "cut", "error")},
        "best": results.row_of(best, base),
        "recipe": None if recipe is None else results.row_of(recipe, base),
        "command_line": results.command_line(base, best.params, config),
    }
