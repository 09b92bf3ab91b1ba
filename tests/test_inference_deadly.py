"""Images that kill the process that decodes them: each becomes a row, and the others get their labels."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from inference_case import encoded_drawings, rows_of

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
    assert result.stdout.splitlines()[-1:] == ["1,500 listed = 1,497 ok + 3 error + 0 already done + 0 duplicate"], (
        result.stderr
    )
    assert errors_of(tmp_path / "out") == dict.fromkeys(["0007.jpg", "0008.jpg", "1200.jpg"], "decoder_died")
    assert verify(str(tmp_path / "out")).rows == 1500


@pytest.mark.usefixtures("deadly")
def test_an_image_that_kills_the_command_is_a_row_of_the_next_run(tmp_path: Path, model: str) -> None:
    images = photographs(tmp_path / "photos", 60, {7: "SIGSEGV", 8: "SIGABRT", 59: "SIGKILL"})
    output = tmp_path / "out"
    assert command(images, output, model, "inline").returncode in {-signal.SIGSEGV, -signal.SIGABRT, -signal.SIGKILL}
    result = command(images, output, model, "inline")
    assert result.stdout == "60 listed = 57 ok + 3 error + 0 already done + 0 duplicate\n", result.stderr
    assert errors_of(output) == dict.fromkeys(["0007.jpg", "0008.jpg", "0059.jpg"], "decoder_died")
    assert verify(str(output)).rows == 60
