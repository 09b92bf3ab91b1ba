"""Joining a Ray cluster, or starting an embedded Ray on this machine."""

import contextlib
import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator
from typing import Final

from catdog import hardware
from catdog.errors import UsageError

logger = logging.getLogger(__name__)

CONNECT_TIMEOUT_S: Final = 10.0
"""Longest wait for the head of a cluster to answer."""


def cluster_address(ray_address: str | None) -> str | None:
    """The address of the cluster to join: `ray_address`, or else `RAY_ADDRESS`; None where Ray is to be embedded."""
    return ray_address or os.environ.get("RAY_ADDRESS") or None


@contextlib.contextmanager
def connect(ray_address: str | None, *, min_cpus: int = 1) -> Iterator[None]:
    """Join the cluster, or start an embedded Ray, for the length of a `with` block.

    An embedded Ray gets at least `min_cpus` logical CPUs, even on a machine with fewer cores: otherwise training
    workers that take every core would leave none for the tasks that feed them. A Ray that this process has joined
    already is used as it is, and left running.

    Raises:
        UsageError: there is no cluster at the address.
    """
    # Ray will make this value its default, and warns of that unless the variable is set.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    if ray.is_initialized():
        yield
        return
    address = cluster_address(ray_address)
    on_sigterm = signal.getsignal(signal.SIGTERM)
    if address is None:
        num_cpus = max(hardware.num_cores(), min_cpus)
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
                _check_reachable(address)
            ray.init(address=address, logging_level=logging.WARNING)
        except (OSError, RuntimeError, ValueError) as error:
            raise UsageError(
                "--ray-address or RAY_ADDRESS must name a Ray cluster that can be reached: HOST:6379, or auto. "
                f"Received: {address}: {error}"
            ) from error
    if threading.current_thread() is threading.main_thread():
        # Ray has installed its own handler, which ends the process without running `finally` blocks.
        signal.signal(signal.SIGTERM, on_sigterm)
    try:
        yield
    finally:
        ray.shutdown()


def _check_reachable(address: str) -> None:
    """Check that something listens at an address. Ray itself would try for minutes.

    Raises:
        OSError: nothing listens there.
        ValueError: it is not an address.
    """
    host, _, port = address.removeprefix("ray://").rpartition(":")
    with socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_TIMEOUT_S):
        pass
