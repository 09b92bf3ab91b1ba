"""Datasets: turning labelled images into checked, deduplicated, split shards, and reading these."""

from typing import TYPE_CHECKING

from catdog.config import PrepareConfig
from catdog.dataset.reading import DatasetInfo, check_shards, iter_split, load_info

if TYPE_CHECKING:
    from catdog.dataset.pipeline import PrepareRecord

__all__ = ["DatasetInfo", "check_shards", "iter_split", "load_info", "prepare"]


def prepare(config: PrepareConfig) -> "PrepareRecord":
    """Prepare a dataset. See `catdog.dataset.pipeline.run`."""
    from catdog.dataset.pipeline import run

    return run(config)
