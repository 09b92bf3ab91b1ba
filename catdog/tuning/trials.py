"""The trials of a search, on Ray Tune: Optuna suggests settings, and ASHA stops those that fall behind."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import logging
import math
import os
import pickle
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import optuna
import ray
import ray.tune
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search.optuna import OptunaSearch

from catdog import hardware, provenance, ray_internals, scratch
from catdog.config import TuneConfig
from catdog.dataset.reading import DatasetInfo
from catdog.errors import CatdogError, TrainingError
from catdog.ray_session import cluster_address
from catdog.records import percent, plural
from catdog.training import ResolvedTrainConfig, decoding
from catdog.training.decoding import Source
from catdog.training.group import class_weights
from catdog.training.request import fetch_start
from catdog.tuning.journal import FINISHED, Journal, Status, Trial
from catdog.tuning.space import SETTINGS, Choices, Space, start_of
from catdog.tuning.trial import Assignment, Trainable

logger = logging.getLogger(__name__)

METRIC: Final = "val_log_loss"

REDUCTION: Final = 3
"""ASHA lets one in so many trials go on: the best at a third, and at a ninth, of the epochs (Li et al., "A system for
massively parallel hyperparameter tuning", MLSys 2020)."""

NUM_RUNGS: Final = 2
"""How often a trial may be stopped early."""

MIN_EPOCHS: Final = 2
"""Epochs before a trial may be stopped early. After one, with the learning rate just risen and the average of the
weights still young, 21 of 40 trials of `cnn` on 3,903 photographs lay within 0.01 of the log loss of chance."""

NUM_RANDOM: Final = 10
"""Trials that are drawn at random before Optuna learns from them: its own default."""

_RESEED: Final = 1_000_003
"""A search that goes on draws other settings than the ones that it began with."""


def run(
    config: TuneConfig,
    base: ResolvedTrainConfig,
    space: Space,
    info: DatasetInfo,
    journal: Journal,
    on_finished: Callable[[], None],
) -> None:
    """Run the trials that are left, and write what becomes of each into the journal.

    Args:
        config: how long to search.
        base: the training that the trials vary.
        space: what they vary.
        info: the dataset.
        journal: knows the trials of earlier runs.
        on_finished: is called whenever a trial has come to its end.

    Raises:
        ClaimLostError: another run has taken over the output.
        StorageError: a storage kept failing.
        TrainingError: the cluster cannot hold a trial.
    """
    num_left = config.num_trials - sum(trial.status in FINISHED for trial in journal.trials)
    clock = Clock(journal, config.max_hours)
    if clock.is_over():
        return
    capacity = _capacity(config)
    assignment = _assignment(base, space, info)
    scribe = _Scribe(journal, clock, base.epochs, on_finished)
    with scratch.directory("tune") as bookkeeping, _quiet_tune():
        tuner = ray.tune.Tuner(
            ray.tune.with_resources(
                ray.tune.with_parameters(Trainable, assignment=assignment),
                {"CPU": config.cpus_per_trial, **({"GPU": 1} if config.use_gpu else {})},
            ),
            tune_config=ray.tune.TuneConfig(
                search_alg=_searcher(config, base, space, journal),
                scheduler=_scheduler(base, journal),
                num_samples=num_left,
                max_concurrent_trials=min(capacity, num_left),
                reuse_actors=True,  # each new process imports TensorFlow
            ),
            run_config=ray.tune.RunConfig(
                name="search",
                storage_path=bookkeeping,
                callbacks=[scribe],
                verbose=0,
                stop=_HoursAreOver(clock),
                checkpoint_config=ray.tune.CheckpointConfig(checkpoint_at_end=False),
            ),
        )
        try:
            tuner.fit()
        except ray.tune.TuneError as error:
            ours = next((cause for cause in ray_internals.causes(error) if isinstance(cause, CatdogError)), None)
            raise (ours or error) from error
    for trial in journal.unfinished:  # the hours were over
        journal.write(dataclasses.replace(trial, status="cut", finished_s=clock.now_s()))


class Clock:
    """Seconds of searching, over all runs of the command."""

    def __init__(self, journal: Journal, max_hours: float | None) -> None:
        self._before_s = max((trial.seen_s for trial in journal.trials), default=0.0)
        self._started = time.monotonic()
        self._limit_s = math.inf if max_hours is None else 3600 * max_hours

    def now_s(self) -> float:
        """Seconds since the search began, without those in which it did not run."""
        return round(self._before_s + time.monotonic() - self._started, 1)

    def is_over(self) -> bool:
        """Whether the hours are over."""
        return self.now_s() >= self._limit_s


class _HoursAreOver(ray.tune.Stopper):  # type: ignore[misc]
    """Ends the search when its hours are over."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    def __call__(self, _trial_id: str, _result: dict[str, Any]) -> bool:
        """No single trial ends by the clock."""
        return False

    def stop_all(self) -> bool:
        """Whether no trial may go on."""
        return self._clock.is_over()


class _Scribe(ray.tune.Callback):  # type: ignore[misc]
    """Writes down in the journal, on the driver, what becomes of every trial."""

    def __init__(self, journal: Journal, clock: Clock, num_epochs: int, on_finished: Callable[[], None]) -> None:
        self._journal, self._clock, self._num_epochs = journal, clock, num_epochs
        self._on_finished = on_finished
        unfinished = [trial.number for trial in journal.unfinished]
        new = itertools.count(max((trial.number for trial in journal.trials), default=-1) + 1)
        self._numbers = itertools.chain(unfinished, new)
        """For the trials in the order in which they are suggested: first those that an earlier run left unfinished."""

        self._number_of: dict[str, int] = {}
        self._of: dict[str, Trial] = {}
        """Ray Tune's id of a trial → the trial, once it has started."""

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Ray Tune saves a copy of the search for itself, which nobody reads."""
        return {}

    def on_trial_start(self, trials: list[Any], trial: Any, **_: Any) -> None:
        """Note the trial. Of two that begin together, the second may start first; the numbers do not depend on that."""
        for each in trials:
            if each.trial_id not in self._number_of:
                self._number_of[each.trial_id] = next(self._numbers)
        number = self._number_of[trial.trial_id]
        self._note(trial, Trial(number=number, params=dict(trial.config), started_s=self._clock.now_s()))

    def on_trial_result(self, trial: Any, result: dict[str, Any], **_: Any) -> None:
        """Note an epoch."""
        known = self._of[trial.trial_id]
        row = {name: result[name] for name in ("epoch", "train_loss", METRIC, "val_accuracy")}
        row["at_s"] = self._clock.now_s()
        self._note(trial, dataclasses.replace(known, epochs=[*known.epochs, row]))
        logger.info(
            "Trial %d, epoch %d/%d: validation log loss %.4f, accuracy %s",
            known.number,
            row["epoch"],
            self._num_epochs,
            row[METRIC],
            percent(row["val_accuracy"]),
        )

    def on_trial_complete(self, trial: Any, **_: Any) -> None:
        """Note that the trial has come to its end, or was stopped."""
        known = self._of[trial.trial_id]
        num_epochs = len(known.epochs)
        status: Status = "ok" if num_epochs == self._num_epochs else "stopped"
        self._note(trial, dataclasses.replace(known, status=status, finished_s=self._clock.now_s()))
        logger.info("Trial %d is done: %s after %s", known.number, status, plural(num_epochs, "epoch"))

    def on_trial_error(self, trials: list[Any], trial: Any, **_: Any) -> None:
        """Note why the trial failed."""
        known = self._of.get(trial.trial_id)
        if known is None:  # its process did not even start
            self.on_trial_start(trials, trial)
            known = self._of[trial.trial_id]
        text = _reason(trial.pickled_error_file)
        self._note(trial, dataclasses.replace(known, status="error", finished_s=self._clock.now_s(), error=text))
        logger.warning("Trial %d failed: %s", known.number, text)

    def _note(self, trial: Any, known: Trial) -> None:
        self._of[trial.trial_id] = known
        self._journal.write(known)
        if known.status != "running":
            self._on_finished()


def _reason(pickled_error: str | None) -> str:
    """Why a trial failed, in one line.

    Args:
        pickled_error: the file where Ray Tune has put what the trial raised.
    """
    if pickled_error is None or not os.path.exists(pickled_error):
        return "Ray Tune does not say why"
    error = pickle.loads(Path(pickled_error).read_bytes())  # noqa: S301 - our own process wrote it
    chain = list(ray_internals.causes(error))
    if ray_internals.is_out_of_memory(error):
        return "memory ran out"
    if any(isinstance(cause, ray.exceptions.RayActorError) for cause in chain):
        return "the process of the trial died"
    ours = [cause for cause in chain if isinstance(cause, CatdogError)]
    return provenance.redact(provenance.one_line((ours or chain)[-1]))


@contextlib.contextmanager
def _quiet_tune() -> Iterator[None]:
    """Keep Ray Tune from writing and printing logs of its own, and from catching Ctrl-C: it ends every command."""
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # failures are ours to tell
    values = {
        "RAY_AIR_NEW_OUTPUT": "0",
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
        "TUNE_DISABLE_SIGINT_HANDLER": "1",
        "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    }
    kept = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in kept.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _capacity(config: TuneConfig) -> int:
    """How many trials may run at the same time.

    Raises:
        TrainingError: the cluster cannot hold a single one.
    """
    nodes = ray_internals.all_resources()
    room = sum(
        min(num_cpus // config.cpus_per_trial, num_gpus if config.use_gpu else num_cpus) for num_cpus, num_gpus in nodes
    )
    if room == 0:
        wanted = plural(config.cpus_per_trial, "CPU") + (" and a GPU" if config.use_gpu else "")
        sizes = "; ".join(f"{num_cpus} CPUs, {num_gpus} GPUs" for num_cpus, num_gpus in nodes)
        raise TrainingError(f"the cluster must have a node with {wanted} for a trial. Received: nodes with {sizes}")
    if cluster_address(config.ray_address) is None:  # an embedded Ray counts more CPUs than there are cores
        return max(1, min(room, hardware.num_cores() // config.cpus_per_trial))
    return room


def _assignment(base: ResolvedTrainConfig, space: Space, info: DatasetInfo) -> Assignment:
    weights = fetch_start(base)
    return Assignment(
        base=base,
        sources=_sources(_image_sizes(base, space), info),
        weights=None if weights is None else ray.put(weights),
        class_weights=class_weights(base, info),
    )


def _image_sizes(base: ResolvedTrainConfig, space: Space) -> list[int]:
    """Every image size that a trial may have."""
    where = space.get("image_size")
    if where is None:
        return [base.image_size]
    if isinstance(where, Choices):
        return sorted(int(size) for size in where.choices)
    return list(range(int(where.min), int(where.max) + 1))


def _sources(sizes: list[int], info: DatasetInfo) -> Mapping[int, tuple[Source, Source]]:
    """The splits `train` and `val` in every size: in memory, where all of them fit there at once."""
    num_images = info.num_images("train") + info.num_images("val")
    side = math.ceil(math.sqrt(sum(size**2 for size in sizes)))  # of an image as large as all sizes together
    in_memory = decoding.fits_in_memory(num_images, side, ray.nodes())
    if not in_memory:
        logger.info("The images are streamed: decoded, they do not fit in the object store of every node")
    return {size: decoding.sources(info, size, in_memory=in_memory) for size in sizes}


def _distributions(space: Space) -> dict[str, Any]:
    """The space in Optuna's words."""
    found: dict[str, Any] = {}
    for name, where in space.items():
        if isinstance(where, Choices):
            found[name] = optuna.distributions.CategoricalDistribution(where.choices)
        elif SETTINGS[name] is int:
            found[name] = optuna.distributions.IntDistribution(int(where.min), int(where.max), log=where.log)
        else:
            found[name] = optuna.distributions.FloatDistribution(where.min, where.max, log=where.log)
    return found


def _searcher(config: TuneConfig, base: ResolvedTrainConfig, space: Space, journal: Journal) -> OptunaSearch:
    """Optuna's sampler, which has been told of the trials of earlier runs.

    It suggests first what an earlier run left unfinished, or else the recipe itself: what is best is at least as good.
    """
    known = [trial for trial in journal.trials if trial.status in FINISHED]
    first = [trial.params for trial in journal.unfinished]
    if not journal.trials and (start := start_of(base, space)) is not None:
        first = [start]
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # `multivariate` and `constant_liar`
        sampler = optuna.samplers.TPESampler(
            seed=(config.seed + _RESEED * len(journal.trials)) % 2**32,
            n_startup_trials=min(NUM_RANDOM, max(3, config.num_trials // 3)),
            multivariate=True,
            constant_liar=True,  # trials that run at the same time are to differ
        )
    searcher = OptunaSearch(_distributions(space), metric=METRIC, mode="min", points_to_evaluate=first, sampler=sampler)
    for trial in known:
        last = trial.last
        is_failed = trial.status == "error" or last is None
        searcher.add_evaluated_point(trial.params, math.nan if last is None else last[METRIC], error=is_failed)
    return searcher


@dataclasses.dataclass(frozen=True)
class _Earlier:
    """A trial of an earlier run, as far as a scheduler asks."""

    trial_id: str


def _scheduler(base: ResolvedTrainConfig, journal: Journal) -> ASHAScheduler:
    """ASHA, which has seen the epochs of the trials of earlier runs."""
    scheduler = ASHAScheduler(
        time_attr="epoch",
        metric=METRIC,
        mode="min",
        max_t=base.epochs,
        grace_period=min(base.epochs, max(MIN_EPOCHS, base.epochs // REDUCTION**NUM_RUNGS)),
        reduction_factor=REDUCTION,
    )
    for trial in journal.trials:
        if trial.status in FINISHED:
            earlier = _Earlier(f"earlier-{trial.number}")
            scheduler.on_trial_add(None, earlier)
            for row in trial.epochs:
                scheduler.on_trial_result(None, earlier, row)
    return scheduler
