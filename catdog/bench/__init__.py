"""What training does on this machine: how fast it is, and how it takes to having its workers killed."""

from catdog.bench.chaos import bench_chaos
from catdog.bench.train import bench_train

__all__ = ["bench_chaos", "bench_train"]
