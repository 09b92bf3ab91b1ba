"""Distillation: the published network teaches the one in training to keep what it knows of ImageNet's classes.

Li and Hoiem, "Learning without forgetting" (TPAMI 2018), with the published classifier on the features of both. These
then still tell cats and dogs from other things (`catdog.neither`).

Shapes: `B` images; `T` pixels per side; `F` features.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from catdog import architectures

if TYPE_CHECKING:
    import keras
    import tensorflow as tf


class Teacher:
    """A published network and its classifier."""

    def __init__(self, published: keras.Model, classifier: architectures.Classifier) -> None:
        """Take a network that `architectures.build_model` made, with the published weights, and their classifier."""
        self._published = architectures.features_model(published)
        self._classifier = classifier

    def distances(self, images_BTTC: tf.Tensor, features_BF: tf.Tensor) -> tf.Tensor:
        """How far the answers that features give are from the teacher's: Kullback-Leibler divergence, float32 (B,).

        Args:
            images_BTTC: pixels, 0 to 255.
            features_BF: what the network in training makes of them.
        """
        import tensorflow as tf

        _, published_BF = self._published(images_BTTC, training=False)
        taught_BK = tf.stop_gradient(self._log_probabilities(published_BF))
        found_BK = self._log_probabilities(features_BF)
        return tf.reduce_sum(tf.exp(taught_BK) * (taught_BK - found_BK), axis=1)

    def _log_probabilities(self, features_BF: tf.Tensor) -> tf.Tensor:
        import tensorflow as tf

        logits_BK = tf.cast(features_BF, tf.float32) @ self._classifier.kernel_FC + self._classifier.bias_C
        return tf.nn.log_softmax(logits_BK)
