"""What is installed: one top-level package, and the libraries that it imports."""

import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from inference_case import encoded_drawings
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from setuptools import find_packages
from test_layers import files, imports

PROJECT = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((PROJECT / "pyproject.toml").read_text())

NOT_IMPORTED = {
    "httptools": "uvicorn parses requests with it",
    "tensorboard": "TensorFlow loads it for tf.summary",
}


EXTRAS = PYPROJECT["project"]["optional-dependencies"]
PEERS = {"daft": "only `catdog bench predict` imports it, where it is installed"}
OPTIONAL = {"pillow-heif": "of the extra heif: imported when the first HEIF file comes"}


def names(listed: list[str]) -> set[str]:
    """The distributions of a list of requirements. An extra of our own stands for its list."""
    found = set()
    for requirement in map(Requirement, listed):
        if requirement.name == "catdog":
            found |= set().union(*(names(EXTRAS[extra]) for extra in requirement.extras))
        else:
            found.add(canonicalize_name(requirement.name))
    return found


def required() -> set[str]:
    """What the whole of catdog needs."""
    return names(PYPROJECT["project"]["dependencies"] + EXTRAS["tune"] + EXTRAS["serve-ray"])


def imported() -> Iterator[tuple[str, str]]:
    """(distribution, where) of every import from outside the standard library."""
    distributions = packages_distributions()
    for path in files():
        for line, module in imports(path):
            name = module.partition(".")[0]
            if name != "catdog" and name not in sys.stdlib_module_names:
                for distribution in distributions[name]:
                    yield canonicalize_name(distribution), f"{path.name}:{line}"


def test_only_catdog_is_installed() -> None:
    found = find_packages(str(PROJECT), **PYPROJECT["tool"]["setuptools"]["packages"]["find"])
    assert {name.partition(".")[0] for name in found} == {"catdog"}
    assert {"catdog.engines", "catdog.report", "catdog.cli"} <= set(found)


def test_every_import_is_a_requirement() -> None:
    missing = {(name, where) for name, where in imported() if name not in required() | {*PEERS, *OPTIONAL}}
    assert missing == set()


def test_every_requirement_is_imported() -> None:
    assert required() - {name for name, _ in imported()} == set(NOT_IMPORTED)


@pytest.mark.parametrize("extra", EXTRAS)
def test_no_extra_repeats_a_requirement(extra: str) -> None:
    assert not names(EXTRAS[extra]) & names(PYPROJECT["project"]["dependencies"])


LEAN = """
import sys
for name in {forbidden!r}:
    sys.modules[name] = None  # as if it were not installed
from catdog import cli
code = cli.main({argv!r})
print(*sorted(name for name, module in sys.modules.items() if module is not None and "." not in name), file=sys.stderr)
sys.exit(code)
"""


def lean(argv: list[str]) -> subprocess.CompletedProcess[str]:
    """Run a command as where only what labelling needs is installed."""
    base = names(PYPROJECT["project"]["dependencies"])
    forbidden = sorted(
        module
        for module, owners in packages_distributions().items()
        if {*map(canonicalize_name, owners)} & required() - base
    )
    code = LEAN.format(forbidden=[*forbidden, "pandas"], argv=argv)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_labelling_needs_neither_tensorflow_nor_ray(tmp_path: Path) -> None:
    (photograph,) = encoded_drawings(1)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").write_bytes(photograph)
    output = tmp_path / "out"
    ran = lean(["predict", "--images", str(tmp_path / "photos"), "--output", str(output)])
    assert ran.returncode == 0, ran.stderr
    (part,) = output.glob("*.parquet")
    assert pq.read_table(part)["status"].to_pylist() == ["ok"]
    imported = set(ran.stderr.splitlines()[-1].split())
    assert "openvino" in imported
    assert not imported & {"botocore", "s3fs", "aiohttp", "obstore", "h5py", "unittest", "openvino_telemetry"}
    assert "pyarrow.dataset" not in ran.stderr
    assert lean(["verify", str(output)]).returncode == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "extra"),
    [
        (["predict", "--images", "p", "--output", "out", "--executor", "ray"], "ray"),
        (["prepare", "--images", "p", "--output", "out"], "train"),
        (["demo", "--output", "out"], "train"),
        (["serve"], "serve"),
    ],
)
def test_what_needs_more_says_which_extra(
    command: list[str], extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "cat.1.png").write_bytes(encoded_drawings(1)[0])
    ran = lean(command)
    assert ran.returncode == 1, ran.stderr
    assert re.search(
        rf"^error: this needs more packages: pip install 'catdog\[({extra}|ray)\]'\. Received: \w+ is not installed$",
        ran.stderr,
        re.MULTILINE,
    ), ran.stderr
