"""`predict` and `train` on nodes that do not share their directories, and on nodes that come and go."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import ray
from inference_case import answers, archive, descendants, encoded_drawings
from ray_case import can_hide, joined_node, small_ray

from catdog import cli, drawings
from catdog.config import PredictConfig, PrepareConfig
from catdog.dataset import prepare
from catdog.inference import predict, verify
from catdog.inference.plan import planner
from catdog.schema import CLASS_NAMES

pytestmark = pytest.mark.slow

NUM_MEMBERS = 1500


@pytest.fixture(scope="module", autouse=True)
def ray_of_this_module() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch, small_ray(num_cpus=1):
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        yield


def catdog(*args: object) -> tuple[int, list[str]]:
    """(exit code, error lines) of a command line of its own, on the Ray of this module."""
    program = [sys.executable, "-m", "catdog"]
    line = [*program, *map(str, args), "--ray-address", ray.get_runtime_context().gcs_address]
    result = subprocess.run(line, capture_output=True, text=True, timeout=150)
    return result.returncode, [said for said in result.stderr.splitlines() if said.startswith("error: ")]


# Nodes that come and go.


def wait_for(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_node_that_joins_is_used_and_one_that_is_lost_loses_nothing(
    tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first node's actor is stopped while the second node is there, so that what appears is the second one's."""
    monkeypatch.setattr(planner, "SLICE_SIZE", 50)
    images, output = archive(tmp_path / "train.zip", NUM_MEMBERS), tmp_path / "out"
    seen: dict[str, object] = {}

    def num_parts() -> int:
        return len(list(output.glob("part-*.parquet")))

    def actors_of(pid: int) -> set[int]:
        return {each for each, line in descendants(pid).items() if "_SliceLabeller" in line}

    def come_and_go() -> None:
        wait_for(lambda: num_parts() > 0)
        (first,) = actors_of(os.getpid())
        os.kill(first, signal.SIGSTOP)
        try:
            with joined_node(1) as node:
                stopped_at = num_parts()
                wait_for(lambda: num_parts() >= stopped_at + 3)
                seen["used"] = len(actors_of(node))
                for pid in [node, *descendants(node)]:
                    os.kill(pid, signal.SIGKILL)
                seen["parts"] = num_parts()
        finally:
            os.kill(first, signal.SIGCONT)

    other = threading.Thread(target=come_and_go)
    other.start()
    line = ["predict", "--images", str(images), "--output", str(output), "--model", model, "--executor", "ray"]
    assert cli.main([*line, "--ray-address", ray.get_runtime_context().gcs_address]) == 0
    other.join()
    assert seen["used"] == 1
    assert f"books    {NUM_MEMBERS:,} listed = {NUM_MEMBERS:,} ok + 0 error" in capsys.readouterr().out
    predict(PredictConfig(images=str(images), output=str(tmp_path / "inline"), model=model, executor="inline"))
    assert answers(output) == answers(tmp_path / "inline")
    assert verify(str(output)).rows == NUM_MEMBERS


# Nodes that do not see what the driver sees.


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("drawings")
    for label in ("cat", "dog"):
        (root / "pictures" / label).mkdir(parents=True)
        for index in range(40):
            drawings.draw(label, [index]).save(root / "pictures" / label / f"{index}.jpg")
    prepare(PrepareConfig(images=str(root / "pictures"), output=str(root / "data"), val_fraction=0.3))
    return root / "data"


@pytest.fixture(scope="module")
def blind(dataset: Path) -> Iterator[Path]:
    """A directory in whose place the only node with free CPUs sees an empty one."""
    if not can_hide():
        pytest.skip("needs namespaces of users and mounts")

    class Busy:
        def begin(self) -> None:
            pass

    busy = ray.remote(num_cpus=1)(Busy).remote()
    ray.get(busy.begin.remote())
    with tempfile.TemporaryDirectory() as directory, joined_node(3, hidden=[Path(directory)]):
        yield Path(directory)
    ray.kill(busy)


def test_predict_on_a_node_that_does_not_see_the_images(blind: Path, tmp_path: Path, model: str) -> None:
    images, output = archive(blind / "train.zip", 40), tmp_path / "out"
    code, errors = catdog("predict", "--images", images, "--output", output, "--model", model, "--executor", "ray")
    assert code == 1
    (error,) = errors
    assert error.startswith(f"error: every node must see the same --images. Received: {images}")
    assert not list(output.glob("*.parquet"))


def test_predict_on_a_node_that_does_not_see_the_output(blind: Path, tmp_path: Path, model: str) -> None:
    images, output = archive(tmp_path / "train.zip", 40), blind / "out"
    output.mkdir()
    code, errors = catdog("predict", "--images", images, "--output", output, "--model", model, "--executor", "ray")
    assert code == 1
    (error,) = errors
    assert error.startswith(f"error: every node must see the same --output. Received: {output}/.catdog-claim-1.json")
    assert [path.name for path in output.iterdir()] == ["_runs"]  # the plan, which the next run takes over


def test_prepare_on_a_node_that_does_not_see_the_output(blind: Path, tmp_path: Path) -> None:
    images, output = tmp_path / "photos", blind / "prepared"
    images.mkdir()
    for number, drawing in enumerate(encoded_drawings(20)):
        (images / f"{CLASS_NAMES[number % 2]}.{number}.png").write_bytes(drawing)
    code, errors = catdog("prepare", "--images", images, "--output", output)
    assert code == 2
    (error,) = errors
    assert error.startswith("error: --output must be where every node of the cluster finds it")
    assert f"Received: --output={output}, which " in error
    assert not (output / "dataset.json").exists()


@pytest.mark.parametrize("hidden", ["data", "output"])
def test_train_on_a_node_that_does_not_see(dataset: Path, blind: Path, tmp_path: Path, hidden: str) -> None:
    places = {"data": tmp_path / "data", "output": tmp_path / "model"} | {hidden: blind / hidden}
    shutil.copytree(dataset, places["data"])
    line = ["train", "--data", places["data"], "--output", places["output"], "--arch", "cnn", "--image-size", 48]
    code, errors = catdog(*line, "--epochs", 1, "--batch-size", 16, "--num-workers", 1)
    (error,) = errors
    if hidden == "data":
        assert code == 1
        assert error.startswith(
            f"error: Every shard in dataset.json must be there and whole. Received: {places['data']}/train/part-00000"
        )
    else:
        assert code == 2
        assert error.startswith("error: --output must be where every node of the cluster finds it")
        assert f"Received: --output={places['output']}, and no train.json there" in error
    assert not list(places["output"].glob("*.keras"))
