"""Who may write to this process's stdout and stderr: the result to the one, and no banners to the other."""

import contextlib
import importlib.util
import os
import sys
from collections.abc import Iterator, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


@contextlib.contextmanager
def stdout_kept_clean() -> Iterator[None]:
    """Send to stderr what a job, its libraries and child processes write to stdout, which is the result's alone."""
    sys.stdout.flush()
    with _descriptor_to(1, 2), contextlib.redirect_stdout(sys.stderr):
        yield


def quieten_tensorflow() -> None:
    """Silence what TensorFlow writes to stderr when it is imported; it heeds no setting (tensorflow#100442)."""
    if "tensorflow" not in sys.modules:
        sys.meta_path.insert(0, _QuietTensorFlow())


class _QuietTensorFlow(MetaPathFinder):
    """Finds TensorFlow as the next finder does, and has it loaded with stderr closed."""

    def find_spec(self, name: str, _path: Sequence[str] | None, _target: ModuleType | None = None) -> ModuleSpec | None:
        """TensorFlow's own spec with a quiet loader; None for every other module."""
        if name != "tensorflow":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def load_quietly(module: ModuleType) -> None:
                with open(os.devnull, "wb") as nowhere, _descriptor_to(2, nowhere.fileno()):
                    load(module)
                    module.config.list_physical_devices()  # it complains of a missing GPU when it first looks for one

            spec.loader.exec_module = load_quietly  # type: ignore[method-assign]
        return spec


@contextlib.contextmanager
def _descriptor_to(descriptor: int, target: int) -> Iterator[None]:
    """Let a file descriptor of this process be another one for a while."""
    kept = os.dup(descriptor)
    os.dup2(target, descriptor)
    try:
        yield
    finally:
        os.dup2(kept, descriptor)
        os.close(kept)
