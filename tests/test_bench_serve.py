"""What `catdog bench serve` measures, on a few drawings: whether the figures are what they say, not what they are."""

from pathlib import Path

import pytest
from inference_case import encoded_drawings

from catdog import storage
from catdog.bench.serve import bench_serve
from catdog.bench.serve_record import CONTENDERS, NUM_CLIENTS
from catdog.config import BenchServeConfig
from catdog.errors import UsageError

pytestmark = pytest.mark.slow


def test_both_servers_are_asked_and_say_the_same(model: str, tmp_path: Path) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    drawings = encoded_drawings(6)
    for number, data in enumerate([*drawings, b"Dear cat,"]):
        (pictures / f"{number}.jpg").write_bytes(data)
    output = tmp_path / "bench"
    record = bench_serve(BenchServeConfig(images=str(pictures), output=str(output), model=model, rounds=1, seconds=0.5))
    assert storage.read_json(str(output / record.file_name)) == record.to_dict()
    assert record.num_images == len(drawings)
    assert record.agreement >= 0.5  # a network that nobody trained is never sure, and Keras's pixels are others
    (measured,) = record.rounds
    for name in CONTENDERS:
        for num_clients in NUM_CLIENTS:
            load = measured[name][str(num_clients)]
            assert load.num_errors == 0
            assert load.num_answers >= num_clients
            assert 0 < load.p50_ms <= load.p99_ms
    for clients, ratio in record.ratios.items():
        ours, theirs = (measured[name][clients].images_per_s for name in CONTENDERS)
        assert ratio.median == pytest.approx(ours / theirs)
    alone_ms = sum(each.median for each in record.alone_ms.values())
    assert record.overhead_ms.median == pytest.approx(measured["catdog"]["1"].p50_ms - alone_ms)
    assert record.summary()[-1] == f"Bench: {output}"


def test_images_of_which_none_can_be_labelled_are_refused(model: str, tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"Dear cat,")
    with pytest.raises(UsageError, match=r"^--images must hold an image that can be labelled\. Received: --images="):
        bench_serve(BenchServeConfig(images=str(tmp_path / "a.jpg"), output=str(tmp_path / "bench"), model=model))
