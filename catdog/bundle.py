"""Model bundles: saving, verifying and loading a model and its card.

A bundle is a directory that holds `bundle.json`, the card, which is written last, and the files that the card lists:
`model.keras`, and the same model for OpenVINO. The SHA-256 of `bundle.json` is the id of the model. The card has the
digests of the other files, so the id covers these too. Loading verifies all of them, and refuses a card of another
format. Nothing in a bundle is ever executed: Keras loads the model in safe mode, and OpenVINO's files can only name
operations that OpenVINO has.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np
import numpy.typing as npt

from catdog import neither, openvino_ir, provenance, scratch, storage
from catdog.errors import BundleError, StorageError
from catdog.images import RESIZE_RULE
from catdog.neither import Gauge
from catdog.openvino_ir import IR
from catdog.schema import CLASS_NAMES

if TYPE_CHECKING:
    import keras

CARD_NAME: Final = "bundle.json"
MODEL_NAME: Final = "model.keras"
NEITHER_NAME: Final = "neither.npz"
"""The arrays of `catdog.neither.Gauge`, where the bundle has a score."""

IR_NAME: Final = "openvino/{weights}.{suffix}"
"""OpenVINO's files: `weights` is `float` or `int8`, `suffix` one of `catdog.openvino_ir.SUFFIXES`."""

Weights = Literal["float", "int8"]
"""Of OpenVINO's models."""

Arithmetic = Literal["float32", "bfloat16", "int8"]
"""Number format in which an engine computes feature maps."""

FORMAT: Final = "catdog-bundle/1"

DEFAULT_URL: Final = str(Path(__file__).parent / "default_model")
"""The bundle that ships with the package."""


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_file_list(value: object) -> bool:
    return isinstance(value, dict) and all(
        not PurePosixPath(name).is_absolute()
        and not {"..", ""} & set(name.split("/"))
        and isinstance(entry, dict)
        and isinstance(entry.get("sha256"), str)
        for name, entry in value.items()
    )


def _is_int8(value: object) -> bool:
    """Whether this is nothing, or what `catdog.quantization` says of an int8 model."""
    if value is None:
        return True
    if not isinstance(value, dict) or not isinstance(value.get("is_accepted"), bool):
        return False
    return not value["is_accepted"] or all(_FIELDS[name][1](value.get(name)) for name in (*_CALIBRATION, "neither"))


def _is_neither(value: object) -> bool:
    """Whether this is nothing, or what `catdog.neither` says of a score."""
    if value is None:
        return True
    if not isinstance(value, dict) or not _is_number(value.get("threshold")):
        return False
    golden = value.get("golden_scores")
    return isinstance(golden, list) and bool(golden) and all(map(_is_number, golden))


_CALIBRATION: Final = ("temperature", "review_threshold", "golden_logits")
"""Fields of the card that are the float model's, and that the card has for the int8 model, too."""

_FIELDS: Final[dict[str, tuple[str, Callable[[Any], bool]]]] = {
    "image_size": ("an integer of at least 1", lambda value: type(value) is int and value >= 1),
    "temperature": ("a number above 0", lambda value: _is_number(value) and value > 0),
    "review_threshold": ("a number of at least 0", lambda value: _is_number(value) and value >= 0),
    "golden_logits": ("a list of numbers", lambda value: isinstance(value, list) and all(map(_is_number, value))),
    "int8": (f"null, or an object with is_accepted and, if that is true, {', '.join(_CALIBRATION)}", _is_int8),
    "neither": ("null, or an object with threshold, a number, and golden_scores, a list of numbers", _is_neither),
    "files": ("an object of names within the bundle, each with its sha256", _is_file_list),
}
"""The fields that a card must have besides the fixed ones: name → (rule, function that tests a value for it)."""


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """A verified model bundle whose files are on this machine."""

    url: str
    card: dict[str, Any]
    """The content of `bundle.json`, checked by `read_card`."""

    model_id: str
    """SHA-256 of `bundle.json`, in hex."""

    paths: Mapping[str, Path]
    """Name of each file that the card lists → path of a verified copy on this machine."""

    @property
    def image_size(self) -> int:
        """Pixels per side of the images that the model takes."""
        return int(self.card["image_size"])

    @property
    def int8(self) -> dict[str, Any] | None:
        """What the card says of the int8 model, which has a calibration of its own; None if there is none to use."""
        int8 = self.card.get("int8")
        return int8 if int8 is not None and int8["is_accepted"] else None

    def temperature(self, arithmetic: Arithmetic) -> float:
        """The number that logits are divided by before the sigmoid."""
        return float(self._calibrated(arithmetic)["temperature"])

    def review_threshold(self, arithmetic: Arithmetic) -> float:
        """Confidence below which a person should review a label."""
        return float(self._calibrated(arithmetic)["review_threshold"])

    def golden_logits(self, arithmetic: Arithmetic) -> list[float]:
        """The logits of `golden_images` when the model was saved, to 4 decimals: in int8, or else in float32."""
        return [float(logit) for logit in self._calibrated(arithmetic)["golden_logits"]]

    def neither(self, arithmetic: Arithmetic) -> dict[str, Any] | None:
        """What the card says of the score that tells what is neither a cat nor a dog; None if the bundle has none."""
        found: dict[str, Any] | None = self._calibrated(arithmetic).get("neither")
        return found

    def _calibrated(self, arithmetic: Arithmetic) -> dict[str, Any]:
        if arithmetic != "int8":
            return self.card
        if self.int8 is None:
            raise BundleError(f"{CARD_NAME} must accept the int8 model. Received: {self.url}")
        return self.int8


def golden_images(image_size: int) -> npt.NDArray[np.uint8]:
    """Four synthetic pictures, uint8 (4, S, S, 3), whose logits a bundle records: colour gradients and moiré patterns.

    They are computed from pixel coordinates in integers, so that they are the same on every machine.
    """
    y, x = np.mgrid[:image_size, :image_size].astype(np.int64)
    planes = [(x * (3 + i) + y * (5 + 2 * i) + x * y * i // 7 + 40 * i) % 256 for i in range(12)]
    return np.stack(planes, axis=-1).reshape(image_size, image_size, 4, 3).transpose(2, 0, 1, 3).astype(np.uint8)


def ir_names(weights: Weights) -> dict[str, str]:
    """Suffix → name within the bundle of the files of OpenVINO's model with these weights."""
    return {suffix: IR_NAME.format(weights=weights, suffix=suffix) for suffix in openvino_ir.SUFFIXES}


def ir_files(irs: Mapping[Weights, IR]) -> dict[str, bytes]:
    """Name within the bundle → content of the files of OpenVINO's models."""
    return {name: ir[suffix] for weights, ir in irs.items() for suffix, name in ir_names(weights).items()}


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def save(
    url: str,
    model: keras.Model,
    card: dict[str, Any],
    *,
    irs: Mapping[Weights, IR] | None = None,
    gauge: Gauge | None = None,
    extra_files: dict[str, bytes] | None = None,
) -> str:
    """Write a bundle. Its card is written last: a directory without a card is no bundle.

    Args:
        url: directory of the bundle.
        model: a model that `catdog.architectures.exported` made. It is saved with the card's temperature in it.
        card: `image_size`, `temperature`, `review_threshold`, and any other fields that describe the model.
        irs: OpenVINO's models, if they are there already; the float one is made if not.
        gauge: what computes the score, if the card has `neither`.
        extra_files: name → content of further files, which the card will list.

    Returns:
        The id of the model.
    """
    from catdog.architectures import logits_model

    files = {MODEL_NAME: keras_file(model, card["temperature"]), **(extra_files or {})}
    files |= ir_files(irs or {"float": openvino_ir.gauged(openvino_ir.float_ir(model, card["image_size"]), gauge)})
    if gauge is not None:
        files[NEITHER_NAME] = gauge.encoded()
    images_BHWC = golden_images(card["image_size"])
    logits_B = np.asarray(logits_model(model)(images_BHWC.astype("float32"), training=False))[:, 0]
    full_card = {
        "format": FORMAT,
        "class_names": list(CLASS_NAMES),
        "resize_rule": RESIZE_RULE,
        **card,
        "golden_logits": [round(float(logit), 4) for logit in logits_B],
    }
    return write(url, full_card, files)


def golden_scores(model: keras.Model, gauge: Gauge | None, image_size: int) -> npt.NDArray[np.float32] | None:
    """The scores of `golden_images`, computed in float32 by a model that `catdog.architectures.exported` made.

    None without a gauge.
    """
    if gauge is None:
        return None
    from catdog.architectures import scoring_network

    found = scoring_network(model)
    assert found is not None, "a gauge comes from features"
    network, is_mirrored = found
    images_BHWC = golden_images(image_size).astype("float32")
    features_BF = np.asarray(network(images_BHWC, training=False)[1])
    if is_mirrored:
        features_BF = (features_BF + np.asarray(network(images_BHWC[:, :, ::-1], training=False)[1])) / 2
    return gauge.scores(features_BF)


def keras_file(model: keras.Model, temperature: float) -> bytes:
    """The content of `model.keras`: the model, whose probabilities are calibrated by this temperature."""
    from catdog.architectures import calibrated

    with scratch.directory("bundle") as directory:
        path = Path(directory) / MODEL_NAME
        calibrated(model, temperature).save(path)
        return _compressed(path)


def write(url: str, card: dict[str, Any], files: Mapping[str, bytes]) -> str:
    """Write a bundle's files, and then its card, to which the list of the files is added. Returns the model's id."""
    for name, data in files.items():
        storage.publish_bytes(storage.join(url, name), data)
    listed = {name: {"sha256": _sha256(data), "num_bytes": len(data)} for name, data in files.items()}
    full_card = card | {"files": listed}
    encoded = (json.dumps(full_card, indent=2) + "\n").encode()
    storage.publish_bytes(storage.join(url, CARD_NAME), encoded)
    return _sha256(encoded)


def _compressed(path: Path) -> bytes:
    """The content of a `.keras` file, a zip archive, with its members compressed. Keras stores them uncompressed."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(path) as plain, zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as small:
        for member in plain.namelist():
            small.writestr(zipfile.ZipInfo(member), plain.read(member), zipfile.ZIP_DEFLATED, 9)
    return buffer.getvalue()


def read_card(url: str | None) -> tuple[dict[str, Any], str]:
    """Read and check a bundle's card, and no other file. Returns the card and the id of the model.

    Args:
        url: directory of the bundle; None for the bundle that ships with catdog.

    Raises:
        BundleError: the card is missing or damaged, or this version does not know its format.
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
    for key, (rule, holds) in _FIELDS.items():
        if not holds(card.get(key)):
            raise BundleError(f"{card_url}: {key} must be {rule}. Received: {card.get(key)!r}")
    if MODEL_NAME not in card["files"]:
        raise BundleError(f"{card_url}: files must list {MODEL_NAME}. Received: {sorted(card['files'])}")
    return card, _sha256(encoded)


def load(url: str | None) -> Bundle:
    """Verify a bundle. Files that are not on this machine are copied to the user's cache.

    Args:
        url: directory of the bundle; None for the bundle that ships with catdog.

    Raises:
        BundleError: a file is missing or damaged, or this version does not know the format of the card.
    """
    url = url or DEFAULT_URL
    card, model_id = read_card(url)
    paths = {}
    for name, entry in card["files"].items():
        file_url = storage.join(url, name)
        if not storage.exists(file_url):
            raise BundleError(f"every file that {CARD_NAME} lists must be there. Received: {file_url} is missing")
        data = storage.read_bytes(file_url)
        if _sha256(data) != entry["sha256"]:
            raise BundleError(
                f"{file_url} is damaged: its SHA-256 must be {entry['sha256']}. Received: {_sha256(data)}"
            )
        paths[name] = _local_copy(file_url, name, data, model_id)
    return Bundle(url=url, card=card, model_id=model_id, paths=paths)


def _local_copy(file_url: str, name: str, data: bytes, model_id: str) -> Path:
    """Path of the verified file on this machine: of the file itself, or of a copy in a cache.

    The cache is the user's; if nobody may write to that, as in some containers, it lies among the temporary files.
    """
    if "://" not in file_url:
        return Path(file_url)
    home = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "catdog"
    try:
        return _cached(home / "models" / model_id / name, data)
    except StorageError:
        return _cached(Path(scratch.base(), f"catdog-cache-{os.getuid()}", model_id, name), data)


def _cached(path: Path, data: bytes) -> Path:
    if not path.exists() or path.read_bytes() != data:
        storage.publish_bytes(str(path), data)
    return path


def load_gauge(bundle: Bundle) -> Gauge | None:
    """What computes the bundle's score; None if it has none.

    Raises:
        BundleError: its file is missing or damaged.
    """
    if bundle.card.get("neither") is None:
        return None
    if NEITHER_NAME not in bundle.paths:
        raise BundleError(f"a bundle with a score must have {NEITHER_NAME}. Received: {bundle.url} without it")
    return neither.decoded(bundle.paths[NEITHER_NAME].read_bytes(), f"{bundle.url}: {NEITHER_NAME}")


def load_model(bundle: Bundle) -> keras.Model:
    """Load the bundle's Keras model, for inference in float32.

    Raises:
        BundleError: Keras cannot read the model, or it has no layer for the logits.
    """
    return _keras_model(bundle.paths[MODEL_NAME], bundle.url)


def model_of(data: bytes, url: str) -> keras.Model:
    """As `load_model`, of a Keras file's content. `url` says in an error where it is from."""
    with scratch.directory("bundle") as directory:
        path = Path(directory) / MODEL_NAME
        path.write_bytes(data)
        return _keras_model(path, url)


def _keras_model(path: Path, url: str) -> keras.Model:
    import keras

    from catdog.architectures import LOGITS_LAYER, logits_model

    try:
        model = keras.saving.load_model(path, compile=False, safe_mode=True)
        logits_model(model)
    except (ValueError, TypeError, KeyError, OSError) as error:
        raise BundleError(
            f"{MODEL_NAME} must be a Keras model with a layer {LOGITS_LAYER!r}. "
            f"Received: {url}: {provenance.one_line(error)}"
        ) from error
    return model
