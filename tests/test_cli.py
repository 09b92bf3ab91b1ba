"""The command line: what it prints, what it exits with, and how little it needs to answer."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Literal, NoReturn

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from catdog import __version__, cli, drawings
from catdog.config import BenchChaosConfig, PredictConfig, flag
from catdog.config.labelling import VerifyConfig
from catdog.errors import StorageError

PROJECT = Path(__file__).resolve().parents[1]
JOBS = ["prepare", "train", "evaluate", "predict", "verify"]


def fails(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str]:
    """Run a command line that must fail: its exit code and its one line."""
    exit_code = cli.main(args)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("error: ")
    return exit_code, err.removeprefix("error: ").rstrip("\n")


def helps(args: list[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(args)
    assert stopped.value.code == 0


def unwrapped(text: str) -> str:
    return " ".join(text.split())


COMMANDS = (
    "catdog must be given one of the commands demo, prepare, train, tune, evaluate, predict, serve, convert, verify, "
    "compact, compare, bench train, bench chaos, bench nightly-chaos, bench plan, bench predict, bench serve, "
    "bench startup. Received: "
)
BENCH = (
    "catdog bench must be given one of the commands train, chaos, nightly-chaos, plan, predict, serve, startup. "
    "Received: "
)
TRAIN = "train --data d --output o "


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", COMMANDS + "nothing"),
        ("label", COMMANDS + "label"),
        ("--dry-run", COMMANDS + "--dry-run"),
        ("bench", BENCH + "nothing"),
        ("bench label", BENCH + "label"),
        ("bench --data d", BENCH + "--data d"),
        ("bench predict", "catdog bench predict needs --images and --output. Received: catdog bench predict"),
        ("bench startup", "catdog bench startup needs --output. Received: catdog bench startup"),
        ("convert --data d", "catdog convert needs MODEL. Received: catdog convert --data d"),
        (
            "predict --images i --output o --engine onnx",
            "--engine must be one of auto, openvino, openvino-float, tensorflow. Received: --engine=onnx",
        ),
        ("bench train", "catdog bench train needs --data and --output. Received: catdog bench train"),
        (
            "bench chaos --foo",
            "catdog bench chaos takes only the flags that catdog bench chaos --help lists. Received: --foo",
        ),
        ("bench chaos --data d --output o --num-kills x", "--num-kills must be an integer. Received: --num-kills=x"),
        (
            "bench chaos --data d --output o --num-kills 0",
            "--num-kills must be at least 1. Received: --num-kills=0",
        ),
        ("train", "catdog train needs --data and --output. Received: catdog train"),
        ("predict --images i", "catdog predict needs --output. Received: catdog predict --images i"),
        ("verify", "catdog verify needs OUTPUT. Received: catdog verify"),
        ("verify --json", "catdog verify needs OUTPUT. Received: catdog verify --json"),
        ("verify o p", "catdog verify takes only the flags that catdog verify --help lists. Received: p"),
        (
            "verify --output o",
            "catdog verify takes only the flags that catdog verify --help lists. Received: --output",
        ),
        ("train --data", "--data needs a value. Received: catdog train --data"),
        (TRAIN + "--foo", "catdog train takes only the flags that catdog train --help lists. Received: --foo"),
        (TRAIN + "--foo 3", "catdog train takes only the flags that catdog train --help lists. Received: --foo 3"),
        ("train --dta d", "catdog train takes only the flags that catdog train --help lists. Received: --dta d"),
        ("train --dat d", "catdog train takes only the flags that catdog train --help lists. Received: --dat d"),
        (TRAIN + "--no-json", "catdog train takes only the flags that catdog train --help lists. Received: --no-json"),
        (TRAIN + "--json=yes", "--json takes no value. Received: catdog train --data d --output o --json=yes"),
        (TRAIN + "--help=data", "-h/--help takes no value. Received: catdog train --data d --output o --help=data"),
        (TRAIN + "--data=e", "--data must be given once. Received: --data=d --data=e"),
        (
            TRAIN + "--batch-size 8 --batch_size=9",
            "--batch-size must be given once. Received: --batch-size=8 --batch-size=9",
        ),
        (TRAIN + "--verbose --verbose", "--verbose must be given once. Received: --verbose --verbose"),
        (TRAIN + "--no-augment --augment", "--augment must be given once. Received: --no-augment --augment"),
        (TRAIN + "extra", "catdog train takes only the flags that catdog train --help lists. Received: extra"),
        (
            TRAIN + "/ /usr",
            "catdog train takes only the flags that catdog train --help lists, and a glob in quotes: the shell "
            "replaces one without. Received: / /usr",
        ),
        (TRAIN + "--epochs many", "--epochs must be an integer. Received: --epochs=many"),
        (TRAIN + "--epochs=1.5", "--epochs must be an integer. Received: --epochs=1.5"),
        (TRAIN + "--epochs None", "--epochs must be an integer. Received: --epochs=None"),
        (TRAIN + "--learning-rate fast", "--learning-rate must be a number. Received: --learning-rate=fast"),
        (TRAIN + "--epochs 0", "--epochs must be at least 1. Received: --epochs=0"),
        (TRAIN + "--epochs -1", "--epochs must be at least 1. Received: --epochs=-1"),
        (TRAIN + "--batch_size=0", "--batch-size must be at least 1. Received: --batch-size=0"),
        (
            "predict --images i --output o --model m --batch-size 0",
            "--batch-size must be at least 1. Received: --batch-size=0",
        ),
        (
            TRAIN + "--precision half",
            "--precision must be one of auto, float32, bfloat16, float16. Received: --precision=half",
        ),
        (
            "prepare --images i --output o --val-fraction 0.7 --test-fraction 0.4",
            "--val-fraction and --test-fraction must leave a share for training. "
            "Received: --val-fraction=0.7 --test-fraction=0.4",
        ),
    ],
)
def test_bad_usage_is_one_line_and_exit_2(capsys: pytest.CaptureFixture[str], line: str, message: str) -> None:
    assert fails(capsys, *line.split()) == (2, message)


@pytest.fixture
def inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory of a user with nothing but bad input."""
    for name in ("empty", "only-cats/cat", "cow", "mine", "broken"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("only-cats/cat/1.png", "cow/cow.png"):
        drawings.draw("cat", (0, 0)).save(tmp_path / name)
    (tmp_path / "cow" / "labels.csv").write_text("uri,label\ncow.png,cow\n")
    (tmp_path / "mine" / "thesis.txt").touch()
    (tmp_path / "broken" / "bundle.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return tmp_path


OURS = "--output must be empty, or hold what this command wrote earlier. Received: --output={0}/mine, which holds "
NO_DATASET = "A dataset must hold dataset.json, which prepare writes last. Received: "


@pytest.mark.parametrize(
    ("line", "exit_code", "message"),
    [
        ("prepare --images missing --output out", 2, "--images must exist. Received: --images={0}/missing"),
        (
            "prepare --images empty --output out",
            2,
            "--images must hold at least one file. Received: --images={0}/empty",
        ),
        (
            "prepare --images only-cats --output out",
            2,
            "Every class must have images. Received: none labelled dog among 1 files",
        ),
        (
            "prepare --images cow --labels cow/labels.csv --output out",
            2,
            "Every label must be cat or dog, 0 or 1, or a name in --class-names. Received: 1 that are not, the first "
            "in row 1 of {0}/cow/labels.csv: 'cow' of {0}/cow/cow.png",
        ),
        ("prepare --images only-cats --output mine", 2, OURS + "thesis.txt"),
        ("train --data missing --output out", 1, NO_DATASET + "{0}/missing"),
        (
            "train --data missing --output out --arch vgg",
            2,
            "--arch must be one of cnn, resnet, vgg16, resnet50, mobilenetv2, efficientnetv2b0, convnext_tiny, "
            "efficientnet_lite0, efficientnet_lite1, efficientnet_lite2. Received: --arch=vgg",
        ),
        ("evaluate --data missing --model broken --output out", 1, NO_DATASET + "missing"),
        ("evaluate --data missing --model broken --output mine", 2, OURS + "thesis.txt"),
        (
            "predict --images only-cats --model missing --output out",
            1,
            "a model bundle is a directory with a bundle.json. Received: missing",
        ),
        (
            "predict --images only-cats --model broken --output out",
            1,
            "broken/bundle.json: format must be 'catdog-bundle/1'. Received: None",
        ),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(
    capsys: pytest.CaptureFixture[str], inputs: Path, line: str, exit_code: int, message: str
) -> None:
    before = sorted(inputs.rglob("*"))
    assert fails(capsys, *line.split()) == (exit_code, message.format(inputs))
    assert sorted(inputs.rglob("*")) == before


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_describes_every_flag(capsys: pytest.CaptureFixture[str], command: str) -> None:
    helps([*command.split(), "--help"])
    out, err = capsys.readouterr()
    assert err == ""
    config_type = cli.COMMANDS[command].config_type
    for field in dataclasses.fields(config_type):
        assert (field.name.upper() if field.metadata.get("positional") else flag(field.name)) in out
    for common in ("--dry-run", "--json", "--verbose"):
        assert common in out
    assert str(config_type.__doc__) in unwrapped(out)
    assert cli.COMMANDS[command].example in out
    assert "default: None" not in out


def test_help_shows_types_and_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    helps(["train", "--help"])
    out = unwrapped(capsys.readouterr().out)
    assert out.startswith("usage: catdog train --data STR --output STR [FLAGS] Train a model on a dataset, ")
    assert "--data STR Dataset to train on, written by `catdog prepare`. (required)" in out
    assert "--epochs INT Number of passes over the training images. The default is the network's own. --" in out
    assert "--augment, --no-augment Vary the training images at random: " in out
    assert "(default: True)" in out
    assert "--use-gpu Give each worker a GPU of its own. Without this flag no GPU is used. --" in out
    assert "--precision {auto,float32,bfloat16,float16} " in out
    for default in ("auto", "0", "0.995", "none"):
        assert f" (default: {default}) " in out


def test_help_lists_the_commands_and_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    helps(["--help"])
    out = capsys.readouterr().out
    for command in cli.COMMANDS:
        assert f"\n  {command} " in out
    assert "--version" in out
    assert "Exit codes: 0 done; 1 the job failed; 2 bad usage; 3 done, but too many images failed." in unwrapped(out)


def test_help_of_a_group_lists_its_commands(capsys: pytest.CaptureFixture[str]) -> None:
    helps(["bench", "--help"])
    out = capsys.readouterr().out
    listed = [command for command in cli.COMMANDS if f"\n  {command} " in out]
    assert listed == [
        f"bench {name}" for name in ("train", "chaos", "nightly-chaos", "plan", "predict", "serve", "startup")
    ]


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"{__version__}\n"


def test_flags_reach_the_configuration() -> None:
    line = "predict --images a --output=b --model c --executor inline --num-workers 3 --retry-errors --json"
    name, invocation = cli.parse(line.split())
    assert name == "predict"
    assert invocation.config == PredictConfig(
        images="a", output="b", model="c", executor="inline", num_workers=3, retry_errors=True
    )
    assert invocation.common == cli.CommonFlags(json=True)


@pytest.mark.parametrize(
    "line", ["--images a b --output o", "--images a --output o --images=b", "--images a --images b"]
)
def test_images_may_be_several_places(line: str) -> None:
    _, invocation = cli.parse(["predict", *line.replace("--output o", "").split(), "--output", "o"])
    assert invocation.config == PredictConfig(images=("a", "b"), output="o")
    assert invocation.config.sources == ("a", "b")


def test_a_value_may_stand_without_a_flag() -> None:
    for line in ("verify s3://b/out --json", "verify --json s3://b/out"):
        name, invocation = cli.parse(line.split())
        assert (name, invocation.config) == ("verify", VerifyConfig(output="s3://b/out"))
        assert invocation.common == cli.CommonFlags(json=True)


def test_help_shows_a_value_without_a_flag(capsys: pytest.CaptureFixture[str]) -> None:
    helps(["verify", "--help"])
    out = unwrapped(capsys.readouterr().out)
    assert out.startswith("usage: catdog verify OUTPUT [FLAGS] Recount everything ")
    assert "positional arguments: OUTPUT Directory of the predictions." in out


def test_flags_reach_a_command_of_two_words() -> None:
    name, invocation = cli.parse(["bench", "chaos", "--data", "a", "--output", "b", "--num-kills", "3"])
    assert (name, invocation.config) == ("bench chaos", BenchChaosConfig(data="a", output="b", num_kills=3))


@dataclass(frozen=True, kw_only=True)
class ManyConfig:
    """Several of each, 100 % of them."""

    images: tuple[str, ...]
    """What to read."""

    sizes: tuple[int, ...] | None = None
    """In pixels."""

    splits: tuple[Literal["test", "val"], ...] = ("test", "val")
    """Which of them."""

    seeds: tuple[int, ...] = (0, 1)
    """One per run."""


@pytest.fixture
def many(monkeypatch: pytest.MonkeyPatch) -> None:
    """A command, `catdog many`, some of whose flags take several values."""
    example = "catdog many --images a b"
    monkeypatch.setitem(
        cli.COMMANDS, "many", dataclasses.replace(cli.COMMANDS["demo"], config_type=ManyConfig, example=example)
    )


@pytest.mark.usefixtures("many")
@pytest.mark.parametrize(
    ("line", "config"),
    [
        ("many --images a", ManyConfig(images=("a",))),
        ("many --images a b --json", ManyConfig(images=("a", "b"))),
        ("many --images a --images=b --images c a", ManyConfig(images=("a", "b", "c", "a"))),
        ("many --images a --sizes 1 --splits val --sizes 2", ManyConfig(images=("a",), sizes=(1, 2), splits=("val",))),
    ],
)
def test_a_tuple_takes_several_values_and_repeated_flags(line: str, config: ManyConfig) -> None:
    assert cli.parse(line.split())[1].config == config


@pytest.mark.usefixtures("many")
@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("many", "catdog many needs --images. Received: catdog many"),
        ("many --images", "--images needs a value. Received: catdog many --images"),
        ("many --images a --sizes 1 x", "--sizes must be an integer. Received: --sizes=x"),
        ("many --images a --splits all", "--splits must be one of test, val. Received: --splits=all"),
    ],
)
def test_bad_values_of_a_tuple_are_one_line(capsys: pytest.CaptureFixture[str], line: str, message: str) -> None:
    assert fails(capsys, *line.split()) == (2, message)


@pytest.mark.usefixtures("many")
def test_help_of_a_tuple(capsys: pytest.CaptureFixture[str]) -> None:
    helps(["many", "--help"])
    out = unwrapped(capsys.readouterr().out)
    assert "Several of each, 100 % of them." in out
    assert "--images STR [STR ...] What to read. (required)" in out
    assert "--sizes INT [INT ...] In pixels. --" in out
    assert "Which of them. (default: test val)" in out
    assert "One per run. (default: 0 1)" in out


def test_dry_run_prints_the_resolved_configuration(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    output = tmp_path / "model"
    assert cli.main(["train", "--data", "d", "--output", str(output), "--no-augment", "--dry-run"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    record = json.loads(out)
    assert record["command"] == "train"
    assert record["config"]["augment"] is False
    assert {name: record["config"][name] for name in ("arch", "weights", "epochs", "batch_size", "head_epochs")} == {
        "arch": "resnet",
        "weights": "none",
        "epochs": 60,
        "batch_size": 128,
        "head_epochs": 0,
    }
    assert not output.exists()


@pytest.mark.parametrize(
    ("line", "exit_code"),
    [
        ("--help", 0),
        ("train --help", 0),
        ("train --epochs x", 2),
        ("train --data d --output o --dry-run", 0),
        ("train --data d --output o --arch vgg --dry-run", 2),
        ("predict --images docs --output o --dry-run", 0),
        ("bench --help", 0),
        ("bench train --data d --output o --dry-run", 0),
        ("bench predict --images i --output o --dry-run", 0),
        ("bench startup --output o --dry-run", 0),
        ("convert m --data d --dry-run", 0),
    ],
)
def test_answers_at_once_without_ray_or_tensorflow(line: str, exit_code: int) -> None:
    code = """if True:
        import sys
        from catdog import cli
        try:
            exit_code = cli.main(sys.argv[1:])
        except SystemExit as stop:
            exit_code = stop.code
        big = {"ray", "tensorflow", "keras", "matplotlib", "openvino", "nncf", "pandas", "s3fs", "scipy"}
        print(len(sys.modules))
        print(exit_code, *(big & sys.modules.keys()))
    """
    command = [sys.executable, "-c", code, *line.split()]
    run = subprocess.run(command, capture_output=True, text=True, check=True, cwd=PROJECT)
    *_, num_modules, last = run.stdout.splitlines()
    assert last == str(exit_code)
    assert int(num_modules) < 650  # about a millisecond each


@pytest.mark.parametrize("job", JOBS)
def test_job_scripts_are_the_same_code(job: str) -> None:
    runs = [
        subprocess.run([sys.executable, *start, "--bogus"], capture_output=True, text=True, cwd=PROJECT)
        for start in (["-m", f"jobs.{job}"], ["-m", "catdog", job])
    ]
    assert runs[0].returncode == runs[1].returncode == 2
    assert runs[0].stderr == runs[1].stderr
    assert f"catdog {job} takes only the flags" in runs[0].stderr


def test_failed_job_is_one_line_and_exit_1(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(args: list[str], *, is_alone: bool) -> NoReturn:
        raise StorageError("s3://bucket must be reachable.\nReceived: connection refused")

    monkeypatch.setattr(cli, "_main", fail)
    assert fails(capsys, "train") == (1, "s3://bucket must be reachable. Received: connection refused")


@pytest.mark.parametrize(
    ("module", "message"),
    [
        ("ray", "this needs more packages: pip install 'catdog[ray]'. Received: ray is not installed"),
        ("keras.layers", "this needs more packages: pip install 'catdog[train]'. Received: keras is not installed"),
    ],
)
def test_a_missing_extra_is_one_line_and_exit_1(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, module: str, message: str
) -> None:
    def fail(args: list[str], *, is_alone: bool) -> NoReturn:
        raise ModuleNotFoundError(f"No module named {module!r}", name=module)

    monkeypatch.setattr(cli, "_main", fail)
    assert fails(capsys, "train") == (1, message)


def test_a_missing_module_of_no_extra_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(args: list[str], *, is_alone: bool) -> NoReturn:
        raise ModuleNotFoundError("No module named 'catdog.forgotten'", name="catdog.forgotten")

    monkeypatch.setattr(cli, "_main", fail)
    with pytest.raises(ModuleNotFoundError):
        cli.main(["train"])


def test_every_extra_that_an_error_names_brings_what_is_missing() -> None:
    extras = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for module, extra in cli._EXTRA_OF.items():
        listed = {canonicalize_name(Requirement(text).name) for text in extras[extra]}
        assert listed & {canonicalize_name(name) for name in packages_distributions()[module]}, module


def test_other_errors_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(args: list[str], *, is_alone: bool) -> NoReturn:
        raise ZeroDivisionError

    monkeypatch.setattr(cli, "_main", fail)
    with pytest.raises(ZeroDivisionError):
        cli.main(["train"])


@pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_unwind_and_exit_quietly(number: signal.Signals, exit_code: int) -> None:
    code = """if True:
        import signal, sys, time
        from catdog import cli
        # A suite that a shell started in the background has its children ignore Ctrl-C.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        def job(args, is_alone):
            try:
                print("running", flush=True)
                time.sleep(60)
            finally:
                print("unwound", flush=True)
        cli._main = job
        sys.exit(cli.main(["train"]))
    """
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"running\n"
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (exit_code, b"unwound\n", b"")


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_daemon_may_start_a_command_without_its_streams(tmp_path: Path, closed: str) -> None:
    """What is written to stdout and stderr must not get into a file that was opened in their place."""
    code = """if True:
        import sys
        from catdog import cli
        cli._main = lambda args, is_alone: cli._tell("the result") or print("a warning", file=sys.stderr) or 0
        sys.stdout and sys.stdout.flush()
        make_usable = cli.streams.make_usable
        def opening():
            make_usable()
            global file
            file = open(sys.argv[1], "w")
            print(file.fileno(), file=file, flush=True)
        cli.streams.make_usable = opening
        cli.run([])
    """
    run = subprocess.run(["sh", "-c", f'"$@" {closed}', "sh", sys.executable, "-c", code, str(tmp_path / "file")])
    assert run.returncode == 0
    assert int((tmp_path / "file").read_text()) > 2


def test_the_result_is_printed_whatever_the_locale_can_write() -> None:
    code = """if True:
        from catdog import cli
        cli._main = lambda args, is_alone: cli._tell("caf\\u00e9 caf\\udce9") or 0
        cli.run([])
    """
    environment = {**os.environ, "PYTHONIOENCODING": "ascii:strict"}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert (run.returncode, run.stdout, run.stderr) == (0, "caf\\xe9 caf\\udce9\n", "")


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_nobody_reads_the_result(unbuffered: str) -> None:
    code = """if True:
        from catdog import cli
        cli._main = lambda args, is_alone: cli._tell("the result")
        cli.run([])
    """
    reading, writing = os.pipe()
    os.close(reading)
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment, stdout=writing, stderr=subprocess.PIPE, text=True
    )
    os.close(writing)
    assert run.returncode == 1
    assert run.stderr == "error: what reads stdout must read all of it. Received: it has ended; the work is done\n"


def test_stdout_is_the_results_alone() -> None:
    code = """if True:
        import os, subprocess, sys
        from catdog import streams
        with streams.stdout_kept_clean():
            print("a print")
            os.write(1, b"a library in C\\n")
            subprocess.run(["echo", "a child process"], check=True)
        print("the result")
    """
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "the result\n"
    assert sorted(run.stderr.splitlines()) == ["a child process", "a library in C", "a print"]


@pytest.mark.slow
def test_tensorflow_loads_without_banners() -> None:
    code = """if True:
        import sys
        from catdog import streams
        streams.quieten_tensorflow()
        import tensorflow as tf
        print(int(tf.constant(2) * 3))
        print("heard", file=sys.stderr)
    """
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (run.stdout, run.stderr) == ("6\n", "heard\n")
