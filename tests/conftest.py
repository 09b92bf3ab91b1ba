"""What all tests share: what `slow` means, TensorFlow on one thread, and the folder of real photographs.

A test that needs Ray, TensorFlow or a server, or takes some seconds, is marked `slow`, singly or with its whole module
(`pytestmark = pytest.mark.slow`). `make test-fast` runs the others, and never imports one of these libraries: neither
to collect the tests nor to run them. A test that forgets its mark fails.

`CATDOG_SHARED` names the folder of `data` and `kuberay-crds`, by default `../shared`. `CATDOG_SHARED=/nonexistent`
shows the suite as it is where that folder is missing.
"""

import ast
import functools
import os
import sys
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Final

import pytest

SHARED: Final = Path(os.environ.get("CATDOG_SHARED") or Path(__file__).resolve().parents[2] / "shared")

FAST_RUN: Final = "not slow"
"""`pytest -m` of `make test-fast`."""

BIG: Final = frozenset({"keras", "ray", "tensorflow"})
"""Libraries that take seconds to import."""

_imported: dict[str, str] = {}
"""Big library → the module or test that was the first to import it in this process."""


def note_imports(by: str) -> list[str]:
    """The big libraries that have come since the last call, noted as imported by this module or test."""
    new = sorted((BIG & sys.modules.keys()) - _imported.keys())
    _imported.update(dict.fromkeys(new, by))
    return new


def is_slow_module(path: Path) -> bool:
    """Whether a test module has `slow` in its `pytestmark`."""
    assigned = [statement for statement in ast.parse(path.read_text()).body if isinstance(statement, ast.Assign)]
    marks = [each.value for each in assigned if ast.unparse(each.targets[0]) == "pytestmark"]
    return any(isinstance(node, ast.Attribute) and node.attr == "slow" for each in marks for node in ast.walk(each))


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave the modules that are slow as a whole out of the fast run: importing them would take long."""
    is_module = collection_path.suffix == ".py" and collection_path.name.startswith("test_")
    return True if is_module and config.option.markexpr == FAST_RUN and is_slow_module(collection_path) else None


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """Refuse, in the fast run, a module that imports one of the big libraries when it is imported itself."""
    report = yield
    new = note_imports(collector.nodeid)
    if new and collector.config.option.markexpr == FAST_RUN:
        raise pytest.UsageError(
            f"{collector.nodeid} imports {', '.join(new)}: do that within the tests that are marked slow, "
            "or say pytestmark = pytest.mark.slow"
        )
    return report


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Settle how TensorFlow computes before the first test that may use it."""
    if item.get_closest_marker("slow"):
        compute_on_one_thread()
        note_imports("conftest.py")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item) -> Generator[None]:
    """Fail a test that has imported one of the big libraries and is not marked as slow."""
    yield
    new = note_imports(item.nodeid)
    if new and not item.get_closest_marker("slow"):
        pytest.fail(f"this test imports {', '.join(new)}: mark it with pytest.mark.slow", pytrace=False)


@functools.cache
def compute_on_one_thread() -> None:
    """Have TensorFlow compute each operation on one thread in this process, as it does in a Ray actor.

    On some CPUs the number of threads changes the last bits of a sum. Where some test has computed earlier on more
    threads, an engine could not change that any more, and rows that are labelled here would differ from an actor's.
    """
    import tensorflow as tf

    from catdog import hardware

    hardware.configure_tensorflow(num_threads=1, num_parallel=2, use_gpu=False)
    if tf.config.threading.get_intra_op_parallelism_threads() != 1:
        raise RuntimeError("TensorFlow must not compute while the tests are collected")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real photographs that lies beside the project; skips where it is missing."""
    path = SHARED / "data"
    if not path.is_dir():
        pytest.skip("needs the photographs of ../shared/data, which are not here")
    return path


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The bundle of a small network that nobody trained, of `inference_case`. Not to be changed."""
    from inference_case import save_model

    return save_model(str(tmp_path_factory.mktemp("untrained") / "model"))


@pytest.fixture(scope="session")
def bfloat16() -> None:
    """For tests that convolve in bfloat16; skips where TensorFlow cannot.

    It can on every CPU: where oneDNN does not know how, with its own code. But it asks the CPU, not
    `ONEDNN_MAX_CPU_ISA`, whether oneDNN knows how, so that AVX2 in that variable makes it fail on a CPU with AVX-512.
    """
    import tensorflow as tf

    try:
        tf.nn.conv2d(tf.zeros((1, 8, 8, 3), tf.bfloat16), tf.zeros((3, 3, 3, 4), tf.bfloat16), 1, "SAME")
    except tf.errors.AbortedError:
        pytest.skip("needs TensorFlow's convolutions in bfloat16, which ONEDNN_MAX_CPU_ISA forbids")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The architectures of `small_architectures`, known by their names."""
    import keras
    import small_architectures

    from catdog.architectures import ARCHITECTURES

    for name, architecture in small_architectures.made().items():
        monkeypatch.setitem(ARCHITECTURES, name, architecture)
    yield
    keras.config.set_dtype_policy("float32")
