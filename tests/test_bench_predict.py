"""What `catdog bench predict` measures, on a few drawings: whether the figures are what they say, not what they are."""

import json
import signal
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
from inference_case import encoded_drawings

from catdog import hardware, storage
from catdog.bench import folders, limit, peers, predict, predict_record, tree
from catdog.bench.predict_record import Measurement
from catdog.bench.rounds import spread
from catdog.config import BenchPredictConfig
from catdog.errors import CatdogError, OutputRefusedError, UsageError

NUM_IMAGES = 20


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("pictures")
    for number, picture in enumerate(encoded_drawings(NUM_IMAGES)):
        (directory / f"{number:03}.jpg").write_bytes(picture)
    return directory


def measurement(images_per_s: float) -> Measurement:
    return Measurement(
        seconds=100 / images_per_s,
        images_per_s=images_per_s,
        cpu_s_per_1000_images=50.0,
        peak_memory_bytes=2**30,
        num_rows=100,
    )


def test_the_ratios_are_of_the_same_round() -> None:
    rounds = [
        {name: measurement(speed) for name, speed in speeds.items()}
        for speeds in (
            {"inline": 30.0, "ray": 20.0, "keras-32": 10.0},
            {"inline": 10.0, "ray": 10.0, "keras-32": 5.0},
            {"inline": 30.0, "ray": 10.0, "keras-32": 12.0},
        )
    ]
    found = predict_record.ratios(rounds)
    assert {ours: list(each) for ours, each in found.items()} == {
        "inline": ["ray", "keras-32"],
        "ray": ["inline", "keras-32"],
    }
    assert str(found["inline"]["keras-32"]) == "2.50 (2.00 to 3.00)"
    assert str(found["inline"]["ray"]) == "1.50 (1.00 to 3.00)"


def test_a_tree_of_processes_is_measured_as_a_whole(tmp_path: Path) -> None:
    """The parent sleeps while a child of its child works, and holds memory."""
    work = (
        "data = bytearray(100 * 2**20); import time; end = time.process_time() + 1\nwhile time.process_time() < end: 0"
    )
    inner = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {work!r}])"
    outer = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {inner!r}]); print('the end')"
    usage = tree.measure([sys.executable, "-c", outer], tmp_path / "log")
    assert (usage.exit_code, usage.log_tail) == (0, "the end")
    assert 1 <= usage.cpu_s <= 1 + usage.wall_s
    assert usage.peak_memory_bytes > 100 * 2**20


def test_what_a_command_leaves_behind_is_counted_and_stopped(tmp_path: Path) -> None:
    left = "import os, time\nopen('pid', 'w').write(str(os.getpid()))\nwhile True: time.sleep(0.01)"
    outer = (
        "import os, subprocess, sys, time\n"
        f"subprocess.Popen([sys.executable, '-c', {left!r}], start_new_session=True)\n"
        "while not (os.path.exists('pid') and open('pid').read()): time.sleep(0.01)\n"
        "time.sleep(0.5)"
    )
    command = [sys.executable, "-c", f"import os; os.chdir({str(tmp_path)!r})\n{outer}"]
    assert tree.measure(command, tmp_path / "log").exit_code == 0
    pid = int((tmp_path / "pid").read_text())
    assert pid not in tree._stats()


def test_a_command_that_takes_too_long_is_killed(tmp_path: Path) -> None:
    usage = tree.measure([sys.executable, "-c", "import time; time.sleep(600)"], tmp_path / "log", timeout_s=0.5)
    assert usage.exit_code == -signal.SIGKILL


def test_an_interrupted_measurement_ends_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen[bytes]] = []

    def watch(process: subprocess.Popen[bytes], *_rest: object) -> None:
        started.append(process)
        raise KeyboardInterrupt

    monkeypatch.setattr(tree, "_watch", watch)
    with pytest.raises(KeyboardInterrupt):
        tree.measure([sys.executable, "-c", "import time; time.sleep(600)"], tmp_path / "log")
    assert started[0].returncode == -signal.SIGTERM


def test_a_peer_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "NEEDS", {"daft": ("no_such_package",)})
    assert peers.missing("daft") == ["no_such_package"]
    assert peers.missing("keras") == []
    assert peers.versions() == {}


def test_the_peers_get_every_image_as_a_file(tmp_path: Path, pictures: Path) -> None:
    path = tmp_path / "pictures.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for picture in sorted(pictures.iterdir())[:3]:
            archive.write(picture, f"train/{picture.name}")
    files = list(storage.list_images(str(path)))
    uris = folders.write_pictures(files, str(tmp_path / "folder"))
    assert list(uris) == ["00000000.jpg", "00000001.jpg", "00000002.jpg"]
    assert [uri.partition("::")[0] for uri in uris.values()] == [f"zip://train/00{number}.jpg" for number in range(3)]
    assert [(tmp_path / "folder" / name).read_bytes() for name in uris] == [
        (pictures / f"00{number}.jpg").read_bytes() for number in range(3)
    ]


@pytest.mark.slow
def test_the_limit_has_every_part(pictures: Path, model: str) -> None:
    (pictures / "letter.jpg").write_text("Dear cat,")
    try:
        seconds = limit.limit({"images": str(pictures), "model": model})
    finally:
        (pictures / "letter.jpg").unlink()
    assert list(seconds) == list(limit.PARTS)
    assert all(each > 0 for each in seconds.values())


@pytest.mark.slow
def test_what_cannot_be_measured_is_refused(tmp_path: Path, pictures: Path, model: str) -> None:
    (tmp_path / "few").mkdir()
    (tmp_path / "few" / "cat.jpg").write_bytes((pictures / "000.jpg").read_bytes())
    config = BenchPredictConfig(images=str(tmp_path / "few"), output=str(tmp_path / "output"), model=model)
    with pytest.raises(UsageError, match=r"^--images must hold at least 10 images\. Received: 1 in "):
        predict.bench_predict(config)
    assert not (tmp_path / "output").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "predict.json").write_text('{"mine": 1}')
    config = BenchPredictConfig(images=str(pictures), output=str(tmp_path / "mine"), model=model)
    with pytest.raises(OutputRefusedError, match=r"^--output must be empty"):
        predict.bench_predict(config)


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Contenders that take no time. By name: the label that one gives every image, or its error; default: cat."""
    says: dict[str, Any] = {}
    said: list[str] = []

    def run(bench: Any, name: str, contender: Any) -> Any:
        is_fifth = contender is bench._fifths.get(name)
        files = bench._files[: bench._num_fifth] if is_fifth else bench._files
        said.append(f"fifth {name}" if is_fifth else name)
        label = says.get(name, "cat")
        if isinstance(label, Exception):
            raise label
        names = [file.uri for file in files] if name in predict_record.OURS else list(bench._uris)
        rows = dict.fromkeys(names, (label,))
        usage = tree.Usage(
            exit_code=0,
            wall_s=1.0 if is_fifth else 5.0,
            started_at=0.0,
            cpu_s=4.0,
            peak_memory_bytes=2**30,
            log_tail="",
        )
        if name == "keras-64":
            rows.popitem()
        return usage, rows

    monkeypatch.setattr(predict._Bench, "_run", run)
    monkeypatch.setattr(
        predict._Bench, "_measure_limit", lambda bench: bench.parts.append(dict.fromkeys(limit.PARTS, 0.1))
    )
    monkeypatch.setattr(hardware, "num_cores", lambda: 3)
    monkeypatch.setattr(peers, "missing", lambda name: ["daft"] if name == "daft" else [])
    says["said"] = said
    return says


@pytest.mark.slow
def test_figures_are_refused_of_who_does_not_label_all(
    tmp_path: Path, pictures: Path, model: str, pretended: dict[str, Any]
) -> None:
    pretended["ray-docs"] = CatdogError("it is raining")
    pretended["keras-32"] = "dog"
    config = BenchPredictConfig(images=str(pictures), output=str(tmp_path / "o"), model=model, rounds=2)
    record = predict.bench_predict(config)
    assert record.to_dict() == json.loads((tmp_path / "o" / "predict.json").read_text())
    assert (tmp_path / "o" / "predict.png").read_bytes().startswith(b"\x89PNG")
    assert record.refused == {
        "keras-64": "it must label all of 20 images. Received: 19 rows",
        "ray-docs": "it is raining",
    }
    assert record.skipped["daft"] == "daft not installed"
    assert [list(each) for each in record.rounds] == [["inline", "ray", *record.agreement]] * 2
    assert record.agreement["keras-32"] == 0
    assert record.ratios["inline"]["keras-32"].median == 1
    # 16 images in the 4 seconds that the longer run takes longer; three cores, of which each takes 0.3 s per image.
    assert record.limit_images_per_s.median == pytest.approx(10)
    assert record.steady_images_per_s == dict.fromkeys(("inline", "ray"), spread([4.0]))
    assert record.steady_share_of_limit["ray"].median == pytest.approx(0.4)
    said: list[str] = pretended["said"]
    assert said.count("ray-docs") == said.count("keras-64") == 1
    assert (said[0], said[-1]) == ("fifth inline", "fifth inline")
    lines = record.summary()
    assert lines[0].startswith("Labelled 20 images at 48 px, 2 times with every contender, in ")
    assert "  steady inline        4.0 images/s, 40.0 % (40.0 to 40.0) of the limit" in lines
    assert "  steady ray           4.0 images/s, 40.0 % (40.0 to 40.0) of the limit" in lines
    assert "  ray-docs       refused: it is raining" in lines
    assert lines[-1] == f"Bench: {tmp_path / 'o'}"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("says", "message"),
    [
        ("dog", r"^every run must say the same of all of 20 images\. Received: 20 rows of ray, of which 20 differ$"),
        (CatdogError("no cluster"), "^no cluster$"),
    ],
)
def test_ours_must_say_the_same_on_every_executor(
    tmp_path: Path, pictures: Path, model: str, pretended: dict[str, Any], says: Any, message: str
) -> None:
    pretended["ray"] = says
    config = BenchPredictConfig(images=str(pictures), output=str(tmp_path / "o"), model=model)
    with pytest.raises(CatdogError, match=message):
        predict.bench_predict(config)
    assert not (tmp_path / "o").exists()


@pytest.mark.slow
def test_real_contenders_label_the_same_images(tmp_path: Path, pictures: Path, model: str) -> None:
    config = BenchPredictConfig(images=str(pictures), output=str(tmp_path / "o"), model=model, rounds=2)
    record = predict.bench_predict(config)
    assert record.refused == {}
    assert set(record.rounds[0]) >= {"inline", "ray", "keras-32", "keras-64", "ray-docs"}
    for a_round in record.rounds:
        assert {each.num_rows for each in a_round.values()} == {NUM_IMAGES}
        assert all(each.cpu_s_per_1000_images > 0 for each in a_round.values())
        assert all(each.peak_memory_bytes > 2**26 for each in a_round.values())
    assert sum(record.engines.values()) > 0
    assert all(0 <= share <= 1 for share in record.agreement.values())
    assert len(record.fifth_seconds) == 2
