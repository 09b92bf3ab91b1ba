"""The architectures, and the recipe that each is trained with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Final

from catdog.architectures.backbones import BACKBONES, Backbone
from catdog.architectures.scratch import RESNET_DEPTH, cnn_features, resnet_features
from catdog.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How an architecture is trained unless the command line says otherwise."""

    image_size: int
    """Pixels per side of the images that the model takes in validation and inference."""

    crop_scales: tuple[float, ...] = (1.0,)
    """Sides of the training crops as shares of `image_size`. The epochs are divided evenly among them, in order. Random
    crops make objects look larger than whole pictures do; smaller crops in training even that out (Touvron et al. 2019,
    "Fixing the train-test resolution discrepancy"). To begin with still smaller ones is faster."""

    min_area: float
    """Lower bound of the share of the picture's area that a random training crop shows."""

    rotation_deg: float
    """Largest random rotation in degrees, to either side."""

    epochs: int
    batch_size: int
    """Images per optimizer step, of all workers together."""

    learning_rate: float
    """Peak of AdamW's learning rate."""

    weight_decay: float
    """AdamW's decoupled weight decay, which applies to kernels only."""

    label_smoothing: float = 0.0

    distillation_weight: float = 0.0
    """Weight, in the loss, of how far the network's answers for ImageNet's classes are from the published network's."""

    cutmix_area: float = 0.0
    """Largest share of a training image that a patch from another image covers; 0 for no patches."""

    average_decay: float = 0.998
    """Decay per step of the running average of the weights, which remembers 1 / (1 - decay) steps."""

    mirror: bool = False
    """Whether the saved model averages the logits of each image and its mirror image, at twice the cost."""

    head_epochs: int = 0
    """How many of the epochs, the first ones, train only the head. The gradients of a new head would harm a pretrained
    backbone, which is frozen until then."""

    head_learning_rate: float = 1e-3
    """AdamW's learning rate in the `head_epochs`."""


@dataclass(frozen=True)
class Architecture:
    """A network, without its last layer, and its recipe."""

    name: str
    build_features: Callable[..., Any]
    """Turns symbolic pixels, (B, H, W, 3), scaled to -1..1 or as the backbone expects, into features, (B, F). Where
    there is a `usual_depth`, it takes `depth` and `width`, too."""

    fixed_size: bool
    """Whether the shapes of the weights depend on the image size."""

    recipe: Recipe
    backbone: Backbone | None = None
    """The published network that the architecture contains; None if it is trained from scratch."""

    min_image_size: int = 32
    """Smallest image size, in pixels per side. A smaller image would leave no pixel for the last layers."""

    usual_depth: int | None = None
    """Number of residual blocks unless the command line says otherwise; None where depth and width are fixed."""

    @property
    def usual_width(self) -> float | None:
        """Multiple of the usual numbers of channels unless the command line says otherwise; None as `usual_depth`."""
        return None if self.usual_depth is None else 1.0

    @property
    def has_backbone(self) -> bool:
        """Whether there are pretrained weights for the architecture."""
        return self.backbone is not None


_FINE_TUNING: Final = Recipe(
    image_size=224,
    crop_scales=(0.8,),
    min_area=0.35,
    rotation_deg=10,
    epochs=4,
    batch_size=64,
    learning_rate=1e-4,
    weight_decay=0.05,
    label_smoothing=0.05,
    head_epochs=1,
)

# The published files of EfficientNet-Lite have the classifier, those of keras.applications do not.
_LITE: Final = replace(_FINE_TUNING, epochs=5, distillation_weight=0.3)

_RECIPES: Final = {
    "vgg16": replace(_FINE_TUNING, learning_rate=3e-5),
    "resnet50": _FINE_TUNING,
    "mobilenetv2": replace(_FINE_TUNING, learning_rate=2e-4),
    "efficientnetv2b0": replace(_FINE_TUNING, learning_rate=2e-4),
    "convnext_tiny": replace(_FINE_TUNING, learning_rate=5e-5),
    "efficientnet_lite0": replace(_LITE, image_size=224),
    "efficientnet_lite1": replace(_LITE, image_size=240),
    "efficientnet_lite2": replace(_LITE, image_size=240),
}

ARCHITECTURES: Final = {
    architecture.name: architecture
    for architecture in (
        Architecture(
            "cnn",
            cnn_features,
            fixed_size=True,
            min_image_size=46,
            recipe=Recipe(
                image_size=150,
                min_area=0.6,
                rotation_deg=15,
                epochs=30,
                batch_size=128,
                learning_rate=1e-3,
                weight_decay=0.01,
            ),
        ),
        Architecture(
            "resnet",
            resnet_features,
            fixed_size=False,
            usual_depth=RESNET_DEPTH,
            recipe=Recipe(
                image_size=160,
                crop_scales=(0.4, 0.5, 0.6, 0.7, 0.8),
                min_area=0.35,
                rotation_deg=10,
                epochs=60,
                batch_size=128,
                learning_rate=4e-3,
                weight_decay=0.05,
                label_smoothing=0.05,
                cutmix_area=0.3,
                mirror=True,
            ),
        ),
        *(
            Architecture(name, backbone.features, fixed_size=False, recipe=_RECIPES[name], backbone=backbone)
            for name, backbone in BACKBONES.items()
        ),
    )
}


def architecture(name: str) -> Architecture:
    """The architecture of that name. Raises `UsageError` for an unknown name."""
    try:
        return ARCHITECTURES[name]
    except KeyError:
        known = ", ".join(ARCHITECTURES)
        raise UsageError(f"--arch must be one of {known}. Received: --arch={name}") from None
