"""The model under `MultiWorkerMirroredStrategy`, and the steps it takes.

Keras 3's own `fit` does not run under that strategy (keras#20585), hence a step of our own. One worker runs the same
code, as a group of one.

Shapes: `B` images in this worker's share of a batch; `S` pixels per side; `C` = 3.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from catdog import architectures, augment
from catdog.config import Precision, TrainConfig

if TYPE_CHECKING:
    import tensorflow as tf

Arrays = list[npt.NDArray[Any]]


def resolve_precision(precision: Precision) -> str:
    """The precision to compute in on this machine: `auto` is bfloat16 where the hardware has it, else float32.

    An NVIDIA GPU has it from compute capability 8.0 on; an x86 CPU says so in its flags.
    """
    import tensorflow as tf

    if precision != "auto":
        return precision
    gpus = tf.config.list_physical_devices("GPU")
    if gpus:
        capability = tf.config.experimental.get_device_details(gpus[0]).get("compute_capability", (0, 0))
        return "bfloat16" if capability >= (8, 0) else "float32"
    if not os.path.exists("/proc/cpuinfo"):
        return "float32"
    with open("/proc/cpuinfo", encoding="utf-8") as info:
        flags = set(next((line for line in info if line.startswith("flags")), "").split())
    return "bfloat16" if flags & {"avx512_bf16", "amx_bf16"} else "float32"


class Learner:
    """One worker's model and optimizer, and the collective steps that train and measure them.

    Every worker of the group calls the same methods in the same order, except for `validate`, which is local.
    """

    def __init__(self, config: TrainConfig, *, num_steps: int, image_size: int, precision: str) -> None:
        """Build the model and the optimizer, the same on every worker.

        Args:
            config: its `None` fields are taken from the architecture's recipe.
            num_steps: optimizer steps in the whole training; the learning rate's schedule spans them.
            image_size: pixels per side that the model is fed in validation.
            precision: float32, bfloat16 or float16.
        """
        import keras
        import tensorflow as tf

        self.precision = precision
        self._config = config
        self._recipe = architectures.architecture(config.arch).recipe
        self._crop_size = round(self._recipe.train_scale * image_size)
        keras.utils.set_random_seed(config.seed)
        keras.config.set_dtype_policy("float32" if precision == "float32" else f"mixed_{precision}")
        self._strategy = tf.distribute.MultiWorkerMirroredStrategy()
        with self._strategy.scope():
            self.model = architectures.build_model(config.arch, image_size)
            self._logits_model = architectures.logits_model(self.model)
            self.optimizer = self._build_optimizer(num_steps)
            if precision == "float16":
                self.optimizer = keras.optimizers.LossScaleOptimizer(self.optimizer)
            self.optimizer.build(self.model.trainable_variables)
        self._moving_statistics = [
            variable
            for layer in self.model.layers
            if isinstance(layer, keras.layers.BatchNormalization)
            for variable in layer.non_trainable_variables
        ]
        images = tf.TensorSpec((None, image_size, image_size, 3), tf.uint8)
        labels = tf.TensorSpec((None,), tf.float32)
        self._run_train_step = self._compile(self._replica_train_step, images, labels, tf.TensorSpec((2,), tf.int32))
        self._run_validate = self._compile(self._replica_validate, images, labels)
        self._run_sum = self._compile(self._replica_sum, tf.TensorSpec((None,), tf.float64))

    def _build_optimizer(self, num_steps: int) -> Any:
        import keras

        recipe = self._recipe
        warmup_steps = max(1, round(recipe.warmup_fraction * num_steps))
        schedule = keras.optimizers.schedules.CosineDecay(
            initial_learning_rate=0.0,
            decay_steps=max(1, num_steps - warmup_steps),
            warmup_target=self._config.learning_rate or recipe.learning_rate,
            warmup_steps=warmup_steps,
        )
        optimizer = keras.optimizers.AdamW(schedule, weight_decay=recipe.weight_decay)
        optimizer.exclude_from_weight_decay(var_names=["bias", "gamma", "beta"])
        return optimizer

    def learning_rate(self) -> float:
        """The rate that the schedule has come to."""
        return float(self.optimizer.learning_rate)

    def train_step(
        self, images_BSSC: npt.NDArray[np.uint8], labels_B: npt.NDArray[np.int8], *, seed: tuple[int, int]
    ) -> tf.Tensor:
        """Take one optimizer step on the whole group's batch.

        Args:
            images_BSSC: this worker's share, 0 to 255; every worker's is as large.
            labels_B: class indices.
            seed: of the augmentation; differs from worker to worker and from step to step.

        Returns:
            float32 (2,), this worker's sum of losses and count of right answers.
        """
        return self._run_train_step(images_BSSC, labels_B.astype(np.float32), np.asarray(seed, np.int32))

    def validate(self, images_BSSC: npt.NDArray[np.uint8], labels_B: npt.NDArray[np.int8]) -> tf.Tensor:
        """The sum of losses and the count of right answers, float32 (2,), with the weights as they are. Local."""
        return self._run_validate(images_BSSC, labels_B.astype(np.float32))

    def sum_over_workers(self, values: npt.ArrayLike) -> npt.NDArray[np.float64]:
        """The sum of every worker's `values`, float64, the same on every worker. All give the same shape."""
        array = np.asarray(values, np.float64)
        return np.asarray(self._run_sum(array.ravel())).reshape(array.shape)

    def average_moving_statistics(self) -> None:
        """Give every worker the mean of all workers' BatchNormalization statistics.

        Each worker normalises its own share of a batch, so the moving statistics drift apart, unlike the weights.
        Synchronising them in every step instead took 23 % of `resnet`'s images per second and 6 % of `cnn`'s, with two
        workers of one core each.
        """
        if self._moving_statistics:
            flat = np.concatenate([np.ravel(variable.numpy()) for variable in self._moving_statistics])
            mean = self.sum_over_workers(flat) / self._strategy.num_replicas_in_sync
            sizes = np.cumsum([int(np.prod(variable.shape)) for variable in self._moving_statistics])
            for variable, part in zip(self._moving_statistics, np.split(mean, sizes[:-1]), strict=True):
                variable.assign(part.reshape(variable.shape).astype(np.float32))

    def state(self) -> dict[str, Arrays]:
        """Everything that training changes: the model's variables, its random state included, and the optimizer's."""
        return {
            "model": [variable.numpy() for variable in self.model.variables],
            "optimizer": [variable.numpy() for variable in self.optimizer.variables],
        }

    def load_state(self, state: dict[str, Arrays]) -> None:
        """Take over what `state` returned. Shapes that differ are an error."""
        for variables, arrays in (
            (self.model.variables, state["model"]),
            (self.optimizer.variables, state["optimizer"]),
        ):
            for variable, array in zip(variables, arrays, strict=True):
                variable.assign(array)

    # What each replica computes. A worker drives one replica: one GPU, or the CPU.

    def _compile(self, replica_fn: Any, *signature: Any) -> Any:
        import tensorflow as tf

        return tf.function(lambda *args: self._strategy.run(replica_fn, args), input_signature=signature)

    def _replica_train_step(self, images_BSSC: tf.Tensor, labels_B: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
        import tensorflow as tf

        if self._config.augment:
            inputs = augment.random_views(
                images_BSSC,
                crop_size=self._crop_size,
                min_area=self._recipe.min_area,
                rotation_deg=self._recipe.rotation_deg,
                seed=seed,
            )
        else:
            inputs = tf.cast(images_BSSC, tf.float32)
        smoothing = self._recipe.label_smoothing
        targets_B = labels_B * (1 - smoothing) + 0.5 * smoothing
        replica = tf.distribute.get_replica_context()
        global_batch_size = tf.cast(tf.shape(labels_B)[0] * replica.num_replicas_in_sync, tf.float32)
        weights = self.model.trainable_variables
        with tf.GradientTape() as tape:
            logits_B = self._logits_model(inputs, training=True)[:, 0]
            losses_B = tf.nn.sigmoid_cross_entropy_with_logits(labels=targets_B, logits=logits_B)
            loss = self.optimizer.scale_loss(tf.reduce_sum(losses_B) / global_batch_size)
        gradients = tape.gradient(loss, weights)
        # One collective for all gradients: on a network a few large messages are faster than many small ones.
        flat = replica.all_reduce("SUM", tf.concat([tf.reshape(gradient, [-1]) for gradient in gradients], axis=0))
        parts = tf.split(flat, [weight.shape.num_elements() for weight in weights])
        summed = [tf.reshape(part, weight.shape) for part, weight in zip(parts, weights, strict=True)]
        self.optimizer.apply(summed, weights)
        return tf.stack([tf.reduce_sum(losses_B), _num_correct(logits_B, labels_B)])

    def _replica_validate(self, images_BSSC: tf.Tensor, labels_B: tf.Tensor) -> tf.Tensor:
        import tensorflow as tf

        logits_B = self._replica_logits(images_BSSC)
        losses_B = tf.nn.sigmoid_cross_entropy_with_logits(labels=labels_B, logits=logits_B)
        return tf.stack([tf.reduce_sum(losses_B), _num_correct(logits_B, labels_B)])

    def _replica_logits(self, images_BSSC: tf.Tensor) -> tf.Tensor:
        import tensorflow as tf

        return self._logits_model(tf.cast(images_BSSC, tf.float32), training=False)[:, 0]

    def _replica_sum(self, values: tf.Tensor) -> tf.Tensor:
        import tensorflow as tf

        # The reduction goes where its input is; an argument is nowhere yet.
        return tf.distribute.get_replica_context().all_reduce("SUM", tf.identity(values))


def _num_correct(logits_B: tf.Tensor, labels_B: tf.Tensor) -> tf.Tensor:
    import tensorflow as tf

    return tf.reduce_sum(tf.cast((logits_B > 0) == (labels_B > 0.5), tf.float32))
