"""Raw images to a validated, grouped, split and sharded dataset, and the readers of its shards."""

from typing import Any

from catdog.config import PrepareConfig
from catdog.dataset.reading import DatasetInfo, check_shards, iter_split, load_info

__all__ = ["DatasetInfo", "check_shards", "iter_split", "load_info", "prepare"]


def prepare(config: PrepareConfig) -> dict[str, Any]:
    """Prepare a dataset; the run record. See `catdog.dataset.pipeline.run`."""
    from catdog.dataset.pipeline import run

    return run(config)
