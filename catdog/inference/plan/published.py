"""The plans in an output: a run publishes its plan before the work, and takes over what dead runs have left of theirs.

`OUTPUT/_runs/<run_id>.plan-<number>.parquet` are files of `PLAN_SCHEMA`. A plan is open as long as its files are there
and its run has no record: some of its workers may still be alive, and may publish a slice of it at any time. A run that
ends in an orderly way deletes the files of its plan, after it has published its record. If it has done all that it took
over, it deletes the files of the other plans, too; else workers of their runs might still publish what is left.
"""

import logging
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pyarrow.parquet as pq

from catdog import failpoints, provenance, schema, storage
from catdog.inference.publish import RUNS_NAME
from catdog.schema import PLAN_SCHEMA

logger = logging.getLogger(__name__)

_NAME: Final = re.compile(r"(.+)\.plan-\d+\.parquet")


@dataclass(frozen=True, kw_only=True)
class OpenPlan:
    """A file of an open plan.

    Attributes:
        name: of the file.
        run_id: the run that has published it.
        path: a local copy.
    """

    name: str
    run_id: str
    path: Path


class PublishedPlans:
    """The files of plans in an output."""

    def __init__(self, output: str, run_id: str | None, check: Callable[[], object]) -> None:
        """Nothing is read or written yet.

        Args:
            output: directory of the part files.
            run_id: the run that plans; None to write nothing.
            check: is called before a file is published, and raises an error if the run may not.
        """
        self._url = storage.join(output, RUNS_NAME)
        self._run_id = run_id
        self._check = check
        self._names: list[str] = []
        self._taken: list[str] = []

    def open_plans(self, scratch: Path) -> list[OpenPlan]:
        """The open plans of the output, in the order in which their runs began. Files of closed ones are deleted."""
        names = storage.list_names(self._url)
        found: list[OpenPlan] = []
        for name in names:
            if (match := _NAME.fullmatch(name)) is None:
                continue
            if f"{match[1]}.json" in names:
                if self._run_id is not None:
                    storage.delete(storage.join(self._url, name))
                continue
            plan = OpenPlan(name=name, run_id=match[1], path=scratch / f"taken-{len(found)}.parquet")
            if self._fetch(plan):
                found.append(plan)
        return found

    def _fetch(self, plan: OpenPlan) -> bool:
        url = storage.join(self._url, plan.name)
        try:
            with storage.open_read(url) as source, open(plan.path, "wb") as target:
                shutil.copyfileobj(source, target, 2**20)
            with pq.ParquetFile(plan.path) as file:
                schema.check(file.schema_arrow, PLAN_SCHEMA)
        except FileNotFoundError:  # its run has just closed it
            return False
        except ValueError as error:  # ArrowInvalid is one
            logger.warning(
                "The plan of a run that was stopped cannot be read; its images are planned anew. %s: %s",
                provenance.redact(url),
                provenance.one_line(error),
            )
            return False
        return True

    def take_over(self, plan: OpenPlan) -> None:
        """Note that the run does what a plan has left."""
        self._taken.append(plan.name)

    def publish(self, path: Path) -> None:
        """Publish a local file of `PLAN_SCHEMA` as the next one of this run's plan.

        Raises:
            StorageError: it could not be written.
        """
        if self._run_id is None:
            return
        self._check()
        name = f"{self._run_id}.plan-{len(self._names):05}.parquet"
        self._names.append(name)
        with failpoints.step("plan"):
            storage.publish_file(storage.join(self._url, name), str(path))

    def close(self, *, is_complete: bool) -> None:
        """Delete the files of this run's plan, and if it is complete, of those that it took over."""
        if self._run_id is None:
            return
        for name in self._names + self._taken * is_complete:
            storage.delete(storage.join(self._url, name))
        self._names, self._taken = [], []
