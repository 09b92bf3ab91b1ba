"""One frozen dataclass per job. Making one validates its values and touches nothing outside itself.

Every URL is a local path or any fsspec URL (`s3://bucket/prefix`, `memory://x`, ...). The command line is made from
these classes by `catdog.cli`: a field is a flag, its docstring the flag's help.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

from catdog.errors import UsageError

Split = Literal["test", "val", "train"]
Precision = Literal["auto", "float32", "bfloat16", "float16"]
Executor = Literal["auto", "inline", "ray"]
EngineName = Literal["auto", "tensorflow"]


def flag(field: str) -> str:
    """The command-line flag of a field: `batch_size` is `--batch-size`."""
    return "--" + field.replace("_", "-")


def _require(condition: bool, rule: str, received: object) -> None:
    """Raise `UsageError` with the rule and what was received, unless `condition` holds. `rule` opens with the flag."""
    if not condition:
        name = rule.split()[0]
        raise UsageError(f"{rule}. Received: {name}={received}")


def _at_least(config: object, minimum: int, *fields: str) -> None:
    for field in fields:
        value = getattr(config, field)
        _require(value is None or value >= minimum, f"{flag(field)} must be at least {minimum}", value)


def _is_url(config: object, *fields: str) -> None:
    for field in fields:
        value = getattr(config, field)
        _require(value is None or bool(value.strip()), f"{flag(field)} must be a path or a URL", repr(value))


def _is_fraction(config: object, *fields: str) -> None:
    for field in fields:
        value = getattr(config, field)
        _require(0 <= value <= 1, f"{flag(field)} must lie between 0 and 1", value)


def to_dict(config: object) -> dict[str, Any]:
    """The resolved configuration as plain JSON values, as it is saved beside every result."""
    if not dataclasses.is_dataclass(config) or isinstance(config, type):
        raise TypeError(f"to_dict takes a configuration dataclass. Received: {config!r}")
    return dataclasses.asdict(config)


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """Raw images to a validated, grouped, split and sharded dataset."""

    images: str
    """Directory or prefix (recursive), glob, one file, a `.zip` read in place, or a Parquet manifest with a column
    `uri`."""

    output: str
    """Where the dataset is written: empty, or an earlier dataset of the same configuration."""

    labels: str = "auto"
    """auto | folder | prefix, or a CSV or Parquet file with the columns `uri` and `label`. auto takes the parent
    folder's name (`cat`, `dogs`, ...), else the file name's prefix (`cat.123.jpg`)."""

    val_fraction: float = 0.1
    """Share of the duplicate groups that go to the validation split."""

    test_fraction: float = 0.1
    """Share of the duplicate groups that go to the test split."""

    seed: int = 0
    """Chooses which groups go to which split."""

    ray_address: str | None = None
    """Cluster to run on; default: `RAY_ADDRESS`, else an embedded Ray on this machine."""

    def __post_init__(self) -> None:
        """Validate."""
        _is_url(self, "images", "output", "labels")
        _is_fraction(self, "val_fraction", "test_fraction")
        total = self.val_fraction + self.test_fraction
        if total >= 1:
            raise UsageError(
                "--val-fraction and --test-fraction must leave a share for training. "
                f"Received: --val-fraction={self.val_fraction} --test-fraction={self.test_fraction}"
            )


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A prepared dataset to a model bundle."""

    data: str
    """A dataset that `catdog prepare` wrote."""

    output: str
    """Where the model bundle is written. The same command again resumes a run that was killed."""

    arch: str = "resnet"
    """Architecture. From scratch: cnn (the classic Conv2D/MaxPooling/Flatten/Dense), resnet (small residual network).
    Transfer learning: efficientnet_lite0, efficientnet_lite1, efficientnet_lite2, mobilenetv2, efficientnetv2b0,
    resnet50, convnext_tiny, vgg16."""

    weights: str | None = None
    """none | imagenet, or a file of the backbone's weights, local or a URL; default: imagenet for transfer learning."""

    epochs: int | None = None
    """Epochs to train; default: the architecture's recipe."""

    head_epochs: int | None = None
    """Epochs, of all, in which a pretrained backbone is frozen and only the new head learns; default: the recipe."""

    batch_size: int | None = None
    """Images per optimizer step, over all workers; default: the architecture's recipe."""

    image_size: int | None = None
    """Pixels per side of the images the model takes; default: the architecture's recipe."""

    learning_rate: float | None = None
    """Adam's peak learning rate, after warm-up; default: the architecture's recipe."""

    augment: bool = True
    """Random flip, rotation, zoom, shift and colours on the training images; cutmix and small crops where the recipe
    has them."""

    shuffle: bool = True
    """Visit the training images in a new order every epoch."""

    review_precision: float = 0.995
    """Share of right labels, on validation data, among those that need no review: sets the bundle's threshold."""

    num_workers: int = 1
    """Data-parallel training workers."""

    min_workers: int | None = None
    """Go on with as few workers as this while the cluster holds no more, and grow back; default: --num-workers."""

    cpus_per_worker: int = 1
    """CPU cores, and so computing threads, per worker."""

    use_gpu: bool = False
    """Give each worker one GPU."""

    precision: Precision = "auto"
    """Of the layers' arithmetic; the weights stay float32. auto: bfloat16 where the hardware has it, else float32."""

    checkpoint_steps: int = 1000
    """Most optimizer steps between checkpoints; there is one after every epoch, too."""

    max_failures: int = 3
    """Restarts in a row, from the last checkpoint and without reaching another, before the job fails."""

    seed: int = 0
    """Of the initial weights, the order of images and the augmentation."""

    ray_address: str | None = None
    """Cluster to run on; default: `RAY_ADDRESS`, else an embedded Ray on this machine."""

    def __post_init__(self) -> None:
        """Validate."""
        _is_url(self, "data", "output", "arch", "weights")
        _at_least(self, 1, "epochs", "batch_size", "num_workers", "min_workers", "cpus_per_worker", "checkpoint_steps")
        _at_least(self, 32, "image_size")
        _at_least(self, 0, "head_epochs", "max_failures", "seed")
        _require(self.seed < 2**31, f"--seed must be below {2**31}", self.seed)
        _require(
            0.5 <= self.review_precision < 1,
            "--review-precision must be at least 0.5 and below 1",
            self.review_precision,
        )
        rate = self.learning_rate
        _require(
            rate is None or (rate > 0 and math.isfinite(rate)), "--learning-rate must be a finite number above 0", rate
        )
        for low, high in (("num_workers", "batch_size"), ("min_workers", "num_workers"), ("head_epochs", "epochs")):
            least, most = getattr(self, low), getattr(self, high)
            if least is not None and most is not None and least > most:
                raise UsageError(
                    f"{flag(low)} must be at most {flag(high)}. Received: {flag(low)}={least} {flag(high)}={most}"
                )


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """A model bundle and a labelled split to metrics and figures."""

    data: str
    """A dataset that `catdog prepare` wrote."""

    output: str
    """Where metrics.json and the figures are written."""

    model: str | None = None
    """A model bundle that `catdog train` wrote; default: the one that ships with catdog."""

    split: Split = "test"
    """Which of the dataset's splits to evaluate on."""

    batch_size: int = 64
    """Images per model call."""

    engine: EngineName = "auto"
    """What computes the model."""

    def __post_init__(self) -> None:
        """Validate."""
        _is_url(self, "data", "output", "model")
        _at_least(self, 1, "batch_size")


@dataclass(frozen=True, kw_only=True)
class PredictConfig:
    """A collection of images to Parquet predictions: only what is new is labelled."""

    images: str
    """Directory or prefix (recursive), glob, one file, a `.zip` read in place, or a Parquet manifest with a column
    `uri`."""

    output: str
    """Where the predictions are kept: empty, or the output of earlier runs, which is added to."""

    model: str | None = None
    """A model bundle that `catdog train` wrote; default: the one that ships with catdog."""

    executor: Executor = "auto"
    """inline: all cores of this machine, no Ray. ray: a Ray Data job. auto: ray where there is a cluster, else
    inline."""

    engine: EngineName = "auto"
    """What computes the model."""

    batch_size: int = 64
    """Images per model call."""

    num_workers: int | None = None
    """Labelling workers: decoding threads (inline) or actors of one CPU each (ray); default: one per CPU."""

    max_failed_fraction: float = 0.1
    """Exit 3 if a larger share of the images labelled by this run failed."""

    retry_errors: bool = False
    """Also label again the images that failed in earlier runs."""

    ray_address: str | None = None
    """Cluster to run on; default: `RAY_ADDRESS`, else an embedded Ray on this machine."""

    def __post_init__(self) -> None:
        """Validate."""
        _is_url(self, "images", "output", "model")
        _at_least(self, 1, "batch_size", "num_workers")
        _is_fraction(self, "max_failed_fraction")
        if self.executor == "inline" and self.ray_address is not None:
            raise UsageError(
                "--ray-address needs --executor ray or auto. "
                f"Received: --executor=inline --ray-address={self.ray_address}"
            )


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Draw pictures of cats and dogs, then prepare, train, predict and evaluate on them, embedded."""

    output: str = "catdog-demo"
    """Where everything is written; an earlier demo there is replaced."""

    def __post_init__(self) -> None:
        """Validate."""
        _is_url(self, "output")


@dataclass(frozen=True, kw_only=True)
class BenchTrainConfig:
    """How fast this machine trains: against the Keras tutorial, bare processes and one worker, alternating."""

    data: str
    """A dataset that `catdog prepare` wrote; its JPEG files are used."""

    output: str
    """Where bench.json is written; an earlier one there is replaced."""

    image_size: int | None = None
    """Pixels per side; default: the recipe of cnn, which is trained."""

    batch_size: int = 64
    """Images per optimizer step and worker. The tutorial's batch is that of all workers together."""

    num_workers: int | None = None
    """Training workers of one thread each; default: one per CPU core. The tutorial has all cores in one process."""

    num_images: int = 2048
    """Training images per epoch of all workers together, rounded down to whole batches."""

    num_rounds: int = 3
    """How often everything is measured; the figures are medians."""

    def __post_init__(self) -> None:
        """Validate."""
        _is_url(self, "data", "output")
        _at_least(self, 1, "batch_size", "num_workers", "num_images", "num_rounds")
        _at_least(self, 32, "image_size")


@dataclass(frozen=True, kw_only=True)
class BenchChaosConfig:
    """A training whose workers are killed over and over, against the same one undisturbed."""

    data: str
    """A dataset that `catdog prepare` wrote."""

    output: str
    """Where chaos.json and both models are written; earlier ones there are replaced."""

    num_kills: int = 20
    """Workers to kill, each with SIGKILL; the training is made long enough."""

    arch: str = "resnet"
    """Architecture, with randomly initialised weights."""

    image_size: int = 48
    """Pixels per side."""

    batch_size: int = 32
    """Images per optimizer step, over all workers."""

    num_workers: int = 2
    """Training workers of one thread each."""

    checkpoint_steps: int = 20
    """Most optimizer steps between checkpoints, and so the most that a kill may cost."""

    streamed: bool = False
    """Have the images decoded anew in every epoch, as if they did not fit in memory."""

    seed: int = 0
    """Of the training, and of when which worker is killed."""

    def __post_init__(self) -> None:
        """Validate."""
        _is_url(self, "data", "output", "arch")
        _at_least(self, 1, "num_kills", "batch_size", "num_workers", "checkpoint_steps")
        _at_least(self, 32, "image_size")
