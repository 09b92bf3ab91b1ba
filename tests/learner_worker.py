"""One of a group of training workers: `learner_worker.py RANK PORT,PORT,... ARCH PRECISION OUTPUT`.

It takes a few steps on a fixed set of images, each worker on its share of every batch, and saves what it ended with.
Every group has processes of its own: in one process TensorFlow 2.21 numbers the collectives of a second strategy as it
did those of the first, and on a busy machine now and then takes one for the other ("Shape mismatch in the collective").
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

NUM_STEPS, BATCH_SIZE, IMAGE_SIZE, CROP_SIZE = 6, 9, 48, 40

Arrays = dict[str, npt.NDArray[Any]]


def steps(arch: str, precision: str, rank: int, num_workers: int) -> Arrays:
    """What a worker has after its steps: losses, the model before and after its statistics are averaged, the average.

    The batch is odd: two workers have unequal shares.
    """
    from catdog.config import TrainConfig
    from catdog.training import resolve
    from catdog.training.feed import Share
    from catdog.training.step import Learner

    config = resolve(
        TrainConfig(data="-", output="-", arch=arch, batch_size=BATCH_SIZE, image_size=IMAGE_SIZE, epochs=1)
    )
    share = Share(rank=rank, num_workers=num_workers, batch_size=BATCH_SIZE)
    # The first worker's precision holds for all, whatever the others would choose.
    learner = Learner(config, share, steps_per_epoch=NUM_STEPS, precision=precision if rank == 0 else "float16")
    assert learner.precision == precision

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


def main(rank: int, ports: list[str], arch: str, precision: str, output: Path) -> None:
    addresses = [f"127.0.0.1:{port}" for port in ports]
    os.environ["TF_CONFIG"] = json.dumps({"cluster": {"worker": addresses}, "task": {"type": "worker", "index": rank}})
    import small_architectures

    from catdog import hardware
    from catdog.architectures import ARCHITECTURES

    hardware.configure_tensorflow(num_threads=1, num_parallel=1, use_gpu=False)
    ARCHITECTURES.update(small_architectures.made())
    np.savez(output, allow_pickle=False, **steps(arch, precision, rank, len(ports)))


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2].split(","), sys.argv[3], sys.argv[4], Path(sys.argv[5]))
