"""`catdog.failpoints`: where and when it strikes, and that it does nothing otherwise."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from catdog import failpoints, storage
from catdog.errors import StorageError, UsageError

PACKAGE = Path(failpoints.__file__).parent


@pytest.fixture(autouse=True)
def count_anew() -> None:
    failpoints._reached.clear()


def test_every_step_is_somewhere_in_the_code() -> None:
    code = "".join(path.read_text() for path in PACKAGE.rglob("*.py"))
    assert [name for name in failpoints.STEPS if f'failpoints.step("{name}")' not in code] == []


def test_without_the_variable_a_step_is_nothing() -> None:
    assert failpoints.VARIABLE not in os.environ
    assert failpoints.step("read") is failpoints.step("write")


@pytest.mark.parametrize("text", ["", "kill", "before:nothing:1=kill", "before:read:0=kill", "at:read:1=kill"])
def test_a_point_that_does_not_exist_is_an_error(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr(failpoints, "_text", text)
    with (
        pytest.raises(UsageError, match=rf"^CATDOG_FAIL_AT must have the form .* Received: CATDOG_FAIL_AT={text}$"),
        failpoints.step("read"),
    ):
        pass


@pytest.mark.parametrize(("moment", "there"), [("before", ["1", "2"]), ("after", ["1", "2", "3"])])
def test_a_process_is_killed_at_its_point(tmp_path: Path, moment: str, there: list[str]) -> None:
    program = f"""if True:
        from catdog import storage
        for name in "1234":
            storage.publish_bytes("{tmp_path}/" + name, b"whole")
    """
    environment = os.environ | {failpoints.VARIABLE: f"{moment}:publish:3=kill"}
    assert subprocess.run([sys.executable, "-c", program], env=environment).returncode == -9
    assert storage.list_names(str(tmp_path)) == there


def test_a_full_disk_stays_full(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(failpoints, "_text", "before:write:2=full")
    storage.publish_bytes(str(tmp_path / "1"), b"whole")
    for _ in range(2):
        with pytest.raises(StorageError, match=os.strerror(errno.ENOSPC)):
            storage.publish_bytes(str(tmp_path / "2"), b"whole")
    assert os.listdir(tmp_path) == ["1"]
