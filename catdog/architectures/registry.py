"""Which architectures there are, and the recipe that each is trained with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Final

from catdog.architectures.backbones import BACKBONES, Backbone
from catdog.architectures.scratch import cnn_features, resnet_features
from catdog.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How an architecture is trained unless the command line says otherwise."""

    image_size: int
    """Pixels per side that the bundle's model is fed, in validation and inference."""

    crop_scales: tuple[float, ...] = (1.0,)
    """Sides of the training crops as shares of `image_size`, each for its part of the epochs. Random crops make objects
    look larger than whole pictures do; training smaller than testing evens that out (Touvron et al. 2019, "Fixing the
    train-test resolution discrepancy"). Beginning smaller still is faster."""

    min_area: float
    """Smallest share of the picture's area that a random training crop shows."""

    rotation_deg: float
    """Largest random rotation, either way, in degrees."""

    epochs: int
    batch_size: int
    """Images per optimizer step, over all workers."""

    learning_rate: float
    """Adam's peak rate."""

    weight_decay: float
    """Decoupled (AdamW), on kernels only."""

    label_smoothing: float = 0.0

    cutmix_area: float = 0.0
    """Largest share of a training image that a patch of another one covers; 0 for none."""

    average_decay: float = 0.998
    """Of the running average of the weights, per step: its memory is 1 / (1 - decay) steps long."""

    mirror: bool = False
    """Let the saved model average the logits of each image and its mirror image, at twice the cost."""

    head_epochs: int = 0
    """Epochs, of all, in which a pretrained backbone is frozen and only the head learns."""

    head_learning_rate: float = 1e-3
    """Adam's rate in those epochs. A new head's first gradients would harm a pretrained backbone."""


@dataclass(frozen=True)
class Architecture:
    """A named model body and its recipe."""

    name: str
    build_features: Callable[[Any], Any]
    """Symbolic pixels, scaled to -1..1 or as the backbone wants them, (B, H, W, 3), to features, (B, F)."""

    fixed_size: bool
    """Whether the weights' shapes depend on the image size."""

    recipe: Recipe
    backbone: Backbone | None = None
    """The published network within, which pretrained weights can be put into."""

    min_image_size: int = 32
    """Pixels per side below which no pixel is left to the last layers."""

    @property
    def has_backbone(self) -> bool:
        """Whether there are pretrained weights for it."""
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

_RECIPES: Final = {
    "vgg16": replace(_FINE_TUNING, learning_rate=3e-5),
    "resnet50": _FINE_TUNING,
    "mobilenetv2": replace(_FINE_TUNING, learning_rate=2e-4),
    "efficientnetv2b0": replace(_FINE_TUNING, learning_rate=2e-4),
    "convnext_tiny": replace(_FINE_TUNING, learning_rate=5e-5),
    "efficientnet_lite0": replace(_FINE_TUNING, image_size=224),
    "efficientnet_lite1": replace(_FINE_TUNING, image_size=240),
    "efficientnet_lite2": replace(_FINE_TUNING, image_size=240),
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
    """Look an architecture up. Raises `UsageError` for an unknown name."""
    try:
        return ARCHITECTURES[name]
    except KeyError:
        known = ", ".join(ARCHITECTURES)
        raise UsageError(f"--arch must be one of {known}. Received: --arch={name}") from None
