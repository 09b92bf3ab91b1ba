"""The configuration of `catdog train`."""

import math
from dataclasses import dataclass
from typing import Literal

from catdog.config import checks
from catdog.config.choices import Precision


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Train a model on a dataset, and write a model bundle."""

    data: str
    """Dataset to train on, written by `catdog prepare`."""

    output: str
    """Directory to write the model bundle to. The same command again goes on with a training that was interrupted."""

    arch: str | None = None
    """Network to train; the default is resnet, or with --from the network of that model. From scratch: cnn (the classic
    Conv2D/MaxPooling/Flatten/Dense), resnet (a small residual network). From weights that are pretrained on ImageNet:
    efficientnet_lite0, efficientnet_lite1, efficientnet_lite2, mobilenetv2, efficientnetv2b0, resnet50, convnext_tiny,
    vgg16."""

    weights: str | None = None
    """Weights to start from: none (random), imagenet, or the path or URL of a weights file. The default is imagenet for
    a network that has pretrained weights, else none."""

    from_: str | None = None
    """Model bundle to start from, in the place of --weights: one that `catdog train` wrote, of the same network. The
    training is a new one, of --epochs epochs, and needs an --output of its own."""

    epochs: int | None = None
    """Number of passes over the training images. The default is the network's own."""

    head_epochs: int | None = None
    """Number of epochs, counted from the first, that train only the new last layer of a pretrained network. The default
    is the network's own."""

    batch_size: int | None = None
    """Images per training step, over all workers together. The default is the network's own, or less for few images."""

    image_size: int | None = None
    """Pixels per side that the model sees of each image. The default is the network's own."""

    learning_rate: float | None = None
    """Highest learning rate of Adam, reached after a warm-up. The default is the network's own."""

    weight_decay: float | None = None
    """Weight decay of AdamW, which applies to kernels alone. The default is the network's own."""

    label_smoothing: float | None = None
    """Share of every label that is spread over both classes, from 0 to below 1. The default is the network's own."""

    distillation_weight: float | None = None
    """Weight, in the loss, of how far the network's answers for ImageNet's 1,000 classes are from those of the
    published network. With it, EfficientNet-Lite keeps what it knows of other things than cats and dogs. The default is
    the network's own."""

    depth: int | None = None
    """Number of residual blocks of resnet, the only network that takes this flag. The default is 5."""

    width: float | None = None
    """Number of channels of resnet, as a multiple of its usual ones: 0.5 halves them. The default is 1."""

    augment: bool = True
    """Vary the training images at random: flip, rotate, zoom, shift and recolour them; also cut them into smaller crops
    and mix them (cutmix), where the network's recipe says so."""

    augment_strength: float = 1.0
    """How much the training images are rotated, recoloured and mixed, as a multiple of what the network's recipe says:
    from 0, which still flips and crops them, to 3."""

    min_area: float | None = None
    """Smallest share of an image's area that a random crop shows in training: above 0, and at most 1, with which only
    the crop's shape varies. The default is the network's own."""

    shuffle: bool = True
    """Visit the training images in a new random order in every epoch."""

    class_weights: Literal["none", "auto"] = "none"
    """auto gives the rarer class more weight, as if there were as many cats as dogs. The probabilities then are those
    of such a collection, too."""

    early_stopping: int | None = None
    """Stop when the validation loss has not fallen for so many epochs, and keep the model of the epoch in which it was
    lowest. The figures on the validation split are then too good: measure on the test split. The default is to train
    all epochs."""

    review_precision: float = 0.995
    """Share of right labels that you want among images that nobody looks at. It sets the confidence below which an
    image `needs_review`."""

    num_workers: int = 1
    """Number of workers that train together, each on its share of every batch."""

    min_workers: int | None = None
    """Go on with as few workers as this while the cluster has no room for --num-workers, and grow again when it has.
    The default is --num-workers."""

    cpus_per_worker: int = 1
    """CPU cores that each worker computes on."""

    use_gpu: bool = False
    """Give each worker a GPU of its own. Without this flag no GPU is used."""

    precision: Precision = "auto"
    """Number format in which the layers compute; the weights stay float32. auto takes bfloat16 where the hardware has
    it, else float32."""

    checkpoint_steps: int = 1000
    """Save a checkpoint after this many training steps at the latest. There is one after every epoch, too."""

    max_failures: int = 3
    """Number of restarts, in a row and without a new checkpoint in between, after which the training fails."""

    seed: int = 0
    """Number that decides the initial weights, the order of the images and how they are varied."""

    ray_address: str | None = None
    """Address of the Ray cluster to run on. The default is `RAY_ADDRESS`, else a Ray embedded on this machine."""

    def __post_init__(self) -> None:
        """Validate."""
        checks.is_url(self, "data", "output", "arch", "weights", "from_")
        checks.at_least(
            self,
            1,
            "epochs",
            "early_stopping",
            "batch_size",
            "num_workers",
            "min_workers",
            "cpus_per_worker",
            "checkpoint_steps",
        )
        checks.at_least(self, 32, "image_size")
        checks.at_least(self, 1, "depth")
        checks.at_least(self, 0, "head_epochs", "max_failures", "seed")
        checks.require(self.seed < 2**31, f"--seed must be below {2**31}", self.seed)
        checks.require(
            0.5 <= self.review_precision < 1,
            "--review-precision must be at least 0.5 and below 1",
            self.review_precision,
        )
        rate = self.learning_rate
        checks.require(
            rate is None or (rate > 0 and math.isfinite(rate)), "--learning-rate must be a finite number above 0", rate
        )
        self._check_recipe()
        checks.in_order(self, "num_workers", "batch_size")
        checks.in_order(self, "min_workers", "num_workers")
        checks.in_order(self, "head_epochs", "epochs")

    def _check_recipe(self) -> None:
        """Validate what stands in the place of a network's recipe."""
        decay, smoothing, strength, area, width = (
            self.weight_decay,
            self.label_smoothing,
            self.augment_strength,
            self.min_area,
            self.width,
        )
        checks.require(
            decay is None or 0 <= decay < math.inf, "--weight-decay must be a finite number of at least 0", decay
        )
        checks.require(
            smoothing is None or 0 <= smoothing < 1, "--label-smoothing must be at least 0 and below 1", smoothing
        )
        distillation = self.distillation_weight
        checks.require(
            distillation is None or 0 <= distillation < math.inf,
            "--distillation-weight must be a finite number of at least 0",
            distillation,
        )
        checks.require(0 <= strength <= 3, "--augment-strength must lie between 0 and 3", strength)
        checks.require(area is None or 0 < area <= 1, "--min-area must be above 0 and at most 1", area)
        checks.require(width is None or 0.125 <= width <= 8, "--width must lie between 0.125 and 8", width)
