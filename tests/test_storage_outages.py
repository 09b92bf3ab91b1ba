"""`catdog.storage.outages`: storages that fail for a while, for good, and for one file."""

import socket
import threading
import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from fault_proxy import FAULTS, Fault, FaultProxy
from s3_server import S3Server
from storage_case import FlakyS3, write_manifest

from catdog import storage
from catdog.errors import ImageError, OutputClaimedError, StorageError, UsageError
from catdog.storage import claims, filesystems, outages, reading
from catdog.storage import s3 as s3_filesystems
from catdog.storage.listing import list_all_names

pytest_plugins = ["s3_server", "storage_case", "fault_proxy"]


@pytest.fixture(autouse=True)
def know_nothing(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv(outages.PATIENCE_VARIABLE, raising=False)
    outages.forget_all()
    yield
    outages.forget_all()


def test_the_patience_is_five_minutes_or_as_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    assert outages.patience_s() == 300
    monkeypatch.setenv(outages.PATIENCE_VARIABLE, "2.5")
    assert outages.patience_s() == 2.5
    for text in ("soon", "-1", "nan", "inf", ""):
        monkeypatch.setenv(outages.PATIENCE_VARIABLE, text)
        with pytest.raises(UsageError, match=rf"^{outages.PATIENCE_VARIABLE} must be .* Received: .*={text}$"):
            outages.patience_s()


def test_fewer_requests_are_in_flight_while_a_storage_fails() -> None:
    known = outages.Storage("s3://b")
    assert known.limit == outages.MAX_CONNECTIONS == 32
    for expected in (16, 8, 4, 2, 1, 1):
        known.failed("s3://b/x", "m", time.monotonic(), is_unreachable=False)
        assert known.limit == expected
    for _ in range(100):
        known.succeeded()
    assert known.limit == 32
    begun = time.monotonic()
    for _ in range(10):  # what was under way together fails together
        known.failed("s3://b/x", "m", begun, is_unreachable=False)
    assert known.limit == 16


def test_no_more_requests_than_the_limit_are_in_flight(monkeypatch: pytest.MonkeyPatch) -> None:
    known = outages.known("s3://b")
    for _ in range(4):
        known.failed("s3://b/x", "m", time.monotonic(), is_unreachable=False)
    in_flight, most = 0, 0
    lock = threading.Lock()

    def action() -> None:
        nonlocal in_flight, most
        with lock:
            in_flight += 1
            most = max(most, in_flight)
        time.sleep(0.02)
        filesystems.attempt("s3://b/inner", lambda: None)  # needs no slot of its own
        with lock:
            in_flight -= 1

    with ThreadPoolExecutor(32) as pool:
        list(pool.map(lambda number: filesystems.attempt(f"s3://b/{number}", action), range(6)))
        assert most <= 5  # it grows again
        list(pool.map(lambda number: filesystems.attempt(f"s3://b/{number}", action), range(200)))
    assert known.limit == 32


def failing(url: str, calls: list[float], error: Exception) -> Callable[[], None]:
    def fail() -> None:
        calls.append(time.monotonic())
        raise error

    return lambda: filesystems.attempt(url, fail)


@pytest.mark.slow
def test_the_budget_is_the_storages_and_not_the_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(outages.PATIENCE_VARIABLE, "1.5")
    started = time.monotonic()
    calls: list[float] = []
    with ThreadPoolExecutor(200) as pool:
        ends = [pool.submit(failing(f"s3://b/{i}", calls, TimeoutError("timed out"))) for i in range(200)]
    for end in ends:
        with pytest.raises(StorageError, match=r"^s3://b/\d+: the storage failed(: | for \d+ s: )timed out$"):
            end.result()
    assert time.monotonic() - started < 10
    begun = time.monotonic()
    with pytest.raises(StorageError, match=r"the storage failed for \d+ s: timed out"):
        failing("s3://b/late", calls, TimeoutError("timed out"))()
    assert time.monotonic() - begun < 1  # one try: the storage is known to be down
    with pytest.raises(StorageError, match=r"s3://other/x: the storage failed for 2 s"):
        failing("s3://other/x", calls, TimeoutError("timed out"))()


def test_a_success_starts_the_budget_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(outages.PATIENCE_VARIABLE, "1")
    known = outages.known("s3://b/x")
    begun = time.monotonic() - 100
    known.failed("s3://b/x", "m", begun, is_unreachable=False)
    assert known.tried_s(begun, 50, is_unreachable=False) is not None
    known.succeeded()
    assert known.tried_s(time.monotonic(), 50, is_unreachable=False) is None


@pytest.mark.parametrize(("num_files", "outage_s", "is_anew"), [(2, 200, True), (1, 200, False), (2, 20, False)])
def test_an_outage_is_not_held_against_a_file(num_files: int, outage_s: float, is_anew: bool) -> None:
    known = outages.Storage("s3://b")
    now = time.monotonic()
    for number in range(num_files):
        known.failed(f"s3://b/{number}", "m", now - outage_s, is_unreachable=False)
    known.succeeded()
    assert (known.tried_s(now - 250, 240, is_unreachable=False) is None) == is_anew
    known.failed("s3://b/0", "m", time.monotonic(), is_unreachable=False)
    assert (known.tried_s(now - 250, 240, is_unreachable=False) is None) == is_anew


@pytest.mark.slow
@pytest.mark.parametrize("error", [ConnectionRefusedError(111, "refused"), socket.gaierror(-2, "Name not known")])
def test_an_address_where_nobody_ever_listened_is_given_up_soon(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    monkeypatch.setattr(outages, "_FIRST_CONTACT_S", 0.5)
    monkeypatch.setattr(outages, "_LONGEST_PAUSE_S", 0.2)
    calls: list[float] = []
    with pytest.raises(StorageError, match=r"the storage failed for [01] s: "):
        failing("sftp://host/x", calls, error)()
    assert len(calls) > 1
    outages.forget_all()
    monkeypatch.setenv(outages.PATIENCE_VARIABLE, "2")
    filesystems.attempt("sftp://host/x", lambda: None)
    with pytest.raises(StorageError, match=r"the storage failed for 2 s: "):  # it had been there
        failing("sftp://host/x", calls, error)()


def test_local_errors_are_not_waited_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outages, "_LOCAL_PATIENCE_S", 0.3)
    calls: list[float] = []
    with pytest.raises(StorageError, match=r"^/x: the storage failed for [01] s: Input/output error$"):
        failing("/x", calls, OSError(5, "Input/output error"))()


def test_one_bad_sector_is_a_row_and_a_dead_disk_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading `/proc/self/mem` fails as a bad sector does, also where it is not named as an image."""
    monkeypatch.setattr(outages, "_LOCAL_PATIENCE_S", 0.0)
    for name in ("bad.jpg", "NOTES"):
        (tmp_path / name).symlink_to("/proc/self/mem")
    (tmp_path / "good.jpg").write_bytes(b"good")
    listed = [file.uri for file in storage.list_images(str(tmp_path), skip_others=True)]
    assert [Path(uri).name for uri in listed] == ["NOTES", "bad.jpg", "good.jpg"]
    *bad, good = storage.read_sources(listed, own=[""])
    assert good == b"good"
    for error in bad:
        assert isinstance(error, ImageError)
        assert error.code == "unreachable"
        assert "Input/output error" in str(error)
    (tmp_path / "good.jpg").unlink()  # now nothing can be read there
    with pytest.raises(StorageError, match="Input/output error"):
        list(storage.read_sources(listed[:1], own=[""]))
    with pytest.raises(StorageError, match="Input/output error"):
        list(storage.list_images(str(tmp_path), skip_others=True))


def test_nothing_is_tried_again_for_a_reader_that_has_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    failed = threading.Event()

    def read(uri: str, expected_bytes: int | None) -> bytes:
        if uri.endswith("/0"):
            return b"0"
        failed.set()
        raise TimeoutError("timed out")

    monkeypatch.setattr(reading, "_read_remote", read)
    reader = storage.read_sources([f"memory://gone/{i}" for i in range(40)], [1] * 40)
    assert next(reader) == b"0"
    failed.wait(30)
    started = time.monotonic()
    assert isinstance(reader, Generator)
    reader.close()
    assert time.monotonic() - started < 10  # and not five minutes


UNREACHABLE = ["http://127.0.0.1:1/a.jpg", "zip://a.jpg::http://127.0.0.1:1/x.zip", "http://no-such-host.invalid/a.jpg"]


@pytest.mark.slow
@pytest.mark.parametrize("uri", UNREACHABLE)
def test_the_host_of_a_few_images_that_is_down_is_rows(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outages, "_FIRST_CONTACT_S", 1.0)
    monkeypatch.setattr(outages, "FOREIGN_PATIENCE_S", 1.0)
    monkeypatch.setenv(outages.PATIENCE_VARIABLE, "2")
    storage.publish_bytes("memory://own/a.jpg", b"mine")
    own = {storage.storage_of("memory://own")}
    uris = [uri.replace("a.jpg", f"{i}.jpg") for i in range(50)]
    started = time.monotonic()
    *rows, mine = storage.read_sources([*uris, "memory://own/a.jpg"], own=own)
    assert time.monotonic() - started < 20
    assert {row.code if isinstance(row, ImageError) else "" for row in rows} == {"unreachable"}
    assert mine == b"mine"
    started = time.monotonic()
    (again,) = storage.read_sources(uris[:1], own=own)
    assert time.monotonic() - started < 0.5  # it is remembered
    assert isinstance(again, ImageError)
    assert "was given up" in str(again)
    write_manifest("memory://own/m.parquet", [uris[0], "a.jpg"])
    assert [bool(file.version) for file in storage.list_images("memory://own/m.parquet")] == [False, True]
    with pytest.raises(StorageError, match=r"the storage failed"):
        list(storage.list_images("memory://own/m.parquet", own={*own, storage.storage_of(uri)}))
    with pytest.raises(StorageError, match=r"the storage failed"):
        list(storage.read_sources(uris[:1], own={*own, storage.storage_of(uri)}))
    with pytest.raises(StorageError, match=r"the storage failed"):
        list(storage.read_sources(uris[:1]))


@pytest.mark.slow
@pytest.mark.parametrize(
    "answer", [(409, "Conflict"), (429, "TooManyRequests"), (500, "InternalError"), (200, "cut"), (404, "NoSuchBucket")]
)
def test_another_storage_that_fails_for_one_image_is_a_row(
    flaky: type[FlakyS3], answer: tuple[int, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outages, "FOREIGN_PATIENCE_S", 1.0)
    flaky.answers = [answer] * 1000
    (row,) = storage.read_sources(["s3://other/a.jpg"], [11], own={"s3://own"})
    assert isinstance(row, ImageError)
    assert row.code == "unreachable"
    assert "s3://other/a.jpg: the storage failed" in str(row)
    flaky.answers = []
    assert list(storage.read_sources(["s3://other/b.jpg"], [11], own={"s3://own"})) == [b"image bytes"]
    flaky.answers = [answer] * 1000
    monkeypatch.setenv(outages.PATIENCE_VARIABLE, "1")
    with pytest.raises(StorageError, match=r"s3://own/a.jpg: the storage failed"):
        list(storage.read_sources(["s3://own/a.jpg"], [11], own={"s3://own"}))


FILES = {f"{i:02}.jpg": b"%d" % i * 2000 for i in range(24)}


@pytest.fixture
def bucket(s3: S3Server, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.delenv(
        outages.PATIENCE_VARIABLE
    )  # `s3` has set one that six faults of one request in a row can outlast
    name = s3.new_bucket()
    storage.publish_bytes(f"{name}/begin", b"the keys work")
    return name


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_listing_reading_and_publishing_survive(bucket: str, proxy: FaultProxy, fault: Fault) -> None:
    proxy.inject(fault, times=8, every=3)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda item: storage.publish_bytes(f"{bucket}/out/{item[0]}", item[1]), FILES.items()))
    proxy.inject(None)
    listed = list(storage.list_images(f"{bucket}/out"))
    assert [file.uri for file in listed] == [f"{bucket}/out/{name}" for name in FILES]
    proxy.inject(fault, times=1)
    assert list(storage.list_images(f"{bucket}/out")) == listed
    proxy.inject(fault, times=8, every=3)
    uris, sizes = [file.uri for file in listed], [file.num_bytes for file in listed]
    assert list(storage.read_sources(uris, sizes)) == list(FILES.values())
    proxy.inject(fault, times=3)
    storage.delete(f"{bucket}/out")
    proxy.inject(fault, times=2)
    assert storage.list_names(bucket) == ["begin"]


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_claims_survive(bucket: str, proxy: FaultProxy, fault: Fault, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "HEARTBEAT_S", 0.2)
    proxy.inject(fault, times=6, every=2)
    with storage.claimed(f"{bucket}/out", "train") as claim:
        proxy.inject(fault, times=2)
        with pytest.raises(OutputClaimedError, match=r"held by `catdog train`"), storage.claimed(f"{bucket}/out", "x"):
            raise AssertionError("two runs hold one output")
        proxy.inject(fault, times=2)
        time.sleep(0.5)  # the claim is renewed
        claim.check()
        proxy.inject(fault, times=2)
    assert list_all_names(f"{bucket}/out") == []


@pytest.mark.slow
def test_what_a_storage_did_although_its_answer_came_too_late_is_not_undone(bucket: str, proxy: FaultProxy) -> None:
    s3_filesystems._filesystem.cache_clear()  # the client has not been told its time-out yet
    filesystems.filesystem(bucket)[0].config_kwargs["read_timeout"] = 1
    proxy.inject("late", times=1)
    storage.publish_bytes(f"{bucket}/a", b"whole")
    assert proxy.num_requests > 1
    assert storage.read_bytes(f"{bucket}/a") == b"whole"
    creating = proxy.expect("PUT /")
    proxy.inject("late", times=100, every=3)
    with storage.claimed(f"{bucket}/out", "predict") as claim:
        assert creating.is_set()
        claim.check()
    proxy.inject(None)
    assert list_all_names(f"{bucket}/out") == []
    s3_filesystems._filesystem.cache_clear()


@pytest.mark.slow
def test_a_run_that_ends_while_its_storage_is_down_does_not_wait_for_it(
    bucket: str, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(claims, "HEARTBEAT_S", 0.2)
    monkeypatch.setattr(claims, "_RELEASE_PATIENCE_S", 1.0)
    monkeypatch.setenv(outages.PATIENCE_VARIABLE, "60")
    with storage.claimed(f"{bucket}/out", "train"):
        proxy.go_down()
        time.sleep(1)  # the claim is being renewed
        started = time.monotonic()
    assert time.monotonic() - started < 10
    assert [record.message[:43] for record in caplog.records if record.levelname == "WARNING"] == [
        "The claim of the output could not be remove"
    ]


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["expired", "skew"])
@pytest.mark.parametrize("every", [1, 2])
def test_a_denial_that_tells_no_reason_is_not_blamed_on_the_file(
    bucket: str, proxy: FaultProxy, fault: Fault, every: int
) -> None:
    storage.publish_bytes(f"{bucket}/a", b"a")
    storage.publish_bytes(f"{bucket}/empty", b"")
    proxy.inject(fault, times=3, every=every)
    assert storage.exists(f"{bucket}/a")
    proxy.inject(fault, times=3, every=every)
    assert storage.exists(f"{bucket}/empty")
    proxy.inject(fault, times=3, every=every)
    assert not storage.exists(f"{bucket}/b")
    proxy.inject(fault, times=3, every=every)
    with storage.open_read(f"{bucket}/a") as file:
        proxy.inject(fault, times=3, every=every)
        assert file.read() == b"a"


@pytest.mark.slow
def test_a_worker_of_ray_trusts_the_address_and_the_keys_that_its_driver_has_used() -> None:
    import ray
    from ray_case import small_ray

    def trusts() -> tuple[bool, bool]:
        known = outages.known("s3://b")
        with ThreadPoolExecutor(1) as pool:  # as the threads that read ahead
            has_succeeded = pool.submit(lambda: known.has_succeeded).result()
        return has_succeeded, known.tried_s(time.monotonic() - 60, 300, is_unreachable=True) is None

    with small_ray(num_cpus=1):
        assert trusts() == (False, False)
        assert ray.get(ray.remote(trusts).remote()) == (True, True)


@pytest.mark.slow
def test_a_storage_that_goes_down_for_good_ends_within_the_patience(
    bucket: str, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(outages.PATIENCE_VARIABLE, "8")
    storage.publish_bytes(f"{bucket}/a.jpg", b"a")
    proxy.go_down()
    started = time.monotonic()
    with pytest.raises(StorageError, match=rf"^{bucket}/\S+: the storage failed(: | for \d+ s: )[^\n]+$") as ended:
        list(storage.read_sources([f"{bucket}/{i}.jpg" for i in range(100)], [1] * 100))
    took_s = time.monotonic() - started
    assert 7.9 < took_s < 30
    assert proxy.endpoint in str(ended.value)


@pytest.mark.slow
def test_a_throttling_storage_gets_fewer_requests_at_a_time(bucket: str, proxy: FaultProxy) -> None:
    for name, data in FILES.items():
        storage.publish_bytes(f"{bucket}/out/{name}", data)
    known = outages.known(bucket)
    uris = [f"{bucket}/out/{name}" for name in FILES]
    proxy.inject("503", times=30)
    assert list(storage.read_sources(uris, [2000] * len(uris))) == list(FILES.values())
    assert known.limit < outages.MAX_CONNECTIONS
    proxy.inject("slow", times=1000)
    proxy.count_anew()
    limit = known.limit
    assert list(storage.read_sources(uris, [2000] * len(uris))) == list(FILES.values())
    assert proxy.most_in_flight <= limit + len(uris) // 2
