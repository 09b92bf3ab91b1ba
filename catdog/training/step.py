"""The model under `MultiWorkerMirroredStrategy`, and the steps it takes.

Keras 3's own `fit` does not run under that strategy (keras#20585), hence a step of our own. One worker runs the same
code, as a group of one.

Shapes: `B` images in this worker's share of a batch; `S` pixels per side; `C` = 3.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from catdog import architectures, augment, hardware
from catdog.config import Precision
from catdog.training import schedule
from catdog.training.distillation import Teacher
from catdog.training.feed import Share
from catdog.training.request import ResolvedTrainConfig

if TYPE_CHECKING:
    import tensorflow as tf

Arrays = list[npt.NDArray[Any]]

PRECISIONS: Final = ("float32", "bfloat16", "float16")
"""Number formats of the layers' arithmetic. The weights are float32 with each of them."""


def resolve_precision(precision: Precision) -> str:
    """The precision to compute in on this machine: `auto` is bfloat16 where the hardware has it, else float32."""
    if precision != "auto":
        return precision
    return "bfloat16" if hardware.tensorflow_has_bfloat16() else "float32"


class Learner:
    """One worker's model, the running average of its weights, its optimizer, and the steps that train and measure them.

    Every worker of the group calls the same methods in the same order, except for `logits`, which is local.
    """

    def __init__(
        self,
        config: ResolvedTrainConfig,
        share: Share,
        *,
        steps_per_epoch: int,
        precision: str,
        class_weights: tuple[float, float] = (1.0, 1.0),
    ) -> None:
        """Build the model and the optimizer, the same on every worker.

        Args:
            config: what to train, and how.
            share: this worker's share of a batch.
            steps_per_epoch: optimizer steps per epoch; the learning rate's schedule spans all epochs.
            precision: one of `PRECISIONS`. The first worker's holds for the whole group.
            class_weights: the weight of an image of each class in the loss.
        """
        import keras
        import tensorflow as tf

        self._config = config
        self._share = share
        self._class_weights = class_weights
        self._recipe = architectures.architecture(config.arch).recipe
        image_size = config.image_size
        keras.utils.set_random_seed(config.seed)
        self._strategy = tf.distribute.MultiWorkerMirroredStrategy()
        self._run_sum = self._compile(self._replica_sum, tf.TensorSpec((None,), tf.float64))
        choice = PRECISIONS.index(precision) if share.rank == 0 else 0
        self.precision = PRECISIONS[int(self.sum_over_workers(choice))]
        keras.config.set_dtype_policy("float32" if self.precision == "float32" else f"mixed_{self.precision}")
        with self._strategy.scope():
            shape: dict[str, Any] = {"depth": config.depth, "width": config.width}
            self.model = architectures.build_model(config.arch, image_size, **shape)
            self._features_model = architectures.features_model(self.model)
            self.average = architectures.build_model(config.arch, image_size, **shape)
            """The model with the running average of the weights: what is validated and saved."""
            self._average_logits_model = architectures.logits_model(self.average)
            self.optimizer = self._build_optimizer(steps_per_epoch)
            if self.precision == "float16":
                self.optimizer = keras.optimizers.LossScaleOptimizer(self.optimizer)
            self.optimizer.build(self.model.trainable_variables)
        self.reset_average()
        self._averaged = [
            (average, variable)
            for average, variable in zip(self.average.variables, self.model.variables, strict=True)
            if tf.as_dtype(variable.dtype).is_floating
        ]
        self._moving_statistics = [
            variable
            for model in (self.model, self.average)
            for layer in model.layers
            if isinstance(layer, keras.layers.BatchNormalization)
            for variable in layer.non_trainable_variables
        ]
        self._images_spec = tf.TensorSpec((None, image_size, image_size, 3), tf.uint8)
        self._train_steps: dict[tuple[int, bool], Any] = {}
        self._run_logits = self._compile(self._replica_logits, self._images_spec)
        self._teacher: Teacher | None = None
        self.classifier: architectures.Classifier | None = None
        """The classifier of the published network, if the features of this one still mean what they meant to it."""

    def _build_optimizer(self, steps_per_epoch: int) -> Any:
        import keras

        recipe = self._recipe
        head_steps = self._config.head_epochs * steps_per_epoch
        rate = schedule.learning_rate_schedule(
            head_rate=recipe.head_learning_rate,
            head_steps=head_steps,
            peak_rate=self._config.learning_rate,
            num_steps=self._config.epochs * steps_per_epoch - head_steps,
        )
        optimizer = keras.optimizers.AdamW(rate, weight_decay=self._config.weight_decay)
        optimizer.exclude_from_weight_decay(var_names=["bias", "gamma", "beta"])
        return optimizer

    def reset_average(self) -> None:
        """Let the running average begin anew, at the weights as they are."""
        for average, variable in zip(self.average.variables, self.model.variables, strict=True):
            average.assign(variable)

    def learning_rate(self) -> float:
        """The rate that the schedule has come to."""
        return float(self.optimizer.learning_rate)

    def train_step(
        self,
        images_BSSC: npt.NDArray[np.uint8],
        labels_B: npt.NDArray[np.int8],
        *,
        step: int,
        crop_size: int,
        head_only: bool = False,
    ) -> tf.Tensor:
        """Take one optimizer step on the whole group's batch.

        Args:
            images_BSSC: this worker's share, 0 to 255.
            labels_B: class indices.
            step: counts from 0. It decides the augmentation, together with the configuration's seed.
            crop_size: pixels per side of the augmented images.
            head_only: leave the backbone as it is.

        Returns:
            float32 (2,), this worker's sum of losses, without those of distillation, and count of right answers.
        """
        import tensorflow as tf

        key = (crop_size, head_only)
        if key not in self._train_steps:
            self._train_steps[key] = self._compile(
                functools.partial(self._replica_train_step, crop_size=crop_size, head_only=head_only),
                self._images_spec,
                tf.TensorSpec((None,), tf.float32),
                tf.TensorSpec((2,), tf.int32),
            )
        seed = np.asarray((self._config.seed, step), np.int32)
        return self._train_steps[key](images_BSSC, labels_B.astype(np.float32), seed)

    def logits(self, images_BSSC: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """Logits of the averaged model, float32 (B,), as the saved model gives them. A worker may call this alone."""
        return np.asarray(self._run_logits(images_BSSC))

    def sum_over_workers(self, values: npt.ArrayLike) -> npt.NDArray[np.float64]:
        """The sum of all workers' `values`, float64; every worker gets the same. All `values` must have one shape."""
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
        """Everything that training changes: the model, its random state included, the optimizer, the average.

        The optimizer's variables hold the position in the learning rate's schedule.
        """
        return {name: _arrays(variables) for name, variables in self._variables().items()}

    def load_state(self, state: dict[str, Arrays]) -> None:
        """Take over what `state` returned. Shapes that differ are an error."""
        for name, variables in self._variables().items():
            _assign(variables, state[name])

    def distil(self, published: bytes) -> None:
        """From now on, train the network to answer as the published one does, too. Its file has its classifier."""
        self.classifier = architectures.classifier(published)
        with self._strategy.scope():
            teacher = architectures.build_model(self._config.arch, self._config.image_size)
        architectures.load_weights(teacher, self._config.arch, published)
        self._teacher = Teacher(teacher, self.classifier)

    def average_state(self) -> Arrays:
        """The running average, as it is in `state`."""
        return _arrays(self.average.variables)

    def load_average(self, arrays: Arrays) -> None:
        """Take over what `average_state` returned."""
        _assign(self.average.variables, arrays)

    def _variables(self) -> dict[str, list[Any]]:
        return {
            "model": self.model.variables,
            "optimizer": self.optimizer.variables,
            "average": self.average.variables,
        }

    # What each replica computes. A worker drives one replica: one GPU, or the CPU.

    def _compile(self, replica_fn: Any, *signature: Any) -> Any:
        import tensorflow as tf

        # No replica function branches or loops on a tensor's value; a file per function would be left for nothing.
        return tf.function(
            lambda *args: self._strategy.run(replica_fn, args), input_signature=signature, autograph=False
        )

    def _replica_train_step(
        self, images_BSSC: tf.Tensor, labels_B: tf.Tensor, seed: tf.Tensor, *, crop_size: int, head_only: bool
    ) -> tf.Tensor:
        import tensorflow as tf

        recipe, strength = self._recipe, self._config.augment_strength
        smoothing = self._config.label_smoothing
        targets_B = labels_B * (1 - smoothing) + 0.5 * smoothing
        if self._config.augment:
            rows = augment.Rows(self._share.start, self._share.stop, self._share.batch_size)
            inputs = augment.random_views(
                images_BSSC,
                crop_size=crop_size,
                min_area=self._config.min_area,
                rotation_deg=recipe.rotation_deg * strength,
                seed=seed,
                rows=rows,
                colour_strength=strength,
            )
            if cutmix_area := recipe.cutmix_area * strength:
                inputs, targets_B = augment.cutmix(inputs, targets_B, max_area=cutmix_area, seed=seed, rows=rows)
        else:
            inputs = tf.cast(images_BSSC, tf.float32)
        weights = self.model.trainable_variables
        if head_only:
            frozen = {id(weight) for weight in architectures.backbone_variables(self.model)}
            weights = [weight for weight in weights if id(weight) not in frozen]
        with tf.GradientTape() as tape:
            logits_B1, features_BF = self._features_model(inputs, training=True)
            logits_B = logits_B1[:, 0]
            losses_B = tf.nn.sigmoid_cross_entropy_with_logits(labels=targets_B, logits=logits_B)
            losses_B *= self._weights(targets_B)
            total = tf.reduce_sum(losses_B)
            if self._teacher is not None and not head_only:  # the head has no part in these answers
                distances_B = self._teacher.distances(inputs, features_BF)
                total += self._config.distillation_weight * tf.reduce_sum(distances_B)
            loss = self.optimizer.scale_loss(total / self._share.batch_size)
        gradients = tape.gradient(loss, weights)
        self.optimizer.apply(self._summed(gradients, weights), weights)
        self._follow()
        return tf.stack([tf.reduce_sum(losses_B), _num_correct(logits_B, labels_B)])

    def _weights(self, targets_B: tf.Tensor) -> tf.Tensor | float:
        """The weight of each image in the loss. An image that is mixed of both classes has a part of both weights."""
        of_cats, of_dogs = self._class_weights
        return 1.0 if of_cats == of_dogs == 1 else of_cats + (of_dogs - of_cats) * targets_B

    def _summed(self, gradients: list[tf.Tensor], weights: list[Any]) -> list[tf.Tensor]:
        """The gradients, summed over all workers."""
        import tensorflow as tf

        # One collective for each number format: on a network a few large messages are faster than many small ones.
        # What was computed in bfloat16 is sent in it, which is half as many bytes. One worker sends nothing.
        by_dtype: dict[tf.DType, list[int]] = {}
        for index, gradient in enumerate(gradients):
            is_sent_small = self._share.num_workers > 1 and _is_bfloat16(gradient)
            by_dtype.setdefault(tf.bfloat16 if is_sent_small else tf.float32, []).append(index)
        summed: dict[int, tf.Tensor] = {}
        for dtype, indices in by_dtype.items():
            flat = tf.cast(tf.concat([tf.reshape(gradients[index], [-1]) for index in indices], axis=0), dtype)
            flat = tf.cast(tf.distribute.get_replica_context().all_reduce("SUM", flat), tf.float32)
            parts = tf.split(flat, [weights[index].shape.num_elements() for index in indices])
            summed |= {
                index: tf.reshape(part, weights[index].shape) for index, part in zip(indices, parts, strict=True)
            }
        return [summed[index] for index in range(len(weights))]

    def _follow(self) -> None:
        """Move the average towards the weights."""
        import tensorflow as tf

        # The first steps count for more, since the average has little to remember yet: as TensorFlow's
        # ExponentialMovingAverage has it.
        done = tf.cast(self.optimizer.iterations, tf.float32)
        decay = tf.minimum(self._recipe.average_decay, (1.0 + done) / (10.0 + done))
        for average, variable in self._averaged:
            average.assign_add((1.0 - decay) * (variable.value - average.value))

    def _replica_logits(self, images_BSSC: tf.Tensor) -> tf.Tensor:
        import tensorflow as tf

        pixels = tf.cast(images_BSSC, tf.float32)
        logits_B = self._average_logits_model(pixels, training=False)[:, 0]
        if self._recipe.mirror:
            logits_B = (logits_B + self._average_logits_model(pixels[:, :, ::-1], training=False)[:, 0]) / 2
        return logits_B

    def _replica_sum(self, values: tf.Tensor) -> tf.Tensor:
        import tensorflow as tf

        # The sum is computed on the device that holds the input. An argument is on no device yet, its copy is.
        return tf.distribute.get_replica_context().all_reduce("SUM", tf.identity(values))


def _arrays(variables: list[Any]) -> Arrays:
    return [variable.numpy() for variable in variables]


def _assign(variables: list[Any], arrays: Arrays) -> None:
    for variable, array in zip(variables, arrays, strict=True):
        variable.assign(array)


def _is_bfloat16(gradient: tf.Tensor) -> bool:
    """Whether a float32 gradient was computed in bfloat16: what computes it does nothing but widen such numbers."""
    import tensorflow as tf

    return bool(gradient.op.type == "Cast" and gradient.op.inputs[0].dtype == tf.bfloat16)


def _num_correct(logits_B: tf.Tensor, labels_B: tf.Tensor) -> tf.Tensor:
    import tensorflow as tf

    return tf.reduce_sum(tf.cast((logits_B > 0) == (labels_B > 0.5), tf.float32))
