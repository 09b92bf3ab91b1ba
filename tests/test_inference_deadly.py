"""Images that kill the process that decodes them: each becomes a row, and the others get their labels."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
from inference_case import archive, descendants, encoded_drawings, is_alive, rows_of
from serving_case import process

from catdog.inference import trial, verify
from catdog.storage import SourceFile, list_images

pytestmark = pytest.mark.slow

POISON = b"poison"

SITECUSTOMIZE = f"""
import os, signal
import catdog.images

def decode(data, *args, honest=catdog.images.decode):
    if data.startswith({POISON!r}):
        os.kill(os.getpid(), getattr(signal, data.decode().split()[1]))
    return honest(data, *args)

catdog.images.decode = decode

if "CATDOG_TEST_SLICE" in os.environ:
    from catdog.inference.plan import planner

    planner.SLICE_SIZE = int(os.environ["CATDOG_TEST_SLICE"])
"""
"""What a Python process runs first that has it on its path: a decoder that some images crash."""


@pytest.fixture
def deadly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes that are started from here have the decoder that some images crash."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(SITECUSTOMIZE)
    monkeypatch.setattr(sys, "path", [str(tmp_path / "site"), *sys.path])
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'site'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")


def photographs(directory: Path, num_photos: int, poisons: dict[int, str]) -> Path:
    directory.mkdir()
    pictures = encoded_drawings(min(num_photos, 20))
    for number in range(num_photos):
        (directory / f"{number:04}.jpg").write_bytes(pictures[number % len(pictures)])
    for number, name in poisons.items():
        (directory / f"{number:04}.jpg").write_bytes(POISON + f" {name}".encode())
    return directory


@pytest.mark.usefixtures("deadly")
@pytest.mark.parametrize("poisons", [{}, {0: "SIGSEGV"}, {4: "SIGKILL"}, {1: "SIGABRT", 2: "SIGBUS", 4: "SIGSEGV"}])
def test_a_trial_finds_what_kills(tmp_path: Path, poisons: dict[int, str]) -> None:
    files = list(list_images(str(photographs(tmp_path / "photos", 5, poisons))))
    found = trial.deadly(files, 32, [""])
    assert {files.index(file): str(error).split()[-1] for file, error in found.items()} == {
        number: f"{name}" for number, name in poisons.items()
    }
    assert {error.code for error in found.values()} <= {"decoder_died"}


def test_a_trial_passes_over_what_is_merely_bad(tmp_path: Path) -> None:
    (tmp_path / "letter.jpg").write_text("Dear cat,")
    files = [SourceFile(str(tmp_path / "letter.jpg"), "1", 9), SourceFile(str(tmp_path / "gone.jpg"), "1", 9)]
    assert trial.deadly(files, 32, [""]) == {}


def command(images: Path, output: Path, model: str, executor: str) -> "subprocess.CompletedProcess[str]":
    code = f"""
from catdog.config import PredictConfig
from catdog.inference import predict
config = PredictConfig(images={str(images)!r}, output={str(output)!r}, model={model!r}, executor={executor!r})
print(predict(config).books)
"""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def errors_of(output: Path) -> dict[str, str]:
    return {Path(row["uri"]).name: row["error_code"] for row in rows_of(output).to_pylist() if row["status"] == "error"}


@pytest.mark.usefixtures("deadly")
def test_an_image_that_kills_actors_is_a_row(tmp_path: Path, model: str) -> None:
    images = photographs(tmp_path / "photos", 1500, {7: "SIGSEGV", 8: "SIGKILL", 1200: "SIGABRT"})
    result = command(images, tmp_path / "out", model, "ray")
    assert result.stdout.splitlines()[-1:] == [
        "1,500 listed = 1,497 ok + 3 error + 0 already done + 0 duplicate + 0 skipped"
    ], result.stderr
    assert errors_of(tmp_path / "out") == dict.fromkeys(["0007.jpg", "0008.jpg", "1200.jpg"], "decoder_died")
    assert verify(str(tmp_path / "out")).rows == 1500


@pytest.mark.usefixtures("deadly")
def test_an_image_that_kills_a_process_which_calls_predict_is_a_row_of_the_next_run(tmp_path: Path, model: str) -> None:
    images = photographs(tmp_path / "photos", 60, {7: "SIGSEGV", 8: "SIGABRT", 59: "SIGKILL"})
    output = tmp_path / "out"
    assert command(images, output, model, "inline").returncode in {-signal.SIGSEGV, -signal.SIGABRT, -signal.SIGKILL}
    result = command(images, output, model, "inline")
    assert result.stdout == "60 listed = 57 ok + 3 error + 0 already done + 0 duplicate + 0 skipped\n", result.stderr
    assert errors_of(output) == dict.fromkeys(["0007.jpg", "0008.jpg", "0059.jpg"], "decoder_died")
    assert verify(str(output)).rows == 60


# The command line.


PROGRAM = [
    sys.executable,
    "-c",
    # A suite that a shell started in the background has its children ignore Ctrl-C.
    "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\nfrom catdog.cli import run; run()",
    "predict",
]


def command_line(images: Path, output: Path, model: str) -> list[str]:
    return [*PROGRAM, "--images", str(images), "--output", str(output), "--model", model, "--executor", "inline"]


@pytest.mark.usefixtures("deadly")
def test_images_that_kill_the_command_are_rows_of_the_same_run(tmp_path: Path, model: str) -> None:
    """Some beside each other, and some so far apart that others are published between two deaths."""
    poisons = dict.fromkeys(range(0, 24, 2), "SIGSEGV") | {39: "SIGKILL", 700: "SIGABRT", 1399: "SIGABRT"}
    images = photographs(tmp_path / "photos", 1400, poisons)
    output = tmp_path / "out"
    line = command_line(images, output, model)
    result = subprocess.run(line, capture_output=True, text=True, env=os.environ | {"CATDOG_TEST_SLICE": "20"})
    assert result.returncode == 0, result.stderr
    assert 2 <= result.stderr.count("The process that labels died of SIG") <= 4, result.stderr
    assert "error: " not in result.stderr
    assert result.stdout.startswith("Labelled ")
    assert errors_of(output) == dict.fromkeys([f"{number:04}.jpg" for number in poisons], "decoder_died")
    assert verify(str(output)).rows == 1400
    assert len(list(output.glob("_runs/*.json"))) == 1


@pytest.mark.parametrize("name", ["SIGSEGV", "SIGKILL"])
def test_a_death_that_has_nothing_to_do_with_images_is_one_error(
    tmp_path: Path, model: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = photographs(tmp_path / "photos", 3, {})
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "duckdb.py").write_text(f"import os, signal\nos.kill(os.getpid(), signal.{name})")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    result = subprocess.run(command_line(images, tmp_path / "out", model), capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (1, "")
    *warnings, error = result.stderr.splitlines()
    assert [warning.split(" WARNING ")[1] for warning in warnings] == [
        f"The process that labels died of {name}, and is started again"
    ] * 3
    assert error == (
        f"error: the process that labels must not die 4 times in a row without having got anywhere. Received: {name}"
    )


@pytest.mark.parametrize(
    ("number", "to", "exit_code"),
    [
        (signal.SIGINT, "group", 130),
        (signal.SIGTERM, "process", 143),
        (signal.SIGKILL, "process", -signal.SIGKILL),
    ],
)
def test_a_signal_ends_the_command_and_its_child(
    tmp_path: Path, model: str, number: signal.Signals, to: str, exit_code: int
) -> None:
    images, output = archive(tmp_path / "train.zip", 4000), tmp_path / "out"
    line = command_line(images, output, model)
    with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True) as process:
        while not list(output.glob("part-*")):
            assert process.poll() is None
            time.sleep(0.01)
        family = descendants(process.pid)
        assert len(family) == 1
        (os.killpg if to == "group" else os.kill)(process.pid, number)
        out, err = process.communicate(timeout=60)
        assert (process.returncode, out) == (exit_code, b"")
        assert b"started again" not in err
    deadline = time.monotonic() + 10
    while any(map(is_alive, family)):
        assert time.monotonic() < deadline
    is_clean = exit_code in (130, 143)
    assert bool(list(output.glob(".catdog-claim-*"))) != is_clean
    assert 0 < verify(str(output)).rows < 4000


def test_a_command_that_is_stopped_goes_on(tmp_path: Path, model: str) -> None:
    images, output = archive(tmp_path / "train.zip", 4000), tmp_path / "out"
    with subprocess.Popen(command_line(images, output, model), stdout=subprocess.PIPE) as process:
        while not list(output.glob("part-*")):
            time.sleep(0.01)
        (child,) = descendants(process.pid)
        process.send_signal(signal.SIGTSTP)
        assert os.WIFSTOPPED(os.waitpid(process.pid, os.WUNTRACED)[1])
        try:
            deadline = time.monotonic() + 10  # its threads stop one by one
            while Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0] != "T":
                assert time.monotonic() < deadline
        finally:  # nobody could wait for a process that is stopped
            process.send_signal(signal.SIGCONT)
        assert process.communicate(timeout=60)[0].startswith(b"Labelled 4,000 images")
        assert process.returncode == 0


# The service.


@pytest.mark.usefixtures("deadly")
def test_an_image_that_kills_the_service_does_not_end_it(tmp_path: Path, model: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with process(tmp_path, "--model", model, port=port) as served:
        for name in ("SIGSEGV", "SIGKILL", "SIGABRT", "SIGBUS", "SIGSEGV"):
            with pytest.raises(httpx.RemoteProtocolError):
                httpx.post(f"{served.url}/v1/predict", content=POISON + f" {name}".encode(), timeout=60)
            answer = None
            deadline = time.monotonic() + 60
            while answer is None and time.monotonic() < deadline:
                try:
                    answer = httpx.post(f"{served.url}/v1/predict", content=encoded_drawings(1)[0], timeout=60)
                except httpx.ConnectError:
                    time.sleep(0.05)
            assert answer is not None
            assert answer.status_code == 200
        assert served.end() == 0
    assert served.log.read_text().count("is started again") == 5
