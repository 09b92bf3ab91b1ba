"""Telling a web hook how a run ended: Slack's, one that takes what Slack's takes (Mattermost, Rocket.Chat), or any.

The body is JSON with a `text` and, under `attachments`, a colour and fields, as Slack's incoming webhooks take it. A
hook that is not Slack's is sent the run record, too, under `record`. The hook's URL is a secret: whoever has it may
write there. So it may come from the environment, and no record and no message shows more of it than its host.
"""

import base64
import json
import logging
import os
import threading
import urllib.parse
from typing import Any, Final

from catdog import __version__, records
from catdog.config import PredictConfig
from catdog.errors import CatdogError, UsageError
from catdog.inference.books import RunRecord
from catdog.provenance import one_line, redact, secret

logger = logging.getLogger(__name__)

VARIABLE: Final = "CATDOG_NOTIFY_URL"
"""The environment variable that names the hook where `--notify` does not."""

TIMEOUT_S: Final = 10.0
"""How long a hook may take, all in all."""

_NOT_SENT: Final = ("parts",)
"""Fields of a record that are long, and of no use without the output."""

_MAX_CHARS: Final = 2000
"""Of a text. Slack cuts longer ones, or takes nothing of the message."""

_MAX_SOURCES: Final = 10
"""A shell makes thousands of a glob that has no quotes."""


def url_of(config: PredictConfig) -> str | None:
    """The hook of a run; None if there is none.

    Raises:
        UsageError: the environment variable holds no URL of HTTP.
    """
    if config.notify is not None:
        return config.notify
    url = os.environ.get(VARIABLE, "").strip()
    if url and not url.startswith(("http://", "https://")):
        raise UsageError(f"{VARIABLE} must be a URL of http or https. Received: {secret(url)}")
    return url or None


def tell_end(url: str, record: RunRecord) -> None:
    """Tell a hook of a run that has come to its end. Warns if the hook does not take it."""
    complaint = record.complaint()
    colour = (
        "danger" if complaint else "good" if record.complete and not (record.drift or record.missing) else "warning"
    )
    first, *_ = record.summary()
    text = f"catdog: {first.replace(' (' + record.executor + ')', '')}"
    text += f" Too many failed: {complaint}." if complaint else ""
    text += "" if record.complete else f" It was stopped: {record.what_remains()}."
    fields = [("Books", str(record.books)), ("Labels", records.counted(record.labels))]
    fields += [("Needs review", f"{record.needs_review:,}")] if record.needs_review else []
    fields += [("Errors", records.counted(record.errors))] if record.errors else []
    if record.expected_accuracy is not None:
        low, high = record.expected_accuracy["ci95"]
        value = records.percent(record.expected_accuracy["value"])
        fields.append(("Accuracy to be expected", f"{value} ({100 * low:.2f} to {100 * high:.2f})"))
    fields += [("Missing", " ".join(record.missing))] if record.missing else []
    fields += [("Drift", " ".join(record.drift))] if record.drift else []
    fields.append(("Report", f"{redact(record.output).rstrip('/')}/_runs/{record.run_id}.html"))
    sent = {name: value for name, value in record.to_dict().items() if name not in _NOT_SENT}
    sent["config"] = {**record.config, "images": _first(record.config["images"])}
    _post(url, _body(url, text, colour, fields, sent))


def tell_failure(url: str, config: PredictConfig, error: BaseException) -> None:
    """Tell a hook of a run that failed. Warns if the hook does not take it."""
    said = redact(one_line(error)) if isinstance(error, Exception) else type(error).__name__
    exit_code = error.exit_code if isinstance(error, CatdogError) else 1
    fields = [
        ("Output", redact(config.output)),
        ("Images", ", ".join(_first(list(map(redact, config.sources))))),
        ("What is labelled so far", "It is kept. The same command does the rest."),
    ]
    record = {"status": "failed", "error": said, "kind": type(error).__name__, "exit_code": exit_code}
    _post(url, _body(url, f"catdog: predict failed: {said}", "danger", fields, record))


def _body(url: str, text: str, colour: str, fields: list[tuple[str, str]], record: dict[str, Any]) -> bytes:
    listed = [{"title": title, "value": _plain(value), "short": len(value) < 40} for title, value in fields]
    body: dict[str, Any] = {
        "text": _plain(text),
        "attachments": [{"color": colour, "fallback": _plain(text), "fields": listed}],
    }
    if not (urllib.parse.urlsplit(url).hostname or "").endswith(".slack.com"):
        body["record"] = record
    # A path may hold bytes that are no UTF-8, and escapes of surrogates are no JSON for most servers.
    return json.dumps(body, ensure_ascii=False).encode(errors="replace")


def _first(sources: list[str]) -> list[str]:
    """The first of many sources, and how many more there are."""
    more = len(sources) - _MAX_SOURCES
    return sources if more <= 0 else [*sources[:_MAX_SOURCES], f"and {more:,} more"]


def _plain(text: str) -> str:
    """A text in which Slack finds no link, and nobody to call: `<!channel>` in a file's name stays a file's name.

    It is not too long for Slack.
    """
    text = text if len(text) <= _MAX_CHARS else f"{text[: _MAX_CHARS - 1]}…"
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _split(url: str) -> tuple[str, str]:
    """A URL without the name and password of `https://name:password@host/`, and these as HTTP has them, if any."""
    parts = urllib.parse.urlsplit(url)
    user_info, at, host = parts.netloc.rpartition("@")
    credentials = base64.b64encode(urllib.parse.unquote_to_bytes(user_info)).decode()
    return (parts._replace(netloc=host).geturl(), credentials) if at else (url, "")


def _post(url: str, body: bytes) -> None:
    """Post JSON. Warns if that fails, or takes longer than `TIMEOUT_S`, whatever the other side does."""
    # Most runs need neither of them.
    import urllib.error
    import urllib.request

    class NoRedirects(urllib.request.HTTPRedirectHandler):
        """Refuses to go elsewhere: a POST would arrive there as a GET, and the secret with it."""

        def redirect_request(self, *_: Any, **__: Any) -> None:
            """Follow no redirection."""

    failures: list[str] = []
    late = f"it has not answered within {TIMEOUT_S:g} s"

    def send() -> None:
        headers = {"Content-Type": "application/json", "User-Agent": f"catdog/{__version__}"}
        try:
            address, credentials = _split(url)
            headers |= {"Authorization": f"Basic {credentials}"} if credentials else {}
            request = urllib.request.Request(address, body, headers, method="POST")
            with urllib.request.build_opener(NoRedirects).open(request, timeout=TIMEOUT_S):
                pass
        except TimeoutError:
            failures.append(late)
        except urllib.error.HTTPError as error:
            failures.append(f"it answered with status {error.code}")
            error.close()
        except urllib.error.URLError as error:
            failures.append(one_line(str(error.reason)))
        except Exception as error:  # of http.client, whose messages may have the URL in them
            failures.append(type(error).__name__)

    sender = threading.Thread(target=send, name="catdog-notify", daemon=True)
    sender.start()
    sender.join(TIMEOUT_S)
    if sender.is_alive():
        failures.append(late)
    if failures:
        logger.warning("The hook %s was not told how the run ended: %s", secret(url), failures[0])
