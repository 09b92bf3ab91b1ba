"""The numbers of the last run for a monitoring system: `_runs/metrics.prom`, in the text form of OpenMetrics.

One file with one name, which each run replaces: node_exporter's textfile collector reads `*.prom` of a directory, and
wants each metric once; `curl --data-binary` pushes the file to a Pushgateway. It is valid for Prometheus's older text
form, too. Each sample has the label `output`: of two files with the same samples node_exporter shows none. The time of
the last success is carried over by a run that fails, so that an alarm needs one rule:
`time() - catdog_last_success_timestamp_seconds > 30 * 3600`.
"""

import re
import time
from collections.abc import Mapping
from typing import Final

from catdog import storage
from catdog.inference.books import RUNS_NAME, RunRecord
from catdog.provenance import redact

METRICS_NAME: Final = "metrics.prom"

_LAST_SUCCESS: Final = "catdog_last_success_timestamp_seconds"


class _Page:
    """Lines of gauges of an output, each family once."""

    def __init__(self, output: str) -> None:
        self.lines: list[str] = []
        self._output = f'output="{_escaped(redact(output))}"'

    def gauge(self, name: str, help_text: str, value: float | Mapping[str, float] | None, label: str = "") -> None:
        """Add a gauge, or one for each value of a label. Nothing if there is no value."""
        if value is None or value == {}:
            return
        self.lines += [f"# HELP {name} {help_text}", f"# TYPE {name} gauge"]
        if isinstance(value, Mapping):
            self.lines += [
                f'{name}{{{self._output},{label}="{_escaped(key)}"}} {_number(each)}' for key, each in value.items()
            ]
        else:
            self.lines.append(f"{name}{{{self._output}}} {_number(value)}")

    def text(self) -> str:
        return "\n".join([*self.lines, "# EOF", ""])


def _escaped(text: str) -> str:
    """A text as the value of a label, which is Unicode whatever bytes a path has."""
    text = text.encode(errors="backslashreplace").decode()
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


def _number(value: float) -> str:
    return repr(float(value)) if isinstance(value, float) else str(int(value))


def text_of(record: RunRecord, output: str, *, now: float, last_success: float | None, is_killed: bool = False) -> str:
    """The metrics of a run that has come to its end.

    Args:
        record: its record.
        output: where its output lies, as an absolute path or URL.
        now: when it ended, in seconds since 1970.
        last_success: when a run last succeeded before; None if that was never, or nobody knows.
        is_killed: whether a signal made it stop before its end. Then it is no success; one with a deadline is.
    """
    is_success = record.complaint() is None and not is_killed
    page = _begun(output, now, is_success=is_success, last_success=now if is_success else last_success)
    books = record.to_dict()["books"]
    page.gauge("catdog_last_run_complete", "Whether the last run did all that there was to do.", int(record.complete))
    page.gauge("catdog_last_run_images", "Images of the last run, by where they went.", books, "outcome")
    page.gauge("catdog_last_run_labels", "Labels of the last run.", record.labels, "label")
    page.gauge("catdog_last_run_errors", "Images that the last run could not label.", record.errors, "code")
    page.gauge("catdog_last_run_skipped", "What the last run passed over, by reason.", _short(record.skipped), "reason")
    page.gauge("catdog_last_run_needs_review", "Labels of the last run that need review.", record.needs_review)
    page.gauge("catdog_last_run_review", "Labels that need review, by reason.", record.review_reasons, "reason")
    page.gauge("catdog_last_run_read_bytes", "Size of the images that the last run read.", record.num_bytes)
    page.gauge("catdog_last_run_images_per_second", "Speed of the last run.", float(record.images_per_s))
    page.gauge("catdog_last_run_duration_seconds", "Seconds that stages took.", record.durations_s, "stage")
    page.gauge("catdog_last_run_drifts", "In how many ways the last run's rows differ.", len(record.drift))
    page.gauge("catdog_last_run_missing", "In how many ways the last listing may lack images.", len(record.missing))
    if record.expected_accuracy is not None:
        page.gauge(
            "catdog_last_run_expected_accuracy_ratio",
            "Share of the labels that are to be expected to be right.",
            record.expected_accuracy["value"],
        )
    return page.text()


def text_of_failure(output: str, *, now: float, last_success: float | None) -> str:
    """The metrics of a run that failed."""
    return _begun(output, now, is_success=False, last_success=last_success).text()


def _short(reasons: Mapping[str, int]) -> dict[str, int]:
    """Reasons that are names. Those that are sentences with paths in them would make a new series every time."""
    found: dict[str, int] = {}
    for reason, count in reasons.items():
        name = reason if re.fullmatch("[a-z_]+", reason) else "other"
        found[name] = found.get(name, 0) + count
    return found


def _begun(output: str, now: float, *, is_success: bool, last_success: float | None) -> _Page:
    page = _Page(output)
    page.gauge("catdog_last_run_timestamp_seconds", "When the last run ended.", round(now, 3))
    page.gauge("catdog_last_run_success", "Whether the last run succeeded.", int(is_success))
    page.gauge(_LAST_SUCCESS, "When a run last succeeded.", None if last_success is None else round(last_success, 3))
    return page


def publish(output: str, record: RunRecord | None, *, is_killed: bool = False) -> None:
    """Write the metrics of a run into its output; `record` is None if the run failed, `is_killed` as in `text_of`.

    A run that failed writes only where there are metrics already: what lies there else may not be ours.

    Raises:
        StorageError: it could not be written.
    """
    url = storage.join(output, RUNS_NAME, METRICS_NAME)
    before = storage.read_text(url) if storage.exists(url) else None
    now = time.time()
    if record is not None:
        text = text_of(record, output, now=now, last_success=_last_success(before or ""), is_killed=is_killed)
    elif before is not None:
        text = text_of_failure(output, now=now, last_success=_last_success(before))
    else:
        return
    storage.publish_bytes(url, text.encode())


def _last_success(before: str) -> float | None:
    found = re.search(rf"^{_LAST_SUCCESS}(?:\{{.*\}})? ([0-9.]+)$", before, re.MULTILINE)
    return float(found[1]) if found else None
