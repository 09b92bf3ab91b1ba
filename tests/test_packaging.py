"""What is installed: one top-level package, and the libraries that it imports."""

import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from setuptools import find_packages
from test_layers import files, imports

PROJECT = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((PROJECT / "pyproject.toml").read_text())

NOT_IMPORTED = {
    "s3fs": "fsspec loads it",
    "tensorboard": "TensorFlow loads it for tf.summary",
}


def required() -> set[str]:
    return {canonicalize_name(Requirement(text).name) for text in PYPROJECT["project"]["dependencies"]}


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
    missing = {(name, where) for name, where in imported() if name not in required()}
    assert missing == set()


def test_every_requirement_is_imported() -> None:
    assert required() - {name for name, _ in imported()} == set(NOT_IMPORTED)


@pytest.mark.parametrize("extra", PYPROJECT["project"]["optional-dependencies"])
def test_no_extra_repeats_a_requirement(extra: str) -> None:
    listed = PYPROJECT["project"]["optional-dependencies"][extra]
    assert not {canonicalize_name(Requirement(text).name) for text in listed} & required()
