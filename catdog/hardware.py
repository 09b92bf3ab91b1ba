"""What this process may use of the machine: CPU cores, number formats, GPUs."""

import math
import os
import socket
from pathlib import Path
from typing import Final

from catdog.errors import UsageError

_CPU_INFO: Final = Path("/proc/cpuinfo")
_CGROUPS: Final = Path("/proc/self/cgroup")
_CGROUP_ROOT: Final = Path("/sys/fs/cgroup")

_WITHOUT_BFLOAT16: Final = ("SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX512_CORE", "AVX512_CORE_VNNI")
"""Values of `ONEDNN_MAX_CPU_ISA` that keep oneDNN, and so TensorFlow, from the CPU's bfloat16 instructions."""


def num_cores() -> int:
    """Number of CPU cores that this process may use: those it may run on, or its container's share if that is less.

    The number is at least 1. The share is the CPU quota of the process's cgroups (version 1 or 2), rounded up.
    """
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _cgroup_quota()
    return allowed if quota is None else max(1, min(allowed, math.ceil(quota)))


def _cgroup_quota() -> float | None:
    """The smallest CPU quota, in cores, of the process's cgroups and their ancestors; None where none has a quota."""
    try:
        lines = _CGROUPS.read_text().splitlines()
    except OSError:
        return None
    quotas = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            quotas += _quotas(_CGROUP_ROOT, path, ("cpu.max",))
        elif "cpu" in controllers.split(","):
            for mount in {controllers, "cpu"}:
                quotas += _quotas(_CGROUP_ROOT / mount, path, ("cpu.cfs_quota_us", "cpu.cfs_period_us"))
    return min(quotas, default=None)


def _quotas(root: Path, path: str, names: tuple[str, ...]) -> list[float]:
    """The CPU quotas, in cores, of the cgroup `path` and of its ancestors up to `root`.

    In a container, `root` may be the container's own cgroup, below which there is no `path`. A missing directory counts
    as one without a quota.
    """
    found = []
    directory = root / path.strip("/")
    for cgroup in (directory, *directory.parents):
        try:
            quota, period = " ".join((cgroup / name).read_text() for name in names).split()
        except (OSError, ValueError):
            quota = period = "max"
        if quota.isdigit() and period.isdigit():
            found.append(int(quota) / int(period))
        if cgroup == root:
            break
    return found


def has_bfloat16() -> bool:
    """Whether this is an x86 CPU with bfloat16 instructions, and `ONEDNN_MAX_CPU_ISA` does not forbid them."""
    if os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper() in _WITHOUT_BFLOAT16:
        return False
    return bool(set(_cpu_info("flags").split()) & {"avx512_bf16", "amx_bf16"})


def cpu_name() -> str:
    """The model name of the CPU; `unknown` where the machine does not tell it."""
    return _cpu_info("model name") or "unknown"


def _cpu_info(field: str) -> str:
    """A field of the first CPU in `/proc/cpuinfo`; empty where the file or the field is missing."""
    try:
        lines = _CPU_INFO.read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == field), "")


def tensorflow_has_bfloat16() -> bool:
    """Whether the first GPU that TensorFlow may use has bfloat16 instructions, or else the CPU.

    An NVIDIA GPU has them from compute capability 8.0 on.
    """
    import tensorflow as tf

    gpus = tf.config.get_visible_devices("GPU")
    if not gpus:
        return has_bfloat16()
    capability = tf.config.experimental.get_device_details(gpus[0]).get("compute_capability", (0, 0))
    return bool(capability >= (8, 0))


def configure_tensorflow(*, num_threads: int, num_parallel: int, use_gpu: bool) -> None:
    """Tell TensorFlow which cores and GPUs it may use. This has no effect once TensorFlow has begun to compute.

    Args:
        num_threads: number of cores that share one operation.
        num_parallel: number of operations that run at the same time.
        use_gpu: whether TensorFlow may see this process's GPUs. If it sees them, it takes all memory of all of them.

    Raises:
        UsageError: TensorFlow is to use a GPU, and finds none. It would compute on the CPU without a word.
    """
    import tensorflow as tf

    if use_gpu and not tf.config.list_physical_devices("GPU"):
        raise UsageError(
            "--use-gpu needs a GPU, its driver, and CUDA's libraries, which pip install 'tensorflow[and-cuda]' brings. "
            f"Received: TensorFlow finds no GPU on {socket.gethostname()}"
        )
    try:
        tf.config.threading.set_intra_op_parallelism_threads(num_threads)
        tf.config.threading.set_inter_op_parallelism_threads(num_parallel)
        if not use_gpu:
            tf.config.set_visible_devices([], "GPU")
    except RuntimeError:
        return
