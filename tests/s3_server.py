"""A real S3 server on this machine, for the tests of object storage.

The server is `ministack`, run by hypercorn on a free port, in a process of its own that ends with the session. A test
module that needs the server says `pytest_plugins = ["s3_server"]`; its tests that take the fixture `s3` are marked
`slow`. (PYTEST_DONT_REWRITE: no asserts here, and test modules import this module before pytest does.)
"""

import contextlib
import os
import re
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import fsspec
import pytest

from catdog.ray_session import connect

_START_S = 180.0

_PATIENCE_S = 20.0
"""For how long catdog tries a server that fails, in place of its five minutes."""


@dataclass(frozen=True)
class S3Server:
    """A running server.

    Attributes:
        endpoint: `http://127.0.0.1:<port>`.
        env: the environment variables by which a process finds the server: endpoint, credentials, region, patience.
        pid: the server's process.
    """

    endpoint: str
    env: dict[str, str]
    pid: int

    def new_bucket(self) -> str:
        """Make an empty bucket that nobody else uses: `s3://<name>`."""
        filesystem = fsspec.filesystem(
            "s3",
            skip_instance_cache=True,
            endpoint_url=self.endpoint,
            key=self.env["AWS_ACCESS_KEY_ID"],
            secret=self.env["AWS_SECRET_ACCESS_KEY"],
        )
        name = f"catdog-{uuid.uuid4().hex[:12]}"
        filesystem.mkdir(name)
        return f"s3://{name}"


@contextlib.contextmanager
def s3_server() -> Iterator[S3Server]:
    """Start a server, wait until it answers, and end it afterwards."""
    with tempfile.TemporaryDirectory() as directory:
        log = Path(directory, "log")
        environment = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
        environment |= {"SERVICES": "s3", "LOG_LEVEL": "WARNING", "TMPDIR": directory}
        with log.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "hypercorn", "--bind", "127.0.0.1:0", "ministack.app:app"],
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=directory,
                env=environment,
            )
        try:
            endpoint = _endpoint(process, log)
            env = {
                "AWS_ENDPOINT_URL": endpoint,
                "AWS_ACCESS_KEY_ID": "test",
                "AWS_SECRET_ACCESS_KEY": "test",
                "AWS_DEFAULT_REGION": "us-east-1",
                "CATDOG_STORAGE_PATIENCE_S": str(_PATIENCE_S),
            }
            yield S3Server(endpoint, env, process.pid)
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _endpoint(process: "subprocess.Popen[bytes]", log: Path) -> str:
    """The address where the server listens. The system chose the port; the server's log tells it."""
    deadline = time.monotonic() + _START_S
    while time.monotonic() < deadline and process.poll() is None:
        if match := re.search(r"Running on (http://127\.0\.0\.1:\d+)", log.read_text(errors="replace")):
            return match[1]
        time.sleep(0.05)
    raise RuntimeError(f"the S3 server did not start: {log.read_text(errors='replace')}")


@pytest.fixture(scope="session")
def s3_process() -> Iterator[S3Server]:
    """One server for the whole session."""
    with s3_server() as server:
        yield server


@pytest.fixture
def s3(s3_process: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """The server. The environment variables of this process name its endpoint."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in s3_process.env.items():
        monkeypatch.setenv(name, value)
    return s3_process


@contextlib.contextmanager
def ray_that_finds(server: S3Server) -> Iterator[None]:
    """Run an embedded Ray whose workers find the server."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in server.env.items():
            patch.setenv(name, value)
        patch.delenv("RAY_ADDRESS", raising=False)
        with connect(None):
            yield
