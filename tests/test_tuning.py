"""Whole searches on a real Ray, with trainings of a second each."""

import dataclasses
import io
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from dataset_case import Row, row_of, write_splits
from PIL import Image
from ray_case import small_ray

from catdog import bundle, cli, drawings, schema, storage
from catdog.config import TuneConfig
from catdog.errors import OutputClaimedError, OutputRefusedError, TrainingError, UsageError
from catdog.tuning import TuneRecord, trials, tune
from catdog.tuning.journal import Journal, Trial, best_of

pytestmark = pytest.mark.slow

SMALL: dict[str, Any] = {"arch": "cnn", "image_size": 46, "batch_size": 16, "epochs": 3}
TINTS = {"cat": (255, 160, 60), "dog": (60, 160, 255)}


@pytest.fixture(scope="module", autouse=True)
def ray_of_this_module() -> Iterator[None]:
    with small_ray(num_cpus=3):
        yield


def tinted(label: str, index: int) -> Row:
    """A drawing in the colour of its class, which a network learns in a few steps."""
    drawing = drawings.draw(label, [index]).convert("RGB").resize((64, 64))
    data = io.BytesIO()
    Image.blend(drawing, Image.new("RGB", drawing.size, TINTS[label]), 0.6).save(data, "JPEG", quality=90)
    return row_of(data.getvalue(), f"{label}.{index}.jpg", int(label == "dog"))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> str:
    rows = [tinted(label, index) for index in range(80) for label in TINTS]
    return write_splits(str(tmp_path_factory.mktemp("data")), {"train": [rows[:112]], "val": [rows[112:]]})


def written(directory: Path, text: str) -> str:
    path = directory / "space.toml"
    path.write_text(text)
    return str(path)


def config(dataset: str, output: Path, space: str, **changes: Any) -> TuneConfig:
    return TuneConfig(data=dataset, output=str(output), space=space, **({"num_trials": 2} | SMALL | changes))


def journal_of(output: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in sorted((output / "trials").glob("*.json"))}


def table_of(output: Path) -> list[dict[str, Any]]:
    table = pq.read_table(output / "trials.parquet")
    assert table.schema.equals(schema.TRIALS_SCHEMA, check_metadata=True)
    rows: list[dict[str, Any]] = table.to_pylist()
    return rows


@dataclasses.dataclass(frozen=True)
class Searched:
    """A search that is done."""

    config: TuneConfig
    record: TuneRecord
    output: Path


@pytest.fixture(scope="module")
def searched(dataset: str, tmp_path_factory: pytest.TempPathFactory) -> Searched:
    """Of nearly six orders of magnitude only the last is of use, and the recipe's own 1e-3 lies outside."""
    root = tmp_path_factory.mktemp("search")
    space = written(root, "[learning_rate]\nmin = 1e-9\nmax = 5e-4\nlog = true")
    chosen = config(dataset, root / "out", space, num_trials=10, seed=1)
    return Searched(chosen, tune(chosen), root / "out")


def test_a_search_finds_the_learning_rate_that_is_of_use(searched: Searched) -> None:
    rows = table_of(searched.output)
    useful = [row for row in rows if row["learning_rate"] > 5e-5]
    assert 0 < len(useful) < len(rows) == 10
    best = min((row for row in rows if row["status"] == "ok"), key=lambda row: row["val_log_loss"])
    assert best in useful
    assert best["val_accuracy"] > 0.95
    assert searched.record.best == best
    assert searched.record.recipe is None
    assert all(row["val_accuracy"] < 0.8 for row in rows if row["learning_rate"] < 1e-6)
    assert {row["image_size"] for row in rows} == {46}
    assert {row["depth"] for row in rows} == {None}


def test_a_search_stops_early_what_falls_behind(searched: Searched) -> None:
    rows = table_of(searched.output)
    assert {row["status"] for row in rows} == {"ok", "stopped"}
    assert {row["epochs"] for row in rows if row["status"] == "stopped"} == {trials.MIN_EPOCHS}
    assert searched.record.trials["stopped"] == sum(row["status"] == "stopped" for row in rows)


def test_a_search_leaves_a_record_and_a_page(searched: Searched) -> None:
    record = json.loads((searched.output / "tune.json").read_text())
    assert record == searched.record.to_dict()
    assert "The best of 10 trials" in (searched.output / "tune.html").read_text()
    name, invocation = cli.parse(shlex.split(record["command_line"])[1:])
    assert name == "train"
    assert invocation.config.learning_rate == searched.record.best["learning_rate"]
    lines = searched.record.summary()
    assert lines[0].startswith("Tried 10 settings of cnn in ")
    assert lines[-1] == f"Search: {searched.output}"


def test_a_search_that_is_done_goes_on_with_more_trials_and_the_best_is_trained_as_its_trial_was(
    searched: Searched,
) -> None:
    before = journal_of(searched.output)
    again = tune(dataclasses.replace(searched.config, num_trials=11, train_best=True))
    after = journal_of(searched.output)
    assert len(after) == 11
    assert {name: after[name] for name in before} == before
    assert again.resumed
    assert len({json.loads(text)["params"]["learning_rate"] for text in after.values()}) == 11
    model = bundle.load(str(searched.output / "model"))
    assert model.model_id == again.model_id
    assert model.card["metrics"]["val_accuracy"] == again.best["val_accuracy"]
    assert model.card["training_config"]["learning_rate"] == again.best["learning_rate"]


def test_a_failure_is_a_row_and_the_search_goes_on(dataset: str, tmp_path: Path) -> None:
    space = written(tmp_path, "[learning_rate]\nchoices = [1e-3, 1e37]")
    record = tune(config(dataset, tmp_path / "out", space, num_trials=4))
    rows = table_of(tmp_path / "out")
    failed = [row for row in rows if row["status"] == "error"]
    assert record.trials["error"] == len(failed) > 0
    assert {row["learning_rate"] for row in failed} == {1e37}
    assert all(row["error"].startswith("the loss must stay finite; ") for row in failed)
    assert record.best["learning_rate"] == 1e-3
    assert record.recipe == rows[0]  # the recipe is the first trial


def test_a_search_whose_trials_all_fail_has_failed(dataset: str, tmp_path: Path) -> None:
    failing = config(dataset, tmp_path / "out", written(tmp_path, "[learning_rate]\nchoices = [1e37]"), num_trials=1)
    for _ in range(2):  # a failed trial is not repeated
        rule = r"^a trial must come to a result\. Received: 1 failure: the loss must stay finite; "
        with pytest.raises(TrainingError, match=rule):
            tune(failing)
        assert [row["status"] for row in table_of(tmp_path / "out")] == ["error"]
    assert not (tmp_path / "out" / "tune.json").exists()


def test_a_trial_that_is_cut_by_the_hours_is_done_later(
    dataset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    long = config(dataset, output, written(tmp_path, "[weight_decay]\nmin = 0\nmax = 0.1"), epochs=25)
    with pytest.raises(TrainingError, match=r"^--max-hours must suffice for an epoch of a trial\. Received: --max-h"):
        tune(dataclasses.replace(long, max_hours=1e-9))
    with monkeypatch.context() as patch:
        patch.setattr(trials.Clock, "is_over", lambda _: any(len(t.epochs) > 1 for t in Journal(str(output)).trials))
        record = tune(long)
    assert record.trials["cut"] > 0
    assert record.best["epochs"] < 25
    cut = {trial.number: trial.params for trial in Journal(str(output)).trials}
    record = tune(long)
    assert record.trials == {"ok": 2, "stopped": 0, "cut": 0, "error": 0} or record.trials["stopped"] == 1
    done = {trial.number: trial.params for trial in Journal(str(output)).trials}
    assert {number: done[number] for number in cut} == cut


def command(tuned: TuneConfig) -> list[str]:
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in vars(tuned).items() if value is not None]
    switches = [flag for flag in flags if not flag.endswith("=False")]
    return [sys.executable, "-c", "import sys; from catdog.cli import main; sys.exit(main())", "tune", *switches]


def ended_by(number: signal.Signals, tuned: TuneConfig, is_time: Callable[[list[Trial]], bool]) -> int:
    """Start a search, and send it a signal when it is time; its exit code."""
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    with subprocess.Popen(command(tuned), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment) as driver:
        deadline = time.monotonic() + 120
        while not is_time(Journal(tuned.output).trials):
            assert driver.poll() is None, driver.stderr.read() if driver.stderr else ""
            assert time.monotonic() < deadline
            time.sleep(0.05)
        driver.send_signal(number)
        return driver.wait(60)


def test_a_search_that_is_terminated_and_killed_goes_on_and_repeats_no_finished_trial(
    dataset: str, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    space = written(tmp_path, "[learning_rate]\nmin = 1e-4\nmax = 1e-2\nlog = true")
    tuned = config(dataset, output, space, num_trials=6, epochs=8)

    def finished(found: list[Trial]) -> list[Trial]:
        return [trial for trial in found if trial.status != "running"]

    assert ended_by(signal.SIGTERM, tuned, lambda found: len(finished(found)) >= 1) == cli.EXIT_TERMINATED
    first = len(finished(Journal(str(output)).trials))
    assert 1 <= first < 6
    assert ended_by(signal.SIGKILL, tuned, lambda found: len(finished(found)) > first) == -signal.SIGKILL
    killed = Journal(str(output)).trials
    assert first < len(finished(killed)) < 6
    before = journal_of(output)
    record = tune(tuned)
    assert sum(record.trials.values()) == 6
    assert [row["trial"] for row in table_of(output)] == list(range(6))
    after = journal_of(output)
    for trial in killed:
        name = f"{trial.number:05}.json"
        if trial.status == "running":  # it is begun again, with its own settings
            assert json.loads(after[name])["params"] == trial.params
        else:
            assert after[name] == before[name]


def test_what_cannot_be_searched_is_refused_before_anything_is_written(dataset: str, tmp_path: Path) -> None:
    output = tmp_path / "out"
    wide = config(dataset, output, written(tmp_path, "[batch_size]\nchoices = [16, 1000]"), batch_size=None)
    with pytest.raises(UsageError, match=r"^--batch-size must be at most the number of training images, 112\. "):
        tune(wide)
    assert not output.exists()
    output.mkdir()
    (output / "thesis.txt").write_text("mine")
    with pytest.raises(OutputRefusedError, match=r"^--output must be empty, .*, which holds thesis\.txt$"):
        tune(config(dataset, output, written(tmp_path, "[batch_size]\nchoices = [8, 16]"), batch_size=None))
    assert [path.name for path in output.iterdir()] == ["thesis.txt"]


def test_another_search_and_a_second_run_are_refused(searched: Searched, tmp_path: Path) -> None:
    before = journal_of(searched.output)
    for changes, text in (
        ({"epochs": 4}, "epochs=3 instead of 4"),
        ({"space": written(tmp_path, "[learning_rate]\nmin = 1e-9\nmax = 9")}, "another space"),
    ):
        with pytest.raises(OutputRefusedError, match=rf"^--output must be empty, or hold a search with .* {text}$"):
            tune(dataclasses.replace(searched.config, **changes))
    with storage.claimed(str(searched.output), "tune"), pytest.raises(OutputClaimedError):
        tune(searched.config)
    assert journal_of(searched.output) == before


def test_the_best_is_one_that_trained_to_the_end() -> None:
    def trial(number: int, status: Any, *losses: float) -> Trial:
        rows = [{"epoch": index + 1.0, "val_log_loss": loss, "at_s": 1.0} for index, loss in enumerate(losses)]
        return Trial(number=number, params={}, status=status, epochs=rows, started_s=0.0)

    found = [trial(0, "ok", 0.5, 0.4), trial(1, "stopped", 0.1), trial(2, "error", 0.2), trial(3, "ok", 0.3, 0.45)]
    assert best_of(found) == found[0]
    assert best_of(found[1:3]) == found[1]
    assert best_of([found[2], trial(4, "cut")]) is None
