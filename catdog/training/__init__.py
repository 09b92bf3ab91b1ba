"""Training a model: the per-worker loop, its checkpoints, and the Ray Train job around it."""

from catdog.training.trainer import train

__all__ = ["train"]
