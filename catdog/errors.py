"""Every error that catdog raises on purpose.

    CatdogError                exit 1: the job failed
    ├── UsageError             exit 2: an argument, a configuration or an input that cannot be used
    │   └── OutputRefusedError exit 2: the output holds something that this command did not write
    ├── StorageError           exit 1: a storage could not be reached, or kept failing
    ├── BundleError            exit 1: a model bundle that is damaged or that we do not understand
    ├── DatasetError           exit 1: a prepared dataset that is damaged, incomplete or not one
    ├── TrainingError          exit 1: training cannot start or cannot go on
    ├── BooksError             exit 1: a run whose books do not close
    └── ImageError             one image that cannot be used; becomes a row, never ends a job

Only `catdog.cli` catches `CatdogError`: it prints the message as one line and exits with `exit_code`. Anything else
keeps its traceback.
"""

from typing import ClassVar


class CatdogError(Exception):
    """Root of every error that catdog raises on purpose."""

    exit_code: ClassVar[int] = 1


class UsageError(CatdogError):
    """An argument, a configuration or an input that cannot be used. States the rule, then what was received."""

    exit_code: ClassVar[int] = 2


class OutputRefusedError(UsageError):
    """The output is not empty and holds something that this command did not write."""


class StorageError(CatdogError):
    """A storage could not be reached, or kept failing after retries."""


class BundleError(CatdogError):
    """A model bundle that is missing, damaged, or of a format that this version does not understand."""


class DatasetError(CatdogError):
    """A prepared dataset that is missing, damaged or incomplete."""


class TrainingError(CatdogError):
    """Training cannot start or cannot go on."""


class BooksError(CatdogError):
    """A run whose books do not close: `listed != ok + error + already_done + duplicate`."""


class ImageError(CatdogError):
    """One image that cannot be used.

    Attributes:
        code: one of `catdog.schema.ERROR_CODES`.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code

    def __reduce__(self) -> tuple[type["ImageError"], tuple[str, str]]:
        """Pickle with both arguments: images are read in other processes."""
        return type(self), (self.code, str(self))
