"""The configuration of `catdog tune`."""

import math
from dataclasses import dataclass
from typing import Literal

from catdog.config import checks
from catdog.config.choices import Precision


@dataclass(frozen=True, kw_only=True)
class TuneConfig:
    """Search the settings of `catdog train` that suit a dataset best, with many trainings, most of them short."""

    data: str
    """Dataset to train and to validate on, written by `catdog prepare`."""

    output: str
    """Directory to write the trials to. The same command again goes on with a search that was interrupted, and repeats
    no trial that is finished."""

    num_trials: int
    """Number of settings to try. A search that is done goes on if you give a larger number."""

    max_hours: float | None = None
    """Hours after which no training goes on, over all runs of the command. The default is to try all settings."""

    arch: str | None = None
    """Network to tune, as for `catdog train`. The default is resnet."""

    weights: str | None = None
    """Weights to start from, as for `catdog train`: none, imagenet, or the path or URL of a weights file."""

    space: str | None = None
    """TOML file that says what to search: a table for each setting, with min and max (and log = true for a range of
    orders of magnitude), or with choices. The default is a space for the network; --dry-run prints it."""

    epochs: int | None = None
    """Number of epochs of a training that is not stopped early. The default is the network's own."""

    batch_size: int | None = None
    """Images per training step. The default is the network's own, or less for few images."""

    image_size: int | None = None
    """Pixels per side that the model sees of each image, for all trials. The default is to search it, or else the
    network's own."""

    class_weights: Literal["none", "auto"] = "none"
    """As for `catdog train`: auto gives the rarer class more weight."""

    cpus_per_trial: int = 1
    """CPU cores that each trial computes on. As many trials as there is room for run at the same time."""

    use_gpu: bool = False
    """Give each trial a GPU of its own. Without this flag no GPU is used."""

    precision: Precision = "auto"
    """Number format in which the layers compute; the weights stay float32. auto takes bfloat16 where the hardware has
    it, else float32."""

    train_best: bool = False
    """In the end, train a model with the best settings, and write its bundle to the folder `model` of --output."""

    num_workers: int = 1
    """Number of workers that train the model of --train-best together."""

    seed: int = 0
    """Number that decides which settings are tried, and everything that the trainings draw at random."""

    ray_address: str | None = None
    """Address of the Ray cluster to run on. The default is `RAY_ADDRESS`, else a Ray embedded on this machine."""

    def __post_init__(self) -> None:
        """Validate."""
        checks.is_url(self, "data", "output", "arch", "weights", "space")
        checks.at_least(self, 1, "num_trials", "epochs", "batch_size", "cpus_per_trial", "num_workers")
        checks.at_least(self, 32, "image_size")
        checks.at_least(self, 0, "seed")
        checks.require(self.seed < 2**31, f"--seed must be below {2**31}", self.seed)
        hours = self.max_hours
        checks.require(hours is None or 0 < hours < math.inf, "--max-hours must be a finite number above 0", hours)
        if self.num_workers > 1:
            checks.require(self.train_best, "--num-workers needs --train-best", self.num_workers)
