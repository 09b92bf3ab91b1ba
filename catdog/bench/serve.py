"""`catdog bench serve`: `catdog serve` and a plain server of FastAPI and Keras with the same weights, in turns.

Every round starts each server, as a process of its own, and asks it with 1, 8 and 64 clients, which are another
process; every other round in reverse order. Both get the same requests: a form with one file.
"""

from __future__ import annotations

import contextlib
import json
import logging
import statistics
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from catdog import bundle, provenance, scratch, storage
from catdog.bench import folders, processes, serve_record
from catdog.bench.record import Begun
from catdog.bench.rounds import in_turn, spread
from catdog.bench.serve_record import CONTENDERS, NUM_CLIENTS, OURS, PEER, BenchServeRecord, Load
from catdog.bundle import Bundle
from catdog.config import BenchServeConfig
from catdog.errors import CatdogError, ImageError, UsageError
from catdog.images import decode
from catdog.storage import SourceFile

logger = logging.getLogger(__name__)

MAX_IMAGES: Final = 64
"""Number of images that the clients send over and over."""

START_S: Final = 120.0

PATHS: Final = {OURS: "/v1/predict", PEER: "/predict"}
READY: Final = {OURS: "/v2/health/ready", PEER: "/openapi.json"}


def bench_serve(config: BenchServeConfig) -> BenchServeRecord:
    """Measure, and write `serve.json`.

    Raises:
        UsageError: there is no image that can be labelled, or the output holds something else.
        CatdogError: a server did not start, or did not answer.
    """
    begun = Begun(BenchServeRecord, config)
    images = storage.absolute(config.images, keep_slash=True)
    model = bundle.load(config.model)
    with scratch.directory("bench") as directory:
        pictures = str(Path(directory, "pictures"))
        files = _usable(list(storage.list_images(images, exclude=begun.output)), model.image_size)
        if not files:
            raise UsageError(f"--images must hold an image that can be labelled. Received: --images={config.images}")
        folders.write_pictures(files, pictures)
        bench = _Bench(config, model, pictures, directory)
        for number in range(config.rounds):
            bench.run_round(number)
    rounds = bench.rounds
    alone_ms = [1000 * sum(each.values()) for each in bench.alone]
    record = BenchServeRecord(
        images=provenance.redact(images),
        num_images=len(files),
        image_size=model.image_size,
        ratios=serve_record.ratios(rounds),
        alone_ms={name: spread([1000 * each[name] for each in bench.alone]) for name in bench.alone[0]},
        overhead_ms=spread([each[OURS]["1"].p50_ms - ms for each, ms in zip(rounds, alone_ms, strict=True)]),
        agreement=_agreement(bench.labels),
        rounds=rounds,
        engine=bench.engine,
        **begun.common(),
    )
    return begun.publish(record)


def _usable(files: Sequence[SourceFile], size_px: int) -> list[SourceFile]:
    """At most `MAX_IMAGES` of the files, from all over the collection, without those that are no usable image."""
    found = []
    for file in files[:: -(-len(files) // MAX_IMAGES) or 1]:
        with contextlib.suppress(ImageError):
            decode(storage.read_source(file.uri, file.num_bytes, file.version), size_px)
            found.append(file)
    return found


def _agreement(labels: dict[str, list[str | None]]) -> float:
    same = [ours == theirs for ours, theirs in zip(labels[OURS], labels[PEER], strict=True)]
    return sum(same) / len(same)


class _Bench:
    """The servers, and what they have done so far."""

    def __init__(self, config: BenchServeConfig, model: Bundle, pictures: str, directory: str) -> None:
        self._config, self._model, self._pictures, self._directory = config, model, pictures, directory
        self.rounds: list[dict[str, dict[str, Load]]] = []
        self.alone: list[dict[str, float]] = []
        self.labels: dict[str, list[str | None]] = {}
        self.engine = ""

    def run_round(self, number: int) -> None:
        """Ask each server with each number of clients."""
        self.alone.append(self._play({"role": "alone", "model": self._config.model}))
        measured = {name: self._measure(name) for name in in_turn(CONTENDERS, number)}
        self.rounds.append({name: measured[name] for name in CONTENDERS})
        logger.info(
            "Round %d of %d: %s",
            number + 1,
            self._config.rounds,
            ", ".join(
                f"{name} {each[str(NUM_CLIENTS[-1])].images_per_s:.1f} images/s" for name, each in measured.items()
            ),
        )

    def _measure(self, name: str) -> dict[str, Load]:
        with self._server(name) as port:
            asked = {"role": "clients", "port": port, "path": PATHS[name]}
            first = self._play({**asked, "num_clients": 4, "seconds": None})  # which also warms it up
            self.labels[name] = first["labels"]
            if name == OURS and not self.engine:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/model", timeout=10) as answer:
                    self.engine = json.load(answer)["engine"]
            return {
                str(num_clients): _load(
                    self._play({**asked, "num_clients": num_clients, "seconds": self._config.seconds})
                )
                for num_clients in NUM_CLIENTS
            }

    def _play(self, settings: dict[str, Any]) -> Any:
        """Run a role of `serve_contenders` to its end, and return what it found."""
        return processes.play("serve_contenders", {"pictures": self._pictures, **settings}, self._directory)

    @contextlib.contextmanager
    def _server(self, name: str) -> Iterator[int]:
        """A server that runs, for the length of a `with` block. Its port."""
        (port,) = processes.free_ports(1)
        if name == OURS:
            flags = ["--executor", "inline", "--port", str(port)]
            command = processes.catdog("serve", *flags, model=self._config.model)
        else:
            model = {"model": str(self._model.paths[bundle.MODEL_NAME]), "image_size": self._model.image_size}
            command = processes.role("serve_contenders", {"role": name, "port": port, **model})
        log = Path(self._directory, f"{name}.log")
        with processes.running(command, log) as server:
            _wait_until_ready(server, f"http://127.0.0.1:{port}{READY[name]}", log)
            yield port


def _wait_until_ready(server: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + START_S
    while True:
        with contextlib.suppress(urllib.error.URLError, ConnectionError), urllib.request.urlopen(url, timeout=10):
            return
        if server.poll() is not None or time.monotonic() > deadline:
            raise CatdogError(f"a server must start. Received: {processes.tail(log.read_text(errors='replace'))}")
        time.sleep(0.1)


def _load(found: dict[str, Any]) -> Load:
    latencies = sorted(found["latencies_s"])
    return Load(
        images_per_s=(len(latencies) - found["num_errors"]) / found["seconds"],
        p50_ms=1000 * statistics.median(latencies),
        p99_ms=1000 * latencies[min(len(latencies) - 1, int(0.99 * len(latencies)))],
        num_answers=len(latencies),
        num_errors=found["num_errors"],
    )
