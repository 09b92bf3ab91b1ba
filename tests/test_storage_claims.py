"""One run at a time in an output, whatever the storage, and whoever was killed."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from s3_server import S3Server

from catdog import storage
from catdog.errors import ClaimLostError, OutputClaimedError, StorageError
from catdog.storage import claims
from catdog.storage.listing import list_all_names

pytest_plugins = ["s3_server"]

HOLD = """if True:
    import sys, time
    from catdog import storage
    with storage.claimed(sys.argv[1], "train"):
        print("held", flush=True)
        time.sleep(60)
"""


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "HEARTBEAT_S", 0.2)
    monkeypatch.setattr(claims, "EXPIRY_S", 1.0)
    monkeypatch.setattr(claims, "SETTLE_S", 0.3)
    monkeypatch.setattr(claims, "_POLL_S", 0.05)


@pytest.fixture(params=["local", "memory", pytest.param("s3", marks=pytest.mark.slow)])
def output(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "s3":
        s3: S3Server = request.getfixturevalue("s3")
        return f"{s3.new_bucket()}/deep/out"
    return str(tmp_path / "deep" / "out") if request.param == "local" else f"memory://{tmp_path.name}/out"


def claim_files(output: str) -> list[str]:
    return [name for name in list_all_names(output) if "claim" in name]


def test_a_second_run_is_told_who_holds_the_output(output: str) -> None:
    with storage.claimed(output, "train") as claim:
        with pytest.raises(OutputClaimedError) as refused, storage.claimed(output, "predict"):
            raise AssertionError("two runs hold one output")
        message = str(refused.value)
        assert message.startswith("--output must not be in use by another run: wait for its end, or take another ")
        assert f"held by `catdog train` (process {os.getpid()} on " in message
        assert ", since 20" in message
        claim.check()
        assert len(claim_files(output)) == 1
    assert claim_files(output) == []
    with storage.claimed(output, "predict"):
        assert len(claim_files(output)) == 1


def test_of_many_that_start_at_once_one_holds_the_output(output: str) -> None:
    holding, most = 0, 0
    lock = threading.Lock()

    def run(number: int) -> bool:
        nonlocal holding, most
        try:
            with storage.claimed(output, f"run {number}"):
                with lock:
                    holding += 1
                    most = max(most, holding)
                time.sleep(0.3)
                with lock:
                    holding -= 1
        except OutputClaimedError:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        held = list(pool.map(run, range(8)))
    assert most == 1
    assert any(held)
    assert claim_files(output) == []


def test_the_claim_of_a_killed_run_on_this_machine_is_taken_over_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claims, "EXPIRY_S", 1000.0)
    output = str(tmp_path / "out")
    with subprocess.Popen([sys.executable, "-c", HOLD, output], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        with pytest.raises(OutputClaimedError), storage.claimed(output, "train"):
            raise AssertionError("two runs hold one output")
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert len(claim_files(output)) == 1
        with storage.claimed(output, "train") as claim:
            assert claim.url.endswith(".catdog-claim-2.json")
            assert len(claim_files(output)) == 1


def elsewhere(output: str, number: int, renewals: int = 0) -> None:
    """A claim of a process of another machine."""
    holder = claims.Holder(
        owner="x", command="predict", since="2026-01-01", host="far", pid=1, process="", renewals=renewals
    )
    storage.publish_bytes(storage.join(output, f".catdog-claim-{number}.json"), claims._encoded(holder))


def test_the_claim_of_another_machine_holds_while_it_is_renewed_and_then_expires(output: str) -> None:
    elsewhere(output, 7)
    done = threading.Event()

    def renew() -> None:
        renewals = 0
        while not done.wait(0.3):
            renewals += 1
            elsewhere(output, 7, renewals)

    renewing = threading.Thread(target=renew)
    renewing.start()
    try:
        with pytest.raises(OutputClaimedError, match="process 1 on far"), storage.claimed(output, "train"):
            raise AssertionError("two runs hold one output")
    finally:
        done.set()
        renewing.join()
    started = time.monotonic()
    with storage.claimed(output, "train") as claim:
        assert time.monotonic() - started >= claims.EXPIRY_S
        assert claim.url.endswith(".catdog-claim-8.json")


def test_a_run_whose_claim_was_taken_over_is_told(output: str) -> None:
    with storage.claimed(output, "train") as claim:
        elsewhere(output, 2)
        with pytest.raises(ClaimLostError, match=r"^a run must hold the claim of its --output to its end\. Received: "):
            claim.check()
    assert claim_files(output) == [".catdog-claim-2.json"]


def test_a_claim_is_renewed(output: str) -> None:
    with storage.claimed(output, "train") as claim:
        first = storage.read_json(claim.url)
        deadline = time.monotonic() + 20
        while storage.read_json(claim.url)["renewals"] < 2:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert storage.read_json(claim.url)["owner"] == first["owner"]


def test_a_run_that_writes_nothing_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), storage.claimed(str(tmp_path / "a" / "b"), "train"):
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []
    with storage.claimed(str(tmp_path / "a" / "b"), "train"):
        (tmp_path / "a" / "b" / "result").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["a", "b", "result"]


def test_an_output_that_cannot_be_written_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(StorageError, match="file/out cannot be written: "),
        storage.claimed(str(tmp_path / "file" / "out"), "train"),
    ):
        raise AssertionError("a file is no directory")


def test_a_claim_that_cannot_be_understood_counts_while_it_changes(tmp_path: Path) -> None:
    (tmp_path / ".catdog-claim-1.json").write_text("of another version")
    with storage.claimed(str(tmp_path), "train") as claim:
        assert claim.url.endswith(".catdog-claim-2.json")


def test_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(source: str, target: str) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    test_of_many_that_start_at_once_one_holds_the_output(str(tmp_path / "out"))


@pytest.fixture
def unconditional(monkeypatch: pytest.MonkeyPatch) -> None:
    """A store that heeds no conditions, as S3 before 2024 and many that speak its protocol."""
    from fsspec.implementations.memory import MemoryFileSystem

    pipe = MemoryFileSystem.pipe_file
    monkeypatch.setattr(
        MemoryFileSystem, "pipe_file", lambda self, path, value, mode="overwrite", **rest: pipe(self, path, value)
    )


@pytest.mark.usefixtures("unconditional")
def test_without_conditional_writes(tmp_path: Path) -> None:
    test_of_many_that_start_at_once_one_holds_the_output(f"memory://{tmp_path.name}/out")
    test_a_second_run_is_told_who_holds_the_output(f"memory://{tmp_path.name}/other")


def test_a_lost_answer_is_no_refusal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The store has done the write, but the answer was lost: the second try finds the file there."""
    from fsspec.implementations.memory import MemoryFileSystem

    pipe = MemoryFileSystem.pipe_file
    calls: list[str] = []

    def lossy(self: object, path: str, value: bytes, mode: str = "overwrite", **rest: object) -> None:
        calls.append(path)
        pipe(self, path, value, mode=mode)
        if len(calls) == 1:
            raise ConnectionResetError("the answer was lost")

    monkeypatch.setattr(MemoryFileSystem, "pipe_file", lossy)
    with storage.claimed(f"memory://{tmp_path.name}/out", "train") as claim:
        assert json.loads(storage.read_bytes(claim.url))["command"] == "train"


def test_where_processes_have_no_identity_a_claim_is_that_of_another_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a system without `/proc`."""
    monkeypatch.setattr(claims, "_process", lambda pid: "")
    elsewhere(str(tmp_path), 1)
    started = time.monotonic()
    with storage.claimed(str(tmp_path), "train") as claim:
        assert time.monotonic() - started >= claims.EXPIRY_S
        assert claim.is_after_death


def test_holding_a_claim_does_not_list_the_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with storage.claimed(str(tmp_path), "train") as claim:
        assert not claim.is_after_death
        monkeypatch.setattr(claims, "list_all_names", pytest.fail)
        claim.check()
        claim.check()
