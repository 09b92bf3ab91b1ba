"""What `catdog bench train` found: its record, the text that it prints, and its figures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import ClassVar

from catdog.bench.record import BenchRecord
from catdog.bench.rounds import Spread, spread
from catdog.records import plural

Epoch = dict[str, float]
"""What a contender says of one epoch: `num_images`; `seconds`; `input_s`, the seconds of waiting for images among
them; `train_loss`."""


@dataclass(frozen=True, kw_only=True)
class Figure(Spread):
    """A ratio, over the rounds."""

    target: float

    def __str__(self) -> str:
        """`98.7 % (97.5 to 99.1)`."""
        return self.in_percent()


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What a contender did in a round, its first epoch left out."""

    images_per_s: float
    input_share: float
    """Share of its seconds in which the workers waited for images."""

    epochs: list[list[Epoch]]
    """Of each of its processes, all epochs."""


Round = Mapping[str, Measurement]
"""By the contenders' names."""


@dataclass(frozen=True, kw_only=True)
class BenchTrainRecord(BenchRecord):
    """What `bench.json` holds.

    Its figures:

    - `tutorial_speedup`: images per second on Ray Train as a multiple of those of the Keras tutorial, with or without
      XLA, whichever is faster in that round. The tutorial decodes its images in every epoch; ours are decoded once,
      before.
    - `tutorial_speedup_streamed`: the same where ours are decoded in every epoch, too.
    - `ray_efficiency`: images per second on Ray Train as a share of those of bare processes.
    - `scaling_efficiency`: images per second of all workers as a share of as many times those of one worker, which
      trains with the same images per step and worker, and has as many steps in an epoch.
    - `sharing_efficiency`: images per second of all workers as a share of those of as many bare processes side by side,
      each of which trains a model of its own. They share caches, memory and clock as our workers do, but no gradients.
    - `input_share_in_memory`, `input_share_streamed`: the share of the time in which workers wait for images, which are
      held in the object store, or decoded anew in every epoch on the cores that train.
    """

    file_name: ClassVar[str] = "bench.json"

    command: str = "bench train"
    arch: str
    figures: dict[str, Figure]
    rounds: list[dict[str, Measurement]]
    num_workers: int
    image_size: int
    num_images: int
    """Per epoch."""

    def summary(self) -> list[str]:
        """Every figure with its range over the rounds and its target."""
        figures, workers = self.figures, plural(self.num_workers, "worker")
        goals = {name: f"{100 * figure.target:g} %" for name, figure in figures.items()}
        return [
            f"Trained {self.arch} at {self.image_size} px on {self.num_images:,} images, "
            f"{len(self.rounds)} times with every contender, in {self.duration_s:,.0f} s.",
            "Images per second:",
            f"  Keras tutorial  {figures['tutorial_speedup']} of its (goal: at least {goals['tutorial_speedup']})",
            f"    both decoding {figures['tutorial_speedup_streamed']} of its "
            f"(goal: at least {goals['tutorial_speedup_streamed']})",
            f"  bare processes  {figures['ray_efficiency']} of theirs (goal: at least {goals['ray_efficiency']})",
            f"  one worker      {figures['scaling_efficiency']} of its with each of {workers} "
            f"(goal: at least {goals['scaling_efficiency']})",
            f"  side by side    {figures['sharing_efficiency']} of those of {workers} that share nothing "
            f"(goal: at least {goals['sharing_efficiency']})",
            "Share of the time in which workers wait for images:",
            f"  in memory       {figures['input_share_in_memory']} (goal: below {goals['input_share_in_memory']})",
            f"  streamed        {figures['input_share_streamed']} (goal: below {goals['input_share_streamed']})",
            f"Bench: {self.output}",
        ]


def figures(rounds: Sequence[Round], num_workers: int) -> dict[str, Figure]:
    """Every figure of `BenchTrainRecord` over the rounds."""

    def images_per_s(a_round: Round, *names: str) -> float:
        return max(a_round[name].images_per_s for name in names)

    def speedup(a_round: Round, name: str) -> float:
        return images_per_s(a_round, name) / images_per_s(a_round, "tutorial", "tutorial_xla")

    definitions: dict[str, tuple[Callable[[Round], float], float]] = {
        "tutorial_speedup": (lambda each: speedup(each, "ray_train"), 2.0),
        "tutorial_speedup_streamed": (lambda each: speedup(each, "streamed"), 2.0),
        "ray_efficiency": (lambda each: images_per_s(each, "ray_train") / images_per_s(each, "bare"), 0.98),
        "scaling_efficiency": (
            lambda each: images_per_s(each, "ray_train") / (num_workers * images_per_s(each, "one_worker")),
            0.95,
        ),
        "sharing_efficiency": (
            lambda each: images_per_s(each, "ray_train") / images_per_s(each, "side_by_side"),
            0.95,
        ),
        "input_share_in_memory": (lambda each: each["ray_train"].input_share, 0.02),
        "input_share_streamed": (lambda each: each["streamed"].input_share, 0.02),
    }
    found = {}
    for name, (definition, target) in definitions.items():
        values = [definition(each) for each in rounds]
        found[name] = Figure(**asdict(spread(values)), target=target)
    return found
