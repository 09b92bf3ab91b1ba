"""One of a group of training workers, as a process of its own: `learner_worker.py RANK PORT,PORT,... ARCH OUTPUT`.

Takes a few steps on a fixed set of images, each worker on its share of every batch, and saves what it ended with.
"""

import json
import os
import sys
from pathlib import Path

NUM_STEPS, BATCH_SIZE, IMAGE_SIZE = 6, 8, 48


def main(rank: int, ports: list[str], arch: str, output: Path) -> None:
    num_workers = len(ports)
    addresses = [f"127.0.0.1:{port}" for port in ports]
    os.environ["TF_CONFIG"] = json.dumps({"cluster": {"worker": addresses}, "task": {"type": "worker", "index": rank}})
    import numpy as np
    from keras import layers

    from catdog import architectures
    from catdog.config import TrainConfig
    from catdog.training.step import Learner

    def plain_features(x: layers.Layer) -> layers.Layer:
        x = layers.Conv2D(8, 3, strides=2, activation="tanh")(x)
        return layers.Dense(16, activation="tanh")(layers.Flatten()(layers.MaxPooling2D()(x)))

    recipe = architectures.architecture("cnn").recipe
    architectures.ARCHITECTURES["plain"] = architectures.Architecture("plain", plain_features, True, recipe)
    config = TrainConfig(data="unused", output="unused", arch=arch, augment=False, learning_rate=1e-3)
    learner = Learner(config, num_steps=NUM_STEPS, image_size=IMAGE_SIZE, precision="float32")

    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, (NUM_STEPS, BATCH_SIZE)).astype(np.int8)
    levels = 60 + 90 * labels[..., None, None, None]
    images = (levels + rng.integers(0, 60, (NUM_STEPS, BATCH_SIZE, IMAGE_SIZE, IMAGE_SIZE, 3))).astype(np.uint8)
    losses = []
    for step in range(NUM_STEPS):
        totals = learner.train_step(images[step, rank::num_workers], labels[step, rank::num_workers], seed=(0, step))
        losses.append(learner.sum_over_workers(np.asarray(totals)))
    before = learner.state()["model"]
    learner.average_moving_statistics()
    after = learner.state()["model"]
    np.savez(
        output,
        losses=losses,
        **{f"before-{i}": a for i, a in enumerate(before)},
        **{f"after-{i}": a for i, a in enumerate(after)},
    )
    learner.sum_over_workers([0.0])  # Leave together: the first one serves the others.


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2].split(","), sys.argv[3], Path(sys.argv[4]))
