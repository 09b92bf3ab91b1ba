"""What the tests of the service share: a real server on a free port, in this process or in one of its own."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from catdog import bundle
from catdog.config import ServeConfig
from catdog.serving import inline
from catdog.serving.service import Service

START_S = 60.0


@dataclass(frozen=True)
class Running:
    """A server that runs in a thread of this process."""

    url: str
    service: Service
    server: inline.Server
    client: httpx.Client


@contextlib.contextmanager
def running(model: str, *, token: str | None = None, **settings: Any) -> Iterator[Running]:
    """A server in a thread of this process, for the length of a `with` block."""
    config = ServeConfig(model=model, executor="inline", **{"reload_s": 0, "drain_s": 5} | settings)
    with inline.listening("127.0.0.1", 0) as listener:
        service = Service(config, bundle.load(model))
        server = inline.Server(service, token)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, name="server")
        thread.start()
        try:
            url = inline.url_of(listener)
            with httpx.Client(base_url=url, timeout=60, trust_env=False) as client:
                yield Running(url, service, server, client)
        finally:
            server.should_exit = True
            thread.join()


@dataclass(frozen=True)
class Process:
    """`catdog serve` as a process of its own."""

    url: str
    process: "subprocess.Popen[str]"
    log: Path

    def end(self, told: signal.Signals = signal.SIGTERM) -> int:
        """Tell the process to end. Returns its exit code."""
        os.kill(self.process.pid, told)
        return self.process.wait(60)


@contextlib.contextmanager
def process(
    directory: Path, *flags: str, port: int = 0, environment: dict[str, str] | None = None
) -> Iterator[Process]:
    """`catdog serve` with these flags, by default on a free port, for the length of a `with` block.

    Raises:
        RuntimeError: it does not say in time where it serves.
    """
    log = directory / "serve.log"
    with log.open("w") as stderr:
        command = [sys.executable, "-m", "jobs.serve", "--port", str(port), "--executor", "inline", *flags]
        started = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=stderr, text=True, env=os.environ | (environment or {})
        )
    try:
        deadline = time.monotonic() + START_S
        while not (found := re.search(r"Serving .* at (http://\S+)", log.read_text())):
            if started.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"catdog serve must begin to serve. Received: {log.read_text()}")
            time.sleep(0.02)
        yield Process(found[1], started, log)
    finally:
        started.kill()
        started.communicate()
