"""What a run leaves for the morning: a report to read, beside its record, and numbers for a monitoring system.

Both are written after the record. If one cannot be written, that is a warning: the run has done its work.
"""

import concurrent.futures
import contextlib
import dataclasses
import json
import logging
import shlex
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any, Final

from catdog import records, storage
from catdog.config import PredictConfig
from catdog.config.checks import flag
from catdog.errors import CatdogError
from catdog.inference import drift, openmetrics
from catdog.inference.books import RUNS_NAME, RunRecord
from catdog.inference.drift import Night
from catdog.inference.findings import Example, Findings
from catdog.inference.plan import PASSING_CODES
from catdog.inference.thumbnails import thumbnails
from catdog.provenance import one_line, redact
from catdog.schema import CLASS_NAMES

logger = logging.getLogger(__name__)

_NUM_RECORDS: Final = 3 * drift.MAX_NIGHTS
"""How many of the last records are looked at for nights that labelled something."""

_READERS: Final = 8

_BOOKS: Final = {
    "ok": "labelled by this run",
    "error": "tried by this run, and not labelled: see below",
    "already done": "labelled by earlier runs",
    "duplicate": "listed more than once",
    "skipped": "no image, or not to be read",
    "remaining": "not tried yet",
}

_REASONS: Final = {"unsure": "are unsure", "neither": "show neither animal", "damaged": "are damaged"}
"""Review reason → the end of a sentence about some photographs."""


def earlier_nights(output: str, model_id: str) -> list[Night]:
    """The last nights of an output that labelled something with a model, the newest first.

    A record that cannot be read, or that an older catdog wrote, is passed over: `catdog verify` says what is wrong.
    """
    try:
        names = sorted(storage.list_names(storage.join(output, RUNS_NAME), ".json"), reverse=True)[:_NUM_RECORDS]
    except CatdogError as error:
        logger.warning("Earlier runs cannot be compared with: %s", one_line(error))
        return []
    nights: list[Night] = []
    with concurrent.futures.ThreadPoolExecutor(_READERS, thread_name_prefix="catdog-records") as pool:
        for start in range(0, len(names), drift.MAX_NIGHTS):
            group = names[start : start + drift.MAX_NIGHTS]
            found = pool.map(lambda name: _night(storage.join(output, RUNS_NAME, name)), group)
            nights += [night for night in found if night is not None and night.model_id == model_id]
            if len(nights) >= drift.MAX_NIGHTS:
                break
    return nights[: drift.MAX_NIGHTS]


def _night(url: str) -> Night | None:
    try:
        night = drift.night_of(storage.read_json(url))
    except (CatdogError, OSError, ValueError, TypeError, KeyError):
        return None
    return None if night.is_empty else night


def calibration_error(card: Mapping[str, Any]) -> float:
    """How far off a model's probabilities may be on average: the upper end of the interval of its calibration error.

    It was measured in validation, and cross-fitted. A card without it counts as one of a model that is calibrated.
    """
    try:
        return float(card["calibration"]["expected_calibration_error"]["after"]["ci95"][1])
    except (KeyError, TypeError, IndexError, ValueError):
        return 0.0


@contextlib.contextmanager
def never_failing(what: str) -> Iterator[None]:
    """Within a `with` block, turn every error into a warning: what only watches must not fail what works."""
    try:
        yield
    except Exception as error:
        logger.warning("%s could not be written: %s", what, redact(one_line(error)))
        logger.debug("%s could not be written", what, exc_info=True)


def publish_report(
    config: PredictConfig,
    output: str,
    record: RunRecord,
    found: Findings,
    nights: list[Night],
    first_skipped: Mapping[str, str],
) -> None:
    """Write `_runs/<run_id>.html`. Warns if it cannot.

    Args:
        config: the configuration of the run.
        output: its output.
        record: its record.
        found: what was found in its rows.
        nights: the nights that it was compared with.
        first_skipped: reason → the first thing that the listing passed over for it.
    """
    with never_failing("The report"):
        from catdog import report

        shown = page(config, record, found, nights, first_skipped)
        storage.publish_bytes(storage.join(output, RUNS_NAME, f"{record.run_id}.html"), report.run_page(shown))


def publish_metrics(output: str, record: RunRecord, *, is_killed: bool) -> None:
    """Write `_runs/metrics.prom`. Warns if it cannot."""
    with never_failing("The metrics"):
        openmetrics.publish(output, record, is_killed=is_killed)


def page(
    config: PredictConfig,
    record: RunRecord,
    found: Findings,
    nights: list[Night],
    first_skipped: Mapping[str, str],
) -> Any:
    """What the report of a run says: a `catdog.report.RunPage`. The arguments are those of `publish_report`."""
    from catdog.report import morning as report

    tonight = drift.night_of(record.to_dict())
    comparison = drift.compare(tonight, nights)
    pictures = iter(thumbnails([*found["uncertain"], *found["neither"]]))
    return report.RunPage(
        title=f"{_what(record)}, {_date(record)}",
        state=_state(record),
        sentences=_sentences(record),
        figures=_figures(record),
        steps=[report.Step(text=text, command=command) for text, command in _steps(config, record)],
        books=[(name, number, _BOOKS.get(name, "")) for name, number in _parts(record)],
        listed=record.books.listed,
        labels=record.labels,
        labels_before=_summed([night.labels for night in nights]) if nights else None,
        edges=record.confidence_edges,
        confidence=record.confidence,
        confidence_before=[sum(counts) for counts in zip(*(night.confidence for night in nights), strict=True)]
        if nights
        else None,
        drift=comparison.verdict,
        questions=[(shift.name, shift.text, _surprise(shift)) for shift in comparison.shifts],
        courses=_courses(tonight, nights, report.Course),
        accuracy=_accuracy(record, has_drift=bool(comparison.drifted)),
        uncertain=[_photo(each, next(pictures), report.Photo) for each in found["uncertain"]],
        neither=[_photo(each, next(pictures), report.Photo) for each in found["neither"]],
        neither_count=record.review_reasons.get("neither", 0),
        errors=[
            report.Cause(
                name=code,
                count=count,
                examples=[(redact(each["uri"]), redact(each["text"] or "")) for each in found["errors"].get(code, [])],
            )
            for code, count in sorted(record.errors.items(), key=lambda item: -item[1])
        ],
        skipped=[
            report.Cause(name=reason, count=count, examples=_first(first_skipped.get(reason)))
            for reason, count in record.skipped.items()
        ],
        durations_s=record.durations_s,
        thread_s=record.thread_s,
        images=record.books.labelled,
        facts=_facts(record),
        configuration=json.dumps(record.config, indent=2),
    )


def _parts(record: RunRecord) -> list[tuple[str, int]]:
    """(name, number) of all that adds up to what was listed."""
    numbers = dataclasses.asdict(record.books)
    hidden = {"listed"} if record.books.remaining else {"listed", "remaining"}
    return [(name.replace("_", " "), number) for name, number in numbers.items() if name not in hidden]


def _what(record: RunRecord) -> str:
    num = record.books.labelled
    return f"{records.plural(record.books.ok, 'image')} labelled" if num else "Nothing new to label"


def _date(record: RunRecord) -> str:
    return f"{datetime.fromisoformat(record.started_at):%-d %B %Y, %H:%M} UTC"


def _state(record: RunRecord) -> Any:
    if record.failed_fraction_exceeded:
        return "bad"
    return "warn" if record.drift or record.missing or not record.complete else "good"


def _sentences(record: RunRecord) -> list[str]:
    """What happened, the most important first."""
    found = []
    if complaint := record.complaint():
        found.append(f"Too many images failed: {complaint}.")
    if not record.complete:
        found.append(f"The run was stopped before its end: {record.what_remains()}.")
    elif not found:
        found.append("The run is complete, and the books close: every image that was listed is accounted for.")
    found += record.missing
    if record.drift:
        found.append(f"These images are not like those of earlier nights. {' '.join(record.drift)}")
    return found


def _figures(record: RunRecord) -> list[tuple[str, str]]:
    books = record.books
    figures = [(f"{books.ok:,}", "labels"), (f"{books.error:,}", "errors")]
    if books.ok:
        figures.append((records.percent(record.needs_review / books.ok), f"need review ({record.needs_review:,})"))
    if record.expected_accuracy is not None:
        figures.append((records.percent(record.expected_accuracy["value"]), "accuracy to be expected"))
    if books.labelled:
        figures.append((f"{record.images_per_s:,.0f}", "images per second"))
    return [*figures, (_duration(record.durations_s.get("total", 0.0)), "from start to end")]


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _accuracy(record: RunRecord, *, has_drift: bool) -> str:
    if (expected := record.expected_accuracy) is None:
        return ""
    low, high = expected["ci95"]
    text = (
        f"{records.percent(expected['value'])} of the labels are to be expected to be right (95 % interval "
        f"{100 * low:.2f} to {100 * high:.2f}). Nobody has looked: this is the mean confidence of the labels, which "
        "is their accuracy if the model is calibrated (confidence-based performance estimation, as NannyML has it). "
        "The interval has room for chance and for the calibration error that was measured in validation."
    )
    if record.review_reasons.get("neither"):
        text += " Photographs that show neither animal are left out."
    if has_drift:
        text += (
            " Tonight it may be too good: the model was validated on photographs like those before, and these are not "
            "like them. Only labels by hand can tell."
        )
    return text


def command_line(config: PredictConfig, **changes: Any) -> str:
    """The command of a configuration, with some fields changed, as a shell takes it, without secrets.

    Example:
        >>> command_line(PredictConfig(images="p q", output="out"), retry_errors=True)
        "catdog predict --images 'p q' --output out --retry-errors"
    """
    changed = dataclasses.replace(config, **changes)
    words = ["catdog", "predict"]
    for each in dataclasses.fields(changed):
        value = getattr(changed, each.name)
        if value == each.default or each.metadata.get("secret"):
            continue
        if isinstance(value, bool):
            words.append(flag(each.name) if value else flag(each.name).replace("--", "--no-", 1))
        else:
            words += [flag(each.name), *(map(str, value) if isinstance(value, tuple) else [str(value)])]
    return shlex.join(redact(word) for word in words)


def _steps(config: PredictConfig, record: RunRecord) -> Iterator[tuple[str, str | None]]:
    """(sentence, command) of what is to be done next."""
    rows = _sql_text(f"{redact(record.output).rstrip('/')}/*.parquet")
    if not record.complete:
        yield "Label what remains. The same command does, and labels nothing twice:", command_line(config)
    if record.missing:
        yield "Find out what is missing, and let the job read it. The same command labels it.", None
    passing = sum(count for code, count in record.errors.items() if code in PASSING_CODES)
    lasting = record.books.error - passing
    if passing:
        yield (
            f"{records.plural(passing, 'image')} could not be got at. Every run tries them again; if it goes on, look "
            "at their storage.",
            None,
        )
    if lasting:
        yield (
            f"{records.plural(lasting, 'image')} cannot be used as they are. Replace the files, and the next run "
            "labels them; or, if the fault was not theirs, try them again:",
            command_line(config, retry_errors=True),
        )
    if record.needs_review:
        reasons = [f"{count:,} {_REASONS.get(reason, reason)}" for reason, count in record.review_reasons.items()]
        yield (
            f"Look at {records.plural(record.needs_review, 'photograph')}{_listed(reasons)}:",
            "duckdb -c "
            + _quoted(
                f"SELECT uri, label, confidence FROM {rows} WHERE needs_review AND run_id = '{record.run_id}' "
                "ORDER BY confidence"
            ),
        )
    if record.drift:
        yield (
            "Find out what has changed: a camera, the light, the animals, or what is sent. If it stays so, label some "
            "hundred of tonight's photographs by hand, measure, and train on:",
            "catdog prepare --images TONIGHT --output tonight --test-fraction 1 && "
            f"catdog evaluate --data tonight --output evaluation{_model(config)}",
        )


def _sql_text(text: str) -> str:
    """A text as SQL has it."""
    return "'" + text.replace("'", "''") + "'"


def _quoted(sql: str) -> str:
    """SQL as a word of a shell: in double quotes, where that is the same."""
    return shlex.quote(sql) if set(sql) & set('"$`\\!') else f'"{sql}"'


def _model(config: PredictConfig) -> str:
    return f" --model {shlex.quote(redact(config.model))}" if config.model else ""


def _listed(parts: Sequence[str]) -> str:
    return f" ({', '.join(parts)})" if parts else ""


def _surprise(shift: drift.Shift) -> str:
    chance = "less than 0.0001" if shift.p_value < 0.0001 else f"{shift.p_value:.2g}"
    return f"{'drift' if shift.is_drift else 'as usual'} (p {'= ' if '0001' not in chance else ''}{chance})"


def _courses(tonight: Night, nights: Sequence[Night], course: Any) -> list[Any]:
    """The share that needs review, and the speed, over the last nights. None where there is only one."""
    if not nights or tonight.is_empty:
        return []
    line = [*reversed(nights), tonight]
    names = [f"{night.run_id[6:8]}.{night.run_id[4:6]}." for night in line]
    review = [100 * night.needs_review / max(1, night.num_ok) for night in line]
    speed = [night.images_per_s for night in line]
    return [
        course(
            title="Share that needs review", values=review, texts=[f"{value:.1f} %" for value in review], nights=names
        ),
        course(title="Images per second", values=speed, texts=[f"{value:,.0f}" for value in speed], nights=names),
    ]


def _summed(counts: Sequence[Mapping[str, int]]) -> dict[str, int]:
    return {name: sum(each[name] for each in counts) for name in CLASS_NAMES}


def _first(place: str | None) -> list[tuple[str, str]]:
    return [] if place is None else [(redact(place), "")]


def _photo(example: Example, jpeg: bytes | None, photo: Any) -> Any:
    caption = f"{example['label']} {100 * (example['confidence'] or 0):.1f} %"
    return photo(jpeg=jpeg, caption=caption, name=redact(example["uri"]))


def _facts(record: RunRecord) -> list[tuple[str, str]]:
    return [
        ("run", record.run_id),
        ("predictions", redact(record.output)),
        ("model", record.model_id),
        ("executor", record.executor),
        ("engines", ", ".join(f"{name}: {count:,}" for name, count in record.engines.items()) or "none"),
        ("parts written", f"{len(record.parts):,}"),
        ("bytes read", f"{record.num_bytes:,}"),
        ("machine", f"{record.host['cpu']}, {record.host['num_cores']} cores, {record.host['system']}"),
        ("versions", ", ".join(f"{name} {version}" for name, version in record.versions.items())),
    ]
