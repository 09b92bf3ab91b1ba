"""One of a group of training workers, as a process of its own: `learner_worker.py RANK PORT,PORT,... OUTPUT`.

Takes a few steps on a fixed set of images, each worker on its share of every batch, and saves what it ended with.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

RUNS = (("plain", "float32"), ("normalized", "float32"), ("plain", "bfloat16"))
"""Architecture and precision; the results are called `plain-float32/after-model-0`, ..."""

NUM_STEPS, BATCH_SIZE, IMAGE_SIZE, CROP_SIZE = 6, 9, 48, 40

Arrays = dict[str, npt.NDArray[Any]]


def steps(arch: str, precision: str, rank: int, num_workers: int) -> Arrays:
    """What a worker has after its steps: losses, the model before and after its statistics are averaged, the average.

    The batch is odd: two workers have unequal shares.
    """
    from catdog.config import TrainConfig
    from catdog.training.feed import Share
    from catdog.training.step import Learner
    from catdog.training.trainer import resolve

    config = resolve(
        TrainConfig(data="-", output="-", arch=arch, batch_size=BATCH_SIZE, image_size=IMAGE_SIZE, epochs=1)
    )
    share = Share(rank=rank, num_workers=num_workers, batch_size=BATCH_SIZE)
    learner = Learner(config, share, steps_per_epoch=NUM_STEPS, precision=precision)

    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, (NUM_STEPS, BATCH_SIZE)).astype(np.int8)
    levels = 60 + 90 * labels[..., None, None, None]
    images = (levels + rng.integers(0, 60, (NUM_STEPS, BATCH_SIZE, IMAGE_SIZE, IMAGE_SIZE, 3))).astype(np.uint8)
    ours = slice(share.start, share.stop)
    totals = [
        learner.sum_over_workers(
            learner.train_step(images[step, ours], labels[step, ours], step=step, crop_size=CROP_SIZE)
        )
        for step in range(NUM_STEPS)
    ]
    before = learner.state()
    learner.average_moving_statistics()
    after = learner.state()
    logits = learner.logits(images[0])
    learner.sum_over_workers([0.0])  # Leave together: the first one serves the others.
    return {
        "totals": np.array(totals),
        "logits": logits,
        **{f"before-{i}": array for i, array in enumerate(before["model"])},
        **{f"after-{name}-{i}": array for name in ("model", "average") for i, array in enumerate(after[name])},
    }


def main(rank: int, ports: list[str], output: Path) -> None:
    addresses = [f"127.0.0.1:{port}" for port in ports]
    os.environ["TF_CONFIG"] = json.dumps({"cluster": {"worker": addresses}, "task": {"type": "worker", "index": rank}})
    import small_architectures
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    from catdog.architectures import ARCHITECTURES

    ARCHITECTURES.update(small_architectures.made())
    found = {
        f"{arch}-{precision}/{name}": array
        for arch, precision in RUNS
        for name, array in steps(arch, precision, rank, len(ports)).items()
    }
    np.savez(output, **found)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2].split(","), Path(sys.argv[3]))
