"""One frozen dataclass per job. Making one validates its values and touches nothing outside itself.

Every URL is a local path or any fsspec URL (`s3://bucket/prefix`, `memory://x`, ...). `catdog.cli` makes the command
line from these classes: a field is a flag, and its docstring is the flag's help.
"""

from catdog.config.checks import flag
from catdog.config.choices import EngineName, Executor, Precision, Split
from catdog.config.dataset import PrepareConfig
from catdog.config.labelling import (
    CompactConfig,
    CompareConfig,
    ConvertConfig,
    EvaluateConfig,
    PredictConfig,
    VerifyConfig,
)
from catdog.config.serving import ServeConfig
from catdog.config.training import TrainConfig
from catdog.config.trials import (
    BenchChaosConfig,
    BenchNightlyChaosConfig,
    BenchPlanConfig,
    BenchPredictConfig,
    BenchServeConfig,
    BenchStartupConfig,
    BenchTrainConfig,
    DemoConfig,
)
from catdog.config.tuning import TuneConfig

__all__ = [
    "BenchChaosConfig",
    "BenchNightlyChaosConfig",
    "BenchPlanConfig",
    "BenchPredictConfig",
    "BenchServeConfig",
    "BenchStartupConfig",
    "BenchTrainConfig",
    "CompactConfig",
    "CompareConfig",
    "ConvertConfig",
    "DemoConfig",
    "EngineName",
    "EvaluateConfig",
    "Executor",
    "Precision",
    "PredictConfig",
    "PrepareConfig",
    "ServeConfig",
    "Split",
    "TrainConfig",
    "TuneConfig",
    "VerifyConfig",
    "flag",
]
