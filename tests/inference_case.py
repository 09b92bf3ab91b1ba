"""What the tests of bulk prediction share: a small model, photographs, and reading an output back."""

import contextlib
import dataclasses
import io
import os
import signal
import socket
import socketserver
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from catdog import bundle, drawings, storage
from catdog.architectures import LOGITS_LAYER, build_model, exported
from catdog.bundle import Arithmetic
from catdog.engines import Outputs
from catdog.inference.work import Job
from catdog.schema import CLASS_NAMES

SIZE_PX = 48
REVIEW_THRESHOLD = 0.7


def save_model(url: str, seed: int = 0) -> str:
    """A small network that nobody trained: what it says means nothing, but every picture gets another answer."""
    import keras

    keras.utils.set_random_seed(seed)
    model = build_model("resnet", SIZE_PX)
    logits = model.get_layer(LOGITS_LAYER)
    logits.set_weights([weights * 20 for weights in logits.get_weights()])
    bundle.save(
        url,
        exported(model, "resnet"),
        {"image_size": SIZE_PX, "temperature": 1.5, "review_threshold": REVIEW_THRESHOLD},
    )
    return url


class Says:
    """An engine that gives these logits and scores, whatever it is shown."""

    name = "says"
    arithmetic: Arithmetic = "float32"

    def __init__(self, *logits: float, scores: Sequence[float] | None = None) -> None:
        self.logits_B = np.array(logits, np.float32)
        self.scores_B = None if scores is None else np.array(scores, np.float32)

    def predict(self, images_BHWC: npt.NDArray[np.uint8]) -> Outputs:
        return Outputs(self.logits_B, self.scores_B)


def job_of(output: Path | str, model: str, claim: storage.Claim, **changes: Any) -> Job:
    """What a worker is told that labels with a model while `claim` holds the output."""
    job = Job(
        model=model,
        model_id=bundle.read_card(model)[1],
        output=str(output),
        claim_url=claim.url,
        claim_owner=storage.read_json(claim.url)["owner"],
        roots=(),
        own=("",),
        is_after_death=False,
        run_id="run",
        batch_size=8,
        engine="auto",
        use_gpu=False,
    )
    return dataclasses.replace(job, **changes)


def encoded_drawings(num: int) -> list[bytes]:
    """So many JPEG files, no two the same."""
    pictures = []
    for index in range(num):
        buffer = io.BytesIO()
        drawings.draw(CLASS_NAMES[index % 2], (11, index)).save(buffer, "JPEG", quality=85)
        pictures.append(buffer.getvalue())
    return pictures


def photographs(directory: Path, num_photos: int) -> Path:
    """A folder of pictures, `000.jpg` and so on, and four files that are no usable image."""
    directory.mkdir(parents=True)
    for number, picture in enumerate(encoded_drawings(num_photos)):
        (directory / f"{number:03}.jpg").write_bytes(picture)
    (directory / "cut.jpg").write_bytes((directory / "000.jpg").read_bytes()[:1000])
    (directory / "empty.jpg").write_bytes(b"")
    (directory / "gone.jpg").symlink_to("nowhere.jpg")
    (directory / "letter.jpg").write_text("Dear cat,")
    return directory


def archive(path: Path, num_members: int) -> Path:
    """A zip of so many pictures, among which a few come again and again: enough to be killed amid."""
    pictures = encoded_drawings(20)
    with zipfile.ZipFile(path, "w") as opened:
        for number in range(num_members):
            opened.writestr(f"train/{number:05}.jpg", pictures[number % len(pictures)])
    return path


def rows_of(output: Path | str) -> pa.Table:
    """All rows of a local output as a plain Parquet reader sees them, by uri."""
    tables = [pq.read_table(path) for path in sorted(Path(output).glob("part-*.parquet"))]
    # Files of an earlier version lack columns.
    return pa.concat_tables(tables, promote_options="default").sort_by("uri")


def answers(output: Path | str) -> list[dict[str, Any]]:
    """Rows less what differs from run to run."""
    rows: list[dict[str, Any]] = rows_of(output).drop_columns(["run_id", "predicted_at"]).to_pylist()
    return rows


def kill_after_first_part(command: str, output: Path, *, victim: Callable[[int], int] = lambda pid: pid) -> None:
    """Run Python code as a process, and kill it, or `victim` of its id, when the first part is there.

    Raises:
        RuntimeError: it ended by itself.
    """
    process = subprocess.Popen([sys.executable, "-c", command], stdout=subprocess.DEVNULL)
    try:
        while not list(output.glob("part-*.parquet")):
            if process.poll() is not None:
                raise RuntimeError(f"the process ended by itself with exit code {process.returncode}")
            time.sleep(0.005)
        os.kill(victim(process.pid), signal.SIGKILL)
    finally:
        process.kill()
        process.wait()
    if list(output.glob("_runs/*.json")):
        raise RuntimeError("the process had finished")


def descendants(pid: int) -> dict[int, str]:
    """Living processes that a process started, and those that they started: id → command line (Linux)."""
    parents, lines = {}, {}
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            process = int(entry.name)
            parents[process] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            lines[process] = (entry / "cmdline").read_text().replace("\0", " ")

    def descends(process: int) -> bool:
        return process in parents and (parents[process] == pid or descends(parents[process]))

    return {process: line for process, line in lines.items() if descends(process)}


def is_alive(pid: int) -> bool:
    """Whether a process runs: it is neither gone nor a zombie (Linux)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


class Relay(socketserver.ThreadingTCPServer):
    """Passes connections on to a server until it is closed: a network that can go down and come back."""

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, target: tuple[str, int], port: int = 0) -> None:
        self.target = target
        self.open: list[socket.socket] = []
        self.num_bytes = 0
        super().__init__(("127.0.0.1", port), _RelayHandler)
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def go_down(self) -> None:
        self.shutdown()
        self.server_close()
        for connection in self.open:
            _cut(connection)


def _cut(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
    connection.close()


class _RelayHandler(socketserver.BaseRequestHandler):
    server: Relay

    def handle(self) -> None:
        upstream = socket.create_connection(self.server.target)
        self.server.open += [self.request, upstream]
        back = threading.Thread(target=self._pass_on, args=(upstream, self.request), daemon=True)
        back.start()
        self._pass_on(self.request, upstream)
        back.join()

    def _pass_on(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                self.server.num_bytes += len(data)
                target.sendall(data)
        _cut(target)
