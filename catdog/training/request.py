"""What is asked of a training: its configuration with nothing left open, its data, and the state of its output."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Final

from catdog import architectures, bundle, provenance, storage
from catdog.architectures import Architecture
from catdog.config import TrainConfig
from catdog.dataset import reading
from catdog.errors import BundleError, OutputRefusedError, TrainingError, UsageError
from catdog.provenance import redact
from catdog.schema import CLASS_NAMES
from catdog.training import checkpoint

_NOT_THE_RESULT: Final = (
    "output",
    "num_workers",
    "min_workers",
    "cpus_per_worker",
    "use_gpu",
    "checkpoint_steps",
    "max_failures",
    "ray_address",
    "from_",
)
"""Fields that may differ when a training is resumed: they say where and how fast it computes."""


_SINCE: Final = {
    "class_weights": "none",
    "early_stopping": None,
    "from_id": None,
    "augment_strength": 1.0,
    "distillation_weight": 0.0,
}
"""Fields that older versions did not have, and what they did. So a training that one of them began can be resumed."""

_OF_RECIPE: Final = ("weight_decay", "label_smoothing", "min_area")
"""Fields for which older versions took the value of the network's recipe. As with `depth` and `width`, that value has
no part in the fingerprint."""

_MIN_STEPS: Final = 4
"""Least number of steps of an epoch for which a recipe's batch size is kept."""


@dataclass(frozen=True, kw_only=True)
class ResolvedTrainConfig(TrainConfig):
    """A training's configuration with no field left to the architecture's recipe."""

    # `field()` takes away the default that the field has in `TrainConfig`.
    arch: str = field()
    weights: str = field()
    epochs: int = field()
    head_epochs: int = field()
    batch_size: int = field()
    image_size: int = field()
    learning_rate: float = field()
    weight_decay: float = field()
    label_smoothing: float = field()
    distillation_weight: float = field()
    min_area: float = field()
    from_id: str | None = None
    """The id of the model to start from."""


def resolve(config: TrainConfig) -> ResolvedTrainConfig:
    """Fill the fields that are left to the architecture's recipe, or to the model to start from, and check the result.

    Raises:
        UsageError: an unknown architecture, or values that do not go together.
        BundleError: there is no model to start from.
    """
    if config.weights is not None and config.from_ is not None:
        raise UsageError(
            "--weights and --from must not come together. "
            f"Received: --weights={redact(config.weights)} --from={redact(config.from_)}"
        )
    parent, parent_id = (None, None) if config.from_ is None else bundle.read_card(config.from_)
    arch = _arch(config, parent)
    architecture = architectures.architecture(arch)
    recipe = architecture.recipe
    weights = config.weights or ("imagenet" if architecture.has_backbone and parent is None else "none")
    if config.head_epochs and weights == "none" and parent is None:
        raise UsageError(f"--head-epochs needs pretrained --weights. Received: --head-epochs={config.head_epochs}")
    if config.distillation_weight and weights == "none":
        raise UsageError(
            "--distillation-weight needs pretrained --weights. "
            f"Received: --distillation-weight={config.distillation_weight:g}"
        )
    epochs = recipe.epochs if config.epochs is None else config.epochs
    defaults: dict[str, Any] = {
        "epochs": epochs,
        "head_epochs": 0 if weights == "none" else min(recipe.head_epochs, epochs),
        "batch_size": recipe.batch_size,
        "image_size": recipe.image_size if parent is None else parent["image_size"],
        "learning_rate": recipe.learning_rate,
        "distillation_weight": 0.0 if weights == "none" else recipe.distillation_weight,
        **{name: getattr(recipe, name) for name in _OF_RECIPE},
        **_shape(config, architecture, parent),
    }
    chosen: dict[str, Any] = {name: value for name, value in vars(config).items() if value is not None}
    chosen["weights"] = weights if weights in ("none", "imagenet") else storage.absolute(weights)
    chosen |= {"arch": arch, "from_id": parent_id}
    resolved = ResolvedTrainConfig(**(defaults | chosen))
    if resolved.image_size < architecture.min_image_size:
        raise UsageError(
            f"--image-size must be at least {architecture.min_image_size} for --arch {arch}. "
            f"Received: --image-size={resolved.image_size}"
        )
    if parent is not None and architecture.fixed_size and resolved.image_size != parent["image_size"]:
        raise UsageError(
            f"--image-size must be that of the model to start from, {parent['image_size']}, for --arch {arch}. "
            f"Received: --image-size={resolved.image_size}"
        )
    return resolved


def _shape(config: TrainConfig, architecture: Architecture, parent: dict[str, Any] | None) -> dict[str, Any]:
    """The depth and the width of the network: the ones asked for, those of the model to start from, or the usual ones.

    Raises:
        UsageError: the network has but one depth and width, or the model to start from has other ones.
    """
    usual = {"depth": architecture.usual_depth, "width": architecture.usual_width}
    trained = {} if parent is None else parent.get("training_config") or {}
    found = {name: trained.get(name, value) for name, value in usual.items()}
    for name, value in found.items():
        asked = getattr(config, name)
        if asked is not None and usual[name] is None:
            raise UsageError(f"--{name} needs --arch resnet. Received: --{name}={asked} --arch={architecture.name}")
        if asked is not None and parent is not None and asked != value:
            raise UsageError(f"--{name} must be that of the model to start from, {value}. Received: --{name}={asked}")
    return found


def _arch(config: TrainConfig, parent: dict[str, Any] | None) -> str:
    """The name of the architecture: the one asked for, that of the model to start from, or else `resnet`.

    Raises:
        UsageError: the two differ, or nothing says which architecture the model is.
    """
    if parent is None:
        return config.arch or "resnet"
    arch = parent.get("arch")
    if not isinstance(arch, str) or config.arch not in (None, arch):
        raise UsageError(
            "--from must be a model of the network that is to be trained, as its card says. "
            f"Received: --from={redact(config.from_ or '')} with {arch}, and --arch={config.arch}"
        )
    return arch


def for_few_images(config: ResolvedTrainConfig, num_images: int) -> ResolvedTrainConfig:
    """The configuration with the recipe's batch size halved until an epoch has at least `_MIN_STEPS` steps."""
    batch_size = config.batch_size
    while batch_size > 1 and batch_size * _MIN_STEPS > num_images:
        batch_size //= 2
    return dataclasses.replace(config, batch_size=max(config.num_workers, batch_size))


@dataclass(frozen=True, kw_only=True)
class Request:
    """A training that can be done, and whose place in the output is taken."""

    config: ResolvedTrainConfig
    published: dict[str, Any]
    """The configuration as it is saved beside the result, without the secrets of its URLs."""

    info: reading.DatasetInfo
    claim: storage.Claim
    """Of the output."""

    weights: bytes | None
    """The file of the backbone's pretrained weights, or the Keras file of the model to start from."""

    is_resumed: bool
    """Whether the output held this very training before, finished or not."""

    is_done: bool
    """Whether the output holds the model."""

    def result(self) -> tuple[dict[str, Any], str]:
        """The card and the id of the model in the output, once it has been compared with what was asked for.

        Raises:
            ClaimLostError: another run has taken over the output.
            TrainingError: it is another model, or a file of it is missing or damaged.
        """
        self.claim.check()
        try:
            found = bundle.load(self.config.output)
        except BundleError as error:
            raise TrainingError(f"the model in --output must be whole. Received: {redact(str(error))}") from error
        config, digest = found.card.get("training_config"), found.card.get("data_digest")
        expected = fingerprint(self.published, self.info.digest)
        if not isinstance(config, dict) or fingerprint(config, digest) != expected:
            differing = _difference(config, self.published) if isinstance(config, dict) else "no configuration"
            raise TrainingError(
                "the model in --output must be that of this configuration and data. "
                f"Received: {self.published['output']} with a model of {differing}; take another --output"
            )
        return found.card, found.model_id


@contextlib.contextmanager
def accepted(config: TrainConfig) -> Iterator[Request]:
    """Check whether a training can be done as configured, fetch what it needs, and hold its output within a block.

    Nothing is written where anything is raised. What another run wrote before the output is held is seen.

    Raises:
        UsageError: the data cannot be trained on as configured, or there are no such weights.
        OutputRefusedError: the output holds something else.
        OutputClaimedError: another run is at work there.
    """
    data, output = storage.absolute(config.data), storage.absolute(config.output)
    parent = None if config.from_ is None else storage.absolute(config.from_)
    resolved = resolve(dataclasses.replace(config, data=data, output=output, from_=parent))
    info = reading.load_info(data)
    if config.batch_size is None:
        resolved = for_few_images(resolved, info.num_images("train"))
    check_data(resolved, info)
    _refuse_foreign(output)
    published = provenance.configuration(resolved)
    record = {"command": "train", "fingerprint": fingerprint(published, info.digest), "config": published}
    with storage.claimed(output, "train") as claim:
        is_done = storage.exists(storage.join(output, bundle.CARD_NAME))
        is_resumed = _is_resumed(output, record, is_done=is_done)
        weights = None if is_done else fetch_start(resolved)
        if not is_resumed:
            storage.publish_json(storage.join(output, checkpoint.CONFIG_NAME), record)
        yield Request(
            config=resolved,
            published=published,
            info=info,
            claim=claim,
            weights=weights,
            is_resumed=is_resumed,
            is_done=is_done,
        )


def fetch_start(config: ResolvedTrainConfig) -> bytes | None:
    """What the network starts from; None for random weights.

    Raises:
        UsageError: there are no such weights, or they lack what distillation needs.
        BundleError: the model to start from is damaged, or has changed by now.
    """
    if config.from_ is None:
        weights = architectures.fetch_weights(config.arch, config.weights)
        if weights is not None and config.distillation_weight:
            architectures.classifier(weights)
        return weights
    parent = bundle.load(config.from_)
    if parent.model_id != config.from_id:
        raise BundleError(f"--from must not change. Received: {redact(config.from_)} with another {bundle.CARD_NAME}")
    return parent.paths[bundle.MODEL_NAME].read_bytes()


def check_data(config: ResolvedTrainConfig, info: reading.DatasetInfo) -> None:
    """Check that a dataset can be trained on as configured.

    Raises:
        UsageError: it lacks a class, or has too few images.
    """
    for split in ("train", "val"):
        for name in CLASS_NAMES:
            if info.counts[split][name] == 0:
                raise UsageError(f"training needs images of both classes in {split}. Received: no {name} in {info.url}")
    num_train = info.num_images("train")
    if config.batch_size > num_train:
        raise UsageError(
            f"--batch-size must be at most the number of training images, {num_train}. "
            f"Received: --batch-size={config.batch_size}"
        )


def fingerprint(published: dict[str, Any], data_digest: str | None) -> str:
    """The digest of everything that decides the result of a training.

    A signature in the weights' URL has no part in it, so that a training can be resumed with another one.
    """
    since = _since(published["arch"])
    fields = {
        name: value
        for name, value in published.items()
        if name not in (*_NOT_THE_RESULT, "data") and not (name in since and value == since[name])
    }
    encoded = json.dumps({"config": fields, "data": data_digest}, sort_keys=True)
    return hashlib.sha256(encoded.encode()).hexdigest()


def _since(arch: str) -> dict[str, Any]:
    """Fields that older versions did not have, and what they did for a network."""
    architecture = architectures.architecture(arch)
    return _SINCE | {
        **{name: getattr(architecture.recipe, name) for name in _OF_RECIPE},
        "depth": architecture.usual_depth,
        "width": architecture.usual_width,
    }


def _refuse_foreign(output: str) -> None:
    storage.refuse_foreign_output(output, (checkpoint.CONFIG_NAME,), says={"command": "train"})


def _is_resumed(output: str, record: dict[str, Any], *, is_done: bool) -> bool:
    """Whether the output holds this very training. Refuses another one, unless that never got to a checkpoint."""
    _refuse_foreign(output)
    url = storage.join(output, checkpoint.CONFIG_NAME)
    if not storage.exists(url):
        return False
    found = storage.read_json(url)
    if found["fingerprint"] == record["fingerprint"]:
        return True
    if is_done or checkpoint.latest_step(output) >= 0:
        raise OutputRefusedError(
            "--output must be empty, or hold a training with the same configuration and data; to train on from a "
            "model, give it as --from, and another --output. "
            f"Received: {record['config']['output']} with {_difference(found['config'], record['config'])}"
        )
    return False


def _difference(found: dict[str, Any], wanted: dict[str, Any]) -> str:
    differing = [
        f"{name}={value!r} instead of {wanted.get(name)!r}"
        for name, value in found.items()
        if name not in _NOT_THE_RESULT and value != wanted.get(name)
    ]
    return ", ".join(differing) or "other data"
