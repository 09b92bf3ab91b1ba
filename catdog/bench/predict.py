"""`catdog bench predict`: `catdog predict` and others that label a folder of images, measured in turns.

Every round runs every contender, one after the other, each as a process of its own that is measured from its start to
its exit with all that it starts, every other round in reverse order: what else the machine does falls on all of them
alike. Nothing is written to the output before all is measured and checked.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pyarrow as pa

from catdog import bundle, hardware, provenance, scratch, storage
from catdog.bench import folders, limit, peers, predict_record, processes, tree
from catdog.bench.predict_record import OURS, BenchPredictRecord, Measurement
from catdog.bench.record import Begun
from catdog.bench.rounds import Spread, in_turn, spread
from catdog.bundle import Bundle
from catdog.config import BenchPredictConfig
from catdog.errors import BooksError, CatdogError, UsageError
from catdog.storage import SourceFile

logger = logging.getLogger(__name__)

CHART_NAME: Final = "predict.png"

MIN_IMAGES: Final = 10
"""A fifth of them must be some."""

TIMEOUT_S: Final = 600.0
"""A contender is stopped after so long, or `TIMEOUT_FACTOR` times as long as inline took."""

TIMEOUT_FACTOR: Final = 20

OPENVINO_NAMES: Final = (bundle.ir_names("int8")["xml"], bundle.ir_names("float")["xml"])
"""OpenVINO's models in a bundle, the faster one first."""


@dataclass(frozen=True, kw_only=True)
class _Contender:
    command: Callable[[str], list[str]]
    """Directory to write to → command line."""

    rows: Callable[[str], folders.Rows]
    """Directory that it wrote to → rows."""


def bench_predict(config: BenchPredictConfig) -> BenchPredictRecord:
    """Measure, and write `predict.json` and `predict.png`.

    Raises:
        UsageError: there are too few images, or the output holds something else.
        CatdogError: `catdog predict` failed.
        BooksError: what it said depends on the executor, or on the round.
    """
    begun = Begun(BenchPredictRecord, config)
    images = storage.absolute(config.images, keep_slash=True)
    model = bundle.load(config.model)
    files = list(dict.fromkeys(storage.list_images(images, exclude=begun.output)))
    if len(files) < MIN_IMAGES:
        raise UsageError(f"--images must hold at least {MIN_IMAGES} images. Received: {len(files)} in {config.images}")
    with scratch.directory("bench") as directory:
        bench = _Bench(config, model, images, files, directory)
        for number in range(config.rounds):
            bench.run_round(number)
    rounds, parts = bench.valid_rounds(), bench.parts
    limits = [hardware.num_cores() / sum(each.values()) for each in parts]
    steady, shares = bench.steady(limits)
    record = BenchPredictRecord(
        images=provenance.redact(images),
        num_images=len(files),
        image_size=model.image_size,
        ratios=predict_record.ratios(rounds),
        limit_images_per_s=spread(limits),
        steady_images_per_s=steady,
        steady_share_of_limit=shares,
        seconds_per_image={name: spread([each[name] for each in parts]) for name in limit.PARTS},
        agreement=bench.agreement,
        skipped=bench.skipped,
        refused=bench.refused,
        rounds=rounds,
        fifth_seconds=bench.fifth_seconds,
        engines=bench.engines,
        **begun.common(peers.versions()),
    )
    storage.publish_bytes(storage.join(begun.output, CHART_NAME), predict_record.chart(record))
    return begun.publish(record)


class _Bench:
    """The contenders, and what they have done so far."""

    def __init__(
        self, config: BenchPredictConfig, model: Bundle, images: str, files: Sequence[SourceFile], directory: str
    ) -> None:
        self._config, self._model, self._images, self._files = config, model, images, files
        self._directory = directory
        self._rounds: list[dict[str, Measurement]] = []
        self._ours: folders.Rows | None = None
        self.parts: list[dict[str, float]] = []
        self.fifth_seconds: list[dict[str, float]] = []
        self.agreement: dict[str, float] = {}
        self.skipped: dict[str, str] = {}
        self.refused: dict[str, str] = {}
        self.engines: dict[str, int] = {}
        pictures = str(Path(directory, "pictures"))
        self._uris = folders.write_pictures(files, pictures)
        self._num_fifth = len(files) // 5
        fifth = storage.join(directory, "fifth.parquet")
        storage.publish_parquet(fifth, pa.table({"uri": [file.uri for file in files[: self._num_fifth]]}))
        self._fifths = {executor: self._predict(fifth, executor) for executor in OURS}
        self._contenders = {executor: self._predict(images, executor) for executor in OURS}
        for name, settings in _peers(model, pictures).items():
            if absent := peers.missing(settings["role"]):
                self.skipped[name] = f"{' and '.join(absent)} not installed"
            elif settings["role"] == "daft_openvino" and settings["openvino"] is None:
                self.skipped[name] = f"the model has no {OPENVINO_NAMES[0]}"
            else:
                self._contenders[name] = self._peer(settings)

    def _predict(self, images: str, executor: str) -> _Contender:
        def command(output: str) -> list[str]:
            flags = ["--images", images, "--output", output, "--executor", executor, "--max-failed-fraction", "1"]
            return processes.catdog("predict", *flags, model=self._config.model)

        return _Contender(command=command, rows=folders.rows_of_ours)

    def _peer(self, settings: processes.Settings) -> _Contender:
        def command(output: str) -> list[str]:
            os.mkdir(output)
            return processes.role("peers", settings | {"output": output})

        return _Contender(command=command, rows=folders.rows_of_peer)

    def run_round(self, number: int) -> None:
        """Run every contender once, and the measurement of the limit."""
        measured: dict[str, Measurement] = {}
        fifths: dict[str, float] = {}
        steps: list[Callable[[], None]] = [self._measure_limit]
        steps += [lambda name=name: self._measure_fifth(name, fifths) for name in OURS]  # type: ignore[misc]
        steps += [
            lambda name=name: self._measure_contender(name, measured)  # type: ignore[misc]
            for name in self._contenders
            if name not in self.refused
        ]
        for step in in_turn(steps, number):
            step()
        self._rounds.append({name: measured[name] for name in self._contenders if name in measured})
        self.fifth_seconds.append(fifths)
        logger.info(
            "Round %d of %d: %s",
            number + 1,
            self._config.rounds,
            ", ".join(f"{name} {each.images_per_s:.1f} images/s" for name, each in self._rounds[-1].items()),
        )

    def _measure_limit(self) -> None:
        settings = {"role": "limit", "images": self._images, "model": self._config.model}
        self.parts.append(processes.play("limit", settings, self._directory))

    def _measure_fifth(self, name: str, measured: dict[str, float]) -> None:
        usage, rows = self._run(name, self._fifths[name])
        self._check_ours(name, rows, self._num_fifth)
        measured[name] = usage.wall_s

    def _measure_contender(self, name: str, measured: dict[str, Measurement]) -> None:
        try:
            usage, rows = self._run(name, self._contenders[name])
        except CatdogError as error:
            if name in OURS:
                raise
            self.refused[name] = str(error)
            return
        if name in OURS:
            self._check_ours(name, rows, len(self._files))
        elif len(rows) != len(self._files):
            self.refused[name] = f"it must label all of {len(self._files):,} images. Received: {len(rows):,} rows"
            return
        elif self._ours is not None:
            same = [self._ours[self._uris[picture]][0] == row[0] for picture, row in rows.items()]
            self.agreement[name] = sum(same) / len(same)
        num_images = len(self._files)
        measured[name] = Measurement(
            seconds=usage.wall_s,
            images_per_s=num_images / usage.wall_s,
            cpu_s_per_1000_images=1000 * usage.cpu_s / num_images,
            peak_memory_bytes=usage.peak_memory_bytes,
            num_rows=len(rows),
        )

    def _run(self, name: str, contender: _Contender) -> tuple[tree.Usage, folders.Rows]:
        slowest = max((each["inline"].seconds for each in self._rounds), default=0.0)
        with tempfile.TemporaryDirectory(dir=self._directory) as place:
            output = storage.join(place, "output")
            usage = tree.measure(
                contender.command(output),
                Path(place, "log"),
                timeout_s=max(TIMEOUT_S, TIMEOUT_FACTOR * slowest),
            )
            if usage.exit_code:
                raise CatdogError(
                    f"a contender must finish. Received: {name} with exit code {usage.exit_code}: {usage.log_tail}"
                )
            rows = contender.rows(output)
            if name in OURS and not self.engines:
                self.engines = folders.run_record(output)["engines"]
        return usage, rows

    def _check_ours(self, name: str, rows: folders.Rows, num_images: int) -> None:
        """Raise `BooksError` unless ours has said the same as ever, of all images."""
        known = self._ours or rows
        if len(rows) != num_images or any(known.get(uri, row) != row for uri, row in rows.items()):
            differing = sum(known.get(uri, row) != row for uri, row in rows.items())
            raise BooksError(
                f"every run must say the same of all of {num_images:,} images. Received: {len(rows):,} rows of {name}, "
                f"of which {differing:,} differ"
            )
        if len(rows) == len(self._files):
            self._ours = rows

    def valid_rounds(self) -> list[dict[str, Measurement]]:
        """The rounds, with the contenders that count."""
        return [{name: each for name, each in a_round.items() if name not in self.refused} for a_round in self._rounds]

    def steady(self, limits: Sequence[float]) -> tuple[dict[str, Spread], dict[str, Spread]]:
        """Images per second of ours under way, and as a share of the limit; missing where there are too few images."""
        speeds, shares = {}, {}
        for name in OURS:
            longer = [
                each[name].seconds - fifths[name] for each, fifths in zip(self._rounds, self.fifth_seconds, strict=True)
            ]
            if min(longer) > 0:
                steady = [(len(self._files) - self._num_fifth) / seconds for seconds in longer]
                speeds[name] = spread(steady)
                shares[name] = spread([each / most for each, most in zip(steady, limits, strict=True)])
        return speeds, shares


def _peers(model: Bundle, pictures: str) -> dict[str, processes.Settings]:
    """The settings of each peer, by its name."""
    converted = next((str(model.paths[name]) for name in OPENVINO_NAMES if name in model.paths), None)
    settings: processes.Settings = {
        "pictures": pictures,
        "model": str(model.paths[bundle.MODEL_NAME]),
        "openvino": converted,
        "image_size": model.image_size,
    }
    return {
        "keras-32": settings | {"role": "keras", "batch_size": 32},
        "keras-64": settings | {"role": "keras", "batch_size": 64},
        "daft": settings | {"role": "daft", "batch_size": 64},
        "daft-openvino": settings | {"role": "daft_openvino", "batch_size": 64},
        "ray-docs": settings | {"role": "ray_docs", "batch_size": 64},
    }
