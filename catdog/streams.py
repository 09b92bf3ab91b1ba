"""What this process writes: the result, and nothing else, to stdout; no banners of TensorFlow's to stderr."""

import contextlib
import importlib.util
import io
import os
import sys
from collections.abc import Iterator, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


def make_usable() -> None:
    """Let this process write to stdout and stderr, wherever it was started, whatever it has to say.

    A daemon may start it without them: then what is written is lost, and does not get into the file that would have had
    their numbers. A name that the locale cannot write, or that is not UTF-8, is written with backslashes.
    """
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(descriptor)
        except OSError:
            nowhere = os.open(os.devnull, os.O_RDWR)  # it may get this very number
            if nowhere != descriptor:
                os.dup2(nowhere, descriptor)
                os.close(nowhere)
            setattr(sys, name, os.fdopen(descriptor, "r" if descriptor == 0 else "w", closefd=False))
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")


@contextlib.contextmanager
def stdout_kept_clean() -> Iterator[None]:
    """Within a `with` block, send what this process and its children write to stdout to stderr instead."""
    sys.stdout.flush()
    with _redirected(1, 2), contextlib.redirect_stdout(sys.stderr):
        yield


def quieten_tensorflow() -> None:
    """Silence what TensorFlow writes to stderr when it is imported. No setting does that (tensorflow#100442)."""
    if "tensorflow" not in sys.modules:
        sys.meta_path.insert(0, _QuietTensorFlow())


class _QuietTensorFlow(MetaPathFinder):
    """Finds TensorFlow as the other finders do, and loads it with stderr sent to the null device."""

    def find_spec(self, name: str, _path: Sequence[str] | None, _target: ModuleType | None = None) -> ModuleSpec | None:
        """TensorFlow's own spec with a quiet loader; None for every other module."""
        if name != "tensorflow":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def load_quietly(module: ModuleType) -> None:
                with open(os.devnull, "wb") as nowhere, _redirected(2, nowhere.fileno()):
                    load(module)
                    module.config.list_physical_devices()  # TensorFlow complains of a missing GPU here

            spec.loader.exec_module = load_quietly  # type: ignore[method-assign]
        return spec


@contextlib.contextmanager
def _redirected(descriptor: int, target: int) -> Iterator[None]:
    """Within a `with` block, let one file descriptor of this process refer to the file of another one."""
    kept = os.dup(descriptor)
    os.dup2(target, descriptor)
    try:
        yield
    finally:
        os.dup2(kept, descriptor)
        os.close(kept)
