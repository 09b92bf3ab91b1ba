import contextlib
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from catdog.training.step import resolve_precision

WORKER = Path(__file__).with_name("learner_worker.py")
Arrays = dict[str, npt.NDArray[np.float64]]


def free_ports(num: int) -> list[str]:
    """Ports on which nobody listens."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(num)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [str(each.getsockname()[1]) for each in sockets]


def run_group(num_workers: int, arch: str, directory: Path) -> list[Arrays]:
    """What each worker of a group ended with."""
    ports = ",".join(free_ports(num_workers))
    outputs = [directory / f"{arch}-{num_workers}-{rank}.npz" for rank in range(num_workers)]
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}
    workers = [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(rank), ports, arch, str(output)],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, output in enumerate(outputs)
    ]
    errors = [worker.communicate(timeout=240)[1] for worker in workers]
    for worker, error in zip(workers, errors, strict=True):
        assert worker.returncode == 0, error
    return [dict(np.load(output)) for output in outputs]


def test_two_workers_compute_what_one_computes(tmp_path: Path) -> None:
    (alone,) = run_group(1, "plain", tmp_path)
    pair = run_group(2, "plain", tmp_path)
    for worker in pair:
        assert worker.keys() == alone.keys()
        for name, array in alone.items():
            np.testing.assert_allclose(worker[name], array, rtol=1e-4, atol=5e-5, err_msg=name)
    first, last = alone["losses"][0, 0], alone["losses"][-1, 0]
    assert last < first


def test_with_batch_normalization_all_workers_end_with_the_same_model(tmp_path: Path) -> None:
    one, other = run_group(2, "resnet", tmp_path)
    names = [name for name in one if name.startswith("after-")]
    for name in names:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)
    drifted = [name for name in names if not np.array_equal(one[f"before-{name[6:]}"], other[f"before-{name[6:]}"])]
    assert drifted, "the moving statistics of workers that saw different images must have differed before"


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_a_precision_that_is_asked_for_is_taken(precision: str) -> None:
    assert resolve_precision(precision) == precision


def test_auto_precision_follows_the_hardware() -> None:
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    expected = "bfloat16" if "avx512_bf16" in flags or "amx_bf16" in flags else "float32"
    assert resolve_precision("auto") == expected
