"""Temporary directories: who may remove them, and who does."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from catdog import scratch
from catdog.errors import UsageError

OWNER = """if True:
    import sys, time
    from catdog import scratch
    with scratch.directory("plan", parent=sys.argv[1]) as path:
        open(f"{path}/gigabytes", "w").close()
        print(path, flush=True)
        time.sleep(600)
"""


def start_owner(parent: Path) -> tuple[subprocess.Popen[str], Path]:
    """A process with a directory of its own."""
    owner = subprocess.Popen([sys.executable, "-c", OWNER, str(parent)], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    return owner, Path(owner.stdout.readline().strip())


def kill(owner: subprocess.Popen[str]) -> None:
    owner.send_signal(signal.SIGKILL)
    owner.communicate()


def test_a_directory_is_gone_after_its_block(tmp_path: Path) -> None:
    with scratch.directory("plan", parent=str(tmp_path)) as path:
        assert Path(path).parent == tmp_path
        assert Path(path).name.startswith("catdog-plan-")
        Path(path, "inside").mkdir()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="mine"), scratch.directory("plan", parent=str(tmp_path)):
        raise ValueError("mine")
    assert list(tmp_path.iterdir()) == []


def test_by_default_it_lies_where_temporary_files_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with scratch.directory("prepare") as path:
        assert Path(path).parent == tmp_path


def test_what_killed_processes_leave_is_removed_and_what_living_ones_have_is_not(tmp_path: Path) -> None:
    living, its = start_owner(tmp_path)
    killed, left = start_owner(tmp_path)
    try:
        kill(killed)
        (left / "session").mkdir()
        (left / "session" / "log").write_text("much")
        assert (left / "gigabytes").exists()
        with scratch.directory("prepare", parent=str(tmp_path)) as path:  # another command removes it, too
            assert set(tmp_path.iterdir()) == {its, Path(path)}
            assert (its / "gigabytes").exists()
    finally:
        kill(living)
    scratch.remove_abandoned(str(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_a_directory_of_this_very_process_is_in_use(tmp_path: Path) -> None:
    with (
        scratch.directory("plan", parent=str(tmp_path)) as one,
        scratch.directory("plan", parent=str(tmp_path)) as two,
    ):
        assert one != two
        assert os.path.isdir(one)


def test_what_is_not_ours_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    killed, left = start_owner(tmp_path)
    kill(killed)
    for name in ("catdog-photographs", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "cat.jpg").touch()
    (tmp_path / "other" / scratch.OWNER_NAME).touch()
    (tmp_path / "catdog-link").symlink_to(tmp_path / "other")
    (tmp_path / "catdog-file").touch()
    before = sorted(tmp_path.rglob("*"))
    with monkeypatch.context() as patch:
        patch.setattr(os, "getuid", lambda: os.geteuid() + 1)  # `left` is somebody else's
        scratch.remove_abandoned(str(tmp_path))
    assert sorted(tmp_path.rglob("*")) == before
    scratch.remove_abandoned(str(tmp_path))
    assert sorted(tmp_path.rglob("*")) == [path for path in before if left not in (path, path.parent)]


def test_a_place_that_cannot_be_written_to_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rule = r"^TMPDIR must name a directory with space in it that can be written to\. Received: "
    with (
        pytest.raises(UsageError, match=rule + f"{tmp_path}/none: "),
        scratch.directory("x", parent=f"{tmp_path}/none"),
    ):
        pass

    def nowhere() -> str:
        raise FileNotFoundError(2, "No usable temporary directory found in ['/tmp']")

    monkeypatch.setattr("tempfile.gettempdir", nowhere)
    monkeypatch.setenv("TMPDIR", "/full")
    with pytest.raises(UsageError, match=rule + "/full: No usable temporary directory found"):
        scratch.base()


def test_a_short_place_is_found_where_the_usual_one_is_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = tmp_path / ("x" * 100)
    long.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(long))
    assert scratch.short_base(300) == str(long)
    assert len(scratch.short_base(20)) <= 20
    with pytest.raises(UsageError, match=r"^TMPDIR must have at most 3 bytes in its path\. Received: TMPDIR=.*x$"):
        scratch.short_base(3)
