"""A bad night of the storage: the real commands against a bucket behind a proxy that does every kind of harm in turn.

When a job is at work, the faults of `fault_proxy.FAULTS` come one after the other, without a pause between them, each
for `FAULT_S` seconds. For the first 60 % of that time a fault hits every request, and then half of them, at random: a
storage that is gone for good ends a job after 300 s without a success, so no fault hits every request for that long.
When the night is over, a fifth of the requests meets some fault until the job ends. So that the job outlasts the night,
the proxy passes on only so many requests in a second.

The form with five minutes of each fault takes 45 minutes a job, which mostly waits. So run the jobs at the same time:

    for job in predict prepare train down; do
        CATDOG_TEST_FAULT_S=300 .venv/bin/pytest tests/test_storage_nights.py -k $job --log-cli-level=INFO &
    done
"""

import dataclasses
import io
import itertools
import json
import logging
import math
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import fsspec
import numpy as np
import pyarrow.parquet as pq
import pytest
from fault_proxy import FAULTS, Fault, FaultProxy
from PIL import Image
from s3_server import S3Server

from catdog import bundle, storage
from catdog.dataset import check_shards
from catdog.storage import outages

pytestmark = [pytest.mark.slow, pytest.mark.timeout(0)]

pytest_plugins = ["s3_server", "fault_proxy"]

logger = logging.getLogger(__name__)

FAULT_S: Final = float(os.environ.get("CATDOG_TEST_FAULT_S", "1"))
"""How long each fault lasts."""

FULL_SHARE: Final = 0.6
"""For this share of its time, a fault hits every request."""

PACE_S: Final = 0.2
"""Between two requests that the proxy passes on in the night of `predict` and `prepare`."""

TRAIN_PACE_S: Final = min(2.0, FAULT_S / 4)

PASSING_S: Final = FAULT_S * (1 + (len(FAULTS) - 1) * (1 - FULL_SHARE))
"""For how long requests pass in a night. Those that are slow pass, too."""

PATIENCE_S: Final = 300.0 if FAULT_S >= 300 else 8.0
"""For how long a job tries a storage that stays down."""

SLICE: Final = 20
"""Images in a slice of `predict` here, so that parts are published all night."""

SITECUSTOMIZE: Final = f"from catdog.inference.plan import planner; planner.SLICE_SIZE = {SLICE}"
"""What a process of `predict` runs first."""

REPOSITORY: Final = Path(__file__).resolve().parents[1]


@dataclasses.dataclass(frozen=True)
class Job:
    """A command on its way."""

    process: subprocess.Popen[bytes]
    directory: Path
    started: float

    def stderr(self) -> str:
        return Path(self.directory, "stderr").read_text()

    def record(self) -> dict[str, Any]:
        """Wait for its end, and return its run record."""
        assert self.process.wait(600) == 0, self.stderr()
        record: dict[str, Any] = json.loads(Path(self.directory, "stdout").read_text())
        return record


@dataclasses.dataclass(frozen=True)
class Starter:
    """Starts commands, and ends those that a test has left."""

    directory: Path
    jobs: list[Job] = dataclasses.field(default_factory=list)

    def __call__(self, *argv: str, **environment: str) -> Job:
        directory = Path(self.directory, str(len(self.jobs)))
        directory.mkdir()
        line = [sys.executable, "-m", f"jobs.{argv[0]}", *argv[1:], "--json"]
        variables = {name: value for name, value in os.environ.items() if name != outages.PATIENCE_VARIABLE}
        if argv[0] == "predict":
            Path(directory, "sitecustomize.py").write_text(SITECUSTOMIZE)
            variables["PYTHONPATH"] = f"{directory}{os.pathsep}{variables.get('PYTHONPATH', '')}"
        with Path(directory, "stdout").open("wb") as out, Path(directory, "stderr").open("wb") as err:
            process = subprocess.Popen(line, cwd=REPOSITORY, env=variables | environment, stdout=out, stderr=err)
        self.jobs.append(Job(process, directory, time.monotonic()))
        return self.jobs[-1]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Starter]:
    starter = Starter(tmp_path)
    yield starter
    for job in starter.jobs:
        if job.process.poll() is None:
            job.process.terminate()
            job.process.wait()


@pytest.fixture
def night(s3: S3Server) -> Iterator[FaultProxy]:
    """A proxy that this process does not use itself."""
    proxy = FaultProxy(s3.endpoint)
    yield proxy
    proxy.go_down()


def through(proxy: FaultProxy) -> dict[str, str]:
    return {"AWS_ENDPOINT_URL": proxy.endpoint}


def spend(job: Job, proxy: FaultProxy, pace_s: float) -> dict[Fault, int]:
    """Let every fault come in turn. Returns how many requests were in flight at most, late in the time of each."""
    in_flight: dict[Fault, int] = {}
    proxy.pace_s = pace_s
    for fault in FAULTS:
        proxy.inject(fault, times=sys.maxsize)
        sleep_at_work(job, fault, FAULT_S * FULL_SHARE / 2)
        proxy.count_anew()
        sleep_at_work(job, fault, FAULT_S * FULL_SHARE / 2)
        in_flight[fault] = proxy.most_in_flight
        num_full = proxy.num_requests
        proxy.inject(fault, times=sys.maxsize, chance=0.5)
        sleep_at_work(job, fault, FAULT_S * (1 - FULL_SHARE))
        figures = num_full, in_flight[fault], proxy.num_requests
        logger.info("%s: every one of %d requests, at most %d at a time; then half of %d", fault, *figures)
    proxy.pace_s = 0.0
    for fault in itertools.cycle(FAULTS):
        proxy.inject(fault, times=sys.maxsize, chance=0.2)
        try:
            job.process.wait(0.5)
            break
        except subprocess.TimeoutExpired:
            assert time.monotonic() - job.started < 20 * FAULT_S + 200, job.stderr()
    logger.info("exit %d after %.0f s", job.process.returncode, time.monotonic() - job.started)
    return in_flight


def wait_until_at_work(job: Job, is_at_work: threading.Event) -> None:
    while not is_at_work.wait(0.01):
        assert job.process.poll() is None, job.stderr()


def sleep_at_work(job: Job, fault: Fault, seconds: float) -> None:
    time.sleep(seconds)
    assert job.process.poll() is None, f"ended amid {fault}: {job.stderr()}"


def put_photos(bucket: str, num_photos: int) -> str:
    """Write photographs `cat/...`, `dog/...`."""
    rng = np.random.default_rng(0)
    filesystem = fsspec.filesystem("s3")
    for number in range(num_photos):
        encoded = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).resize((64, 64)).save(encoded, "JPEG")
        name = f"{('cat', 'dog')[number % 2]}/{number:07}.jpg"
        filesystem.pipe_file(f"{bucket}/photos/{name}", encoded.getvalue())
    return f"{bucket}/photos"


def answers(output: str) -> list[tuple[Any, ...]]:
    """What an output says of each image."""
    filesystem = fsspec.filesystem("s3")
    tables = [pq.read_table(io.BytesIO(filesystem.cat_file(part))) for part in filesystem.glob(f"{output}/*.parquet")]
    columns = ("uri", "source_version", "image_id", "label", "prob_dog")
    return sorted(tuple(row[name] for name in columns) for table in tables for row in table.to_pylist())


def test_predict(s3: S3Server, night: FaultProxy, start: Starter, model: str) -> None:
    bucket = s3.new_bucket()
    num_photos = 130 + math.ceil(PASSING_S / PACE_S)
    command = ("predict", "--images", put_photos(bucket, num_photos), "--model", model, "--output")
    is_at_work = night.expect("/out/part-")
    undisturbed, job = start(*command, f"{bucket}/undisturbed"), start(*command, f"{bucket}/out", **through(night))
    wait_until_at_work(job, is_at_work)
    before = night.most_in_flight
    in_flight = spend(job, night, PACE_S)
    logger.info("in flight: %d before, then %s", before, in_flight)
    assert job.record()["books"]["ok"] == undisturbed.record()["books"]["ok"] == num_photos
    assert answers(f"{bucket}/out") == answers(f"{bucket}/undisturbed")
    assert start("verify", f"{bucket}/out").process.wait(120) == 0
    assert all(in_flight[fault] < before for fault in ("503", "500", "expired", "skew"))


@pytest.fixture(scope="module")
def dataset(s3_process: S3Server, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A bucket with `photos`, and with `data`, which an undisturbed run of `prepare` has made of them."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in s3_process.env.items():
            patch.setenv(name, value)
        bucket = s3_process.new_bucket()
        photos = put_photos(bucket, 100 + math.ceil(PASSING_S / PACE_S))
        start = Starter(tmp_path_factory.mktemp("dataset"))
        start("prepare", "--images", photos, "--output", f"{bucket}/data").record()
    return bucket


def test_prepare(s3: S3Server, night: FaultProxy, start: Starter, dataset: str) -> None:
    is_at_work = night.expect("/photos/", 20)
    job = start("prepare", "--images", f"{dataset}/photos", "--output", f"{dataset}/out", **through(night))
    wait_until_at_work(job, is_at_work)
    spend(job, night, PACE_S)
    record = job.record()
    ours, theirs = (storage.read_json(f"{dataset}/{name}/dataset.json") for name in ("out", "data"))
    assert record["digest"] == ours["digest"] == theirs["digest"]
    assert [name for name in theirs if ours[name] != theirs[name]] == ["config"]
    check_shards(f"{dataset}/out")


def test_train(s3: S3Server, night: FaultProxy, start: Starter, dataset: str) -> None:
    num_epochs = 4 + math.ceil(PASSING_S / TRAIN_PACE_S / 8)
    small = ("--arch", "cnn", "--image-size", "48", "--batch-size", "32", "--precision", "float32")
    command = ("train", "--data", f"{dataset}/data", *small, "--epochs", str(num_epochs), "--output")
    is_at_work = night.expect("/_checkpoints/step-")
    undisturbed, job = start(*command, f"{dataset}/model"), start(*command, f"{dataset}/disturbed", **through(night))
    wait_until_at_work(job, is_at_work)
    spend(job, night, TRAIN_PACE_S)
    ours, theirs = job.record(), undisturbed.record()
    logger.info("%d steps were done again", ours["num_repeated_steps"])
    assert ours["epochs_trained"] == num_epochs
    assert ours["metrics"] == theirs["metrics"]
    models = (bundle.load_model(bundle.load(f"{dataset}/{name}")) for name in ("disturbed", "model"))
    for one, other in zip(*(model.get_weights() for model in models), strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_storage_that_stays_down_ends_a_job_within_the_patience_and_in_a_line(
    s3: S3Server, night: FaultProxy, start: Starter, model: str
) -> None:
    bucket = s3.new_bucket()
    command = ("predict", "--images", put_photos(bucket, 200), "--model", model, "--output", f"{bucket}/out")
    environment = {} if PATIENCE_S == 300 else {outages.PATIENCE_VARIABLE: str(PATIENCE_S)}
    is_at_work = night.expect("/out/part-")
    job = start(*command, **through(night), **environment)
    wait_until_at_work(job, is_at_work)
    night.go_down()
    down = time.monotonic()
    assert job.process.wait(2 * PATIENCE_S + 60) == 1
    took_s = time.monotonic() - down
    (error,) = [line for line in job.stderr().splitlines() if not re.match(r"\d\d:\d\d:\d\d (INFO|WARNING) ", line)]
    logger.info("ended after %.1f s: %s", took_s, error)
    assert re.fullmatch(rf"error: {bucket}/\S+: the storage failed(: | for \d+ s: ).+", error)
    assert PATIENCE_S - 1 < took_s < PATIENCE_S + 30
