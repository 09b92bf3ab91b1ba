"""The tests themselves: each of them can fail, and what is not marked as slow stays quick."""

import ast
import functools
import os
import subprocess
import sys
from pathlib import Path

import conftest
import pytest

TESTS = Path(__file__).parent

Function = ast.FunctionDef | ast.AsyncFunctionDef


def modules() -> list[Path]:
    return sorted(TESTS.glob("*.py"))


@functools.cache
def functions(path: Path) -> dict[str, Function]:
    """The functions of a module by their names, those within others included."""
    return {node.name: node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, Function)}


@functools.cache
def helpers(path: Path) -> dict[str, Function]:
    """The functions that a module can call by name: its own, and those it takes from other modules of the tests."""
    imported = [
        (TESTS / f"{node.module}.py", alias.name)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and (TESTS / f"{node.module}.py").is_file()
        for alias in node.names
    ]
    taken = {name: functions(other)[name] for other, name in imported if name in functions(other)}
    return taken | functions(path)


def can_fail(node: ast.AST, known: dict[str, Function]) -> bool:
    """Whether it asserts something, itself or through one of the `known` functions that it calls."""
    for part in ast.walk(node):
        if isinstance(part, ast.Assert):
            return True
        if isinstance(part, ast.Call):
            name = ast.unparse(part.func)
            if name in {"pytest.raises", "pytest.warns", "pytest.fail"} or name.startswith("np.testing.assert_"):
                return True
            if name in known and can_fail(known[name], {each: known[each] for each in known if each != name}):
                return True
    return False


def test_every_test_asserts_something() -> None:
    """A test that only runs code passes whatever comes of it."""
    without = [
        f"{path.name}:{function.lineno} {name}"
        for path in modules()
        for name, function in functions(path).items()
        if name.startswith("test_") and not can_fail(function, helpers(path))
    ]
    assert without == []


def test_an_error_is_expected_by_its_one_class() -> None:
    """`pytest.raises((A, B))` leaves open which of them it is."""
    loose = [
        f"{path.name}:{node.lineno}"
        for path in modules()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) == "pytest.raises"
        and (not node.args or isinstance(node.args[0], ast.Tuple))
    ]
    assert loose == []


@pytest.mark.parametrize(
    ("test", "complaint"),
    [
        (
            "import keras\ndef test_it(): pass\n",
            "test_it.py imports keras: do that within the tests that are marked",
        ),
        ("def test_it(): import keras\n", "this test imports keras: mark it with pytest.mark.slow"),
        ("import pytest, keras\npytestmark = [pytest.mark.slow]\ndef test_it(): pass\n", "no tests ran"),
    ],
)
def test_the_fast_run_imports_no_big_library(test: str, complaint: str, tmp_path: Path) -> None:
    """Shown with a test module and a `keras` that holds nothing."""
    (tmp_path / "keras.py").touch()
    (tmp_path / "test_it.py").write_text(test)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = slow\npythonpath = .\n")
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "conftest", "-m", conftest.FAST_RUN, "-q", "."],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(TESTS)},
        capture_output=True,
        text=True,
    )
    assert run.returncode != 0
    assert complaint in run.stdout + run.stderr


def test_only_tests_of_real_photographs_need_them() -> None:
    """All others run where `../shared/data` is missing, on drawings."""
    needing = {
        name
        for path in modules()
        for name, function in functions(path).items()
        if name.startswith("test_") and "shared_data" in [argument.arg for argument in function.args.args]
    }
    assert needing == {
        # Cats and dogs as cameras see them.
        "test_it_tells_photographs_of_cats_from_those_of_dogs",
        "test_published_weights_tell_cats_from_dogs",
        "test_photographs_of_other_things_need_review",
        # Which photographs are near.
        "test_copies_of_a_photograph_are_near_and_others_are_not",
        "test_other_cameras",
        # Files that odd cameras and programs have written.
        "test_every_odd_file_is_a_row",
        "test_every_odd_file_is_decoded_or_named",
        "test_odd_files_become_rejects",
        "test_orientations_of_real_photographs",
        # Kaggle's own archive.
        "test_kaggles_archive",
    }
