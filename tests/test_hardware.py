"""`catdog.hardware`: cores, bfloat16 and the CPU's name, read from system files that the tests write."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from catdog import hardware


@pytest.fixture
def cgroups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory that stands for `/sys/fs/cgroup`, on a host of 64 cores."""
    monkeypatch.setattr(hardware, "_CGROUP_ROOT", tmp_path)
    monkeypatch.setattr(hardware, "_CGROUPS", tmp_path / "self")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)), raising=False)
    return tmp_path


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_without_a_quota_all_cores_that_the_process_may_run_on(cgroups: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert hardware.num_cores() == 64
    write(cgroups / "self", "0::/\n")
    write(cgroups / "cpu.max", "max 100000\n")
    assert hardware.num_cores() == 64
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3}, raising=False)
    assert hardware.num_cores() == 1


@pytest.mark.parametrize(("quota", "num_cores"), [("200000", 2), ("150000", 2), ("10000", 1), ("9999999999", 64)])
def test_the_quota_of_a_container_version_2(cgroups: Path, quota: str, num_cores: int) -> None:
    write(cgroups / "self", "0::/\n")
    write(cgroups / "cpu.max", f"{quota} 100000\n")
    assert hardware.num_cores() == num_cores


def test_the_quota_of_a_group_above_counts_too(cgroups: Path) -> None:
    write(cgroups / "self", "0::/pods/one/container\n")
    write(cgroups / "pods/cpu.max", "800000 100000\n")
    write(cgroups / "pods/one/cpu.max", "300000 100000\n")
    write(cgroups / "pods/one/container/cpu.max", "max 100000\n")
    assert hardware.num_cores() == 3


@pytest.mark.parametrize("seen_at", ["cpu,cpuacct", "cpu,cpuacct/docker/12ab"])
def test_the_quota_of_a_container_version_1(cgroups: Path, seen_at: str) -> None:
    write(cgroups / "self", "5:cpuset:/\n4:cpu,cpuacct:/docker/12ab\n1:name=systemd:/\n")
    write(cgroups / seen_at / "cpu.cfs_quota_us", "400000\n")
    write(cgroups / seen_at / "cpu.cfs_period_us", "100000\n")
    assert hardware.num_cores() == 4
    write(cgroups / seen_at / "cpu.cfs_quota_us", "-1\n")
    assert hardware.num_cores() == 64


@pytest.mark.parametrize(
    ("flags", "limit", "expected"),
    [
        ("fpu avx2 avx512_bf16", "", True),
        ("fpu amx_bf16", "", True),
        ("fpu amx_bf16", "AVX512_CORE_BF16", True),
        ("fpu avx512_bf16 amx_bf16", "AVX2", False),
        ("fpu avx512_bf16", "avx512_core", False),
        ("fpu avx2", "", False),
    ],
)
def test_bfloat16_needs_a_cpu_that_has_it_and_may_be_forbidden(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: str, limit: str, expected: bool
) -> None:
    write(tmp_path / "cpuinfo", f"processor\t: 0\nmodel name\t: A CPU: fast\nflags\t\t: {flags}\n\nprocessor\t: 1\n")
    monkeypatch.setattr(hardware, "_CPU_INFO", tmp_path / "cpuinfo")
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
    assert hardware.has_bfloat16() is expected
    assert hardware.cpu_name() == "A CPU: fast"


def test_a_machine_that_tells_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "_CPU_INFO", tmp_path / "nowhere")
    assert (hardware.has_bfloat16(), hardware.cpu_name()) == (False, "unknown")


@pytest.mark.slow
def test_tensorflow_is_told_of_threads_and_gpus() -> None:
    code = """if True:
        from catdog import hardware
        import tensorflow as tf
        hardware.configure_tensorflow(num_threads=1, num_parallel=3, use_gpu=False)
        print(tf.config.threading.get_intra_op_parallelism_threads())
        print(tf.config.threading.get_inter_op_parallelism_threads())
        print(tf.config.get_visible_devices("GPU"))
        tf.constant(1) + 1
        hardware.configure_tensorflow(num_threads=5, num_parallel=5, use_gpu=False)  # too late, and no error
        print(tf.config.threading.get_intra_op_parallelism_threads())
    """
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.splitlines() == ["1", "3", "[]", "1"]
