"""`predict --use-gpu`, on machines that have no GPU: nodes that say they have one, and a TensorFlow that finds none."""

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pytest
import tensorflow as tf
from inference_case import answers, archive, descendants
from ray_case import joined_node, small_ray

from catdog import cli
from catdog.config import PredictConfig
from catdog.inference import RunRecord, predict
from catdog.inference.plan import planner

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(tf.config.list_physical_devices("GPU")), reason="this machine has a GPU"),
]

NUM_MEMBERS = 600

PRETENDED = """
import catdog.hardware

configure = catdog.hardware.configure_tensorflow
catdog.hardware.configure_tensorflow = lambda **settings: configure(**settings | {"use_gpu": False})
"""
"""What a Python runs that is to take the CPU for a GPU."""


@pytest.fixture(scope="module", autouse=True)
def ray_of_this_module() -> Iterator[None]:
    with small_ray(num_cpus=2):
        yield


def error_lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]


def test_without_a_gpu_use_gpu_is_an_error(tmp_path: Path, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    images, output = archive(tmp_path / "train.zip", 3), tmp_path / "out"
    flags = ["--images", str(images), "--output", str(output), "--model", model, "--use-gpu"]
    assert cli.main(["predict", *flags, "--executor", "inline"]) == 2
    (error,) = error_lines(capsys)
    assert error.startswith("error: --use-gpu needs a GPU, its driver, and CUDA's libraries")
    assert "Received: TensorFlow finds no GPU on " in error
    assert not list(output.glob("part-*"))


def test_a_node_that_only_says_that_it_has_a_gpu_is_an_error(
    tmp_path: Path, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    images, output = archive(tmp_path / "train.zip", 3), tmp_path / "out"
    flags = ["--images", str(images), "--output", str(output), "--model", model, "--use-gpu", "--executor", "ray"]
    with joined_node(1, num_gpus=1):
        assert cli.main(["predict", *flags]) == 2
    (error,) = error_lines(capsys)
    assert "Received: TensorFlow finds no GPU on " in error
    assert not list(output.glob("part-*"))


def test_actors_go_where_gpus_are_and_one_to_each(tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The node that joins has two GPUs. The first node has CPUs, and no GPU."""
    monkeypatch.setattr(planner, "SLICE_SIZE", 50)
    (tmp_path / "hook").mkdir()
    (tmp_path / "hook" / "sitecustomize.py").write_text(PRETENDED)
    images = archive(tmp_path / "train.zip", NUM_MEMBERS)
    num_actors = set()
    done = threading.Event()

    def run(executor: Literal["inline", "ray"], *, use_gpu: bool) -> RunRecord:
        output = str(tmp_path / executor)
        config = PredictConfig(
            images=str(images), output=output, model=model, executor=executor, engine="tensorflow", use_gpu=use_gpu
        )
        return predict(config)

    def watch() -> None:
        while not done.wait(0.05):
            num_actors.add(sum("_SliceLabeller" in line for line in descendants(node).values()))

    with contextlib.ExitStack() as stack:
        with monkeypatch.context() as patch:
            patch.setenv("PYTHONPATH", str(tmp_path / "hook"))
            node = stack.enter_context(joined_node(4, num_gpus=2))
        watching = threading.Thread(target=watch)
        watching.start()
        try:
            record = run("ray", use_gpu=True)
        finally:
            done.set()
            watching.join()
    assert max(num_actors) == 2
    assert record.books.ok == NUM_MEMBERS
    assert [engine.partition(" ")[0] for engine in record.engines] == ["tensorflow"]
    run("inline", use_gpu=False)
    assert answers(tmp_path / "ray") == answers(tmp_path / "inline")
