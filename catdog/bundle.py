"""The saved model and its card: save, verify, load.

A bundle is a directory: `model.keras` and whatever else its card lists, and `bundle.json`, the card, written last. The
SHA-256 of `bundle.json` is the model's id; it covers every other file through the digests in the card. Loading verifies
them all, and refuses what it does not understand. Nothing in a bundle is ever executed: Keras loads it in safe mode.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from catdog import storage
from catdog.errors import BundleError
from catdog.images import RESIZE_RULE
from catdog.schema import CLASS_NAMES

if TYPE_CHECKING:
    import keras

CARD_NAME: Final = "bundle.json"
MODEL_NAME: Final = "model.keras"
FORMAT: Final = "catdog-bundle/1"

DEFAULT_URL: Final = str(Path(__file__).parent / "default_model")
"""The bundle that ships with the package."""

GOLDEN_TOLERANCE: Final = 0.25
"""Logits. bfloat16 arithmetic on other hardware moved a logit by up to 0.1; another model moves it by whole units."""


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """A verified model bundle, its files on this machine."""

    url: str
    card: dict[str, Any]
    model_id: str
    """SHA-256 of `bundle.json`, in hex."""

    model_path: Path
    """A local copy of `model.keras`."""

    @property
    def image_size(self) -> int:
        """Pixels per side of the images that the model takes."""
        return int(self.card["image_size"])

    @property
    def temperature(self) -> float:
        """What the logits are divided by before the sigmoid."""
        return float(self.card["temperature"])

    @property
    def review_threshold(self) -> float:
        """Confidence below which a person should look."""
        return float(self.card["review_threshold"])


def golden_images(image_size: int) -> npt.NDArray[np.uint8]:
    """Four synthetic pictures, uint8 (4, S, S, 3), whose logits a bundle records: smooth colour gradients and noise.

    They are integer arithmetic on coordinates, so that they are the same on every machine.
    """
    y, x = np.mgrid[:image_size, :image_size].astype(np.int64)
    planes = [(x * (3 + i) + y * (5 + 2 * i) + x * y * i // 7 + 40 * i) % 256 for i in range(12)]
    return np.stack(planes, axis=-1).reshape(image_size, image_size, 4, 3).transpose(2, 0, 1, 3).astype(np.uint8)


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def save(url: str, model: keras.Model, card: dict[str, Any], *, extra_files: dict[str, bytes] | None = None) -> str:
    """Write a bundle; its card goes last, and makes it one.

    Args:
        url: the bundle's directory.
        model: what `catdog.architectures.exported` made.
        card: `image_size`, `temperature`, `review_threshold`, and whatever else describes the model.
        extra_files: name → content of further files that the card shall cover.

    Returns:
        The model's id.
    """
    from catdog.architectures import logits_model

    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / MODEL_NAME
        model.save(path)
        files = {MODEL_NAME: _deflated(path), **(extra_files or {})}
    images_BHWC = golden_images(card["image_size"])
    logits_B = np.asarray(logits_model(model)(images_BHWC.astype("float32"), training=False))[:, 0]
    full_card = {
        "format": FORMAT,
        "class_names": list(CLASS_NAMES),
        "resize_rule": RESIZE_RULE,
        **card,
        "golden_logits": [round(float(logit), 4) for logit in logits_B],
        "files": {name: {"sha256": _sha256(data), "num_bytes": len(data)} for name, data in files.items()},
    }
    for name, data in files.items():
        storage.publish_bytes(storage.join(url, name), data)
    encoded = (json.dumps(full_card, indent=2) + "\n").encode()
    storage.publish_bytes(storage.join(url, CARD_NAME), encoded)
    return _sha256(encoded)


def _deflated(path: Path) -> bytes:
    """A `.keras` file, a zip archive, with its members compressed, which Keras leaves as they are."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(path) as plain, zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as small:
        for member in plain.namelist():
            small.writestr(zipfile.ZipInfo(member), plain.read(member), zipfile.ZIP_DEFLATED, 9)
    return buffer.getvalue()


def read_card(url: str | None) -> tuple[dict[str, Any], str]:
    """A bundle's card, checked, and the model's id. Reads no other file. None is the bundle that ships with catdog.

    Raises:
        BundleError: there is no card, it is damaged, or this version does not understand it.
    """
    url = url or DEFAULT_URL
    card_url = storage.join(url, CARD_NAME)
    if not storage.exists(card_url):
        raise BundleError(f"a model bundle is a directory with a {CARD_NAME}. Received: {url}")
    encoded = storage.read_bytes(card_url)
    try:
        card = json.loads(encoded)
    except ValueError as error:
        raise BundleError(f"{CARD_NAME} must be JSON. Received: {card_url}: {error}") from error
    if not isinstance(card, dict):
        raise BundleError(f"{CARD_NAME} must be a JSON object. Received: {card_url}: {type(card).__name__}")
    expected = {"format": FORMAT, "class_names": list(CLASS_NAMES), "resize_rule": RESIZE_RULE}
    for key, value in expected.items():
        if card.get(key) != value:
            raise BundleError(f"{card_url}: {key} must be {value!r}. Received: {card.get(key)!r}")
    required = {
        "image_size": int,
        "temperature": float,
        "review_threshold": float,
        "golden_logits": list,
        "files": dict,
    }
    for key, kind in required.items():
        if not isinstance(card.get(key), kind):
            raise BundleError(f"{card_url}: {key} must be of type {kind.__name__}. Received: {card.get(key)!r}")
    if MODEL_NAME not in card["files"]:
        raise BundleError(f"{card_url}: files must list {MODEL_NAME}. Received: {sorted(card['files'])}")
    return card, _sha256(encoded)


def load(url: str | None) -> Bundle:
    """Verify a bundle, and copy what is not on this machine here. None is the bundle that ships with catdog.

    Raises:
        BundleError: a file is missing or damaged, or the card is not one that this version understands.
    """
    url = url or DEFAULT_URL
    card, model_id = read_card(url)
    for name, entry in card["files"].items():
        file_url = storage.join(url, name)
        if not storage.exists(file_url):
            raise BundleError(f"every file that {CARD_NAME} lists must be there. Received: {file_url} is missing")
        data = storage.read_bytes(file_url)
        if _sha256(data) != entry["sha256"]:
            raise BundleError(
                f"{file_url} is damaged: its SHA-256 must be {entry['sha256']}. Received: {_sha256(data)}"
            )
        if name == MODEL_NAME:
            model_path = _local_copy(file_url, data, model_id)
    return Bundle(url=url, card=card, model_id=model_id, model_path=model_path)


def _local_copy(file_url: str, data: bytes, model_id: str) -> Path:
    """Where the verified bytes lie on this machine: the file itself, or a copy in the user's cache."""
    if "://" not in file_url:
        return Path(file_url)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "catdog" / "models" / model_id
    path = cache / MODEL_NAME
    if not path.exists() or path.read_bytes() != data:
        storage.publish_bytes(str(path), data)
    return path


def load_model(bundle: Bundle) -> keras.Model:
    """The bundle's Keras model, for inference.

    Raises:
        BundleError: Keras cannot read it, or it computes something else than when it was saved.
    """
    import keras

    from catdog.architectures import LOGITS_LAYER, logits_model

    try:
        model = keras.saving.load_model(bundle.model_path, compile=False, safe_mode=True)
        logits = logits_model(model)
    except (ValueError, TypeError, KeyError, OSError) as error:
        reason = " ".join(str(error).split())[:300]
        raise BundleError(
            f"{MODEL_NAME} must be a Keras model with a layer {LOGITS_LAYER!r}. Received: {bundle.url}: {reason}"
        ) from error
    images_BHWC = golden_images(bundle.image_size).astype("float32")
    logits_B = np.asarray(logits(images_BHWC, training=False))[:, 0]
    difference = float(np.max(np.abs(logits_B - np.asarray(bundle.card["golden_logits"]))))
    if not difference <= GOLDEN_TOLERANCE:
        raise BundleError(
            f"{bundle.url}: the model must compute its golden logits to within {GOLDEN_TOLERANCE}. "
            f"Received: off by {difference:.3g} on this machine"
        )
    return model
