"""A small Ray of its own for a test module, and nodes that join it. (PYTEST_DONT_REWRITE: no asserts here.)"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import ray

from catdog import scratch
from catdog.ray_session import _MAX_BASE_BYTES

UNSHARED: Final = ("unshare", "--user", "--map-root-user", "--mount", "sh", "-c")
"""The beginning of a command line that runs a shell script in a namespace of mounts of its own."""

_JOIN_TIMEOUT_S: Final = 60


@contextlib.contextmanager
def small_ray(num_cpus: int) -> Iterator[None]:
    """Run an embedded Ray of so many logical CPUs, whose files lie in a directory of its own."""
    with scratch.directory("ray", parent=scratch.short_base(_MAX_BASE_BYTES)) as directory:
        ray.init(
            address="local",
            num_cpus=num_cpus,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="ERROR",
            _temp_dir=directory,
        )
        yield
        ray.shutdown()


def can_hide() -> bool:
    """Whether this machine gives us namespaces of mounts."""
    with contextlib.suppress(OSError):
        return not subprocess.run([*UNSHARED, "mount -t tmpfs none /mnt"], capture_output=True).returncode
    return False


@contextlib.contextmanager
def joined_node(num_cpus: int, hidden: Sequence[Path] = (), *, num_gpus: int = 0) -> Iterator[int]:
    """A node that joins the Ray of this process, as if it were another machine. Gives the id of its first process.

    Args:
        num_cpus: how many logical CPUs it brings.
        hidden: directories in whose place this node sees empty ones.
        num_gpus: how many GPUs it says it has.

    Raises:
        TimeoutError: it does not join.
    """
    mounts = [f"mount -t tmpfs none '{directory}'" for directory in hidden]
    line = [str(Path(sys.executable).parent / "ray"), "start", f"--address={ray.get_runtime_context().gcs_address}"]
    # This is another address than that of the first node: a driver looks for the node of its own address.
    line += [
        "--node-ip-address=127.0.0.2",
        f"--num-cpus={num_cpus}",
        f"--num-gpus={num_gpus}",
        "--object-store-memory=100000000",
        "--block",
    ]
    if hidden:
        line = [*UNSHARED, " && ".join([*mounts, 'exec "$0" "$@"']), *line]
    num_before = num_living_nodes()
    quiet = subprocess.DEVNULL
    with subprocess.Popen(line, start_new_session=True, stdout=quiet, stderr=quiet) as process:
        try:
            _wait_for_nodes(num_before + 1)
            yield process.pid
            process.terminate()  # `ray start --block` ends its own processes, and no others
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(20)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    _wait_for_nodes(num_before)


def num_living_nodes() -> int:
    """Number of nodes that the Ray of this process has now."""
    return sum(node["Alive"] for node in ray.nodes())


def _wait_for_nodes(num_nodes: int) -> None:
    deadline = time.monotonic() + _JOIN_TIMEOUT_S
    while num_living_nodes() != num_nodes:
        if time.monotonic() > deadline:
            raise TimeoutError(f"{num_living_nodes()} nodes instead of {num_nodes}")
        time.sleep(0.1)
