"""Joining a Ray cluster that cannot be reached, or is none; and an embedded Ray, which leaves nothing behind."""

import contextlib
import os
import re
import signal
import socket
import socketserver
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import grpc  # type: ignore[import-untyped]
import pytest

from catdog import ray_session, scratch
from catdog.errors import UsageError
from catdog.ray_session import connect

pytestmark = pytest.mark.slow

RULE = r"^--ray-address or RAY_ADDRESS must name a Ray cluster that can be reached: HOST:6379, or auto\. Received: "


@pytest.mark.parametrize("address", ["127.0.0.1:1", "http://127.0.0.1:8265"])
def test_a_cluster_that_cannot_be_reached_is_named(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(UsageError, match=RULE + address), connect(None):
        pass


@contextlib.contextmanager
def silent() -> Iterator[int]:
    """Something that accepts connections, and never answers. The port."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@contextlib.contextmanager
def web_server() -> Iterator[int]:
    with HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:
        yield from serving(server)


@contextlib.contextmanager
def greeter() -> Iterator[int]:
    """Something that speaks first, as SSH and mail servers do."""

    class Greeting(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            self.request.sendall(b"SSH-2.0-OpenSSH_9.6\r\n")

    with socketserver.TCPServer(("127.0.0.1", 0), Greeting) as server:
        yield from serving(server)


@contextlib.contextmanager
def other_grpc_server() -> Iterator[int]:
    server = grpc.server(ThreadPoolExecutor(1))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield port
    server.stop(None)


def serving(server: socketserver.TCPServer) -> Iterator[int]:
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server.server_address[1]
    server.shutdown()
    thread.join()


@pytest.mark.parametrize("listener", [silent, web_server, greeter, other_grpc_server])
def test_something_else_that_listens_there_is_found_out_soon(
    listener: Callable[[], contextlib.AbstractContextManager[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_session, "CONNECT_TIMEOUT_S", 3.0)
    with listener() as port:
        address = f"127.0.0.1:{port}"
        started = time.monotonic()
        with pytest.raises(UsageError, match=rf"{RULE}{address}: what listens there "), connect(address):
            pass
        assert time.monotonic() - started < 30


def test_local_is_an_embedded_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "local")
    assert ray_session.cluster_address(None) is None
    assert ray_session.cluster_address("local") is None
    assert ray_session.cluster_address("host:6379") == "host:6379"
    monkeypatch.setenv("RAY_ADDRESS", "host:1")
    assert ray_session.cluster_address(None) == "host:1"
    assert ray_session.cluster_address("local") is None


def test_a_working_directory_that_was_removed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(UsageError, match=r"^the working directory must exist\. Received: "), connect("local"):
        pass


EMBEDDED = """if True:
    import logging, os, tempfile, time
    from catdog.ray_session import connect
    from catdog import ray_internals
    with connect(None):
        import ray
        @ray.remote
        def where():
            import tempfile
            return tempfile.gettempdir()
        ray_internals.ping(ray.get_runtime_context().gcs_address, 60)  # a real head answers
        address = ray.get_runtime_context().gcs_address
        print(os.environ["TMPDIR"], tempfile.gettempdir(), ray.get(where.remote()), address, flush=True)
        time.sleep(600)
"""


def test_an_embedded_ray_keeps_to_a_directory_of_its_own_and_what_a_killed_one_leaves_is_removed(
    tmp_path: Path,
) -> None:
    long = tmp_path / ("x" * 120)  # the path of a socket may have 107 bytes
    long.mkdir()
    environment = {**os.environ, "TMPDIR": str(long), "RAY_ADDRESS": "local", "HOME": "/proc/none"}
    line = [sys.executable, "-c", EMBEDDED]
    process = subprocess.Popen(
        line, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        assert process.stdout is not None
        said = process.stdout.readline().split()
        if not said:
            pytest.fail(process.communicate()[1])
        ours, also_ours, directory, address = said
        assert ours == also_ours == str(long)
        assert re.fullmatch(r".{1,20}/catdog-ray-\w{8}", directory)
        assert any(path.name.startswith("session_") for path in Path(directory).iterdir())
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    assert Path(directory).exists()
    deadline = time.monotonic() + 60
    while Path(directory).exists() and time.monotonic() < deadline:  # Ray's processes outlive their driver by a moment
        scratch.remove_abandoned(str(Path(directory).parent))
        time.sleep(0.5)
    assert not Path(directory).exists()
    # Where other programs look for a cluster, none of them finds the dead one.
    common = Path("/tmp/ray/ray_current_cluster")
    assert not common.exists() or common.read_text() != address
    assert list(long.iterdir()) == []
