"""What `catdog bench serve` found: its record, and the table that it prints."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Final

from catdog.bench.record import BenchRecord
from catdog.bench.rounds import Spread, spread
from catdog.records import plural

OURS: Final = "catdog"
PEER: Final = "keras"
CONTENDERS: Final = (OURS, PEER)
NUM_CLIENTS: Final = (1, 8, 64)


@dataclass(frozen=True, kw_only=True)
class Load:
    """What a server did under a number of clients, each of which sent one request after the other."""

    images_per_s: float
    p50_ms: float
    p99_ms: float
    num_answers: int
    num_errors: int
    """Answers with another status than 200."""


@dataclass(frozen=True, kw_only=True)
class BenchServeRecord(BenchRecord):
    """What `serve.json` holds.

    - `ratios`: number of clients → images per second of ours, divided by those of the Keras server in the same round.
    - `alone_ms`: decoding and computing one image, on one thread, without a server.
    - `overhead_ms`: by how much longer half of the answers take one client than `alone_ms`, in the same round.
    """

    file_name: ClassVar[str] = "serve.json"

    command: str = "bench serve"
    images: str
    num_images: int
    image_size: int
    ratios: dict[str, Spread]
    alone_ms: dict[str, Spread]
    overhead_ms: Spread
    agreement: float
    """Share of the images to which both servers give the same label."""

    rounds: list[dict[str, dict[str, Load]]]
    """Contender → number of clients → what it did."""

    engine: str
    """What computed ours."""

    def summary(self) -> list[str]:
        """A table with a row per contender and number of clients."""
        lines = [
            f"Sent {plural(self.num_images, 'image')} over and over, {len(self.rounds):,} times to each server, "
            f"in {self.duration_s:,.0f} s on {plural(self.host['num_cores'], 'core')}.",
            f"  {'':8}{'clients':>8}{'images/s':>10}{'p50 ms':>9}{'p99 ms':>9}{'errors':>8}   catdog ÷ keras",
        ]
        for num_clients in map(str, NUM_CLIENTS):
            for name in CONTENDERS:
                ratio = str(self.ratios[num_clients]) if name == OURS else ""
                lines.append(f"  {name:8}{num_clients:>8}{self._row(name, num_clients)}   {ratio}".rstrip())
        parts = " + ".join(f"{each.median:.1f} {name}" for name, each in self.alone_ms.items())
        lines += [
            f"  alone   {parts} ms; half of the answers take one client {self.overhead_ms} ms longer",
            f"  same labels {100 * self.agreement:.1f} %",
            f"Bench: {self.output}",
        ]
        return lines

    def _row(self, name: str, num_clients: str) -> str:
        found = [a_round[name][num_clients] for a_round in self.rounds]
        speed, p50, p99 = (
            statistics.median(getattr(each, field) for each in found) for field in ("images_per_s", "p50_ms", "p99_ms")
        )
        return f"{speed:10.1f}{p50:9.1f}{p99:9.1f}{sum(each.num_errors for each in found):8}"


def ratios(rounds: Sequence[dict[str, dict[str, Load]]]) -> dict[str, Spread]:
    """Number of clients → images per second of ours, as a multiple of the peer's in the same round."""
    return {
        num_clients: spread(
            [each[OURS][num_clients].images_per_s / each[PEER][num_clients].images_per_s for each in rounds]
        )
        for num_clients in map(str, NUM_CLIENTS)
    }
