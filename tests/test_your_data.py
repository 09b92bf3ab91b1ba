"""README's table "Your data": each command does what it says with data of that form. And what comes of a dataset."""

import csv
import io
import json
import shlex
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from inference_case import encoded_drawings, rows_of
from s3_server import S3Server, ray_that_finds
from test_documentation import README, codes, table
from test_storage_inventory import write_inventory
from test_storage_tars import PACKERS, make_tar

from catdog import cli, storage
from catdog.config import EvaluateConfig, PredictConfig, TrainConfig
from catdog.dataset import load_info
from catdog.evaluation import evaluate
from catdog.inference import predict
from catdog.schema import CLASS_NAMES
from catdog.training import train

pytest_plugins = ["s3_server"]
pytestmark = pytest.mark.slow

NUM: int = 24
"""Photographs, every other one a dog: enough for three splits with both classes."""

PICTURES = encoded_drawings(NUM)
NAMES = [f"{CLASS_NAMES[number % 2]}.{number}.jpg" for number in range(NUM)]
LABELS = [number % 2 for number in range(NUM)]
FILES = dict(zip(NAMES, PICTURES, strict=True))

COMMANDS = [codes(cells[-1])[0] for cells in table(README, "what you have")]


def zipped(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def write(files: dict[str, bytes], root: str = ".") -> None:
    for name, data in files.items():
        storage.publish_bytes(storage.join(storage.absolute(root), name), data)


def by_class(folders: tuple[str, str]) -> dict[str, bytes]:
    return {f"{folders[label]}/{name}": data for label, (name, data) in zip(LABELS, FILES.items(), strict=True)}


def table_of(path: str, header: str, names: list[str], labels: list[object]) -> None:
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([header.split(","), *zip(names, labels, strict=True)])


def camera() -> None:
    import pillow_heif
    from PIL import Image

    heic = io.BytesIO()
    pillow_heif.from_pillow(Image.open(io.BytesIO(PICTURES[0]))).save(heic)
    photographs = {f"100APPLE/IMG_{number:04}.JPG": data for number, data in enumerate(PICTURES[1:])}
    others = {"Thumbs.db": b"\xd0\xcf\x11\xe0", ".DS_Store": b"x", "IMG_1.MOV": b"\0\0\0\x14ftypqt  ", "1.AAE": b"<x/>"}
    write({**photographs, "100APPLE/IMG_9999.HEIC": heic.getvalue(), **others}, "DCIM")


def tutorial() -> None:
    for number, (name, data) in enumerate(FILES.items()):
        split = "validation" if number % 4 < 2 else "train"
        write({f"{split}/{CLASS_NAMES[LABELS[number]]}s/{name}": data}, "cats_and_dogs_filtered")


def kaggle() -> None:
    train = zipped({f"train/{name}": data for name, data in FILES.items()})
    inner = {
        "test1.zip": zipped({"test1/1.jpg": PICTURES[0]}),
        "train.zip": train,
        "sampleSubmission.csv": b"id,label\n",
    }
    write({"dogs-vs-cats.zip": zipped(inner)})


def webdataset() -> None:
    samples = [
        {f"{number:06}.jpg": PICTURES[number], f"{number:06}.cls": b"%d" % LABELS[number]} for number in range(NUM)
    ]
    for shard in range(2):
        files = {name: data for sample in samples[shard::2] for name, data in sample.items()}
        write({f"shards/pets-{shard:06}.tar": make_tar(files)})


def hugging_face() -> None:
    images = [{"bytes": data, "path": name} for name, data in FILES.items()]
    features = {"label": {"_type": "ClassLabel", "names": ["cat", "dog"]}, "image": {"_type": "Image"}}
    rows = pa.table({"image": images, "label": LABELS})
    rows = rows.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    Path("huggingface/data").mkdir(parents=True)
    pq.write_table(rows, "huggingface/data/train-00000-of-00001.parquet")
    write({"README.md": b"---\n", ".gitattributes": b"*.parquet\n"}, "huggingface")


def names_in(folder: str, header: str, table_name: str, labels: list[object], *, stem: bool = False) -> None:
    plain = {f"{number}.jpg": data for number, data in enumerate(PICTURES)}
    write(plain, folder)
    table_of(table_name, header, [Path(name).stem if stem else name for name in plain], labels)


def text_file() -> None:
    write(FILES, "somewhere")
    Path("list.txt").write_text("".join(f"somewhere/{name}\n" for name in NAMES))


def manifest() -> None:
    write(FILES, "pictures")
    table_of("pets.csv", "path,label", [f"pictures/{name}" for name in NAMES], WORDS)


WORDS: list[object] = [CLASS_NAMES[label].upper() for label in LABELS]

FORMS: dict[str, Callable[[], object]] = {
    "DCIM": camera,
    "list.txt": text_file,
    "PetImages": lambda: write({**by_class(("Cat", "Dog")), "Cat/Thumbs.db": b"x", "readme.txt": b"x"}, "PetImages"),
    "cats_and_dogs_filtered": tutorial,
    "animals": lambda: write(by_class(("Katzen", "n02084071/Hund")), "animals"),
    "cats.zip": lambda: write(
        {
            "cats.zip": zipped({name: data for name, data in FILES.items() if name.startswith("cat")}),
            "dogs.tgz": PACKERS["tgz"](make_tar({f"./d/{n}": d for n, d in FILES.items() if n.startswith("dog")})),
        }
    ),
    "dogs-vs-cats.zip": kaggle,
    "shards/pets-{000000..000001}.tar": webdataset,
    "huggingface": hugging_face,
    "pets.csv": manifest,
    "train": lambda: names_in("train", "id,label", "train_labels.csv", list(LABELS), stem=True),
    "photos": lambda: names_in("photos", "photo,animal", "animals.csv", WORDS),
}
"""What `--images` is in README → what makes the data there, in the working directory."""


@pytest.fixture(scope="module")
def ray(s3_process: S3Server) -> Iterator[None]:
    """One embedded Ray for the module."""
    with ray_that_finds(s3_process):
        yield


def in_bucket(args: list[str], bucket: str) -> list[str]:
    """The command with this bucket in place of README's, which holds what the command is about."""
    files = {f"new/{name}": data for name, data in FILES.items()}
    write(files, bucket)
    args = [arg.replace("s3://bucket", bucket) for arg in args]
    if args[2].endswith("manifest.json"):
        write_inventory(bucket, args[2], "CSV", list(storage.list_images(f"{bucket}/new")))
    return args


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: shlex.split(command)[3])
def test_each_command_of_the_table(
    command: str,
    ray: None,
    s3_process: S3Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    args = shlex.split(command)[1:]
    if "s3://" in command:
        args = in_bucket(args, s3_process.new_bucket())
    else:
        FORMS[args[2]]()
    assert cli.main([*args, *(["--executor", "inline"] if args[0] == "predict" else []), "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    if args[0] == "predict":
        assert (record["books"]["ok"], record["books"]["error"]) == (NUM, 0)
        return
    assert record["kept"] == NUM
    kept = [counts for split in record["counts"].values() for counts in split.values()]
    assert all(kept), "a split lacks a class"
    assert sum(split["dog"] for split in record["counts"].values()) == NUM // 2


def test_every_form_is_in_the_table() -> None:
    assert {shlex.split(command)[3] for command in COMMANDS if "s3://" not in command} == FORMS.keys()


TRAINED_WITH = ["dogs-vs-cats.zip", "shards/pets-{000000..000001}.tar", "huggingface", "cats_and_dogs_filtered"]
"""Forms whose datasets are compared with each other, evaluated and predicted."""


@pytest.fixture(scope="module")
def datasets(ray: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Form → the directory with its data, and the dataset made of it."""
    found = {}
    for images in TRAINED_WITH:
        command = next(each for each in COMMANDS if shlex.split(each)[3] == images)
        found[images] = tmp_path_factory.mktemp("form")
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(found[images])
            FORMS[images]()
            assert cli.main([*shlex.split(command)[1:], "--json"]) == 0
    return found


@pytest.fixture(scope="module")
def trained(datasets: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model that has learned, for an epoch, from the pictures in Kaggle's form."""
    url = str(tmp_path_factory.mktemp("trained") / "model")
    data = str(datasets[TRAINED_WITH[0]] / "data")
    train(TrainConfig(data=data, output=url, arch="cnn", image_size=64, epochs=1, batch_size=4, num_workers=1))
    return url


@pytest.mark.parametrize("images", TRAINED_WITH)
def test_each_form_from_beginning_to_end(
    images: str, datasets: dict[str, Path], trained: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(datasets[images])
    info = load_info("data")
    if images == "cats_and_dogs_filtered":
        assert info.raw["given_splits"] == {"train": NUM // 2, "val": NUM // 2}
    else:  # the same pictures, wherever they lay
        assert info.digest == load_info(str(datasets[TRAINED_WITH[0]] / "data")).digest
    record = evaluate(EvaluateConfig(data="data", model=trained, output=str(tmp_path / "evaluation")))
    assert record.num_images == sum(info.counts["test"].values())
    exclude = ("test1.zip",) if images.endswith(".zip") else ()
    config = PredictConfig(
        images=images, exclude=exclude, model=trained, output=str(tmp_path / "out"), executor="inline"
    )
    assert predict(config).books.ok == NUM
    rows = rows_of(tmp_path / "out").to_pylist()
    assert len({row["image_id"] for row in rows}) == len({row["uri"] for row in rows}) == NUM
