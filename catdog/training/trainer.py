"""The driver of a training: checks, what the workers get, the record."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import tempfile
import time
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Final

from catdog import __version__, architectures, bundle, storage
from catdog.config import TrainConfig, to_dict
from catdog.dataset import reading
from catdog.errors import OutputRefusedError, UsageError
from catdog.ray_session import connect
from catdog.schema import CLASS_NAMES
from catdog.training import checkpoint
from catdog.training.schedule import resolved

if TYPE_CHECKING:
    from catdog.training.group import TrainLoop

logger = logging.getLogger(__name__)

_NOT_THE_RESULT: Final = (
    "output",
    "num_workers",
    "min_workers",
    "cpus_per_worker",
    "use_gpu",
    "checkpoint_steps",
    "max_failures",
    "ray_address",
)
"""Fields that may differ when a run is resumed: they are about where and how fast it computes."""

_LIBRARIES: Final = ("keras", "numpy", "pillow", "ray", "tensorflow")


def train(config: TrainConfig, *, in_memory: bool | None = None, train_loop: TrainLoop | None = None) -> dict[str, Any]:
    """Train a model, or go on with a training that was cut short, and write its bundle.

    Args:
        config: what to train, and how.
        in_memory: hold the decoded images in the object store, or stream them; default: whatever fits.
        train_loop: what every worker runs; default: `loop.train_loop`. For who watches it: `catdog.bench`.

    Returns:
        The run record: `model_id`, `output`, the last epoch's `metrics`, `calibration`, `epochs_trained`,
        `wall_seconds`, `resumed`.

    Raises:
        UsageError: the data cannot be trained on as configured, or the output holds something else.
        TrainingError: the workers kept failing, or the cluster cannot hold them.
    """
    started = time.monotonic()
    config = resolve(
        dataclasses.replace(config, data=storage.absolute(config.data), output=storage.absolute(config.output))
    )
    weights_url, config = config.weights or "none", _redacted(config)
    info = reading.load_info(config.data)
    _check_data(config, info)
    fingerprint = _fingerprint(config, info.digest)
    is_done = storage.exists(storage.join(config.output, bundle.CARD_NAME))
    resumed = _check_output(config, fingerprint, is_done=is_done)
    if is_done:
        logger.info("%s holds this very model already", config.output)
    else:
        if architectures.architecture(config.arch).has_backbone and config.weights == "none":
            logger.warning("%s is made to be fine-tuned: from random weights it learns badly", config.arch)
        weights = architectures.fetch_weights(config.arch, weights_url)
        if not resumed:
            record = {"command": "train", "fingerprint": fingerprint, "config": to_dict(config)}
            storage.publish_json(storage.join(config.output, checkpoint.CONFIG_NAME), record)
        _run(config, info, weights, in_memory, train_loop)
    # Not before the workers are gone: one group that starts late would find none and begin anew.
    checkpoint.delete_all(config.output)
    card, model_id = bundle.read_card(config.output)
    return {
        "command": "train",
        "output": config.output,
        "model_id": model_id,
        "arch": config.arch,
        "resumed": resumed,
        "wall_seconds": round(time.monotonic() - started, 1),
        **{
            name: card[name]
            for name in ("metrics", "calibration", "epochs_trained", "training_seconds", "durations_s", "precision")
        },
        "config": to_dict(config),
    }


def resolve(config: TrainConfig) -> TrainConfig:
    """Fill what was left to the architecture's recipe, and check the result.

    Raises:
        UsageError: an unknown architecture, or values that do not go together.
    """
    architecture = architectures.architecture(config.arch)
    weights = config.weights or ("imagenet" if architecture.has_backbone else "none")
    defaults: dict[str, Any] = {
        name: getattr(architecture.recipe, name)
        for name in ("epochs", "batch_size", "image_size", "learning_rate")
        if getattr(config, name) is None
    }
    epochs = config.epochs or architecture.recipe.epochs
    if config.head_epochs is None:
        defaults["head_epochs"] = 0 if weights == "none" else min(architecture.recipe.head_epochs, epochs)
    elif config.head_epochs and weights == "none":
        raise UsageError(f"--head-epochs needs pretrained --weights. Received: --head-epochs={config.head_epochs}")
    if weights not in ("none", "imagenet"):
        weights = storage.absolute(weights)
    config = dataclasses.replace(config, weights=weights, **defaults)
    if resolved(config.image_size) < architecture.min_image_size:
        raise UsageError(
            f"--image-size must be at least {architecture.min_image_size} for --arch {config.arch}. "
            f"Received: --image-size={config.image_size}"
        )
    return config


def _redacted(config: TrainConfig) -> TrainConfig:
    """Without the signature that the weights' URL may hold: this is published, and may be resumed with another."""
    return dataclasses.replace(config, weights=None if config.weights is None else storage.redact(config.weights))


def _check_data(config: TrainConfig, info: reading.DatasetInfo) -> None:
    for split in ("train", "val"):
        for name in CLASS_NAMES:
            if info.counts[split][name] == 0:
                raise UsageError(f"training needs images of both classes in {split}. Received: no {name} in {info.url}")
    num_train = info.num_images("train")
    if config.batch_size is not None and config.batch_size > num_train:
        raise UsageError(
            f"--batch-size must be at most the number of training images, {num_train}. "
            f"Received: --batch-size={config.batch_size}"
        )


def _fingerprint(config: TrainConfig, data_digest: str) -> str:
    """Of everything that decides the result."""
    fields = {name: value for name, value in to_dict(config).items() if name not in (*_NOT_THE_RESULT, "data")}
    encoded = json.dumps({"config": fields, "data": data_digest}, sort_keys=True)
    return hashlib.sha256(encoded.encode()).hexdigest()


def _check_output(config: TrainConfig, fingerprint: str, *, is_done: bool) -> bool:
    """Whether the output holds this very training. Refuses another one, unless that never got to a checkpoint."""
    storage.refuse_foreign_output(config.output, (checkpoint.CONFIG_NAME,), says={"command": "train"})
    url = storage.join(config.output, checkpoint.CONFIG_NAME)
    if not storage.exists(url):
        return False
    found = storage.read_json(url)
    if found["fingerprint"] == fingerprint:
        return True
    if is_done or checkpoint.latest_step(config.output) >= 0:
        raise OutputRefusedError(
            "--output must be empty, or hold a training with the same configuration and data. "
            f"Received: {config.output} with {_difference(found, config)}"
        )
    return False


def _difference(found: dict[str, Any], config: TrainConfig) -> str:
    ours = to_dict(config)
    differing = [
        f"{name}={value!r} instead of {ours.get(name)!r}"
        for name, value in found["config"].items()
        if name not in _NOT_THE_RESULT and value != ours.get(name)
    ]
    return ", ".join(differing) or "other data"


def _run(
    config: TrainConfig,
    info: reading.DatasetInfo,
    weights: bytes | None,
    in_memory: bool | None,
    train_loop: TrainLoop | None,
) -> None:
    num_cpus = config.num_workers * config.cpus_per_worker
    # Training workers hold their CPUs for good; the tasks that decode for them need some of their own.
    with (
        connect(config.ray_address, min_cpus=num_cpus + (os.cpu_count() or 1)),
        tempfile.TemporaryDirectory() as scratch,
    ):
        import ray

        from catdog.training import decoding, group, loop, progress

        group.check_resources(config)
        image_size = resolved(config.image_size)
        num_images = info.num_images("train") + info.num_images("val")
        if in_memory is None:
            in_memory = decoding.fits_in_memory(num_images, image_size, ray.nodes())
            if not in_memory:
                logger.info("The images are streamed: decoded, they do not fit in the object store of every node")
        train = decoding.source(info, "train", image_size, in_memory=in_memory)
        val = decoding.source(info, "val", image_size, in_memory=in_memory)
        # While tasks are waiting for CPUs the workers would not get theirs, and Ray Train would give up after a minute.
        decoding.wait_until_decoded(train, val)
        with progress.followed() as queue:
            plan = loop.Plan(
                config=config,
                steps_per_epoch=info.num_images("train") // resolved(config.batch_size),
                train=train,
                val=val,
                weights=None if weights is None else ray.put(weights),
                card={
                    "data_digest": info.digest,
                    "pretrained_weights": architectures.weights_source(config.arch, config.weights or "none"),
                    "versions": {"catdog": __version__, **{name: version(name) for name in _LIBRARIES}},
                },
                progress=queue,
            )
            group.run(plan, train_loop or loop.train_loop, scratch)
