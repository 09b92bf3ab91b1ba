"""The configurations of the commands that try catdog out: `catdog demo` and `catdog bench ...`."""

from dataclasses import dataclass
from typing import Literal

from catdog.config import checks


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Draw pictures of cats and dogs, then prepare, train, predict and evaluate on them, on this machine."""

    output: str = "catdog-demo"
    """Directory to write everything to. An earlier demo there is replaced."""

    def __post_init__(self) -> None:
        """Validate."""
        checks.is_url(self, "output")


@dataclass(frozen=True, kw_only=True)
class BenchTrainConfig:
    """Measure how fast this machine trains, against the Keras tutorial, bare processes and one worker, in turns."""

    data: str
    """Dataset to train on, written by `catdog prepare`. Only its JPEG files are used."""

    output: str
    """Directory to write bench.json to. An earlier bench.json there is replaced."""

    image_size: int | None = None
    """Pixels per side of the images. The default is that of the network cnn, which is trained."""

    batch_size: int = 64
    """Images per training step and worker. The tutorial trains on as many per step as all workers together."""

    num_workers: int | None = None
    """Number of workers, each on one core. The default is one per core. The tutorial has all cores in one process."""

    num_images: int = 2048
    """Training images per epoch, over all workers together, rounded down to whole batches."""

    num_rounds: int = 3
    """Number of times that everything is measured. The figures are medians."""

    def __post_init__(self) -> None:
        """Validate."""
        checks.is_url(self, "data", "output")
        checks.at_least(self, 1, "batch_size", "num_workers", "num_images", "num_rounds")
        checks.at_least(self, 32, "image_size")


@dataclass(frozen=True, kw_only=True)
class BenchChaosConfig:
    """Kill the workers of a training over and over, and compare its model with that of an undisturbed training."""

    data: str
    """Dataset to train on, written by `catdog prepare`."""

    output: str
    """Directory to write chaos.json and both models to. Earlier ones there are replaced."""

    num_kills: int = 20
    """Number of workers to kill with SIGKILL. The training is made long enough for them."""

    arch: str = "resnet"
    """Network to train, from random weights."""

    image_size: int = 48
    """Pixels per side of the images."""

    batch_size: int = 32
    """Images per training step, over all workers together."""

    num_workers: int = 2
    """Number of workers, each on one core."""

    checkpoint_steps: int = 20
    """Save a checkpoint after this many training steps at the latest. A kill costs no more steps than these."""

    streamed: bool = False
    """Decode the images anew in every epoch, as if they did not fit in memory."""

    seed: int = 0
    """Number that decides what the training draws at random, and which worker is killed when."""

    def __post_init__(self) -> None:
        """Validate."""
        checks.is_url(self, "data", "output", "arch")
        checks.at_least(self, 1, "num_kills", "batch_size", "num_workers", "checkpoint_steps")
        checks.at_least(self, 32, "image_size")


@dataclass(frozen=True, kw_only=True)
class BenchNightlyChaosConfig:
    """Kill the runs that label a growing collection over and over, and compare their rows with an undisturbed run's."""

    output: str
    """Directory to write nightly-chaos.json, the pictures and both sets of predictions to. Earlier ones there are
    replaced."""

    images: str | None = None
    """Where the pictures are, JPEG or PNG, of which the collection is made. The default is drawings."""

    model: str | None = None
    """Model bundle to label with, written by `catdog train`. The default is the model that comes with catdog."""

    executor: Literal["inline", "ray"] = "inline"
    """Where to label: inline, or ray, on a cluster that this command starts on this machine."""

    num_worker_kills: int = 100
    """Number of workers to kill with SIGKILL: the process that labels (inline), or an actor's (ray)."""

    num_driver_kills: int = 20
    """Number of runs to kill with SIGKILL."""

    num_overlaps: int = 20
    """Number of times that two runs are started at the same time."""

    num_compactions: int = 10
    """Number of times that the output is compacted beside a run. Every second compaction, about, is killed."""

    night_size: int = 1500
    """Number of pictures by which the collection grows, whenever less than that is left to label."""

    seed: int = 0
    """Number that decides what is killed when."""

    def __post_init__(self) -> None:
        """Validate."""
        checks.is_url(self, "images", "output", "model")
        checks.at_least(self, 0, "num_worker_kills", "num_driver_kills", "num_overlaps", "num_compactions")
        checks.at_least(self, 1, "night_size")


@dataclass(frozen=True, kw_only=True)
class BenchPredictConfig:
    """Measure how fast this machine labels, against Keras, Daft and Ray Data, whole processes in turns."""

    images: str
    """Where the images are, as for `catdog predict`. The others get them as files in a folder."""

    output: str
    """Directory to write predict.json and predict.png to. Earlier ones there are replaced."""

    model: str | None = None
    """Model bundle to label with, written by `catdog train`. The default is the model that comes with catdog."""

    rounds: int = 5
    """Number of times that everything is measured. The figures are medians."""

    def __post_init__(self) -> None:
        """Validate."""
        checks.is_url(self, "images", "output", "model")
        checks.at_least(self, 1, "rounds")


@dataclass(frozen=True, kw_only=True)
class BenchServeConfig:
    """Measure how fast this machine serves, against a plain server of FastAPI and Keras with the same weights."""

    images: str
    """Where the images are, as for `catdog predict`. At most 64 of them are sent, over and over."""

    output: str
    """Directory to write serve.json to. An earlier serve.json there is replaced."""

    model: str | None = None
    """Model bundle to label with, written by `catdog train`. The default is the model that comes with catdog."""

    seconds: float = 10.0
    """Seconds for which each server is asked with each number of clients."""

    rounds: int = 3
    """Number of times that everything is measured. The figures are medians."""

    def __post_init__(self) -> None:
        """Validate."""
        checks.is_url(self, "images", "output", "model")
        checks.at_least(self, 1, "rounds")
        checks.require(self.seconds > 0, "--seconds must be above 0", self.seconds)


@dataclass(frozen=True, kw_only=True)
class BenchStartupConfig:
    """Measure how long one photograph takes from the shell, against the import of the libraries that it needs."""

    output: str
    """Directory to write startup.json to. An earlier startup.json there is replaced."""

    images: str | None = None
    """A photograph. The default is a drawing."""

    model: str | None = None
    """Model bundle to label with, written by `catdog train`. The default is the model that comes with catdog."""

    rounds: int = 5
    """Number of times that everything is measured. The figures are medians."""

    def __post_init__(self) -> None:
        """Validate."""
        checks.is_url(self, "images", "output", "model")
        checks.at_least(self, 1, "rounds")


@dataclass(frozen=True, kw_only=True)
class BenchPlanConfig:
    """Measure how long listing and planning take, and how much memory, as a collection in a simulated S3 grows."""

    output: str
    """Directory to write plan.json to. An earlier plan.json there is replaced."""

    num_objects: int = 10_000_000
    """Objects in the largest collection. Those before it have 10,000, 100,000, and so on."""

    layout: Literal["flat", "deep", "hashed"] = "deep"
    """Names of the objects: flat (all in one folder, numbered), deep (folders of years, months, days and cameras), or
    hashed (all in one folder, named by digests)."""

    page_ms: int = 50
    """Milliseconds that a request takes besides the work of this machine. S3 takes 50 to 100 for a page of 1,000."""

    def __post_init__(self) -> None:
        """Validate."""
        checks.is_url(self, "output")
        checks.at_least(self, 1, "num_objects")
        checks.at_least(self, 0, "page_ms")
