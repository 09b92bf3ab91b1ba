"""`catdog.storage.s3_objects`: obstore reads what s3fs reads, and what it cannot read, s3fs says.

Most tests ask the same question twice: s3fs alone, which is the reference, and `s3.read`, which asks obstore. Which of
the two sent a request, its `User-Agent` tells the server.
"""

import contextlib
import datetime
import http.server
import json
import os
import re
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
from s3_server import S3Server

from catdog.storage import filesystems, outages, s3, s3_objects

pytestmark = pytest.mark.slow

pytest_plugins = ["s3_server", "storage_case"]

REGION: Final = "eu-west-1"
"""Where the bucket `far` lies."""


class ToldS3(http.server.BaseHTTPRequestHandler):
    """An S3 that does what a key says: `404-NoSuchKey`, `503`, `reset`, `silent`, ... It gives every other key."""

    protocol_version = "HTTP/1.1"
    requests: list[tuple[str, str, str]]
    """Who asked, for what, and the region and the key of the signature."""

    def do_GET(self) -> None:
        who = "obstore" if "object_store" in self.headers["User-Agent"] else "s3fs"
        signed = re.search(r"Credential=(\w+)/\d+/([\w-]+)/", self.headers["Authorization"])
        assert signed is not None
        type(self).requests.append((who, self.path, f"{signed[2]} {signed[1]}"))
        bucket, _, key = self.path.rpartition("/")
        if key == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True
            self.connection.close()
        elif key == "closed":
            self.close_connection = True
        elif key == "silent":
            time.sleep(1.5)
            self.close_connection = True
        elif key in ("cut", "halting"):
            self.answer(200, b"imag", length=11)
            time.sleep(1.5 if key == "halting" else 0)
            self.close_connection = True
        elif key == "unmeasured":
            self.answer(200, b"b\r\nimage bytes\r\n0\r\n\r\n", length=None)
        elif key == "html":
            self.answer(503, b"<html><body>Try later<br></html>")
        elif bucket.endswith("/far") and signed[2] != REGION:
            code = "<Code>AuthorizationHeaderMalformed</Code>"
            self.answer(400, f"<Error>{code}<Message>m</Message><Region>{REGION}</Region></Error>".encode())
        elif key[:3].isdigit():
            code = key[4:]
            body = f"<Error><Code>{code}</Code><Message>a &amp; &quot;b&quot;\n\u00e9</Message></Error>" if code else ""
            self.answer(int(key[:3]), body.encode())
        elif self.headers["Range"] is not None and key != "whole":
            first, _, last = self.headers["Range"].removeprefix("bytes=").partition("-")
            self.answer(206, b"image bytes"[int(first) : int(last) + 1], first=int(first))
        else:
            self.answer(200, b"image bytes")

    def answer(self, status: int, body: bytes, *, length: int | None = -1, first: int | None = None) -> None:
        self.send_response(status)
        if length is None:
            self.send_header("Transfer-Encoding", "chunked")
        else:
            self.send_header("Content-Length", str(len(body) if length == -1 else length))
        if first is not None:
            self.send_header("Content-Range", f"bytes {first}-{first + len(body) - 1}/11")
        if status in (301, 400):
            self.send_header("x-amz-bucket-region", REGION)
        self.end_headers()
        with contextlib.suppress(OSError):
            self.wfile.write(body)
            self.wfile.flush()

    def do_HEAD(self) -> None:
        self.send_response(200)
        self.send_header("x-amz-bucket-region", REGION)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *args: object) -> None:
        pass


@contextlib.contextmanager
def serving(certificate: tuple[str, str] | None = None) -> Iterator[tuple[type[ToldS3], int]]:
    """A server, and its port."""
    handler = type("Handler", (ToldS3,), {"requests": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    server.handle_error = lambda *_: None  # type: ignore[method-assign]  # clients that break off a handshake
    if certificate is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*certificate)
        server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield handler, server.server_address[1]
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(autouse=True)
def know_nothing(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    s3._filesystem.cache_clear()
    s3_objects._buckets.clear()
    yield
    s3._filesystem.cache_clear()
    s3_objects._buckets.clear()


@pytest.fixture
def told(no_s3_server: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[ToldS3]]:
    """A server; the settings for S3 name it."""
    with serving() as (handler, port):
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        yield handler


def filesystem() -> Any:
    return s3.url_to_fs("s3://b", outages.MAX_CONNECTIONS)[0]


def who(handler: type[ToldS3]) -> list[str]:
    """Who sent the requests since this was last asked."""
    found = [request[0] for request in handler.requests]
    handler.requests.clear()
    return found


def outcome(url: str, action: Any) -> Any:
    """What an action gives, or how its error is judged and described."""
    try:
        return action()
    except Exception as error:
        unreachable = isinstance(error, filesystems._loaded(filesystems._UNREACHABLE_ERRORS))
        about = filesystems._about_one_file(error)
        judged = type(about), filesystems._can_pass(error), unreachable, s3.is_out_of_date(error)
        return *judged, s3.is_invalid_range(error), filesystems.describe(error)


@pytest.mark.parametrize(
    ("key", "asked"),
    [
        ("404-NoSuchKey", "obstore"),
        ("403-InvalidObjectState", "obstore"),
        ("503-SlowDown", "obstore"),
        ("503", "obstore"),
        ("html", "obstore"),
        ("500-InternalError", "obstore"),
        ("500-Unheard", "obstore"),
        ("501-NotImplemented", "obstore"),
        ("429-TooManyRequests", "obstore"),
        ("400-ExpiredToken", "obstore"),
        ("403-RequestTimeTooSkewed", "obstore"),
        ("409-OperationAborted", "obstore"),
        ("416-InvalidRange", "obstore"),
        ("reset", "obstore"),
        ("closed", "obstore"),
        ("404-NoSuchBucket", "both"),
        ("404", "both"),
        ("403-AccessDenied", "both"),
        ("403-SignatureDoesNotMatch", "both"),
        ("403", "both"),
        ("401-Unheard", "both"),
        ("409-Conflict", "both"),
        ("412-PreconditionFailed", "both"),
        ("unmeasured", "both"),
        ("whatever", "obstore"),
    ],
)
def test_an_answer_is_what_s3fs_makes_of_it(told: type[ToldS3], key: str, asked: str) -> None:
    fs = filesystem()
    reference = outcome(key, lambda: fs.cat_file(f"b/{key}", max_concurrency=1))
    assert set(who(told)) == {"s3fs"}  # which sends a request twice if the connection is closed
    assert outcome(key, lambda: s3.read(fs, f"b/{key}")) == reference
    assert who(told) == (["obstore"] if asked == "obstore" else ["obstore", "s3fs"])


def test_a_time_out_that_s3_tells_is_one(told: type[ToldS3]) -> None:
    """The words of s3fs are none here."""
    fs = filesystem()
    for read in (s3.read, lambda fs, path: fs.cat_file(path, max_concurrency=1)):
        with pytest.raises(TimeoutError) as caught:
            read(fs, "b/400-RequestTimeout")
        assert filesystems._can_pass(caught.value)
    assert who(told) == ["obstore", "s3fs"]


@pytest.mark.parametrize("key", ["cut", "halting", "silent"])
def test_a_short_body_and_a_silent_server_are_errors_that_pass(
    told: type[ToldS3], key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fs = filesystem()
    limits = fs.s3.meta.config
    assert (limits.connect_timeout, limits.read_timeout) == (5, 15)
    limits.read_timeout = 0.5  # obstore takes it from there
    started = time.monotonic()
    *judged, words = outcome(key, lambda: s3.read(fs, f"b/{key}"))
    assert judged == [type(None), True, False, False, False]
    assert words.startswith("Connection was closed" if key == "cut" else "Read timeout on endpoint URL: ")
    assert time.monotonic() - started < 1.4
    assert who(told) == ["obstore"]


def test_a_server_that_takes_no_connection_is_a_time_out(no_s3_server: None, monkeypatch: pytest.MonkeyPatch) -> None:
    with contextlib.ExitStack() as stack:
        listening = stack.enter_context(socket.socket())
        listening.bind(("127.0.0.1", 0))
        listening.listen(0)
        for _ in range(4):  # the kernel takes one or two more; what comes then is not answered
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(listening.getsockname())
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{listening.getsockname()[1]}")
        fs = filesystem()
        fs.s3.meta.config.connect_timeout = 0.5
        started = time.monotonic()
        _, can_pass, is_unreachable, *_, words = outcome("k", lambda: s3.read(fs, "b/k"))
        assert 0.4 < time.monotonic() - started < 4
        assert can_pass
        assert is_unreachable
        assert words.startswith("Connect timeout on endpoint URL: ")


def test_a_range_is_read_as_s3fs_reads_it(told: type[ToldS3]) -> None:
    fs = filesystem()
    for start, stop in ((0, 1), (2, 7), (10, 11), (0, 5000)):
        assert s3.read_range(fs, "b/k", start, stop) == b"image bytes"[start:stop]
        assert who(told) == ["obstore"]
    assert s3.read_range(fs, "b/whole", 0, 2) == fs.cat_file("b/whole", start=0, end=2) == b"image bytes"
    assert who(told) == ["obstore", "s3fs", "s3fs"]  # a server that takes no notice of ranges


def test_a_bucket_that_obstore_cannot_read_is_left_to_s3fs(told: type[ToldS3]) -> None:
    fs = filesystem()
    for _ in range(5):
        assert s3.read(fs, "b/unmeasured") == b"image bytes"
    assert who(told) == ["obstore", "s3fs"] * 3 + ["s3fs"] * 2
    assert s3.read(fs, "c/k") == b"image bytes"
    assert who(told) == ["obstore"]


def test_a_bucket_in_another_region_is_found_by_s3fs_and_read_by_obstore(told: type[ToldS3]) -> None:
    fs = filesystem()
    for _ in range(3):
        assert s3.read(fs, "far/k") == b"image bytes"
    regions = [(asked, signed.partition(" ")[0]) for asked, _, signed in told.requests]
    assert regions == [
        ("obstore", "us-east-1"),
        ("s3fs", "us-east-1"),
        ("s3fs", REGION),
        ("obstore", REGION),
        ("obstore", REGION),
    ]


KEYS: Final = [
    *("a b", "a+b", "a%b", "a%20b", "a%2Fb", "a%2E%2E/b", "a?b", "a#b", "a&b=c", "a:b", "a@b,c;d!$()", "a*b", "a[0]"),
    *("a\\b", "a{b}", "a'b", "a~b", "a|b", "a^b", "é", "e\u0301", "日本/x.jpg", "\U0001f600", "..a", "a..", "..."),
    *("/a", "a/", "a//b", "a/./b", "a/../b", "a\tb", "a?versionId=1"),
]


@pytest.mark.parametrize("key", KEYS)
def test_every_key_gives_what_it_gives_with_s3fs(s3: S3Server, key: str) -> None:
    from catdog.storage import s3 as storage_s3

    name = s3.new_bucket().removeprefix("s3://")
    fs = filesystem()
    for other in {key, key.strip("/"), key.replace("//", "/"), "a", "b"}:
        fs.call_s3("put_object", Bucket=name, Key=other, Body=b"of " + other.encode())
    path = f"{name}/{key}"
    reference = outcome(key, lambda: fs.cat_file(path, max_concurrency=1))
    assert outcome(key, lambda: storage_s3.read(fs, path)) == reference
    if key.strip("/") == key:
        assert reference == b"of " + key.encode()


def test_a_missing_object_and_a_coded_one(s3: S3Server) -> None:
    from catdog.storage import s3 as storage_s3

    name = s3.new_bucket().removeprefix("s3://")
    fs = filesystem()
    fs.call_s3("put_object", Bucket=name, Key="gz", Body=b"\x1f\x8b no gzip", ContentEncoding="gzip")
    fs.call_s3("put_object", Bucket=name, Key="empty", Body=b"")
    for key in ("gz", "empty", "missing"):
        reference = outcome(key, lambda key=key: fs.cat_file(f"{name}/{key}", max_concurrency=1))
        assert outcome(key, lambda key=key: storage_s3.read(fs, f"{name}/{key}")) == reference
    for span in ((0, 3), (3, 100), (100, 200)):
        reference = outcome("gz", lambda span=span: fs.cat_file(f"{name}/gz", start=span[0], end=span[1]))
        assert outcome("gz", lambda span=span: storage_s3.read_range(fs, f"{name}/gz", *span)) == reference


def test_a_profile_with_keys_that_expire(told: type[ToldS3], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """botocore renews keys when they are good for less than 15 minutes."""
    expires = datetime.datetime.now(datetime.UTC) + datetime.timedelta(minutes=14)
    answer = {"Version": 1, "SecretAccessKey": "s", "SessionToken": "t", "Expiration": expires.isoformat()}
    program = f"""
import json, pathlib
path = pathlib.Path({str(tmp_path / "number")!r})
number = int(path.read_text()) + 1 if path.exists() else 0
path.write_text(str(number))
print(json.dumps({answer!r} | dict(AccessKeyId=f"AK{{number}}")))
"""
    (tmp_path / "keys.py").write_text(program)
    endpoint = os.environ["AWS_ENDPOINT_URL"]
    lines = f"credential_process = {sys.executable} {tmp_path}/keys.py\nregion = {REGION}\nendpoint_url = {endpoint}\n"
    (tmp_path / "config").write_text(f"[profile expiring]\n{lines}")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION", "AWS_ENDPOINT_URL"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_PROFILE", "expiring")
    monkeypatch.setattr(s3_objects, "_GOOD_FOR_S", 0.0)
    fs = filesystem()
    signed = []
    for _ in range(3):
        assert s3.read(fs, "b/k") == b"image bytes"
        assert told.requests[-1][0] == "obstore"
        signed.append(told.requests[-1][2])
    assert len(set(signed)) == 3
    assert {text.partition(" ")[0] for text in signed} == {REGION}
    monkeypatch.setattr(s3_objects, "_GOOD_FOR_S", 60.0)
    assert s3.read(fs, "b/k") == s3.read(fs, "b/k") == b"image bytes"
    assert told.requests[-1] == told.requests[-2]
    with pytest.raises(PermissionError):
        s3.read(fs, "b/400-ExpiredToken")
    assert s3.read(fs, "b/k") == b"image bytes"
    assert told.requests[-1][2] != told.requests[-2][2]


def test_only_s3fs_decides_what_the_environment_means(told: type[ToldS3], monkeypatch: pytest.MonkeyPatch) -> None:
    """obstore has variables of its own, and reads the proxy's."""
    for name, value in {
        "AWS_SKIP_SIGNATURE": "true",
        "AWS_ENDPOINT": "http://127.0.0.1:1",
        "AWS_TOKEN": "x",
        "AWS_PROXY_URL": "http://127.0.0.1:1",
        "AWS_ALLOW_INVALID_CERTIFICATES": "true",
        "http_proxy": "http://127.0.0.1:1",
        "no_proxy": "127.0.0.1",
    }.items():
        monkeypatch.setenv(name, value)
    fs = filesystem()
    assert s3.read(fs, "b/k") == b"image bytes"
    assert told.requests == [("obstore", "/b/k", "us-east-1 test")]


def test_a_proxy_is_asked(told: type[ToldS3], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", os.environ["AWS_ENDPOINT_URL"])
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://s3.example.invalid")
    assert s3.read(filesystem(), "b/k") == b"image bytes"
    assert told.requests == [("obstore", "http://s3.example.invalid/b/k", "us-east-1 test")]
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    s3._filesystem.cache_clear()
    with pytest.raises(Exception, match="Failed to connect to proxy URL"):
        s3.read(filesystem(), "c/k")


def openssl(directory: Path, *words: str) -> None:
    subprocess.run(["openssl", *words], cwd=directory, check=True, capture_output=True)


def test_certificates_are_those_that_s3fs_trusts(
    no_s3_server: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    new = ("-newkey", "rsa:2048", "-nodes", "-keyout")
    openssl(tmp_path, "req", "-x509", *new, "ca.key", "-out", "ca.pem", "-days", "2", "-subj", "/CN=ours")
    openssl(tmp_path, "req", *new, "key.pem", "-out", "request.pem", "-subj", "/CN=localhost")
    (tmp_path / "names").write_text("subjectAltName=DNS:localhost\n")
    signing = ("-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-days", "2", "-extfile", "names")
    openssl(tmp_path, "x509", "-req", "-in", "request.pem", *signing, "-out", "certificate.pem")
    with serving((str(tmp_path / "certificate.pem"), str(tmp_path / "key.pem"))) as (handler, port):
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"https://localhost:{port}")
        with pytest.raises(Exception, match="SSL validation failed"):
            s3.read(filesystem(), "b/k")
        s3._filesystem.cache_clear()
        monkeypatch.setenv("AWS_CA_BUNDLE", str(tmp_path / "ca.pem"))
        assert s3.read(filesystem(), "b/k") == b"image bytes"
        assert who(handler) == ["obstore"]


def test_without_keys_s3fs_says_so(told: type[ToldS3], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(Exception, match="Unable to locate credentials"):
        s3.read(filesystem(), "b/k")
    assert told.requests == []


def test_where_obstore_is_not_installed_s3fs_reads(told: type[ToldS3], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "obstore", None)
    assert s3.read(filesystem(), "b/k") == b"image bytes"
    assert who(told) == ["s3fs"]


FORKED: Final = """
import json, os, sys
from catdog.storage import s3
def read():
    fs, path = s3.url_to_fs("s3://b/k", 4)
    return s3.read(fs, path).decode()
read()
child = os.fork()
text = read()
if child:
    _, status = os.waitpid(child, 0)
    print(json.dumps([text, status]))
sys.stdout.flush()
os._exit(0 if text == "image bytes" else 1)
"""


def test_a_forked_process_reads_with_s3fs(told: type[ToldS3]) -> None:
    ran = subprocess.run([sys.executable, "-W", "ignore", "-c", FORKED], capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout) == ["image bytes", 0]
    assert sorted(who(told)) == ["obstore", "obstore", "s3fs"]


def test_what_it_uses_of_s3fs_and_obstore_is_where_it_was(told: type[ToldS3]) -> None:
    fs = filesystem()
    plan = s3_objects._plan(fs, "b")
    assert plan == s3_objects._Plan(f"{os.environ['AWS_ENDPOINT_URL']}/b", "us-east-1", "test", "test", None)
    assert told.requests == []  # nothing was sent
    from obstore.exceptions import BaseError

    with pytest.raises(BaseError) as caught:
        s3_objects._store(plan, fs).get("503-SlowDown")
    text = str(caught.value)
    assert s3_objects._DETAILS in text
    assert s3_objects._STATUS.search(text) is not None


def test_few_buckets_are_kept(told: type[ToldS3], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3_objects, "_MOST_BUCKETS", 3)
    fs = filesystem()
    for number in (0, 1, 2, 0, 3):
        assert s3.read(fs, f"b{number}/k") == b"image bytes"
    assert [name for _, name in s3_objects._buckets] == ["b2", "b0", "b3"]
