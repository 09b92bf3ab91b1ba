"""The service: encoded images to answers, by the path of the bulk job, whatever protocol they came by.

A service has a model, which another one may replace while it runs. Each request keeps the model that it began with, so
that all its answers are of one model; a model that was replaced is closed after its last request. All methods but those
that say otherwise are called on one event loop.
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final

from catdog import bundle, hardware
from catdog.bundle import Bundle
from catdog.config import ServeConfig
from catdog.errors import CatdogError, ImageError
from catdog.images import MAX_PIXELS, open_upright
from catdog.images.overlay import overlay_png
from catdog.labelling import load_labeller
from catdog.provenance import one_line
from catdog.schema import CLASS_NAMES
from catdog.serving.batching import Answer, Batcher
from catdog.serving.metrics import Metrics
from catdog.serving.problems import busy, draining
from catdog.serving.saliency import Method, Saliency

logger = logging.getLogger(__name__)

MAX_HELD_BYTES: Final = 512 * 2**20
"""Number of encoded bytes that a process holds at a time. A request that would exceed it is refused with status 429."""


MAX_OVERLAY_PX: Final = 512
"""Longest side of the picture of an explanation."""

_POLL_S: Final = 0.02
"""Time between two looks at whether something that nobody announces has come."""

_MAX_EXPLANATIONS: Final = 16
"""Number of explanations that may wait. They are made one after the other."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a request may have."""

    max_files: int
    max_bytes: int
    """Of a file."""

    max_request_bytes: int
    max_queue: int
    """Number of images that may wait."""

    timeout_s: float
    """Time that a client may stay silent."""

    max_pixels: int = MAX_PIXELS


def limits_of(config: ServeConfig) -> Limits:
    """The limits of a configuration."""
    return Limits(
        max_files=config.max_files,
        max_bytes=config.max_file_mib * 2**20,
        max_request_bytes=config.max_request_mib * 2**20,
        max_queue=config.max_queue,
        timeout_s=config.timeout_s,
    )


@dataclass(frozen=True)
class Explanation:
    """Why an image has its label."""

    png: bytes
    """The upright picture, in which glows what speaks for the label."""

    method: Method


class ServedModel:
    """A model that is loaded, with the threads that label with it, and the number of requests that use it."""

    def __init__(self, model: Bundle, config: ServeConfig, num_threads: int, metrics: Metrics) -> None:
        """Load a model. This takes a second, and may be done on any thread.

        Raises:
            CatdogError: the model cannot be used.
        """
        labeller = load_labeller(model, config.engine, num_workers=num_threads, use_gpu=config.use_gpu)
        self.bundle = model
        self.engine = labeller.engine
        self.num_users = 0
        self.is_replaced = False
        self.batcher = Batcher(labeller, num_threads=num_threads, note_batch=metrics.batches.observe)
        self._explaining = ThreadPoolExecutor(1, thread_name_prefix="catdog-explain")
        self._saliency: Saliency | None = None

    @property
    def description(self) -> dict[str, Any]:
        """What a client may know of the model."""
        return {
            "model_id": self.bundle.model_id,
            "architecture": self.bundle.card.get("arch"),
            "input_size": self.bundle.image_size,
            "engine": f"{self.engine.name} {self.engine.arithmetic}",
            "review_threshold": self.bundle.review_threshold(self.engine.arithmetic),
        }

    def explain(self, data: bytes) -> "Future[Explanation]":
        """Have it shown, on a thread, why an image gets its label. The future may raise an `ImageError`."""
        return self._explaining.submit(self._explain, data)

    def _explain(self, data: bytes) -> Explanation:
        labeller = self.batcher.labeller
        if self._saliency is None:  # few ask for it
            self._saliency = Saliency(self.bundle, self.engine)
        seen = labeller.look(data)
        (verdict,) = labeller.judge([seen])
        if seen.image is None:
            raise ImageError(verdict.error_code or "decode_failed", verdict.error_message or "")
        heat_YX = self._saliency.heat(seen.image.pixels_HWC)
        speaks_for = heat_YX if verdict.label == CLASS_NAMES[1] else -heat_YX
        picture = overlay_png(open_upright(data), speaks_for, max_px=MAX_OVERLAY_PX)
        return Explanation(picture, self._saliency.method)

    def close(self) -> None:
        """Wait for the images under way, and end the threads."""
        self._explaining.shutdown()
        self.batcher.close()
        self.batcher.labeller.close()


class Service:
    """Labels images with a model, within limits."""

    def __init__(self, config: ServeConfig, model: Bundle | None = None) -> None:
        """Load the model.

        Args:
            config: the configuration.
            model: the model, if it is verified already.

        Raises:
            CatdogError: the model cannot be used.
        """
        self.config = config
        self.limits = limits_of(config)
        self.metrics = Metrics()
        self._num_threads = config.num_workers or (
            min(config.cpus_per_replica, hardware.num_cores()) if config.executor == "ray" else hardware.num_cores()
        )
        self._model = self._loaded(model or bundle.load(config.model))
        self._show_model()
        self._num_waiting = 0
        self._num_held_bytes = 0
        self._num_explanations = 0
        self.is_draining = False
        self.num_requests = 0
        """Number of requests for labels that are under way."""

        self.num_begun = 0
        """Number of requests for labels since the start."""

    def _loaded(self, model: Bundle) -> ServedModel:
        return ServedModel(model, self.config, self._num_threads, self.metrics)

    def _show_model(self) -> None:
        self.metrics.model.clear()
        self.metrics.model.labels(self.model.bundle.model_id).set(1)

    @property
    def model(self) -> ServedModel:
        """The model that the next request gets."""
        return self._model

    # Requests.

    @contextlib.contextmanager
    def request(self) -> Iterator["RequestUnderWay"]:
        """A request for labels, for the length of a `with` block.

        Raises:
            ProblemError: draining, or busy.
        """
        if self.is_draining:
            raise draining()
        self.check_room()
        model, under_way = self._model, RequestUnderWay(self, self._model)
        model.num_users += 1
        self.num_requests += 1
        self.num_begun += 1
        try:
            yield under_way
        finally:
            under_way.close()
            self.num_requests -= 1
            model.num_users -= 1
            self._close_unused(model)

    @property
    def has_room(self) -> bool:
        """Whether one more image may wait."""
        return self._num_waiting < self.limits.max_queue

    def check_room(self) -> None:
        """Raise the problem busy unless one more image may wait."""
        if not self.has_room:
            raise busy(f"{self._num_waiting} images are waiting, and at most {self.limits.max_queue} may")

    def _close_unused(self, model: ServedModel) -> None:
        if model.is_replaced and model.num_users == 0:
            asyncio.get_running_loop().run_in_executor(None, model.close)

    def hold(self, num_bytes: int) -> None:
        """Count encoded bytes that have arrived, or, if negative, that are let go.

        Raises:
            ProblemError: busy. Nothing is counted.
        """
        if num_bytes > 0 and self._num_held_bytes + num_bytes > MAX_HELD_BYTES:
            raise busy(f"the images of all requests may have {MAX_HELD_BYTES} bytes together")
        self._num_held_bytes += num_bytes
        self.metrics.held.set(self._num_held_bytes)

    def count_waiting(self, change: int) -> None:
        """Count images that begin or cease to wait."""
        self._num_waiting += change
        self.metrics.waiting.set(self._num_waiting)

    async def explain(self, data: bytes, model: ServedModel) -> Explanation:
        """Show why an image gets its label.

        Raises:
            ImageError: the image cannot be used.
            ProblemError: busy.
        """
        if self._num_explanations >= _MAX_EXPLANATIONS:
            raise busy(f"at most {_MAX_EXPLANATIONS} explanations may wait")
        self._num_explanations += 1
        try:
            return await asyncio.wrap_future(model.explain(data))
        finally:
            self._num_explanations -= 1

    def count(self, answer: Answer) -> None:
        """Count an answer by its label, or by its error."""
        verdict = answer.verdict
        if verdict.error_code is not None:
            self.metrics.errors.labels(verdict.error_code).inc()
        else:
            self.metrics.images.labels(verdict.label).inc()
            if verdict.needs_review:
                self.metrics.reviews.inc()

    # Another model.

    async def watch(self) -> None:
        """Look again and again whether another model has taken the place of this one, and take it. Never returns."""
        while True:
            await asyncio.sleep(self.config.reload_s)
            await self.reload()

    async def reload(self) -> bool:
        """Take the model that is at the configured place now. Returns whether it is another one.

        If it cannot be used, the service keeps the one that it has.
        """
        loop = asyncio.get_running_loop()
        try:
            fresh = await loop.run_in_executor(None, self._fresh)
        except CatdogError as error:
            self.metrics.reloads.labels("failed").inc()
            logger.warning("The model that is there now cannot be used, so the old one stays: %s", one_line(error))
            return False
        if fresh is None:
            return False
        old, self._model = self._model, fresh
        self._show_model()
        self.metrics.reloads.labels("done").inc()
        logger.info("Model %s has taken the place of %s", fresh.bundle.model_id[:12], old.bundle.model_id[:12])
        old.is_replaced = True
        self._close_unused(old)
        return True

    def _fresh(self) -> ServedModel | None:
        """The model that is at the configured place, if it is another one than the service has. Takes long."""
        _, model_id = bundle.read_card(self.config.model)
        if model_id == self._model.bundle.model_id:
            return None
        return self._loaded(bundle.load(self.config.model))

    # The end.

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Look for other models for the length of an `async with` block, and close the service at its end."""
        watcher = asyncio.create_task(self.watch()) if self.config.reload_s else None
        try:
            yield
        finally:
            if watcher is not None:
                watcher.cancel()
            await asyncio.get_running_loop().run_in_executor(None, self.close)

    async def drain(self) -> bool:
        """Refuse new requests, and wait for those under way, but no longer than `--drain-s`. Whether all have ended."""
        self.is_draining = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.config.drain_s):
                while self.num_requests:
                    await asyncio.sleep(_POLL_S)
        return self.num_requests == 0

    def close(self) -> None:
        """Wait for the images under way, and end the threads."""
        self._model.close()


class RequestUnderWay:
    """One request: the bytes that it holds, and its images, in order."""

    MAX_AHEAD: Final = 16
    """Number of images of a request that wait at a time. The rest of the request is not read meanwhile."""

    def __init__(self, service: Service, model: ServedModel) -> None:
        self.service = service
        self.model = model
        self._num_held_bytes = 0
        self._waiting: list[asyncio.Future[Answer]] = []
        self._num_done = 0

    def hold(self, num_bytes: int) -> None:
        """As `Service.hold`, for the length of the request at most."""
        self.service.hold(num_bytes)
        self._num_held_bytes += num_bytes

    async def submit(self, content: bytes | ImageError, num_held_bytes: int) -> "asyncio.Future[Answer]":
        """Have an image labelled. Waits while too many images of this request wait, or of all.

        Args:
            content: the encoded image, or the reason why there is none.
            num_held_bytes: number of bytes that the request holds for this image. They are let go with its answer.

        Raises:
            ProblemError: busy, if this is the first image of the request. A request that has begun is not refused.
        """
        if not self._waiting:
            self.service.check_room()
        while len(self._waiting) - self._num_done >= self.MAX_AHEAD or not self.service.has_room:
            if self._num_done < len(self._waiting):
                await asyncio.wait(self._waiting[self._num_done : self._num_done + 1])
            else:
                await asyncio.sleep(_POLL_S)
        answer = asyncio.wrap_future(self.model.batcher.submit(content))
        self._num_held_bytes -= num_held_bytes  # from here on, they are the answer's
        self.service.count_waiting(1)
        self._waiting.append(answer)
        answer.add_done_callback(lambda done: self._note(done, num_held_bytes))
        return answer

    def _note(self, done: "asyncio.Future[Answer]", num_held_bytes: int) -> None:
        self.service.count_waiting(-1)
        self.service.hold(-num_held_bytes)
        while self._num_done < len(self._waiting) and self._waiting[self._num_done].done():
            self._num_done += 1
        if not done.cancelled() and done.exception() is None:
            self.service.count(done.result())

    def close(self) -> None:
        """Give up what has no answer yet, and let go of all bytes."""
        for answer in self._waiting[self._num_done :]:
            answer.cancel()
        self.service.hold(-self._num_held_bytes)
