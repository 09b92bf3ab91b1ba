"""The roles of `catdog bench serve`.

- `keras`: a server as people write it: FastAPI, a file of a form, Keras's own functions, `model.predict`. It runs until
  it is stopped.
- `clients`: so many clients, each of which sends one request after the other for so long. They speak HTTP with as
  little work as they can, for they share the cores with the server.
- `alone`: decoding and computing one image after the other, on one thread, by the path of `catdog serve`.
"""

from __future__ import annotations

import asyncio
import io
import itertools
import json
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from catdog import bundle, images
from catdog.bench import processes
from catdog.bench.processes import Settings
from catdog.engines import load_engine

BOUNDARY: Final = "7d1f3a0c5e"
LONGEST_S: Final = 600.0


def keras(settings: Settings) -> None:
    """Serve as tutorials do."""
    import uvicorn
    from fastapi import FastAPI, UploadFile
    from keras import saving, utils

    model = saving.load_model(settings["model"], compile=False)
    size = settings["image_size"]
    app = FastAPI()

    async def predict(file: UploadFile) -> dict[str, Any]:
        picture = utils.load_img(io.BytesIO(await file.read()), target_size=(size, size), interpolation="bilinear")
        batch = np.expand_dims(utils.img_to_array(picture), 0)
        prob_dog = float(model.predict(batch, verbose=0)[0, 0])
        return {"label": "dog" if prob_dog >= 0.5 else "cat", "prob_dog": prob_dog}

    predict.__annotations__["file"] = UploadFile  # FastAPI cannot look up what a function has imported
    app.post("/predict")(predict)
    uvicorn.run(app, host="127.0.0.1", port=settings["port"], log_level="warning")


def alone(settings: Settings) -> dict[str, float]:
    """Median seconds of each part of the work on one image."""
    model = bundle.load(settings["model"])
    engine = load_engine(model, num_parallel=1)
    decode_s, forward_s = [], []
    for data in _pictures(settings["pictures"]):
        started = time.perf_counter()
        pixels_HWC = images.decode(data, model.image_size).pixels_HWC
        decoded = time.perf_counter()
        engine.predict(pixels_HWC[np.newaxis])
        forward_s.append(time.perf_counter() - decoded)
        decode_s.append(decoded - started)
    return {"decode": statistics.median(decode_s), "forward": statistics.median(forward_s)}


def _pictures(directory: str) -> list[bytes]:
    return [path.read_bytes() for path in sorted(Path(directory).iterdir())]


def clients(settings: Settings) -> dict[str, Any]:
    """Ask, and note how long each answer took, and what the label of each image was."""
    requests = [_request(settings["path"], data) for data in _pictures(settings["pictures"])]
    return asyncio.run(_ask(settings["port"], requests, settings["num_clients"], settings["seconds"]))


def _request(path: str, data: bytes) -> bytes:
    """A request with one image as the file of a form, as browsers send it."""
    opening = (
        f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="file"; filename="image.jpg"\r\n'
        "Content-Type: image/jpeg\r\n\r\n"
    )
    body = opening.encode() + data + f"\r\n--{BOUNDARY}--\r\n".encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: multipart/form-data; boundary={BOUNDARY}\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


async def _ask(port: int, requests: Sequence[bytes], num_clients: int, seconds: float | None) -> dict[str, Any]:
    """Ask for so many seconds, or, if it is None, once for each image."""
    started = time.perf_counter()
    turns: Iterator[int] = iter(itertools.cycle(range(len(requests))) if seconds else range(len(requests)))
    latencies: list[float] = []
    labels: dict[int, str | None] = {}

    async def client() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for number in turns:
            asked = time.perf_counter()
            if seconds and asked > started + seconds:
                break
            writer.write(requests[number])
            status, answer = await _read_answer(reader)
            latencies.append(time.perf_counter() - asked)
            labels[number] = _label(answer) if status == 200 else None
            statuses.append(status)
        writer.close()
        await writer.wait_closed()

    statuses: list[int] = []
    async with asyncio.timeout(LONGEST_S):
        await asyncio.gather(*(client() for _ in range(num_clients)))
    return {
        "seconds": time.perf_counter() - started,
        "latencies_s": latencies,
        "num_errors": sum(status != 200 for status in statuses),
        "labels": [labels.get(number) for number in range(len(requests))],
    }


async def _read_answer(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    length = int(head.partition(b"content-length:")[2].partition(b"\r\n")[0])
    return int(head.split(b" ", 2)[1]), await reader.readexactly(length)


def _label(answer: bytes) -> str:
    document = json.loads(answer)
    label: str = document["predictions"][0]["label"] if "predictions" in document else document["label"]
    return label


if __name__ == "__main__":
    processes.main(keras, alone, clients)
