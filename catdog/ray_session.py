"""Joining a Ray cluster, or starting an embedded Ray on this machine."""

import contextlib
import functools
import logging
import os
import secrets
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from catdog import hardware, ray_internals, scratch
from catdog.errors import CatdogError, UsageError
from catdog.provenance import one_line, redact

logger = logging.getLogger(__name__)

CONNECT_TIMEOUT_S: Final = 10.0
"""Longest wait for the head of a cluster to answer."""

_MAX_BASE_BYTES: Final = 20
"""Longest path of the directory in which an embedded Ray gets one of its own. Of the 107 bytes that a socket's path may
have, `/catdog-ray-12345678` takes 20, and what Ray adds to that takes 64."""


def cluster_address(ray_address: str | None) -> str | None:
    """The address of the cluster to join: `ray_address`, or else `RAY_ADDRESS`; None where Ray is to be embedded.

    `local` is Ray's own word for that.
    """
    address = ray_address or os.environ.get("RAY_ADDRESS")
    return None if address in (None, "", "local") else address


def is_worker() -> bool:
    """Whether this process is a worker of Ray. Ray is not imported for that: a worker has imported it."""
    ray = sys.modules.get("ray")
    return ray is not None and ray.is_initialized() and ray.get_runtime_context().worker.mode == ray.WORKER_MODE


@contextlib.contextmanager
def connect(ray_address: str | None, *, min_cpus: int = 1) -> Iterator[None]:
    """Join the cluster, or start an embedded Ray, for the length of a `with` block.

    An embedded Ray gets at least `min_cpus` logical CPUs, even on a machine with fewer cores: otherwise training
    workers that take every core would leave none for the tasks that feed them. A Ray that this process has joined
    already is used as it is, and left running.

    Everything that an embedded Ray and its workers write beside their results lies in one directory, and goes with it.

    Raises:
        UsageError: there is no cluster at the address, or an embedded Ray finds no place for its files.
        CatdogError: an embedded Ray does not start.
    """
    # Ray will make this value its default, and warns of that unless the variable is set.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    if ray.is_initialized():
        yield
        return
    address = cluster_address(ray_address)
    _check_working_directory()
    on_sigterm = signal.getsignal(signal.SIGTERM)
    with contextlib.ExitStack() as stack:
        if address is None:
            directory = stack.enter_context(scratch.directory("ray", parent=scratch.short_base(_MAX_BASE_BYTES)))
            stack.enter_context(_token_at_hand(directory))
            stack.callback(ray.shutdown)
            _start(directory, max(hardware.num_cores(), min_cpus))
        else:
            stack.callback(ray.shutdown)
            _join(address)
        if threading.current_thread() is threading.main_thread():
            # Ray has installed its own handler, which ends the process without running `finally` blocks.
            signal.signal(signal.SIGTERM, on_sigterm)
        yield


def _check_working_directory() -> None:
    """Ray tells its workers the working directory of the one who starts it.

    Raises:
        UsageError: it is gone.
    """
    try:
        os.getcwd()
    except FileNotFoundError as error:
        raise UsageError("the working directory must exist. Received: one that was removed") from error


def _start(directory: str, num_cpus: int) -> None:
    """Start an embedded Ray whose files, and whose workers' temporary files, lie in `directory`."""
    import ray

    logger.info("Starting an embedded Ray with %d logical CPUs", num_cpus)
    kept = os.environ.get("TMPDIR")
    os.environ["TMPDIR"] = directory  # Ray's processes inherit it, this one goes on with its own
    try:
        ray.init(
            address="local",
            num_cpus=num_cpus,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            _temp_dir=directory,
        )
    except (OSError, RuntimeError, ValueError) as error:
        raise CatdogError(
            "an embedded Ray must start: TMPDIR must have space, and this machine memory and processes to spare. "
            f"Received: {one_line(error)}"
        ) from error
    finally:
        if kept is None:
            del os.environ["TMPDIR"]
        else:
            os.environ["TMPDIR"] = kept


@contextlib.contextmanager
def _token_at_hand(directory: str) -> Iterator[None]:
    """Keep the secret by which Ray's processes know each other in `directory`, where there is no place in `HOME`."""
    if _has_place_for_token():
        yield
        return
    path = Path(directory, "auth_token")
    path.touch(mode=0o600)
    path.write_text(_token())
    os.environ["RAY_AUTH_TOKEN_PATH"] = str(path)
    try:
        yield
    finally:
        del os.environ["RAY_AUTH_TOKEN_PATH"]


def _has_place_for_token() -> bool:
    if not {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"}.isdisjoint(os.environ):
        return True  # somebody has seen to it
    try:
        directory = Path.home() / ".ray"
        directory.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):
        return False
    return (directory / "auth_token").exists() or os.access(directory, os.W_OK | os.X_OK)


@functools.cache
def _token() -> str:
    """One for the life of this process: Ray reads it once."""
    return secrets.token_hex(32)


def _join(address: str) -> None:
    """Join the cluster at an address.

    Raises:
        UsageError: there is none.
    """
    import ray

    logger.info("Joining the Ray cluster at %s", redact(address))
    try:
        if address != "auto":
            _check_reachable(address)
        ray.init(address=address, logging_level=logging.WARNING)
    except (OSError, RuntimeError, ValueError) as error:
        raise UsageError(
            "--ray-address or RAY_ADDRESS must name a Ray cluster that can be reached: HOST:6379, or auto. "
            f"Received: {redact(address)}: {one_line(error)}"
        ) from error


def _check_reachable(address: str) -> None:
    """Check that a Ray cluster answers at an address. Ray itself would try for minutes.

    Raises:
        OSError: none does.
        ValueError: it is not an address.
    """
    host, _, port = address.removeprefix("ray://").rpartition(":")
    with socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_TIMEOUT_S):
        pass
    ray_internals.ping(address, CONNECT_TIMEOUT_S)
