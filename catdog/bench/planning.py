"""What `catdog bench plan` measures: `python -m catdog.bench.planning SETTINGS`, in a process of its own.

`SETTINGS` is JSON. The process lists a simulated S3 and plans what to label, as `predict` does before and while it
labels, and labels nothing. It prints a line of JSON.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from typing import Any

from catdog import storage
from catdog.bench import simulated_s3

Settings = dict[str, Any]
Measured = dict[str, float]
"""`seconds`, `first_s` (until the first image or slice), `peak_bytes`, and the counts of the plan, if there is one."""


def lists(settings: Settings) -> Measured:
    """List the store."""
    started = time.monotonic()
    files = storage.list_images(_source(settings))
    next(files)
    first_s = time.monotonic() - started
    num_listed = 1 + sum(1 for _ in files)
    return {"seconds": time.monotonic() - started, "first_s": first_s, "listed": num_listed}


def plans(settings: Settings) -> Measured:
    """List the store, and plan a run over it. What is published is the plan, and the index of what is done."""
    from catdog.inference.plan import open_plan

    started = time.monotonic()
    first_s = 0.0
    with open_plan([_source(settings)], settings["output"], settings["model_id"], run_id=settings["run_id"]) as plan:
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
    return measured


def _source(settings: Settings) -> str:
    os.environ.update(settings["environment"])
    return f"s3://{simulated_s3.BUCKET}/{simulated_s3.PREFIX}"


def _main() -> None:
    settings: Settings = json.loads(sys.argv[1])
    measured = {"lists": lists, "plans": plans}[settings["does"]](settings)
    measured["peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    sys.stdout.write(json.dumps(measured) + "\n")


if __name__ == "__main__":
    _main()
