"""Name → Keras model, its preprocessing included, the recipe it is trained with, and pretrained weights for it.

Every model takes RGB pixels of 0 to 255, shape (B, H, W, 3), and ends in a layer `logits`, float32 (B, 1), of class 1
(`dog`), followed by a sigmoid `prob_dog`. An architecture that can start from published weights holds them in a nested
model, its backbone.
"""

from catdog.architectures.fast_layers import in_bfloat16
from catdog.architectures.models import (
    LOGITS_LAYER,
    PROBABILITY_LAYER,
    backbone_layer,
    backbone_variables,
    build_model,
    exported,
    logits_model,
)
from catdog.architectures.registry import ARCHITECTURES, Architecture, Recipe, architecture
from catdog.architectures.weights import fetch_weights, load_weights, weights_source

__all__ = [
    "ARCHITECTURES",
    "LOGITS_LAYER",
    "PROBABILITY_LAYER",
    "Architecture",
    "Recipe",
    "architecture",
    "backbone_layer",
    "backbone_variables",
    "build_model",
    "exported",
    "fetch_weights",
    "in_bfloat16",
    "load_weights",
    "logits_model",
    "weights_source",
]
