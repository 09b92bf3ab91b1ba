"""Architectures that are quick to build and to trace. (PYTEST_DONT_REWRITE: no asserts here.)"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import keras
from keras import layers

from catdog.architectures import ARCHITECTURES, Architecture, fast_layers
from catdog.architectures.backbones import Backbone, KerasWeights


def _plain(x: Any) -> Any:
    x = layers.Conv2D(8, 3, strides=2, activation="tanh")(x)
    return layers.Dense(16, activation="tanh")(layers.GlobalAveragePooling2D()(layers.MaxPooling2D()(x)))


def _normalized(x: Any) -> Any:
    return _plain(fast_layers.batch_normalization()(layers.Conv2D(4, 3)(x)))


def _mixed(x: Any) -> Any:
    x = layers.BatchNormalization()(layers.Conv2D(4, 3, strides=2)(x))
    return layers.Dropout(0.3)(layers.GlobalAveragePooling2D()(layers.ReLU()(x)))


def _network() -> keras.Model:
    pixels = keras.Input((None, None, 3))
    x = layers.Conv2D(4, 3, strides=2, use_bias=False)(pixels)
    x = layers.BatchNormalization()(x)
    return keras.Model(pixels, layers.Dropout(0.5)(layers.ReLU()(x)))


def made() -> dict[str, Architecture]:
    """By name.

    In `plain` the images of a batch do not meet, so that its gradients do not depend on who has which; in `normalized`
    they do. `mixed` has all that changes from step to step: normalization, dropout and cutmix. `with_backbone` stands
    for the published networks.
    """
    recipe = replace(ARCHITECTURES["resnet"].recipe, learning_rate=1e-3)
    recipe_of_lite = ARCHITECTURES["efficientnet_lite0"].recipe
    pretrained = replace(recipe_of_lite, epochs=2, learning_rate=0.01, distillation_weight=0.0)
    backbone = Backbone(
        build=_network, mean_rgb=(127.0,) * 3, std_rgb=(128.0,) * 3, weights=KerasWeights(path="nowhere", digest=None)
    )
    return {
        architecture.name: architecture
        for architecture in (
            Architecture("plain", _plain, False, replace(recipe, cutmix_area=0.0)),
            Architecture("normalized", _normalized, False, recipe),
            Architecture("mixed", _mixed, False, replace(recipe, average_decay=0.3, learning_rate=0.01)),
            Architecture("with_backbone", backbone.features, False, pretrained, backbone),
        )
    }
