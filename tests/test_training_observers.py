"""What watches a training: that it is told everything, writes what it should, and can disturb nothing."""

import functools
import inspect
import logging
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from catdog.errors import StorageError
from catdog.training import observers, recorder
from catdog.training.history import history_files
from catdog.training.observers import Observer, ObserverFactory, Observers, Tick, WorkerInfo
from catdog.training.recorder import Background, Recorder

TICK = Tick(epoch=2, num_epochs=3, step=4, steps_per_epoch=5, loss=0.25, images_per_s=1234.5, eta_s=4000)
EVENTS: dict[str, Any] = {
    "started": 1,
    "stepped": 2,
    "ticked": TICK,
    "saving": 3,
    "saved": 3,
    "epoch_done": [{"epoch": 1.0}],
    "finishing": None,
    "close": None,
}
"""Every event, with what it tells."""


def worker(output: Path | str = "-") -> WorkerInfo:
    return WorkerInfo(rank=0, num_workers=1, output=str(output))


def history(num_epochs: int) -> list[dict[str, float]]:
    names = ("train_loss", "train_accuracy", "val_loss", "val_accuracy")
    return [{"epoch": float(epoch), **dict.fromkeys(names, 1 / epoch)} for epoch in range(1, num_epochs + 1)]


def tell_all(observer: Observer) -> None:
    for name, argument in EVENTS.items():
        getattr(observer, name)(*([] if argument is None else [argument]))


class Listener(Observer):
    """Keeps what it is told."""

    def __init__(self, told: list[tuple[str, Any]]) -> None:
        for name in EVENTS:
            setattr(self, name, functools.partial(self._keep, told, name))

    @staticmethod
    def _keep(told: list[tuple[str, Any]], name: str, argument: Any = None) -> None:
        told.append((name, argument))


class Broken(Observer):
    """Fails at every event."""

    def __init__(self, worker: WorkerInfo) -> None:
        for name in EVENTS:
            setattr(self, name, self._fail)

    @staticmethod
    def _fail(*arguments: Any) -> None:
        raise StorageError("the disk must\nhave space")


def test_every_event_reaches_every_observer_and_one_by_itself_does_nothing() -> None:
    methods = {name for name, _ in inspect.getmembers(Observer, inspect.isfunction) if not name.startswith("_")}
    assert methods == set(EVENTS)
    first: list[tuple[str, Any]] = []
    second: list[tuple[str, Any]] = []
    tell_all(Observers([lambda _: Listener(first), lambda _: Observer(), lambda _: Listener(second)], worker()))
    assert first == second == list(EVENTS.items())


def test_an_observer_that_fails_is_told_on_and_logged_once_and_disturbs_nobody(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def broken_factory(_worker: WorkerInfo) -> Observer:
        raise ValueError("no such board")

    told: list[tuple[str, Any]] = []
    factories: list[ObserverFactory] = [functools.partial(broken_factory), Broken, Broken, lambda _: Listener(told)]
    tell_all(Observers(factories, worker()))
    assert told == list(EVENTS.items())
    assert caplog.messages == [
        "broken_factory failed; the training goes on: no such board",
        "Broken failed; the training goes on: the disk must have space",
        "Broken failed; the training goes on: the disk must have space",
    ]


def test_an_interrupt_is_no_failure_of_an_observer() -> None:
    class Interrupted(Observer):
        def stepped(self, step: int) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Observers([lambda _: Interrupted()], worker()).stepped(1)


def test_a_tick_is_one_line() -> None:
    assert str(TICK) == "Epoch 2/3, step 4/5: loss 0.2500; 1,234 images/s, 67 min left"
    assert TICK.steps_done == 9


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (89, "89 s"), (95, "2 min"), (5000, "83 min"), (11_100, "3 h 05 min")]
)
def test_durations_are_short(seconds: float, text: str) -> None:
    assert observers.duration(seconds) == text


# The recorder.


def published(output: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in output.iterdir() if path.is_file()}


@pytest.mark.slow
def test_the_history_its_curves_and_tensorboards_events_are_there_while_the_training_goes_on(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    observer = Recorder(worker(tmp_path))
    for num_epochs in (1, 2):
        observer.ticked(TICK)
        observer.epoch_done(history(num_epochs))
        observer.finishing()
        assert published(tmp_path) == history_files(history(num_epochs))
    observer.ticked(TICK)
    observer.close()
    events = EventAccumulator(str(tmp_path / recorder.TENSORBOARD_DIRECTORY))
    events.Reload()
    steps = {tag: [event.step for event in events.Tensors(tag)] for tag in events.Tags()["tensors"]}
    assert steps["epoch/val_loss"] == [1, 2]
    assert steps["train/images_per_s"] == [9, 9, 9]
    assert len(list((tmp_path / recorder.TENSORBOARD_DIRECTORY).iterdir())) == 1


@pytest.mark.slow
def test_an_upload_that_fails_is_logged_once_and_tried_again_at_the_next_event(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    in_the_way = tmp_path / recorder.TENSORBOARD_DIRECTORY
    in_the_way.write_text("no directory")
    watching = Observers([Recorder], worker(tmp_path))
    for num_epochs in (1, 2):
        watching.epoch_done(history(num_epochs))
        watching.finishing()
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert caplog.messages[0].startswith(f"Recorder failed; the training goes on: {in_the_way}/")
    in_the_way.unlink()
    watching.epoch_done(history(3))
    watching.close()
    assert len(caplog.messages) == 1
    assert len(list(in_the_way.iterdir())) == 1


class SlowFileSystem(MemoryFileSystem):  # type: ignore[misc]
    """A storage that writes nothing until it is let."""

    protocol = "slow"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    answers = threading.Event()

    @classmethod
    def _strip_protocol(cls, path: str) -> Any:
        return super()._strip_protocol(path.replace("slow://", "memory://"))

    def pipe_file(self, *arguments: Any, **options: Any) -> Any:
        self.answers.wait(60)
        return super().pipe_file(*arguments, **options)


def files_of(storage: SlowFileSystem) -> dict[str, bytes]:
    names = ("history.csv", "curves.png")
    return {name: storage.cat_file(f"/model/{name}") for name in names if storage.exists(f"/model/{name}")}


@pytest.fixture
def slow_storage() -> Iterator[type[SlowFileSystem]]:
    fsspec.register_implementation("slow", SlowFileSystem, clobber=True)
    yield SlowFileSystem
    SlowFileSystem.answers.set()


@pytest.mark.slow
def test_a_slow_storage_holds_up_no_step_and_gets_the_latest_history_in_the_end(
    slow_storage: type[SlowFileSystem], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(recorder, "PATIENCE_S", 0.2)
    watching = Observers([Recorder], worker("slow://model"))
    started = time.monotonic()
    for num_epochs in range(1, 6):
        watching.epoch_done(history(num_epochs))
    assert time.monotonic() - started < 5
    watching.finishing()
    assert caplog.messages == [
        "Recorder failed; the training goes on: an upload must end within 0.2 s. Received: one that takes longer"
    ]
    # What was begun first is published late, and after that what is true at the end.
    slow_storage.answers.set()
    expected = history_files(history(5))
    deadline = time.monotonic() + 60
    while files_of(slow_storage()) != expected and time.monotonic() < deadline:
        time.sleep(0.05)
    assert files_of(slow_storage()) == expected
    watching.close()
    assert len(caplog.messages) == 1


def test_requests_that_come_while_a_call_runs_are_answered_by_one_more_call() -> None:
    calls: list[float] = []
    goes_on = threading.Event()

    def call() -> None:
        calls.append(time.monotonic())
        goes_on.wait(60)

    background = Background(call)
    background.request()
    while not calls:
        time.sleep(0.001)
    for _ in range(100):
        background.request()
    with pytest.raises(StorageError, match=r"^an upload must end within 0\.05 s\. Received: one that takes longer$"):
        background.wait(0.05)
    goes_on.set()
    background.close(60)
    assert len(calls) == 2
