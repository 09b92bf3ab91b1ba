"""What `catdog bench train` compares: roles, which return a row per epoch.

All train the same network on the same images with batches of the same size, on the CPU.

- `ray_train`: `catdog train`, on an embedded Ray. Its seconds are those of `history.csv`, input and computing: neither
  validation nor checkpoints count.
- `bare`: the same steps on the same batches without Ray, in one of a group of processes. Each has its batches ready in
  memory: there is no input to wait for.
- `tutorial`: the network in Keras's own layers and float32, trained on folders of JPEG files as in
  https://keras.io/examples/vision/image_classification_from_scratch, without its validation and checkpoints, with or
  without XLA. Its epochs begin with their first step: before it, TensorFlow 2.21 ends the threads of the epoch before,
  and every other time waits 20 s for the one that tunes the input pipeline.
"""

from __future__ import annotations

import csv
import io
import json
import os
import signal
import sys
import time
from typing import TYPE_CHECKING

import numpy as np

from catdog import architectures, hardware, storage
from catdog.architectures import fast_layers
from catdog.bench import processes
from catdog.bench.processes import Settings
from catdog.bench.train_record import Epoch
from catdog.config import TrainConfig
from catdog.dataset import reading
from catdog.training import ResolvedTrainConfig, resolve

if TYPE_CHECKING:
    import keras
    import tensorflow as tf


def train_config(settings: Settings) -> ResolvedTrainConfig:
    """What `ray_train` and `bare` train."""
    names = ("data", "output", "arch", "epochs", "batch_size", "image_size", "num_workers")
    return resolve(TrainConfig(weights="none", **{name: settings[name] for name in names}))


def ray_train(settings: Settings) -> list[Epoch]:
    """Train with `catdog train`."""
    from catdog.training import train

    # Ray's processes end with this one. The other contenders may be busy outside Python, and are ended by the signal.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    config = train_config(settings)
    train(config, in_memory=settings["in_memory"])
    history = csv.DictReader(io.StringIO(storage.read_text(storage.join(config.output, "history.csv"))))
    num_images = _num_steps(settings) * settings["batch_size"]
    return [
        {
            "num_images": num_images,
            "seconds": float(row["input_s"]) + float(row["compute_s"]),
            "input_s": float(row["input_s"]),
            "train_loss": float(row["train_loss"]),
        }
        for row in history
    ]


def bare(settings: Settings) -> list[Epoch]:
    """Train with the steps of a worker of Ray Train, in a loop of a few lines."""
    task = {"type": "worker", "index": settings["rank"]}
    os.environ["TF_CONFIG"] = json.dumps({"cluster": {"worker": settings["addresses"]}, "task": task})
    hardware.configure_tensorflow(num_threads=1, num_parallel=1, use_gpu=False)
    from catdog.training import decoding, feed
    from catdog.training.schedule import crop_size
    from catdog.training.step import Learner, resolve_precision

    config, num_steps, batch_size = train_config(settings), _num_steps(settings), settings["batch_size"]
    share = feed.Share(rank=settings["rank"], num_workers=settings["num_workers"], batch_size=batch_size)
    learner = Learner(config, share, steps_per_epoch=num_steps, precision=resolve_precision(config.precision))
    scales = architectures.architecture(config.arch).recipe.crop_scales
    chunks = decoding.chunks(reading.load_info(settings["data"]), "train")
    decoded = [decoding.decode_here(chunk, settings["image_size"]) for chunk in chunks]
    pixels_NSSC, labels_N = (np.concatenate(arrays) for arrays in zip(*decoded, strict=True))
    epochs = []
    for epoch in range(settings["epochs"]):
        order_N = np.random.default_rng((config.seed, epoch)).permutation(len(labels_N))
        rows = [order_N[step * batch_size + share.start : step * batch_size + share.stop] for step in range(num_steps)]
        batches = [(pixels_NSSC[rows_B], labels_N[rows_B]) for rows_B in rows]
        side = crop_size(scales, settings["image_size"], epoch, settings["epochs"])
        learner.sum_over_workers([0.0])  # begin together
        loss, started = 0.0, time.perf_counter()
        for step, (images_BSSC, labels_B) in enumerate(batches, start=epoch * num_steps):
            loss += float(learner.train_step(images_BSSC, labels_B, step=step, crop_size=side).numpy()[0])
        seconds = time.perf_counter() - started
        num_images = num_steps * batch_size
        total = float(learner.sum_over_workers([loss])[0])
        epochs.append({"num_images": num_images, "seconds": seconds, "input_s": 0.0, "train_loss": total / num_images})
        learner.average_moving_statistics()
    learner.sum_over_workers([0.0])  # leave together: the first one serves the others
    return epochs


def tutorial(settings: Settings) -> list[Epoch]:
    """Train as the tutorial does: `image_dataset_from_directory`, augmentation in the input pipeline, `model.fit`."""
    num_cores = hardware.num_cores()
    hardware.configure_tensorflow(num_threads=num_cores, num_parallel=num_cores, use_gpu=False)
    import keras
    import tensorflow as tf
    from keras import layers

    keras.utils.set_random_seed(0)
    dataset = keras.utils.image_dataset_from_directory(
        settings["pictures"],
        seed=0,
        image_size=(settings["image_size"], settings["image_size"]),
        batch_size=settings["batch_size"],
    )
    augmentation = [layers.RandomFlip("horizontal"), layers.RandomRotation(0.1)]

    def augmented(pixels_BSSC: tf.Tensor, labels_B: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        for layer in augmentation:
            pixels_BSSC = layer(pixels_BSSC, training=True)
        return pixels_BSSC, labels_B

    dataset = dataset.prefetch(32).map(augmented, num_parallel_calls=tf.data.AUTOTUNE).prefetch(tf.data.AUTOTUNE)
    model = fast_layers.with_stock_layers(architectures.build_model(settings["arch"], settings["image_size"]))
    model.compile(
        optimizer=keras.optimizers.Adam(1e-3),
        loss="binary_crossentropy",
        metrics=["accuracy"],
        jit_compile=settings["jit_compile"],
    )
    num_images = _num_steps(settings) * settings["batch_size"]
    epochs: list[Epoch] = []
    model.fit(dataset, epochs=settings["epochs"], callbacks=[_clock(num_images, epochs)], verbose=0)
    return epochs


def _clock(num_images: int, epochs: list[Epoch]) -> keras.callbacks.Callback:
    """Adds each epoch of Keras to the epochs. An epoch begins with its first step."""
    import keras

    started = 0.0

    def begin(step: int, logs: None) -> None:
        nonlocal started
        del logs
        if step == 0:
            started = time.perf_counter()

    def end(_epoch: int, logs: dict[str, float]) -> None:
        seconds = time.perf_counter() - started
        epochs.append({"num_images": num_images, "seconds": seconds, "input_s": 0.0, "train_loss": logs["loss"]})

    return keras.callbacks.LambdaCallback(on_train_batch_begin=begin, on_epoch_end=end)


def _num_steps(settings: Settings) -> int:
    """Steps per epoch. The number of images is a multiple of the batch size."""
    return reading.load_info(settings["data"]).num_images("train") // int(settings["batch_size"])


if __name__ == "__main__":
    processes.main(ray_train, bare, tutorial)
