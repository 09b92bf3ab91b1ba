"""The architectures: for each name a Keras model, the recipe that trains it, and pretrained weights if there are any.

Every model takes RGB pixels of 0 to 255, shape (B, H, W, 3), and scales them itself. It ends in a layer `logits`,
float32 (B, 1), the logit of class 1 (`dog`), and a sigmoid layer `prob_dog`. An architecture that can start from
published weights has a nested model for them, its backbone.
"""

from catdog.architectures.fast_layers import in_bfloat16
from catdog.architectures.models import (
    LOGITS_LAYER,
    PROBABILITY_LAYER,
    backbone_layer,
    backbone_variables,
    build_model,
    calibrated,
    exported,
    features_model,
    load_trained,
    logits_model,
    mirrored_network,
    scoring_network,
)
from catdog.architectures.registry import ARCHITECTURES, Architecture, Recipe, architecture
from catdog.architectures.weights import Classifier, classifier, fetch_weights, load_weights, weights_source

__all__ = [
    "ARCHITECTURES",
    "LOGITS_LAYER",
    "PROBABILITY_LAYER",
    "Architecture",
    "Classifier",
    "Recipe",
    "architecture",
    "backbone_layer",
    "backbone_variables",
    "build_model",
    "calibrated",
    "classifier",
    "exported",
    "features_model",
    "fetch_weights",
    "in_bfloat16",
    "load_trained",
    "load_weights",
    "logits_model",
    "mirrored_network",
    "scoring_network",
    "weights_source",
]
