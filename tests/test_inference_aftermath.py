"""What follows a run: the metrics file, read by Prometheus's own parsers, and the notice to a web hook."""

import contextlib
import http.server
import json
import logging
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from inference_case import encoded_drawings
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_open
from prometheus_client.parser import text_string_to_metric_families as parse_text

from catdog import cli, provenance
from catdog.config import PredictConfig
from catdog.errors import UsageError
from catdog.inference import RunRecord, notice, openmetrics, predict

pytestmark = pytest.mark.slow

TOKEN = "T0SECRET/B0SECRET/XXSECRET"


class Hook:
    """A server that takes what is posted, and answers as it is told."""

    def __init__(self, status: int = 200) -> None:
        self.status = status
        self.delay_s = 0.0
        self.posts: list[dict[str, Any]] = []
        self.authorizations: list[str | None] = []
        hook = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                assert self.headers["Content-Type"] == "application/json"
                hook.authorizations.append(self.headers["Authorization"])
                hook.posts.append(json.loads(body))
                time.sleep(hook.delay_s)
                self.send_response(hook.status)
                if hook.status == 302:
                    self.send_header("Location", self.path + "/elsewhere")
                self.send_header("Content-Length", "0")
                with contextlib.suppress(BrokenPipeError):
                    self.end_headers()

            def do_GET(self) -> None:
                raise AssertionError("a hook is not fetched")

            def log_message(self, *_: object) -> None:
                """Say nothing."""

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}/services/{TOKEN}"


@pytest.fixture
def hook() -> Iterator[Hook]:
    made = Hook()
    yield made
    made.server.shutdown()
    made.server.server_close()


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("images")
    for number, picture in enumerate(encoded_drawings(5)):
        (directory / f"{number}.jpg").write_bytes(picture)
    (directory / "<!channel> & co.jpg").write_bytes(b"")
    return directory


@pytest.fixture(scope="module")
def record(images: Path, tmp_path_factory: pytest.TempPathFactory) -> RunRecord:
    """Of a run of the model that comes with catdog, which has an output with metrics by now."""
    output = tmp_path_factory.mktemp("run") / "predictions"
    return predict(PredictConfig(images=str(images), output=str(output), executor="inline"))


def metrics_of(output: Path | str) -> dict[str, dict[str, float]]:
    """Name → labels → value, as both parsers read it."""
    text = (Path(output) / "_runs" / "metrics.prom").read_text()
    found = [samples_of(parse(text)) for parse in (parse_open, parse_text)]
    assert found[0] == found[1]
    return found[0]


def samples_of(families: Any) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    for family in families:
        assert family.type == "gauge"
        assert family.documentation.endswith(".")
        for sample in family.samples:
            labels = [value for name, value in sample.labels.items() if name != "output"]
            found.setdefault(sample.name, {})[",".join(labels)] = sample.value
    return found


def test_the_metrics_are_those_of_the_record(record: RunRecord) -> None:
    found = metrics_of(record.output)
    assert found["catdog_last_run_success"] == {"": 1}
    assert found["catdog_last_run_images"] == {**record.to_dict()["books"]}
    assert found["catdog_last_run_labels"] == record.labels
    assert found["catdog_last_run_errors"] == {"empty_file": 1}
    assert found["catdog_last_run_duration_seconds"] == record.durations_s
    assert found["catdog_last_success_timestamp_seconds"] == found["catdog_last_run_timestamp_seconds"]
    assert abs(found["catdog_last_success_timestamp_seconds"][""] - time.time()) < 3600


def test_a_failure_carries_the_last_success_over(record: RunRecord, images: Path) -> None:
    before = metrics_of(record.output)["catdog_last_success_timestamp_seconds"]
    with pytest.raises(UsageError):
        predict(PredictConfig(images="/nowhere", output=record.output, executor="inline"))
    failed = metrics_of(record.output)
    assert failed["catdog_last_run_success"] == {"": 0}
    assert failed["catdog_last_success_timestamp_seconds"] == before
    assert failed["catdog_last_run_timestamp_seconds"][""] >= before[""]
    predict(PredictConfig(images=str(images), output=record.output, executor="inline"))
    again = metrics_of(record.output)
    assert again["catdog_last_run_success"] == {"": 1}
    assert again["catdog_last_success_timestamp_seconds"][""] > before[""]


def test_too_many_failures_are_no_success(record: RunRecord) -> None:
    bad = replace(record, failed_fraction_exceeded=True)
    text = openmetrics.text_of(bad, "out", now=200.0, last_success=100.0)
    found = samples_of(parse_open(text))  # type: ignore[no-untyped-call]
    assert found["catdog_last_run_success"] == {"": 0}
    assert found["catdog_last_success_timestamp_seconds"] == {"": 100}


def test_a_run_that_was_killed_is_no_success(record: RunRecord) -> None:
    part = replace(record, complete=False)
    for is_killed in (False, True):
        text = openmetrics.text_of(part, "out", now=200.0, last_success=100.0, is_killed=is_killed)
        found = samples_of(parse_open(text))  # type: ignore[no-untyped-call]
        assert found["catdog_last_run_complete"] == {"": 0}
        assert found["catdog_last_run_success"] == {"": int(not is_killed)}


def test_a_label_may_hold_anything(record: RunRecord) -> None:
    odd = replace(record, errors={'a"b\\c\nd': 1}, skipped={"/private/dir may not be read": 2, "not_an_image": 1})
    text = openmetrics.text_of(odd, "out", now=1.0, last_success=None)
    found = samples_of(parse_open(text))  # type: ignore[no-untyped-call]
    assert found["catdog_last_run_errors"] == {'a"b\\c\nd': 1}
    assert found["catdog_last_run_skipped"] == {"other": 2, "not_an_image": 1}


def test_two_outputs_have_no_sample_in_common(record: RunRecord) -> None:
    """node_exporter reads both files, and shows none of their metrics if one sample is in both."""
    samples = []
    for output in ("/srv/one", "s3://key:SECRET@host/caf\udce9"):
        texts = (
            openmetrics.text_of(record, output, now=1.0, last_success=None),
            openmetrics.text_of_failure(output, now=1.0, last_success=1.0),
        )
        for text in texts:
            text.encode()
            assert "SECRET" not in text
            assert openmetrics._last_success(text) == 1
        families = parse_open(texts[0])  # type: ignore[no-untyped-call]
        samples.append({(each.name, str(each.labels)) for family in families for each in family.samples})
    assert samples[0]
    assert not samples[0] & samples[1]
    assert openmetrics._last_success("catdog_last_success_timestamp_seconds 12.5\n") == 12.5  # of an older catdog


def test_a_failure_writes_nothing_where_there_was_nothing(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    with pytest.raises(UsageError):
        predict(PredictConfig(images=str(tmp_path), output=str(tmp_path / "mine"), executor="inline"))
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_the_hook_is_told_of_the_end(
    hook: Hook, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    output = tmp_path / "predictions"
    command = ["predict", "--images", str(images), "--output", str(output), "--executor", "inline", "--verbose"]
    assert cli.main([*command, "--notify", hook.url]) == 0
    (post,) = hook.posts
    assert post["text"].startswith("catdog: Labelled 6 images in ")
    (attachment,) = post["attachments"]
    assert attachment["color"] == "good"
    fields = {field["title"]: field["value"] for field in attachment["fields"]}
    assert fields["Books"] == "6 listed = 5 ok + 1 error + 0 already done + 0 duplicate + 0 skipped"
    assert fields["Errors"] == "1 empty_file"
    assert fields["Report"] == str(next(output.glob("_runs/*.html")))
    assert post["record"]["run_id"] in fields["Report"]
    assert "parts" not in post["record"]
    written = "".join(path.read_text() for path in output.glob("_runs/*"))
    out, err = capsys.readouterr()
    for text in (written, out, err, caplog.text, json.dumps(post)):
        assert "SECRET" not in text
    assert f"127.0.0.1:{hook.server.server_port}/***" in written


def test_the_hook_is_told_of_a_failure(
    hook: Hook, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(notice.VARIABLE, hook.url)
    place = "s3://key:secret@127.0.0.1/<!channel>"
    command = ["predict", "--images", "/nowhere/<!channel>", place, "--output", str(tmp_path / "out")]
    assert cli.main([*command, "--executor", "inline"]) == 2
    assert "SECRET" not in capsys.readouterr().err
    (post,) = hook.posts
    assert post["text"].startswith("catdog: predict failed: ")
    assert "<!channel>" not in post["text"] + json.dumps(post["attachments"])
    assert "secret" not in json.dumps(post)
    assert post["record"]["exit_code"] == 2
    assert post["attachments"][0]["color"] == "danger"


@pytest.mark.parametrize(
    ("status", "complaint"), [(500, "status 500"), (404, "status 404"), (302, "status 302"), (0, "has not answered")]
)
def test_a_hook_that_fails_is_a_warning(
    hook: Hook,
    record: RunRecord,
    status: int,
    complaint: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hook.status, hook.delay_s = status or 200, 0.0 if status else 1.0
    if not status:
        monkeypatch.setattr(notice, "TIMEOUT_S", 0.1)
    notice.tell_end(hook.url, record)
    (warning,) = caplog.messages
    assert warning.startswith(f"The hook http://127.0.0.1:{hook.server.server_port}/*** was not told how the run ended")
    assert complaint in warning or (not status and "timed out" in warning)


@pytest.mark.parametrize("url", [f"http://127.0.0.1:9/{TOKEN}", f"http://127.0.0.1:9/{TOKEN} \t", f"http:///{TOKEN}"])
def test_a_hook_that_is_not_there_is_a_warning(url: str, record: RunRecord, caplog: pytest.LogCaptureFixture) -> None:
    notice.tell_end(url, record)
    (warning,) = caplog.messages
    assert "SECRET" not in warning


def test_slack_gets_no_field_that_it_does_not_know(record: RunRecord) -> None:
    body = json.loads(notice._body(f"https://hooks.slack.com/services/{TOKEN}", "text", "good", [("a", "b")], {"c": 1}))
    assert set(body) == {"text", "attachments"}
    assert set(body["attachments"][0]) == {"color", "fallback", "fields"}
    assert body["attachments"][0]["fields"] == [{"title": "a", "value": "b", "short": True}]


def test_a_message_is_no_longer_than_slack_takes(hook: Hook, record: RunRecord) -> None:
    """A shell makes thousands of sources of a glob; a name may be no UTF-8, which is no JSON for most servers."""
    sources = tuple(f"photos/{number:05}.jpg" for number in range(5000))
    config = PredictConfig(images=(f"caf\udce9{'x' * 5000}", *sources), output="out")
    notice.tell_failure(hook.url, config, UsageError("too long " * 5000))
    notice.tell_end(hook.url, replace(record, config={**record.config, "images": list(sources)}))
    for post in hook.posts:
        texts = [post["text"], *(field["value"] for field in post["attachments"][0]["fields"])]
        assert max(map(len, texts)) <= 2000
        assert all(text.encode() for text in texts)
    assert hook.posts[1]["record"]["config"]["images"][-2:] == ["photos/00009.jpg", "and 4,990 more"]


def test_a_hook_may_want_a_password(hook: Hook, record: RunRecord) -> None:
    notice.tell_end(hook.url.replace("://", "://me:pass%40word@"), record)
    assert hook.authorizations == ["Basic bWU6cGFzc0B3b3Jk"]


def test_a_hook_is_a_url_of_http(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=r"^--notify must be a URL of http or https\. Received: --notify=\*\*\*$"):
        PredictConfig(images="p", output="out", notify=TOKEN)
    monkeypatch.setenv(notice.VARIABLE, f"ftp://host/{TOKEN}")
    with pytest.raises(UsageError, match=r"^CATDOG_NOTIFY_URL must be .* Received: ftp://host/\*\*\*$"):
        predict(PredictConfig(images="p", output="out", executor="inline"))


def test_a_configuration_shows_only_the_host_of_a_hook() -> None:
    config = PredictConfig(images="p", output="out", notify=f"https://me:SECRET@host.example/{TOKEN}?key=SECRET")
    assert provenance.configuration(config)["notify"] == "https://host.example/***"
    assert "SECRET" not in provenance.redact(f"catdog predict --notify https://hooks.slack.com/services/{TOKEN}")
