"""The plan of a run: the images that are listed and not yet in the output, cut into slices.

The listing is taken in chunks (`chunks`). Each is compared with what is done (`index`) and with what was listed before,
and what is new in it is cut into slices of `SLICE_SIZE` images (`planner`). Slices consist of new images alone, so that
few new ones among many old ones make few part files. The slices of a chunk are published (`published`) before the first
of them is handed out, and they are handed out while the listing goes on.

A run takes over what dead runs have left of their plans, slice by slice, exactly as it stands there, and plans only
what no plan holds. A worker that outlives its driver thus publishes a part that the next run knows by name: whoever
comes second finds the part there, and its images are done.

The name of a part is a digest of the images that it will hold, and of what the output held of them.

What a storage says of an image can be a fact of a moment: `PASSING_CODES` are tried again in every run. An image that
has no version (its storage tells neither an ETag nor a time) is read in every run, and so is one whose version is new.
If the run finds of such an image what the output holds (`Slice.known`), it counts as already done, and its row stays as
it is. A new version of the same bytes is remembered (`Plan.note_same`).
"""

import contextlib
import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Final

import duckdb

from catdog import failpoints
from catdog.inference.database import open_database
from catdog.inference.plan.chunks import ahead, chunks
from catdog.inference.plan.index import INDEX_NAME, Index, SameImages
from catdog.inference.plan.planner import MEMORY_LIMIT, Planner
from catdog.inference.plan.published import PublishedPlans
from catdog.inference.plan.slices import CONTENT_VERSION, PASSING_CODES, SLICE_SIZE, Counts, Slice, read_slices
from catdog.inference.publish import RUNS_NAME, columns_of
from catdog.inference.sources import Collection, Root, listed, refuse_output_inside
from catdog.records import plural
from catdog.storage import outages
from catdog.storage.manifests import Columns
from catdog.storage.patterns import Chosen

__all__ = [
    "CONTENT_VERSION",
    "INDEX_NAME",
    "PASSING_CODES",
    "SLICE_SIZE",
    "Counts",
    "Plan",
    "Slice",
    "open_plan",
    "plan_files",
]

_POLL_S: Final = 0.1

logger = logging.getLogger(__name__)


class Plan:
    """The plan of one run, which grows while it is carried out. `open_plan` makes it.

    Attributes:
        output: directory of the part files.
        listed: what the listing says besides the images.
        columns: the columns of the output's part files (`columns_of`).
        roots: the local places of the images that were listed at first. A slice names those that came later.
    """

    def __init__(
        self,
        collection: Collection,
        output: str,
        model_id: str,
        database: duckdb.DuckDBPyConnection,
        scratch: Path,
        planner: Planner,
        plans: PublishedPlans,
        columns: tuple[str, ...],
        max_images: int | None,
    ) -> None:
        self.output = output
        self.listed = collection
        self.columns = columns
        self.roots: tuple[Root, ...] = ()
        self._database = database
        self._scratch = scratch
        self._planner = planner
        self._plans = plans
        self._same = SameImages(output, model_id, scratch)
        self._files: SimpleQueue[tuple[Path, tuple[Root, ...]] | None] = SimpleQueue()
        self._stop = threading.Event()
        self._has_begun = threading.Event()
        self._is_listed = False
        self._num_begun = 0
        self._max_images = max_images
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="catdog-planner", daemon=True)

    def begin(self) -> None:
        """Start planning, and wait for the first slices, or the end of the listing. Errors as `open_plan`."""
        self._thread.start()
        while not self._has_begun.wait(_POLL_S):  # in short waits, so that Ctrl-C ends them
            pass
        if self._failure is not None:
            raise self._failure

    def _run(self) -> None:
        try:
            with outages.stoppable(self._stop):
                self._plan_all()
        except BaseException as error:  # the one who waits for slices raises it
            self._failure = None if self._stop.is_set() else error
        finally:
            self._files.put(None)
            self._has_begun.set()

    def _plan_all(self) -> None:
        for path in self._planner.take_over(self._plans.open_plans(self._scratch)):
            self._files.put((path, ()))
        if self.counts.to_label:
            logger.info(
                "%s of runs that died (%s) come first, whatever --images is now. To give them up, stop this run, and "
                "delete %s/*.plan-* in the output",
                plural(self.counts.to_label, "planned image"),
                ", ".join(self.taken_from),
                RUNS_NAME,
            )
        for chunk in ahead(chunks(self.listed, self._scratch, self._stop), self._stop):
            files = self._planner.plan(chunk)
            self._is_listed = chunk.is_last and not self._stop.is_set()
            self._hand_over(files)
            if self._planner.is_full:
                break

    def _hand_over(self, files: Sequence[Path]) -> None:
        roots = self.listed.roots
        if not self._has_begun.is_set():
            self.roots = roots
        known = {root.path for root in self.roots}
        later = tuple(root for root in roots if root.path not in known)
        for path in files:
            self._files.put((path, later))
        if not self._files.empty():
            self._has_begun.set()

    @property
    def counts(self) -> Counts:
        """Numbers of images, as far as they are planned."""
        return self._planner.counts

    @property
    def num_slices(self) -> int:
        """Number of slices, as far as they are planned."""
        return self._planner.num_slices

    @property
    def num_begun(self) -> int:
        """Number of images in the slices that were handed out, less those that were taken back."""
        return self._num_begun

    @property
    def is_listed(self) -> bool:
        """Whether the listing has come to its end, and all of it is planned."""
        return self._is_listed

    @property
    def taken_from(self) -> list[str]:
        """The runs whose plans were taken over."""
        return self._planner.taken_from

    def wait(self) -> None:
        """Wait until all is planned. Errors as `open_plan`."""
        while self._thread.is_alive():
            self._thread.join(_POLL_S)
        if self._failure is not None:
            raise self._failure

    def slices(self, is_over: Callable[[], bool] = bool) -> Iterator[Slice]:
        """The slices, as they are planned; each once. Errors as `open_plan`.

        Args:
            is_over: whether no further slice is to be handed out. It is asked before each, and while none is there.
        """
        while not (is_over() or self._is_full()):
            try:
                item = self._files.get(timeout=_POLL_S)
            except Empty:
                continue
            if item is None:
                if self._failure is not None:
                    raise self._failure
                return
            path, roots = item
            for piece in read_slices(path, roots):
                if is_over() or self._is_full():
                    return
                self._num_begun += len(piece.files)
                yield piece
            path.unlink()

    def _is_full(self) -> bool:
        """Whether as many images were handed out as there may be. Slices that were taken over may have more."""
        return self._max_images is not None and self._num_begun >= self._max_images

    def take_back(self, num_images: int) -> None:
        """Note that a slice of so many images was handed out, and no worker has begun it."""
        self._num_begun -= num_images

    def note_same(self, found: Iterable[tuple[str, str, str]]) -> None:
        """Note images whose version is new, and whose bytes are not, as (uri, version, content)."""
        self._same.note(found)

    def stop(self) -> None:
        """List and plan no further. What is published stays."""
        self._stop.set()
        with contextlib.suppress(duckdb.Error):
            self._database.interrupt()
        self._thread.join()

    def close(self, *, is_complete: bool = True) -> None:
        """Say that no worker of this run works on the plan any more, so that the next run plans afresh.

        Args:
            is_complete: whether all slices were done, also those that were taken over. Else the plans that these are
                from stay open.
        """
        self.stop()
        self._same.publish()
        self._plans.close(is_complete=is_complete)


@contextlib.contextmanager
def open_plan(
    sources: Sequence[str],
    output: str,
    model_id: str,
    *,
    retry_errors: bool = False,
    chosen: Chosen | None = None,
    columns: Columns | None = None,
    allow_empty: bool = False,
    run_id: str | None = None,
    max_images: int | None = None,
    check: Callable[[], object] = bool,
    settled: Callable[[], contextlib.AbstractContextManager[object]] = contextlib.nullcontext,
) -> Iterator[Plan]:
    """Plan a run while it works, for the length of a `with` block.

    Args:
        sources: where the images are. An image that two sources list is a duplicate.
        output: directory of the part files.
        model_id: the model to label with.
        retry_errors: whether all images that failed are tried again, and not only those with `PASSING_CODES`.
        chosen: which of the files are labelled; None for all.
        columns: which columns of manifests hold what.
        allow_empty: whether there may be nothing to label.
        run_id: the run, which holds the claim of the output. None to write nothing but temporary files on this machine.
        max_images: how many images are planned at most; None for all.
        check: raises an error if the run may not publish any more.
        settled: gives a context in which no rows move from one part to another one (`compaction.paused`).

    Raises:
        UsageError: there are no images, or the output lies within them.
        OutputRefusedError: the output holds something that predict did not write.
        StorageError: a storage failed.
    """
    refuse_output_inside(sources, output)
    with failpoints.step("list"):
        collection = listed(sources, output, chosen or Chosen(), columns=columns, allow_empty=allow_empty)
    with plan_files(
        collection,
        output,
        model_id,
        retry_errors=retry_errors,
        run_id=run_id,
        max_images=max_images,
        check=check,
        settled=settled,
    ) as plan:
        yield plan


@contextlib.contextmanager
def plan_files(
    collection: Collection,
    output: str,
    model_id: str,
    *,
    retry_errors: bool = False,
    run_id: str | None = None,
    max_images: int | None = None,
    check: Callable[[], object] = bool,
    settled: Callable[[], contextlib.AbstractContextManager[object]] = contextlib.nullcontext,
) -> Iterator[Plan]:
    """As `open_plan`, for a collection."""
    with open_database(MEMORY_LIMIT) as (database, scratch):
        with settled():
            index = Index(database, scratch, output, model_id, may_write=run_id is not None)
        plans = PublishedPlans(output, run_id, check)
        planner = Planner(database, scratch, plans, model_id, retry_errors=retry_errors, max_images=max_images)
        columns = columns_of(output, index.parts)
        plan = Plan(collection, output, model_id, database, scratch, planner, plans, columns, max_images)
        try:
            plan.begin()
            yield plan
        finally:
            plan.stop()
