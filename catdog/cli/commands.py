"""The table of commands: the configuration class of each and the function that runs it."""

from dataclasses import dataclass
from typing import Final

from catdog.config import (
    BenchChaosConfig,
    BenchNightlyChaosConfig,
    BenchPlanConfig,
    BenchPredictConfig,
    BenchServeConfig,
    BenchStartupConfig,
    BenchTrainConfig,
    CompactConfig,
    CompareConfig,
    ConvertConfig,
    DemoConfig,
    EvaluateConfig,
    PredictConfig,
    PrepareConfig,
    ServeConfig,
    TrainConfig,
    TuneConfig,
    VerifyConfig,
)


@dataclass(frozen=True)
class Command:
    """A configuration class and the function that runs it, imported only to run."""

    config_type: type
    module: str
    function: str
    example: str


COMMANDS: Final = {
    "demo": Command(DemoConfig, "catdog.demo", "run_demo", "catdog demo --output catdog-demo"),
    "prepare": Command(PrepareConfig, "catdog.dataset", "prepare", "catdog prepare --images train.zip --output data"),
    "train": Command(
        TrainConfig,
        "catdog.training",
        "train",
        "catdog train --data data --output model --arch resnet --num-workers 2",
    ),
    "tune": Command(
        TuneConfig,
        "catdog.tuning",
        "tune",
        "catdog tune --data data --output search --arch cnn --num-trials 30 --max-hours 2",
    ),
    "evaluate": Command(
        EvaluateConfig,
        "catdog.evaluation",
        "evaluate",
        "catdog evaluate --data data --model model --output evaluation",
    ),
    "predict": Command(
        PredictConfig,
        "catdog.inference",
        "predict",
        "catdog predict --images s3://bucket/new --model s3://bucket/model --output s3://bucket/predictions",
    ),
    "serve": Command(ServeConfig, "catdog.serving", "serve", "catdog serve --model s3://bucket/model --port 8000"),
    "convert": Command(ConvertConfig, "catdog.conversion", "convert", "catdog convert model --data data"),
    "verify": Command(VerifyConfig, "catdog.inference", "run_verify", "catdog verify s3://bucket/predictions"),
    "compact": Command(
        CompactConfig, "catdog.inference.compaction", "compact", "catdog compact s3://bucket/predictions"
    ),
    "compare": Command(
        CompareConfig,
        "catdog.inference.comparison",
        "compare",
        "catdog compare predictions predictions-2 --output compare.html",
    ),
    "bench train": Command(
        BenchTrainConfig,
        "catdog.bench.train",
        "bench_train",
        "catdog bench train --data data --output bench",
    ),
    "bench chaos": Command(
        BenchChaosConfig,
        "catdog.bench.chaos",
        "bench_chaos",
        "catdog bench chaos --data data --output chaos --num-kills 20",
    ),
    "bench nightly-chaos": Command(
        BenchNightlyChaosConfig,
        "catdog.bench.nightly_chaos",
        "bench_nightly_chaos",
        "catdog bench nightly-chaos --output chaos",
    ),
    "bench plan": Command(BenchPlanConfig, "catdog.bench.plan", "bench_plan", "catdog bench plan --output plan"),
    "bench predict": Command(
        BenchPredictConfig,
        "catdog.bench.predict",
        "bench_predict",
        "catdog bench predict --images photos --output bench",
    ),
    "bench serve": Command(
        BenchServeConfig,
        "catdog.bench.serve",
        "bench_serve",
        "catdog bench serve --images photographs --output bench",
    ),
    "bench startup": Command(
        BenchStartupConfig,
        "catdog.bench.startup",
        "bench_startup",
        "catdog bench startup --output startup",
    ),
}
"""By name: one word, or two of which the first is shared by a group."""
