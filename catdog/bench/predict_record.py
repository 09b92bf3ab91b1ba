"""What `catdog bench predict` found: its record, the table that it prints, and the chart that it draws."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Final

from catdog.bench.record import BenchRecord
from catdog.bench.rounds import Spread, spread
from catdog.records import plural
from catdog.report import style

OURS: Final = ("inline", "ray")


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What a contender did in a round: a whole process, from its start to its exit."""

    seconds: float
    images_per_s: float
    cpu_s_per_1000_images: float
    """Of all processes, see `catdog.bench.tree`."""

    peak_memory_bytes: int
    """Largest sum of the PSS of all processes at one time, see `catdog.bench.tree`."""

    num_rows: int


@dataclass(frozen=True, kw_only=True)
class BenchPredictRecord(BenchRecord):
    """What `predict.json` holds.

    - `ratios`: of `inline` and `ray`, which are ours, by the other contender: images per second of ours, divided by
      those of the other in the same round.
    - `limit_images_per_s`: the images that all cores could label per second if reading, decoding and computing took no
      more than each takes alone, on one thread, and nothing else took any time.
    - `steady_images_per_s`: of `inline` and `ray`: the images that it labels per second once it is under way: four
      fifths of the images, divided by what a run over all of them takes longer than one over a fifth of them.
    - `steady_share_of_limit`: of the same round.

    Steady figures are missing where there are too few images: the longer run was not the slower one.
    """

    file_name: ClassVar[str] = "predict.json"

    command: str = "bench predict"
    images: str
    num_images: int
    image_size: int
    ratios: dict[str, dict[str, Spread]]
    limit_images_per_s: Spread
    steady_images_per_s: dict[str, Spread]
    steady_share_of_limit: dict[str, Spread]
    seconds_per_image: dict[str, Spread]
    """Part of the work (`read`, `decode`, `forward`) → seconds on one core."""

    agreement: dict[str, float]
    """Peer → share of the images to which it gives the same label as ours."""

    skipped: dict[str, str]
    """Contender → why it did not run."""

    refused: dict[str, str]
    """Contender → why its figures do not count."""

    rounds: list[dict[str, Measurement]]
    fifth_seconds: list[dict[str, float]]
    """Seconds of `inline` and `ray` over a fifth of the images, by round."""

    engines: dict[str, int]
    """What computed ours, from the run record."""

    def summary(self) -> list[str]:
        """A table with a row per contender, and the limit."""
        milliseconds = " + ".join(f"{1000 * each.median:.2f} {name}" for name, each in self.seconds_per_image.items())
        lines = [
            f"Labelled {plural(self.num_images, 'image')} at {self.image_size} px, {len(self.rounds):,} times with "
            f"every contender, in {self.duration_s:,.0f} s on {plural(self.host['num_cores'], 'core')}.",
            f"  {'':15}{'images/s':>9}{'seconds':>9}{'memory':>10}{'CPU s/1,000':>13}   "
            f"{'inline ÷':24}{'ray ÷':24}same labels",
        ]
        for name in self.rounds[0]:
            if name not in self.refused:
                lines.append(f"  {name:15}{self._row(name)}".rstrip())
        lines.append(
            f"  {'limit':15}{self.limit_images_per_s.median:9.1f} images/s: {milliseconds} ms per image and core"
        )
        for name in OURS:
            steady = "too few images"
            if name in self.steady_images_per_s:
                share = self.steady_share_of_limit[name].in_percent()
                steady = f"{self.steady_images_per_s[name].median:9.1f} images/s, {share} of the limit"
            lines.append(f"  {f'steady {name}':15}{steady}")
        lines += [f"  {name:15}skipped: {reason}" for name, reason in self.skipped.items()]
        lines += [f"  {name:15}refused: {reason}" for name, reason in self.refused.items()]
        return [*lines, f"Bench: {self.output}"]

    def _row(self, name: str) -> str:
        found = [a_round[name] for a_round in self.rounds]
        speed, seconds = (
            statistics.median(getattr(each, field) for each in found) for field in ("images_per_s", "seconds")
        )
        memory = max(each.peak_memory_bytes for each in found)
        cpu_s = statistics.median(each.cpu_s_per_1000_images for each in found)
        ratios = "".join(f"{self.ratios[ours].get(name, '')!s:24}" for ours in OURS)
        agreement = f"{100 * self.agreement[name]:.2f} %" if name in self.agreement else ""
        return f"{speed:9.1f}{seconds:9.2f}{memory / 2**20:6,.0f} MiB{cpu_s:13.1f}   {ratios}{agreement}"


def ratios(rounds: Sequence[Mapping[str, Measurement]]) -> dict[str, dict[str, Spread]]:
    """Images per second of ours, as a multiple of those of every other contender in the same round."""
    return {
        ours: {
            other: spread([each[ours].images_per_s / each[other].images_per_s for each in rounds])
            for other in rounds[0]
            if other != ours
        }
        for ours in OURS
    }


def chart(record: BenchPredictRecord) -> bytes:
    """Images per second of every contender, as the PNG of a bar chart: medians, and lines from the least to the most.

    A dashed line shows the limit.
    """
    names = [name for name in record.rounds[0] if name not in record.refused][::-1]
    spreads = [spread([each[name].images_per_s for each in record.rounds]) for name in names]
    figure = style.new_figure(8.0, 1.4 + 0.5 * len(names))
    axes = figure.subplots()
    style.set_titles(axes, "Images per second", f"{record.num_images:,} images, {record.host['num_cores']} cores")
    colours = [style.BLUE if name in OURS else style.GREY for name in names]
    axes.barh(names, [each.median for each in spreads], height=0.6, color=colours)
    for place, each in enumerate(spreads):
        axes.hlines(place, each.min, each.max, color=style.INK, linewidth=1.5)
        axes.text(each.max, place, f"  {each.median:,.1f}", va="center", color=style.INK, fontsize=9)
    axes.axvline(record.limit_images_per_s.median, color=style.QUIET, linewidth=1, linestyle=(0, (4, 3)))
    axes.set_xlabel(
        "whole processes, start to exit; medians, least to most; dashed: the limit of the cores",
        color=style.QUIET,
        fontsize=9,
    )
    axes.grid(axis="x", color=style.FAINT, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[:].set_visible(False)
    axes.tick_params(colors=style.INK, length=0, pad=6, labelsize=10)
    return style.png(figure)
