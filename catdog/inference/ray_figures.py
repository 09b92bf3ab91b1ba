"""What actors count for Ray's dashboard and its Prometheus: images, labels that need review, and seconds by stage.

Ray exports the counters of every process with the node and the job that they belong to, and puts `ray_` before their
names: `ray_catdog_images_total{Outcome="ok"}`. The dashboard and Ray Data's own figures show the job's operator as
`OPERATOR`.
"""

from typing import Final

from ray.util import metrics

from catdog.inference.work import SliceResult

OPERATOR: Final = "Map(_SliceLabeller)"
"""How Ray names the operator whose actors label."""


class Figures:
    """Counters of one actor."""

    def __init__(self) -> None:
        self._images = metrics.Counter("catdog_images_total", "Images that actors tried.", tag_keys=("Outcome",))
        self._review = metrics.Counter("catdog_needs_review_total", "Labels that need review.")
        self._seconds = metrics.Counter("catdog_stage_seconds_total", "Seconds of threads.", tag_keys=("Stage",))

    def add(self, result: SliceResult) -> None:
        """Count what became of a slice."""
        outcomes = {"ok": sum(result.labels.values()), "error": sum(result.errors.values())}
        for outcome, count in (outcomes | {"already_done": result.already_done}).items():
            if count:
                self._images.inc(count, {"Outcome": outcome})
        if result.needs_review:
            self._review.inc(result.needs_review)
        for stage in ("decode", "score", "publish"):
            if (seconds := getattr(result, f"{stage}_s")) > 0:
                self._seconds.inc(seconds, {"Stage": stage})
