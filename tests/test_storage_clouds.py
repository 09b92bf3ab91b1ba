"""Google Cloud Storage and Azure Blob Storage, on their emulators.

`pip install gcsfs gcp-storage-emulator` and `pip install adlfs`, `npm install --global azurite` bring what is needed.
gcsfs must be of a release that goes with the fsspec that is installed.
"""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence

import pytest
from inference_case import encoded_drawings
from storage_case import image_error

from catdog import storage
from catdog.config import PredictConfig
from catdog.errors import StorageError
from catdog.inference import predict
from catdog.storage import outages

pytestmark = pytest.mark.slow

ACCOUNT = "devstoreaccount1"
KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
"""What every Azurite takes. They are no secret."""


@contextlib.contextmanager
def emulator(command: Sequence[str], port: int) -> Iterator[None]:
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            deadline = time.monotonic() + 60
            while time.monotonic() < deadline and process.poll() is None:
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                    break
                time.sleep(0.1)
            yield
        finally:
            process.terminate()


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


@pytest.fixture(scope="module")
def google() -> Iterator[dict[str, str]]:
    pytest.importorskip("gcsfs", reason="gcsfs is not installed")
    pytest.importorskip("gcp_storage_emulator", reason="gcp-storage-emulator is not installed")
    port = free_port()
    options = ["start", "--host", "127.0.0.1", "--port", str(port), "--in-memory", "--default-bucket", "catdog"]
    with emulator([sys.executable, "-m", "gcp_storage_emulator", *options], port):
        yield {"STORAGE_EMULATOR_HOST": f"http://127.0.0.1:{port}", "root": "gs://catdog"}


@pytest.fixture(scope="module")
def azure() -> Iterator[dict[str, str]]:
    adlfs = pytest.importorskip("adlfs", reason="adlfs is not installed")
    if (program := shutil.which("azurite-blob")) is None:
        pytest.skip("azurite-blob is not on PATH: npm install --global azurite")
    port = free_port()
    options = ["--blobPort", str(port), "--inMemoryPersistence", "--skipApiVersionCheck", "--silent"]
    endpoint = f"http://127.0.0.1:{port}/{ACCOUNT}"
    text = f"DefaultEndpointsProtocol=http;AccountName={ACCOUNT};AccountKey={KEY};BlobEndpoint={endpoint};"
    with emulator([program, *options, "--disableTelemetry"], port):
        adlfs.AzureBlobFileSystem(connection_string=text).mkdir("catdog")
        yield {"AZURE_STORAGE_CONNECTION_STRING": text, "root": "abfs://catdog"}


@pytest.fixture(params=["google", "azure"])
def root(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    settings: dict[str, str] = dict(request.getfixturevalue(request.param))
    place = settings.pop("root")
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("CATDOG_STORAGE_PATIENCE_S", "5")
    outages.forget_all()
    return f"{place}/{os.urandom(4).hex()}"


@pytest.mark.filterwarnings("ignore")
def test_predict_from_end_to_end(root: str) -> None:
    photographs = encoded_drawings(3)
    for number, name in enumerate(["a.jpg", "d/b c+d%20e.jpg", "d/é.jpg"]):
        storage.publish_bytes(f"{root}/photos/{name}", photographs[number])
    config = PredictConfig(images=f"{root}/photos", output=f"{root}/out")
    first = predict(config)
    assert first.books.ok == 3
    parts = storage.list_names(f"{root}/out", ".parquet")
    assert sum(len(storage.read_parquet(f"{root}/out/{part}")) for part in parts) == 3
    storage.publish_bytes(f"{root}/photos/a.jpg", photographs[2])
    again = predict(config)
    assert (again.books.ok, again.books.already_done) == (1, 2)


@pytest.mark.filterwarnings("ignore")
def test_what_is_not_there(root: str) -> None:
    assert image_error(f"{root}/missing.jpg").code == "not_found"
    assert not storage.exists(f"{root}/missing")
    with (
        pytest.raises(StorageError),
        storage.claimed("gs://no-such-bucket/x" if "gs:" in root else "abfs://no-such/x", "p"),
    ):
        pass
