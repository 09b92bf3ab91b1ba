"""Where the command runs, and what it says there: a full disk, a missing directory, secrets in URLs."""

import errno
import importlib
import logging
import os
import types
from collections.abc import Callable
from pathlib import Path

import pytest

from catdog import cli, scratch
from catdog.errors import UsageError

LINE = ["prepare", "--images", "/photographs", "--output", "/data"]
URL = "https://user:hunter2@host/cat.jpg?X-Amz-Signature=0123abcd"


@pytest.fixture
def job(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], None]], None]:
    """Lets the command do something else."""

    def replace(work: Callable[[], None]) -> None:
        module = types.SimpleNamespace(**{command.function: lambda config: work() for command in cli.COMMANDS.values()})
        monkeypatch.setattr(importlib, "import_module", lambda name: module)

    return replace


def raises(error: BaseException) -> Callable[[], None]:
    def work() -> None:
        raise error

    return work


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/x"),
            "every directory that is written to must have space, TMPDIR's too. Received: /x: No space left on device",
        ),
        (
            OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)),
            "every directory that is written to must have space, TMPDIR's too. Received: Disk quota exceeded",
        ),
        (
            FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/x', '/y']"),
            "TMPDIR must name a directory with space in it that can be written to. Received: /nowhere",
        ),
    ],
)
def test_a_place_without_space_is_one_line(
    error: OSError,
    said: str,
    job: Callable[[Callable[[], None]], None],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TMPDIR", "/nowhere")
    job(raises(error))
    assert cli.main(LINE) == 1
    assert capsys.readouterr() == ("", f"error: {said}\n")


def test_a_working_directory_that_was_removed_is_one_line(
    tmp_path: Path,
    job: Callable[[Callable[[], None]], None],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    job(lambda: raises(OSError(os.path.abspath("photographs")))())
    assert cli.main(LINE) == 1
    assert capsys.readouterr().err == "error: the working directory must exist. Received: one that was removed\n"


def test_every_other_error_keeps_its_traceback(job: Callable[[Callable[[], None]], None]) -> None:
    job(raises(FileNotFoundError(errno.ENOENT, "No such file or directory", "/x")))
    with pytest.raises(FileNotFoundError):
        cli.main(LINE)


def test_a_temporary_directory_without_space_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def full(*arguments: object, **options: object) -> str:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("tempfile.mkdtemp", full)
    with (
        pytest.raises(UsageError, match=rf"^TMPDIR must .* Received: {tmp_path}: No space left on device$"),
        scratch.directory("plan", parent=str(tmp_path)),
    ):
        pass


def test_no_error_and_no_line_of_the_log_has_the_secret_of_a_url(
    job: Callable[[Callable[[], None]], None], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])

    def work() -> None:
        logging.getLogger("catdog.storage").info("Reading %s", URL)
        logging.getLogger("fsspec.http").warning("Retrying %s", URL)
        raise UsageError(f"--images must be there. Received: --images={URL}")

    job(work)
    assert cli.main(LINE) == 2
    said = capsys.readouterr().err
    assert said.count("https://***@host/cat.jpg?***") == 3
    assert "hunter2" not in said
    assert "0123abcd" not in said
