"""The entry scripts, submitted to a real Ray cluster as `ray job submit` does it."""

import contextlib
import dataclasses
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from ray._private.runtime_env import packaging

from catdog import drawings, storage
from catdog.bench import processes
from catdog.schema import CLASS_NAMES

pytestmark = pytest.mark.slow

PROJECT = Path(__file__).resolve().parents[1]
NUM_PICTURES = 64

Submit = Callable[..., subprocess.CompletedProcess[str]]


@dataclasses.dataclass(frozen=True)
class Cluster:
    """A cluster of one node, whose token no file has."""

    environment: dict[str, str]
    head: str
    submit: Submit
    """Submits a job and waits for the end."""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
    }
    gcs, dashboard, agent, agent_grpc, client = processes.free_ports(5)
    temporary = tempfile.mkdtemp(prefix="ray")  # pytest's own are too long for the names of Ray's sockets
    address = f"http://127.0.0.1:{dashboard}"
    command = [
        *("ray", "start", "--head", "--block", "--node-ip-address=127.0.0.1", f"--port={gcs}", "--num-cpus=4"),
        *(f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}"),
        *(f"--dashboard-agent-grpc-port={agent_grpc}", f"--ray-client-server-port={client}"),
        *(f"--temp-dir={temporary}", "--object-store-memory=200000000"),
    ]
    log = Path(temporary, "start.log")
    with log.open("w") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)

    def run(*entrypoint: str) -> subprocess.CompletedProcess[str]:
        line = ["ray", "job", "submit", "--address", address, "--working-dir", ".", "--", *entrypoint]
        return subprocess.run(line, cwd=PROJECT, env=environment, capture_output=True, text=True, timeout=500)

    try:
        wait_for_dashboard(address, environment["RAY_AUTH_TOKEN"], process, log)
        yield Cluster(environment, f"127.0.0.1:{gcs}", run)
    finally:
        process.send_signal(signal.SIGTERM)  # `ray start --block` ends its own processes, and no others
        process.wait(60)
        shutil.rmtree(temporary, ignore_errors=True)


@pytest.fixture
def submit(cluster: Cluster) -> Submit:
    return cluster.submit


def wait_for_dashboard(address: str, token: str, process: subprocess.Popen[bytes], log: Path) -> None:
    request = urllib.request.Request(f"{address}/api/version", headers={"Authorization": f"Bearer {token}"})
    deadline = time.monotonic() + 120
    while True:
        with contextlib.suppress(urllib.error.URLError, ConnectionError), urllib.request.urlopen(request, timeout=10):
            return
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.5)


def last_record(run: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """The run record that `--json` printed, amid the job's log."""
    assert run.returncode == 0, run.stdout + run.stderr
    lines = run.stdout.splitlines()
    first = lines.index("{")
    record: dict[str, Any] = json.loads("\n".join(lines[first : lines.index("}") + 1]))
    return record


def test_the_upload_is_the_code_alone(tmp_path: Path) -> None:
    archive = tmp_path / "upload.zip"
    packaging._zip_files(str(PROJECT), [], str(archive), include_parent_dir=False, include_gitignore=True)
    members = zipfile.ZipFile(archive).infolist()
    names = [member.filename for member in members]
    assert {"jobs/predict.py", "catdog/cli/__init__.py", "catdog/storage/__init__.py"} <= set(names)
    assert {name.split("/")[0] for name in names} == {"catdog", "jobs"}
    code = [member for member in members if not member.filename.startswith("catdog/default_model/")]
    assert sum(member.compress_size for member in code) < 2_000_000


def test_prepare_train_and_predict_as_submitted_jobs(submit: Submit, tmp_path: Path) -> None:
    for index in range(NUM_PICTURES):
        label = CLASS_NAMES[index % 2]
        (tmp_path / "pictures" / label).mkdir(parents=True, exist_ok=True)
        drawings.draw(label, (3, index)).save(tmp_path / "pictures" / label / f"{index}.png")
    pictures, data, model, predictions = (str(tmp_path / name) for name in ("pictures", "data", "model", "predictions"))

    split = ["--val-fraction", "0.2", "--test-fraction", "0"]
    prepared = last_record(
        submit("python", "-m", "jobs.prepare", "--images", pictures, "--output", data, *split, "--json")
    )
    assert prepared["kept"] == NUM_PICTURES

    size = ["--arch", "cnn", "--image-size", "64", "--epochs", "1", "--batch-size", "16", "--num-workers", "2"]
    trained = last_record(submit("python", "-m", "jobs.train", "--data", data, "--output", model, *size, "--json"))
    assert trained["epochs_trained"] == 1

    line = ["python", "-m", "jobs.predict", "--images", pictures, "--model", model, "--output", predictions, "--json"]
    labelled = last_record(submit(*line))
    assert labelled["executor"] == "ray"  # auto: there is a cluster
    assert labelled["model_id"] == trained["model_id"]
    assert labelled["books"]["ok"] == NUM_PICTURES
    rows = [pq.read_table(Path(predictions, name)).num_rows for name in storage.list_names(predictions, ".parquet")]
    assert sum(rows) == NUM_PICTURES


def test_a_failed_job_fails_the_submission(submit: Submit) -> None:
    run = submit("python", "-m", "jobs.predict", "--images", "i", "--model", "m", "--output", "o", "--batch-size", "0")
    assert run.returncode != 0
    assert "error: --batch-size must be at least 1. Received: --batch-size=0" in run.stdout


@pytest.mark.parametrize(
    ("settings", "received"),
    [
        ({}, "that cluster wants a token: set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN to the token of the cluster"),
        ({"RAY_AUTH_MODE": "token"}, "Token authentication is enabled but Ray couldn't find an authentication token"),
        ({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}, "that cluster wants a token"),
    ],
)
def test_a_cluster_that_wants_a_token_is_named(
    cluster: Cluster, tmp_path: Path, settings: dict[str, str], received: str
) -> None:
    (tmp_path / "pictures").mkdir()
    drawings.draw("cat", (3, 1)).save(tmp_path / "pictures" / "cat.png")
    environment = {name: value for name, value in cluster.environment.items() if not name.startswith("RAY_AUTH")}
    environment |= {"HOME": str(tmp_path), "RAY_ADDRESS": cluster.head, **settings}
    places = ["--images", str(tmp_path / "pictures"), "--output", str(tmp_path / "out")]
    line = [sys.executable, "-m", "catdog", "predict", *places]
    run = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=100)
    assert run.returncode == 2
    assert f"Received: {cluster.head}: {received}" in run.stderr
    # What the error advises is what works.
    if not settings:
        token = {name: value for name, value in cluster.environment.items() if name.startswith("RAY_AUTH")}
        run = subprocess.run(line, env=environment | token, capture_output=True, text=True, timeout=100)
        assert run.returncode == 0, run.stderr
        assert "leaked" not in run.stderr  # DuckDB's farewell
