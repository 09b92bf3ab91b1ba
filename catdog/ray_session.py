"""Joining a Ray cluster, or starting an embedded Ray on this machine."""

import contextlib
import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator
from typing import Final

from catdog.errors import UsageError

logger = logging.getLogger(__name__)

CONNECT_TIMEOUT_S: Final = 10.0
"""For the head of a cluster to answer."""


def cluster_address(ray_address: str | None) -> str | None:
    """The cluster to run on: `ray_address`, else the environment's `RAY_ADDRESS`, else None for an embedded Ray."""
    return ray_address or os.environ.get("RAY_ADDRESS") or None


@contextlib.contextmanager
def connect(ray_address: str | None, *, min_cpus: int = 1) -> Iterator[None]:
    """Join the cluster, or start an embedded Ray, for the length of a `with` block.

    An embedded Ray counts at least `min_cpus` logical CPUs, however few cores there are: training workers that take
    every core would otherwise leave none for the tasks that feed them. A Ray that this process has joined already is
    used as it stands, and left running.

    Raises:
        UsageError: there is no cluster at the address.
    """
    # Ray's own default will become this one; setting it silences the warning that says so.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    if ray.is_initialized():
        yield
        return
    address = cluster_address(ray_address)
    on_sigterm = signal.getsignal(signal.SIGTERM)
    if address is None:
        num_cpus = max(os.cpu_count() or 1, min_cpus)
        logger.info("Starting an embedded Ray with %d logical CPUs", num_cpus)
        ray.init(
            address="local",
            num_cpus=num_cpus,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    else:
        logger.info("Joining the Ray cluster at %s", address)
        try:
            if address != "auto":
                _reach(address)
            ray.init(address=address, logging_level=logging.WARNING)
        except (OSError, RuntimeError, ValueError) as error:
            raise UsageError(
                "--ray-address or RAY_ADDRESS must name a Ray cluster that can be reached: HOST:6379, or auto. "
                f"Received: {address}: {error}"
            ) from error
    if threading.current_thread() is threading.main_thread():
        # Ray has put a handler of its own in its place, which ends the process without unwinding it.
        signal.signal(signal.SIGTERM, on_sigterm)
    try:
        yield
    finally:
        ray.shutdown()


def _reach(address: str) -> None:
    """Raise `OSError` where nobody listens; Ray itself would try for minutes. `ValueError` for what is no address."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    with socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_TIMEOUT_S):
        pass
