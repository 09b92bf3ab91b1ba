"""What `catdog bench plan` measures: roles, which list a simulated S3 and plan what to label.

They do what `predict` does before and while it labels, and label nothing.
"""

from __future__ import annotations

import resource
import time
from typing import Final

from catdog import storage
from catdog.bench import processes, simulated_s3
from catdog.bench.processes import Settings

Measured = dict[str, float]
"""`seconds`, `first_s` (until the first image or slice), `peak_bytes`, and the counts of the plan, if there is one."""

_SOURCE: Final = f"s3://{simulated_s3.BUCKET}/{simulated_s3.PREFIX}"


def lists(_: Settings) -> Measured:
    """List the store."""
    started = time.monotonic()
    files = storage.list_images(_SOURCE)
    next(files)
    first_s = time.monotonic() - started
    num_listed = 1 + sum(1 for _ in files)
    seconds = time.monotonic() - started
    return {"seconds": seconds, "first_s": first_s, "listed": num_listed, "peak_bytes": _peak_bytes()}


def plans(settings: Settings) -> Measured:
    """List the store, and plan a run over it. What is published is the plan, and the index of what is done."""
    from catdog.inference.plan import open_plan

    started = time.monotonic()
    first_s = 0.0
    with open_plan([_SOURCE], settings["output"], settings["model_id"], run_id=settings["run_id"]) as plan:
        for _ in plan.slices():
            first_s = first_s or time.monotonic() - started
        seconds = time.monotonic() - started
        counts = plan.counts
        measured: Measured = {
            "seconds": seconds,
            "first_s": first_s or seconds,
            "listed": counts.listed,
            "already_done": counts.already_done,
            "to_label": counts.to_label,
            "num_parts": plan.num_slices,
        }
        plan.close()
    return measured | {"peak_bytes": _peak_bytes()}


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    processes.main(lists, plans)
