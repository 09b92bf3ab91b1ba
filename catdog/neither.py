"""How little an image looks like a cat or a dog: a score of the features from which the logit is computed.

A network has one logit, and so gives a photograph of a car one of the two labels, at times with confidence. What tells
that it shows neither animal is in the network's features, one layer earlier. There are two kinds of score:

- `classes`: the classifier that a published network came with knows 118 kinds of dog, 5 of cat, and 877 other things.
  The score is the logarithm of the odds of the others.
- `distance`: how far the features lie from those of the nearer class, in units of their spread. The score is the
  logarithm of the squared Mahalanobis distance: Lee et al., "A simple unified framework for detecting
  out-of-distribution samples" (NeurIPS 2018). It needs no classifier.

Shapes: `B` images, `F` features, `K` values that are sums of weighted features, `C` classes.
"""

import io
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final, TypedDict

import numpy as np
import numpy.typing as npt

from catdog import metrics
from catdog.errors import BundleError
from catdog.metrics import Estimate, FloatArray

MAX_FLAGGED: Final = 0.02
"""Share of the cats and dogs of the validation split that may be taken for neither: it sets the threshold."""

_LARGEST: Final = 127
_LEAST_VARIANCE: Final = 1e-12


class NeitherCard(TypedDict):
    """What the card of a bundle says of the score, for one number format."""

    threshold: float
    """An image with a higher score looks like neither a cat nor a dog."""

    flagged: Estimate
    """Share of the validation split above the threshold."""

    golden_scores: list[float]
    """The scores of `catdog.bundle.golden_images`, to 4 decimals."""


@dataclass(frozen=True, kw_only=True)
class Gauge:
    """Computes the score. Its arrays are what a bundle holds."""

    offset_F: npt.NDArray[np.float32]  # noqa: N815
    """What is subtracted from the features."""

    kernel_FK: npt.NDArray[np.int8] = field(repr=False)  # noqa: N815
    """Weights of the features, as multiples of `scale_K`. A byte each is exact enough."""

    scale_K: npt.NDArray[np.float32]  # noqa: N815
    bias_K: npt.NDArray[np.float32]  # noqa: N815
    centers_CK: npt.NDArray[np.float32]  # noqa: N815
    """Of the kind `distance`, the values of each class's mean features; of the kind `classes`, none."""

    num_others: int = 0
    """Of the kind `classes`, how many values, from the first, are logits of other things than cats and dogs."""

    @property
    def kind(self) -> str:
        """`classes` or `distance`."""
        return "distance" if len(self.centers_CK) else "classes"

    def scores(self, features_BF: npt.ArrayLike) -> npt.NDArray[np.float32]:
        """The score of each image, float32 (B,)."""
        features = np.asarray(features_BF, np.float32) - self.offset_F
        values_BK = features @ self.kernel_FK.astype(np.float32) * self.scale_K + self.bias_K
        if self.kind == "classes":
            others, kin = values_BK[:, : self.num_others], values_BK[:, self.num_others :]
            return np.asarray(np.logaddexp.reduce(others, axis=1) - np.logaddexp.reduce(kin, axis=1), np.float32)
        squares_BC = np.square(values_BK[:, np.newaxis] - self.centers_CK).sum(axis=2)
        return np.asarray(np.log(squares_BC.min(axis=1)), np.float32)

    def encoded(self) -> bytes:
        """The arrays as one file, which `decoded` reads."""
        file = io.BytesIO()
        np.savez_compressed(file, **vars(self))
        return file.getvalue()


def decoded(data: bytes, url: str) -> Gauge:
    """The gauge that `Gauge.encoded` wrote.

    Raises:
        BundleError: the file is damaged. `url` says in the message where it is from.
    """
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            found = {name: arrays[name] for name in Gauge.__dataclass_fields__}
    except (KeyError, OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise BundleError(f"{url} must hold the arrays of a score. Received: {error}") from error
    return Gauge(**{**found, "num_others": int(found["num_others"])})


def of_classes(kernel_FC: npt.NDArray[np.floating], bias_C: npt.NDArray[np.floating], kin: Sequence[int]) -> Gauge:
    """The gauge of the kind `classes`.

    Args:
        kernel_FC: weights of the published network's classifier.
        bias_C: its biases.
        kin: the classes that are cats and dogs.
    """
    others = sorted({*range(len(bias_C))} - {*kin})
    order = [*others, *kin]
    # What is added to all classes changes no odds. Without it, the numbers are smaller and their rounding finer.
    kernel_FC = kernel_FC - kernel_FC.mean(axis=1, keepdims=True)
    kernel_FK, scale_K = _in_bytes(kernel_FC[:, order])
    return Gauge(
        offset_F=np.zeros(len(kernel_FK), np.float32),
        kernel_FK=kernel_FK,
        scale_K=scale_K,
        bias_K=(bias_C - bias_C.mean())[order].astype(np.float32),
        centers_CK=np.empty((0, len(order)), np.float32),
        num_others=len(others),
    )


def of_distance(features_NF: npt.ArrayLike, labels_N: npt.ArrayLike) -> Gauge:
    """The gauge of the kind `distance`, fitted to the features of cats and dogs.

    Args:
        features_NF: features of `N` images.
        labels_N: their classes.
    """
    features, labels = np.asarray(features_NF, np.float64), np.asarray(labels_N)
    offset_F = features.mean(axis=0)
    means_CF = np.stack([features[labels == label].mean(axis=0) for label in np.unique(labels)]) - offset_F
    spread_NF = features - offset_F - means_CF[np.unique(labels, return_inverse=True)[1]]
    # With A = inverse(L)ᵀ and the covariance L Lᵀ, the square of f A is the squared Mahalanobis distance of f from 0.
    kernel_FK, scale_K = _in_bytes(np.linalg.inv(np.linalg.cholesky(_covariance(spread_NF))).T)
    return Gauge(
        offset_F=offset_F.astype(np.float32),
        kernel_FK=kernel_FK,
        scale_K=scale_K,
        bias_K=np.zeros(len(scale_K), np.float32),
        centers_CK=(means_CF @ (kernel_FK * scale_K)).astype(np.float32),
    )


def measured(scores_N: npt.NDArray[np.float32], golden_scores: npt.NDArray[np.float32]) -> NeitherCard:
    """What the card says of the scores of the validation split."""
    threshold = float(np.quantile(scores_N, 1 - MAX_FLAGGED, method="higher"))
    return NeitherCard(
        threshold=threshold,
        flagged=metrics.share(int(np.sum(scores_N > threshold)), len(scores_N)),
        golden_scores=[round(float(score), 4) for score in golden_scores],
    )


def _in_bytes(kernel_FK: npt.NDArray[np.floating]) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]:
    """Weights as multiples, -127 to 127, of a scale for each value."""
    scale_K = np.maximum(np.abs(kernel_FK).max(axis=0) / _LARGEST, np.finfo(np.float32).tiny).astype(np.float32)
    return np.round(kernel_FK / scale_K).astype(np.int8), scale_K


def _covariance(spread_NF: FloatArray) -> FloatArray:
    """The covariance of features around 0, drawn towards a multiple of the unit matrix as far as they are few.

    Ledoit and Wolf, "A well-conditioned estimator for large-dimensional covariance matrices" (J. Multivar. Anal. 2004).
    """
    num_images, num_features = spread_NF.shape
    found_FF = spread_NF.T @ spread_NF / num_images
    variance = max(float(np.trace(found_FF)) / num_features, _LEAST_VARIANCE)
    target_FF: Any = variance * np.eye(num_features)
    off_target = float(np.square(found_FF - target_FF).sum())
    squares_NF = np.square(spread_NF)
    noise = (
        float(np.square(squares_NF.sum(axis=1)).sum()) / num_images - float(np.square(found_FF).sum())
    ) / num_images
    share = min(1.0, max(noise / off_target, _LEAST_VARIANCE)) if off_target else 1.0
    covariance_FF: FloatArray = share * target_FF + (1 - share) * found_FF
    return covariance_FF
