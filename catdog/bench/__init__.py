"""How fast training is on this machine, and whether it withstands the killing of its workers."""

from catdog.bench.chaos import BenchChaosRecord, bench_chaos
from catdog.bench.train import BenchTrainRecord, bench_train

__all__ = ["BenchChaosRecord", "BenchTrainRecord", "bench_chaos", "bench_train"]
