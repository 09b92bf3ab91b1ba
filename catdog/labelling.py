"""Labelling: encoded images to verdicts. `predict` and `evaluate` both label images here.

Some threads decode images, others score them with the model, a portion of images at a time. The number and the size of
the portions that are under way are bounded. This module knows nothing of slices, Parquet or storage.

Shapes: `B` images in a portion, `H` = `W` = the bundle's image size, `C` = 3 (RGB).
"""

import hashlib
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Final

import numpy as np
import numpy.typing as npt

from catdog import calibration, hardware, provenance
from catdog.bundle import Bundle
from catdog.config import EngineName
from catdog.engines import Engine, Outputs, load_engine
from catdog.errors import BundleError, ImageError
from catdog.images import DecodedImage, decode
from catdog.schema import CLASS_NAMES

PORTION_BYTES: Final = 16 * 2**20
"""Number of encoded bytes at which a portion of images ends, even if it has few images."""

MAX_BYTES: Final = 256 * 2**20
"""Largest number of encoded bytes that a labeller holds at a time. A single portion may have more."""

Contents = Iterable[bytes | ImageError]
"""For each image, its encoded bytes, or the reason why there are none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """The result for one image: a label, or an error."""

    image_id: str | None = None
    """SHA-256 of the encoded bytes, in hex; None if they could not be read."""

    num_bytes: int | None = None
    """Number of encoded bytes; None if they could not be read."""

    width: int | None = None
    """Width of the upright original, in pixels. This and all further fields except the error's are None on error."""

    height: int | None = None
    """Height of the upright original, in pixels."""

    label: str | None = None
    """One of `CLASS_NAMES`."""

    prob_dog: float | None = None
    """Probability of `dog`."""

    confidence: float | None = None
    """Probability of `label`."""

    needs_review: bool | None = None
    """Whether a person should look."""

    review_reason: str | None = None
    """Why a person should look: one of `catdog.schema.REVIEW_REASONS`; None if nobody needs to."""

    error_code: str | None = None
    """One of `catdog.schema.ERROR_CODES`; None if there is a label."""

    error_message: str | None = None
    """What was wrong, in one line; None if there is a label."""

    remark: str | None = None
    """What is wrong with a file that has a label all the same, in one line."""


@dataclass(frozen=True, kw_only=True)
class Labelled:
    """The result for a portion of images."""

    verdicts: list[Verdict]
    """A verdict for each image, in the order of the images."""

    decode_s: float
    """Seconds that a thread spent reading and decoding."""

    score_s: float
    """Seconds that a thread spent computing the model."""


@dataclass(frozen=True, slots=True)
class Seen:
    """An image that has been decoded, or could not be."""

    verdict: Verdict
    """Without a label; with an error if the image could not be decoded."""

    image: DecodedImage | None
    """None on error."""


@dataclass(frozen=True)
class _DecodedPortion:
    """A portion of images that are decoded, but not yet scored."""

    verdicts: list[Verdict]
    """A verdict for each image, which has no label yet."""

    pixels_BHWC: npt.NDArray[np.uint8]  # noqa: N815
    """Pixels of the images without an error, in order."""

    decode_s: float


class Labeller:
    """Labels images with one bundle, on its own threads. It is a context manager, and thread-safe.

    A verdict depends only on its image: neither on the other images of the portion, nor on the number of threads.
    """

    def __init__(self, bundle: Bundle, engine: Engine, *, num_decoders: int = 1, num_scorers: int = 1) -> None:
        """Start the threads.

        Args:
            bundle: the bundle, whose temperature and review threshold are used.
            engine: the engine that computes the bundle's model.
            num_decoders: number of threads that read and decode.
            num_scorers: number of threads that call the engine.
        """
        self.bundle = bundle
        self.engine = engine
        self._limiter = _Limiter(max_portions=2 * num_decoders + num_scorers, max_bytes=MAX_BYTES)
        self._decoders = ThreadPoolExecutor(num_decoders, thread_name_prefix="catdog-decode")
        self._scorers = ThreadPoolExecutor(num_scorers, thread_name_prefix="catdog-score")

    def __enter__(self) -> "Labeller":
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def submit(self, read: Callable[[], Contents], *, num_bytes: int) -> "Future[Labelled]":
        """Have a portion of images labelled. Waits while too many portions, or too many bytes, are under way.

        Args:
            read: a function that returns the images. It is called on a decoding thread, and the future raises what it
                raises.
            num_bytes: number of encoded bytes of the images, as far as it is known.

        Raises:
            Exception: the error of an earlier portion, after which no more portions are labelled.
        """
        self._limiter.enter(num_bytes)
        labelled = self._scorers.submit(self._score, self._decoders.submit(self._decode, read))
        labelled.add_done_callback(lambda future: self._limiter.leave(num_bytes, _error_of(future)))
        return labelled

    def label(self, contents: Contents) -> list[Verdict]:
        """Label one portion of images, on the calling thread."""
        return self._verdicts(self._decode(lambda: contents))

    def look(self, content: bytes | ImageError) -> Seen:
        """Decode one image, on the calling thread."""
        seen = Verdict()
        try:
            if isinstance(content, ImageError):
                raise content
            seen = Verdict(image_id=hashlib.sha256(content).hexdigest(), num_bytes=len(content))
            image = decode(content, self.bundle.image_size)
        except ImageError as error:
            return Seen(replace(seen, error_code=error.code, error_message=provenance.one_line(error)), None)
        return Seen(replace(seen, width=image.width, height=image.height, remark=image.remark), image)

    def judge(self, seen: Sequence[Seen]) -> list[Verdict]:
        """Score images that `look` has returned, on the calling thread. Returns a verdict for each, in their order."""
        return self._verdicts(self._portion(seen, decode_s=0.0))

    def close(self) -> None:
        """Drop the portions that no thread has begun, and wait for the others."""
        for pool in (self._decoders, self._scorers):
            pool.shutdown(wait=False, cancel_futures=True)
        for pool in (self._decoders, self._scorers):
            pool.shutdown()

    def _decode(self, read: Callable[[], Contents]) -> _DecodedPortion:
        started = time.perf_counter()
        seen = [self.look(content) for content in read()]
        return self._portion(seen, decode_s=time.perf_counter() - started)

    def _portion(self, seen: Sequence[Seen], *, decode_s: float) -> _DecodedPortion:
        size = self.bundle.image_size
        pixels = [each.image.pixels_HWC for each in seen if each.image is not None]
        pixels_BHWC = np.stack(pixels) if pixels else np.empty((0, size, size, 3), np.uint8)
        return _DecodedPortion([each.verdict for each in seen], pixels_BHWC, decode_s)

    def _score(self, decoding: "Future[_DecodedPortion]") -> Labelled:
        decoded = decoding.result()
        started = time.perf_counter()
        verdicts = self._verdicts(decoded)
        return Labelled(verdicts=verdicts, decode_s=decoded.decode_s, score_s=time.perf_counter() - started)

    def _verdicts(self, decoded: _DecodedPortion) -> list[Verdict]:
        """The verdicts with the labels and probabilities that the model gives.

        Raises:
            BundleError: the model gives a logit that is not a finite number.
        """
        outputs = self.engine.predict(decoded.pixels_BHWC)
        logits_B = outputs.logits_B
        for output_B in outputs:
            if output_B is not None and not np.isfinite(output_B).all():
                raise BundleError(f"{self.bundle.url}: the model must give finite numbers. Received: {output_B}")
        temperature = self.bundle.temperature(self.engine.arithmetic)
        threshold = self.bundle.review_threshold(self.engine.arithmetic)
        prob_cat_B = calibration.probabilities(-logits_B, temperature).tolist()
        prob_dog_B = calibration.probabilities(logits_B, temperature).tolist()
        scored = iter(zip(prob_cat_B, prob_dog_B, self._are_neither(outputs), strict=True))
        verdicts = []
        for verdict in decoded.verdicts:
            if verdict.error_code is None:
                prob_cat, prob_dog, is_neither = next(scored)
                is_dog = prob_dog >= prob_cat
                confidence = prob_dog if is_dog else prob_cat
                reason = _review_reason(verdict, is_neither=is_neither, is_unsure=confidence < threshold)
                verdict = replace(
                    verdict,
                    label=CLASS_NAMES[is_dog],
                    prob_dog=prob_dog,
                    confidence=confidence,
                    needs_review=reason is not None,
                    review_reason=reason,
                )
            verdicts.append(verdict)
        return verdicts

    def _are_neither(self, outputs: Outputs) -> list[bool]:
        """Whether each image looks like neither a cat nor a dog."""
        neither = self.bundle.neither(self.engine.arithmetic)
        if neither is None or outputs.neither_B is None:
            return [False] * len(outputs.logits_B)
        return [score > neither["threshold"] for score in outputs.neither_B.tolist()]


def _review_reason(verdict: Verdict, *, is_neither: bool, is_unsure: bool) -> str | None:
    """Why a person should look at an image: the first of `REVIEW_REASONS` that holds, or None."""
    if verdict.remark is not None:
        return "damaged"
    if is_neither:
        return "neither"
    return "unsure" if is_unsure else None


def load_labeller(
    bundle: Bundle, engine: EngineName = "auto", *, num_workers: int | None = None, use_gpu: bool = False
) -> Labeller:
    """Load a bundle's model, and start the threads that label with it.

    Args:
        bundle: a verified bundle.
        engine: name of the engine that computes the model.
        num_workers: number of decoding threads; as many threads call the model, but no more than there are cores. None
            for one per core that this process may use.
        use_gpu: whether to compute on this process's GPU.

    Raises:
        BundleError: the model cannot be used.
    """
    num_cores = hardware.num_cores()
    num_decoders = num_workers or num_cores
    num_scorers = min(num_decoders, num_cores)
    loaded = load_engine(bundle, engine, num_parallel=num_scorers, use_gpu=use_gpu)
    return Labeller(bundle, loaded, num_decoders=num_decoders, num_scorers=num_scorers)


def _error_of(future: "Future[Labelled]") -> BaseException | None:
    """The exception of a future that is done; None if it has none or was cancelled."""
    return None if future.cancelled() else future.exception()


@dataclass
class _Limiter:
    """Limits the number and the total size of the portions under way. Once a portion fails, it admits no more."""

    max_portions: int
    max_bytes: int
    num_portions: int = 0
    num_bytes: int = 0
    failure: BaseException | None = None
    changed: threading.Condition = field(default_factory=threading.Condition)

    def enter(self, num_bytes: int) -> None:
        """Wait until a portion may begin, and count it. Raises the error of a portion that failed."""
        with self.changed:
            self.changed.wait_for(lambda: self.failure is not None or self._admits(num_bytes))
            if self.failure is not None:
                raise self.failure
            self.num_portions += 1
            self.num_bytes += num_bytes

    def _admits(self, num_bytes: int) -> bool:
        if self.num_portions == 0:
            return True
        return self.num_portions < self.max_portions and self.num_bytes + num_bytes <= self.max_bytes

    def leave(self, num_bytes: int, failure: BaseException | None) -> None:
        """Count a portion as done, with its error if it failed."""
        with self.changed:
            self.num_portions -= 1
            self.num_bytes -= num_bytes
            self.failure = self.failure or failure
            self.changed.notify_all()
