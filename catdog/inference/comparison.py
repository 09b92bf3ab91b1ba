"""Comparing two outputs, or two models in one: which labels flipped, how confidence shifted, which errors are new.

DuckDB does the work on a spilled copy of the columns that it takes, so that memory does not grow with the outputs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import duckdb

from catdog import records, storage
from catdog.config import CompareConfig
from catdog.errors import OutputRefusedError, UsageError
from catdog.inference.database import open_database
from catdog.inference.findings import Example
from catdog.inference.journals import settled
from catdog.inference.publish import read_parts, spill_keys
from catdog.inference.thumbnails import thumbnails
from catdog.provenance import redact
from catdog.schema import CLASS_NAMES

_COLUMNS: Final = (
    *("uri", "source_version", "image_id", "model_id", "status", "error_code", "error_message"),
    *("label", "prob_dog", "needs_review", "num_bytes", "predicted_at"),
)

_SHIFT: Final = 0.1
"""A probability that moves by at least so much has shifted."""

_NUM_PHOTOS: Final = 12
"""How many photographs of each kind are shown."""

_NUM_NAMES: Final = 20
"""How many images of each kind are named."""

_MODELS: Final = """
SELECT model_id FROM read_parquet($rows, hive_partitioning = false)
GROUP BY model_id ORDER BY max(predicted_at) DESC, model_id
"""

# Of an image that has changed there are several rows; the last one is what is there now.
_SIDE: Final = """
CREATE TABLE {side} AS
SELECT {by} AS key, * FROM read_parquet($rows, hive_partitioning = false)
WHERE model_id = $model_id AND {by} IS NOT NULL
QUALIFY row_number() OVER (PARTITION BY {by} ORDER BY predicted_at DESC, source_version DESC) = 1
"""

_JOINED: Final = """
CREATE VIEW joined AS SELECT
    coalesce(a.key, b.key) AS key, coalesce(b.uri, a.uri) AS uri,
    CASE WHEN b.uri IS NULL THEN a.source_version ELSE b.source_version END AS source_version,
    CASE WHEN b.uri IS NULL THEN a.num_bytes ELSE b.num_bytes END AS num_bytes,
    CASE WHEN a.key IS NULL THEN 'absent' ELSE coalesce(a.label, 'error') END AS before,
    CASE WHEN b.key IS NULL THEN 'absent' ELSE coalesce(b.label, 'error') END AS after,
    a.prob_dog::DOUBLE AS prob_before, b.prob_dog::DOUBLE AS prob_after,
    abs(b.prob_dog::DOUBLE - a.prob_dog::DOUBLE) AS shift,
    a.error_code AS code_before, b.error_code AS code_after, b.error_message AS message,
    coalesce(a.needs_review, false) AS review_before, coalesce(b.needs_review, false) AS review_after,
    a.image_id <> b.image_id AS has_changed
FROM a FULL JOIN b ON a.key = b.key
"""

_FLOWS: Final = "SELECT before, after, count(*) FROM joined GROUP BY ALL ORDER BY ALL"

_TOTALS: Final = f"""
SELECT
    count(*) FILTER (has_changed),
    count(*) FILTER (shift = 0),
    count(*) FILTER (shift >= {_SHIFT}),
    count(*) FILTER (review_after AND NOT review_before),
    count(*) FILTER (review_before AND NOT review_after),
    avg(greatest(prob_after, 1 - prob_after) - greatest(prob_before, 1 - prob_before)),
    quantile_disc(shift, [0.5, 0.9, 0.99, 1.0])
FROM joined WHERE before <> 'absent' AND after <> 'absent'
"""

_IS_FLIP: Final = "before <> after AND shift IS NOT NULL"

_KINDS: Final = {
    "flips": (f"{_IS_FLIP} ORDER BY shift DESC, key", _NUM_PHOTOS),
    "shifts": (f"before = after AND shift >= {_SHIFT} ORDER BY shift DESC, key", _NUM_PHOTOS),
    "new_errors": (f"after = 'error' AND before IN {CLASS_NAMES} ORDER BY key", _NUM_NAMES),
    "mended": (f"before = 'error' AND after IN {CLASS_NAMES} ORDER BY key", _NUM_NAMES),
    "only_before": ("after = 'absent' ORDER BY key", _NUM_NAMES),
    "only_after": ("before = 'absent' ORDER BY key", _NUM_NAMES),
}
"""Kind of difference → which images are of it, and how many examples are given."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """An image of which two outputs say different things."""

    uri: str
    before: str
    """`cat`, `dog`, `error` or `absent`."""

    after: str
    prob_dog_before: float | None
    prob_dog_after: float | None
    error_code: str | None
    """Of the second output, else of the first one."""

    error_message: str | None


@dataclass(frozen=True, kw_only=True)
class Comparison(records.Record):
    """What differs between two outputs."""

    before: str
    after: str
    model_before: str
    model_after: str
    by: str
    """What makes two rows rows of one image: `uri` or `image_id`."""

    both: int
    """Number of images that both outputs have. All numbers that follow are of these, but for the last two."""

    flows: dict[str, dict[str, int]]
    """What the first output says, `cat`, `dog`, `error` or `absent` → what the second one says → number of images."""

    flips: int
    """Number of images with another label."""

    new_errors: int
    mended: int
    """Number of images that were errors and have a label now."""

    same_probability: int
    """Number of images with the same probability, to the last bit."""

    shifted: int
    """Number of images whose probability of `dog` moved by 0.1 or more."""

    shift_quantiles: dict[str, float]
    """How far the probability of `dog` moved: of half of the images no farther than `50 %`, and so on."""

    mean_confidence_shift: float
    """By how much the mean confidence rose."""

    review_added: int
    """Number of images that need review only in the second output."""

    review_dropped: int
    content_changed: int
    """Number of images whose bytes are not the same."""

    only_before: int
    only_after: int
    examples: dict[str, list[Difference]]
    """Kind of difference → some of its images, those that differ most first."""

    page: str | None
    """The HTML file that was written."""

    def summary(self) -> list[str]:
        """The numbers of differences, and the images that differ most."""
        names = [f"{self.before} (model {self.model_before[:12]})", f"{self.after} (model {self.model_after[:12]})"]
        quantiles = ", ".join(f"{share} {value:.3g}" for share, value in self.shift_quantiles.items())
        flips = ", ".join(f"{self.flows[one][two]:,} {one} → {two}" for one, two in _flips(self.flows))
        lines = [
            f"Compared {names[0]} with {names[1]}: {records.plural(self.both, 'image')} in both.",
            f"  flips    {self.flips:,}{f': {flips}' if self.flips else ''}{self._share()}",
            f"  shift    of the probability of dog: {quantiles or 'none'}; {self.shifted:,} by {_SHIFT:g} or more",
            f"  review   {self.review_added:,} more, {self.review_dropped:,} fewer",
            f"  errors   {self.new_errors:,} new, {self.mended:,} mended",
            f"  images   {self.only_before:,} only in the first, {self.only_after:,} only in the second",
        ]
        if self.content_changed:
            lines.append(f"  content  {self.content_changed:,} images have other bytes")
        lines += [f"  flip     {each.uri}: {_said(each)}" for each in self.examples["flips"][:3]]
        lines += [f"  error    {each.uri}: {each.error_code}" for each in self.examples["new_errors"][:3]]
        return [*lines, *([f"Page: {self.page}"] if self.page else [])]

    def _share(self) -> str:
        return f" ({records.percent(self.flips / self.both)} of both)" if self.flips else ""


def _flips(flows: Mapping[str, Mapping[str, int]]) -> list[tuple[str, str]]:
    """The pairs of labels that flipped."""
    return [(one, two) for one in CLASS_NAMES for two in CLASS_NAMES if one != two and flows.get(one, {}).get(two)]


def _said(difference: Difference) -> str:
    one, two = difference.prob_dog_before or 0.0, difference.prob_dog_after or 0.0
    return f"{difference.before} {_sure(one)} → {difference.after} {_sure(two)}"


def _sure(prob_dog: float) -> str:
    return f"{100 * max(prob_dog, 1 - prob_dog):.1f} %"


def compare(config: CompareConfig) -> Comparison:
    """Compare two outputs, or the rows of two models in one. Writes nothing but the page, if one is asked for.

    Raises:
        UsageError: an output, or a model, has no rows; or more than one model is meant.
        StorageError: a storage failed.
    """
    before = storage.absolute(config.before)
    after = before if config.after is None else storage.absolute(config.after)
    with open_database() as (database, scratch):
        files = {url: _spilled(url, scratch / f"rows{index}.parquet") for index, url in enumerate({before, after})}
        models = _chosen_models(database, config, files[before], files[after])
        for side, url, model_id in (("a", before, models[0]), ("b", after, models[1])):
            database.execute(_SIDE.format(side=side, by=config.by), {"rows": str(files[url]), "model_id": model_id})
        for path in files.values():
            path.unlink()
        database.execute(_JOINED)
        found = {kind: _examples(database, where, most) for kind, (where, most) in _KINDS.items()}
        page = None if config.output is None else storage.absolute(config.output)
        comparison = _comparison(database, config, (before, after), models, found, page)
    if page is not None:
        shown = [*found["flips"], *found["shifts"]]
        storage.publish_bytes(page, _page(comparison, thumbnails([each for each, _ in shown])))
    return comparison


def _spilled(output: str, path: Path) -> Path:
    """The columns that are compared, of all parts of an output, as one local file."""

    def spill(parts: Sequence[str], _merged: set[str]) -> Path:
        if not parts:
            raise OutputRefusedError(f"OUTPUT must hold predictions. Received: {redact(output)}, which holds none")
        spill_keys(path, read_parts(output, parts, _COLUMNS), _COLUMNS)
        return path

    return settled(output, spill)


def _chosen_models(
    database: duckdb.DuckDBPyConnection, config: CompareConfig, rows_before: Path, rows_after: Path
) -> tuple[str, str]:
    """The two models whose rows are compared: those that are asked for, else the last ones."""
    listed = [
        [model for (model,) in database.execute(_MODELS, {"rows": str(path)}).fetchall()]
        for path in (rows_before, rows_after)
    ]
    is_one_output = rows_before == rows_after
    if is_one_output and len(listed[0]) < 2:
        raise UsageError(
            "AFTER must name a second output, unless BEFORE holds the rows of two models. "
            f"Received: {redact(config.before)}, which holds those of {records.plural(len(listed[0]), 'model')}"
        )
    wanted_after = _model(listed[1], config.model_after, "--model-after") or listed[1][0]
    remaining = [model for model in listed[0] if not is_one_output or model != wanted_after]
    wanted_before = _model(listed[0], config.model_before, "--model-before") or remaining[0]
    return wanted_before, wanted_after


def _model(listed: Sequence[str], wanted: str | None, flag: str) -> str | None:
    """The one model whose id begins so; None if none is asked for."""
    if wanted is None:
        return None
    found = [model for model in listed if model.startswith(wanted)]
    if len(found) != 1:
        there = ", ".join(model[:12] for model in listed)
        raise UsageError(f"{flag} must be the beginning of one of {there or 'no model'}. Received: {flag}={wanted}")
    return found[0]


_Found = list[tuple[Example, Difference]]


def _examples(database: duckdb.DuckDBPyConnection, where: str, most: int) -> _Found:
    columns = "uri, source_version, num_bytes, before, after, prob_before, prob_after, code_before, code_after, message"
    rows = database.execute(f"SELECT {columns} FROM joined WHERE {where} LIMIT {most}").fetchall()
    found: _Found = []
    for uri, version, num_bytes, before, after, prob_before, prob_after, code_before, code_after, message in rows:
        difference = Difference(
            uri=redact(uri),
            before=before,
            after=after,
            prob_dog_before=prob_before,
            prob_dog_after=prob_after,
            error_code=code_after or code_before,
            error_message=None if message is None else redact(message),
        )
        example = Example(
            uri=uri, source_version=version, num_bytes=num_bytes, label=after, confidence=None, text=message
        )
        found.append((example, difference))
    return found


def _comparison(
    database: duckdb.DuckDBPyConnection,
    config: CompareConfig,
    outputs: tuple[str, str],
    models: tuple[str, str],
    found: Mapping[str, _Found],
    page: str | None,
) -> Comparison:
    flows: dict[str, dict[str, int]] = {}
    for one, two, count in database.execute(_FLOWS).fetchall():
        flows.setdefault(one, {})[two] = count
    ((changed, same, shifted, added, dropped, mean_shift, quantiles),) = database.execute(_TOTALS).fetchall()

    def flow(*pairs: tuple[str, str]) -> int:
        return sum(flows.get(one, {}).get(two, 0) for one, two in pairs)

    return Comparison(
        before=redact(outputs[0]),
        after=redact(outputs[1]),
        model_before=models[0],
        model_after=models[1],
        by=config.by,
        both=sum(count for one, counts in flows.items() for two, count in counts.items() if "absent" not in (one, two)),
        flows=flows,
        flips=flow(*_flips(flows)),
        new_errors=flow(*((name, "error") for name in CLASS_NAMES)),
        mended=flow(*(("error", name) for name in CLASS_NAMES)),
        same_probability=same,
        shifted=shifted,
        shift_quantiles=dict(zip(("50 %", "90 %", "99 %", "100 %"), quantiles or [], strict=False)),
        mean_confidence_shift=round(mean_shift or 0.0, 6),
        review_added=added,
        review_dropped=dropped,
        content_changed=changed,
        only_before=sum(counts.get("absent", 0) for counts in flows.values()),
        only_after=sum(flows.get("absent", {}).values()),
        examples={kind: [difference for _, difference in examples] for kind, examples in found.items()},
        page=None if page is None else redact(page),
    )


def _page(comparison: Comparison, pictures: Sequence[bytes | None]) -> bytes:
    from catdog import report
    from catdog.report.morning import Photo

    remaining = iter(pictures)

    def photos(kind: str) -> list[Photo]:
        return [Photo(jpeg=next(remaining), caption=_said(each), name=each.uri) for each in comparison.examples[kind]]

    def names(kind: str) -> list[tuple[str, str]]:
        return [(each.uri, each.error_message or each.error_code or "") for each in comparison.examples[kind]]

    def figure(number: float, name: str) -> tuple[str, str]:
        return f"{number:,}", name

    shown: Any = report.ComparisonPage(
        title=f"{comparison.both:,} images compared: {records.plural(comparison.flips, 'label')} flipped",
        sides=[
            ("before", comparison.before, comparison.model_before),
            ("after", comparison.after, comparison.model_after),
        ],
        figures=[
            figure(comparison.flips, "labels flipped"),
            figure(comparison.shifted, f"probabilities moved by {_SHIFT:g} or more"),
            figure(comparison.new_errors, "new errors"),
            figure(comparison.mended, "errors mended"),
            figure(comparison.review_added - comparison.review_dropped, "more that need review"),
            (f"{100 * comparison.mean_confidence_shift:+.2f} %", "mean confidence"),
        ],
        flows=comparison.flows,
        quantiles=[(share, f"{value:.4f}") for share, value in comparison.shift_quantiles.items()],
        flips=photos("flips"),
        shifts=photos("shifts"),
        lists=[
            ("New errors", comparison.new_errors, names("new_errors")),
            ("Errors that are mended", comparison.mended, names("mended")),
            ("Only before", comparison.only_before, names("only_before")),
            ("Only after", comparison.only_after, names("only_after")),
        ],
    )
    return report.comparison_page(shown)
