"""The private names of Ray that catdog uses are still there, and mean what they did. On a real Ray."""

import logging
import signal
import traceback
from collections.abc import Iterator
from typing import Any

import pytest
import ray
import ray.data
import ray.train
from ray_case import small_ray

from catdog import ray_internals

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def ray_of_this_module() -> Iterator[None]:
    with small_ray(num_cpus=2):
        yield


def moved(name: str) -> str:
    return f"ray {ray.__version__} moved {name}: mend catdog/ray_internals.py"


@pytest.mark.parametrize("name", ray_internals.NAMES)
def test_this_version_of_ray_has_the_private_name(name: str) -> None:
    assert ray_internals.find(name) is not None, moved(name)


def test_a_name_that_is_gone_is_nothing_and_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    for name in ("ray.train.v9._internal.Thing", "ray.train.Thing", "ray.train.tensorflow.TensorflowTrainer._thing"):
        for _ in range(2):
            assert ray_internals.find(name) is None
        assert caplog.messages == [f"ray {ray.__version__} has no {name}: catdog does without"]
        caplog.clear()


def made_trainer() -> Any:
    scaling = ray.train.ScalingConfig(num_workers=1)
    return ray_internals.tensorflow_trainer(lambda: None, scaling_config=scaling)


def callback_names(trainer: Any) -> set[str]:
    return {type(callback).__name__ for callback in trainer._create_default_callbacks()}


def test_the_trainer_has_no_callback_without_work() -> None:
    names = callback_names(made_trainer())
    assert "BackendSetupCallback" in names, moved(ray_internals.DEFAULT_CALLBACKS)
    for name in (ray_internals.DATASETS_CALLBACK, ray_internals.CLEANER_CALLBACK):
        assert name.rpartition(".")[2] not in names, moved(name)


def test_with_a_dashboard_the_trainer_has_the_callback_that_asks_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_OVERRIDE_DASHBOARD_URL", "127.0.0.1:8265")
    name = ray_internals.CLEANER_CALLBACK.rpartition(".")[2]
    assert name in callback_names(made_trainer()), moved(ray_internals.DASHBOARD_URL)


def test_the_trainer_leaves_ctrl_c_alone() -> None:
    before = signal.getsignal(signal.SIGINT)
    made_trainer()._register_sigint_handler(None)
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("constant", ["SIGINT_HANDLER", "DEFAULT_CALLBACKS", "DATASETS_CALLBACK", "DASHBOARD_URL"])
def test_without_a_private_name_the_trainer_is_rays_own(monkeypatch: pytest.MonkeyPatch, constant: str) -> None:
    monkeypatch.setattr(ray_internals, constant, f"ray.train.gone.{constant}")
    assert "BackendSetupCallback" in callback_names(made_trainer())


def test_a_lost_worker_is_told_from_one_that_failed() -> None:
    health_check_error = ray_internals.find(ray_internals.HEALTH_CHECK_ERROR)
    assert health_check_error is not None
    died = health_check_error("A worker health check failed.", ray.exceptions.ActorDiedError())
    assert ray_internals.is_lost_worker(died), moved(f"{ray_internals.HEALTH_CHECK_ERROR}.health_check_failure")
    assert not ray_internals.is_lost_worker(health_check_error("Slow.", ray.exceptions.GetTimeoutError()))
    assert not ray_internals.is_lost_worker(ValueError("mine"))


def test_a_worker_that_was_killed_for_memory_is_told_from_one_that_was_killed() -> None:
    health_check_error = ray_internals.find(ray_internals.HEALTH_CHECK_ERROR)
    assert health_check_error is not None
    low = ray.exceptions.OutOfMemoryError("1 worker(s) were killed due to the node running low on memory.")
    said = ray.exceptions.ActorDiedError()
    said.error_msg = "Task was killed due to the node running low on memory."
    # What Ray says of whatever process is gone.
    usual = ray.exceptions.ActorDiedError()
    usual.error_msg = (
        "Some common causes include: (1) the process was killed by the OOM killer due to high memory usage"
    )
    for cause, is_memory in ((low, True), (said, True), (usual, False), (ValueError("mine"), False)):
        for failure in (cause, health_check_error("A worker health check failed.", cause)):
            group = ray.train.WorkerGroupError("Training failed", {0: ValueError("another"), 1: failure})
            assert ray_internals.is_out_of_memory(group) is is_memory, (cause, failure)


def test_the_error_that_a_worker_raised_is_found_in_what_ray_wraps_it_in() -> None:
    user_error = ray_internals.find(ray_internals.USER_ERROR)
    assert user_error is not None
    ours = ValueError("ours")
    task_error = ray.exceptions.RayTaskError("train_loop", "Traceback", ours)
    try:
        raise RuntimeError("around") from ours
    except RuntimeError as error:
        around = error
        text = traceback.format_exc()
    for wrapped, name in (
        (user_error(ours, traceback_str=text), f"{ray_internals.USER_ERROR}._base_exc"),
        (user_error(task_error, traceback_str=text), f"{ray_internals.USER_ERROR}._base_exc"),
        (task_error, "ray.exceptions.RayTaskError.cause"),
        (around, "Python's __cause__"),
    ):
        assert list(ray_internals.causes(wrapped))[-1] is ours, moved(name)


def test_ray_data_is_quiet(caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]) -> None:
    caplog.set_level(logging.INFO)
    ray_internals.quiet_ray_data(ray.data.DataContext.get_current())
    assert logging.getLogger("ray.data._internal.progress").level == logging.ERROR, moved(ray_internals.PROGRESS_LOGGER)
    assert sorted(row["id"] for row in ray.data.range(3).map(lambda row: row).take_all()) == [0, 1, 2]
    assert [record.getMessage() for record in caplog.records if record.name.startswith("ray.data")] == []
    assert capfd.readouterr() == ("", "")
