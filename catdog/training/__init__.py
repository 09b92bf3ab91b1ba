"""Training a model: the per-worker loop, its observers and checkpoints, and the Ray Train job around it."""

from catdog.training.request import ResolvedTrainConfig, resolve
from catdog.training.trainer import TrainRecord, train

__all__ = ["ResolvedTrainConfig", "TrainRecord", "resolve", "train"]
