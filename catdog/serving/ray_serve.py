"""Serving in replicas of a Ray Serve deployment: the same application in each, behind Serve's proxy.

Serve hands a replica up to `max_ongoing_requests` requests at a time. With its default, 5, no batch would fill; here it
is more than the replica's queue has room for, so that the replica itself says when it is full.
"""

import dataclasses
import logging
import signal
import threading
import time
from collections.abc import Mapping
from types import FrameType
from typing import Any, Final

from fastapi import FastAPI
from ray import serve

from catdog import bundle, ray_session
from catdog.bundle import Bundle
from catdog.config import ServeConfig
from catdog.serving import inline
from catdog.serving.app import create_app
from catdog.serving.record import ServeRecord
from catdog.serving.service import Service
from catdog.serving.token import read_token

logger = logging.getLogger(__name__)

NAME: Final = "catdog"
"""Of the application and of its deployment."""


@serve.ingress()
class Replica:
    """One replica: a service with its own model, and the application around it."""

    def __init__(self, config: ServeConfig, token: str | None) -> None:
        self._service = Service(config)
        self._token = token if token is not None else read_token(config)

    def __serve_build_asgi_app__(self) -> FastAPI:
        """What Serve calls for the application."""
        return create_app(self._service, token=self._token)


def application(args: Mapping[str, Any]) -> serve.Application:
    """What a `RayService` or `serve deploy` imports: the application with these fields of `ServeConfig`.

    Every replica reads the token in its own environment.
    """
    return _bound(ServeConfig(**args), None)


def _bound(config: ServeConfig, token: str | None) -> serve.Application:
    deployment = serve.deployment(
        Replica,
        name=NAME,
        num_replicas=config.num_replicas,
        ray_actor_options={"num_cpus": config.cpus_per_replica, "num_gpus": int(config.use_gpu)},
        max_ongoing_requests=2 * config.max_queue,
        graceful_shutdown_timeout_s=config.drain_s,
        max_constructor_retry_count=3,
    )
    return deployment.bind(dataclasses.replace(config, executor="ray"), token)


def run(config: ServeConfig, token: str | None) -> ServeRecord:
    """Serve on a cluster, or on an embedded Ray, until this process is told to end.

    Raises:
        UsageError: the port is taken.
        CatdogError: the model cannot be used, or Ray does not start.
    """
    started = time.monotonic()
    model = bundle.load(config.model)  # so that a bad one is told before anything starts
    with inline.listening(config.host, config.port) as listener:
        host, port = listener.getsockname()[:2]
        url = inline.url_of(listener)
    with ray_session.connect(config.ray_address, min_cpus=config.num_replicas * config.cpus_per_replica + 1):
        _serve(config, token, host, port, url, model)
    return ServeRecord(
        url=url,
        executor="ray",
        model_id=model.model_id,
        num_requests=None,
        labels=None,
        errors=None,
        num_cut_off=0,
        duration_s=round(time.monotonic() - started, 1),
    )


def _serve(config: ServeConfig, token: str | None, host: str, port: int, url: str, model: Bundle) -> None:
    is_told = threading.Event()

    def end(_signum: int, _frame: FrameType | None) -> None:
        is_told.set()

    serve.start(http_options={"host": host, "port": port})
    previous = {each: signal.signal(each, end) for each in (signal.SIGTERM, signal.SIGINT)}
    try:
        serve.run(_bound(config, token), name=NAME, route_prefix="/")
        logger.info("Serving model %s with %d replicas at %s", model.model_id[:12], config.num_replicas, url)
        is_told.wait()
        logger.info("Ending: requests under way get %g s", config.drain_s)
    finally:
        serve.delete(NAME)  # waits for its replicas, which answer what is under way
        serve.shutdown()
        for each, handler in previous.items():
            signal.signal(each, handler)
