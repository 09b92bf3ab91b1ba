"""Every error that catdog raises on purpose.

    CatdogError                exit 1: the job failed
    ├── UsageError             exit 2: an argument, a configuration or an input cannot be used
    │   ├── OutputRefusedError exit 2: the output holds something that this command did not write
    │   └── OutputClaimedError exit 2: another run is at work in the output
    ├── ClaimLostError         exit 1: another run took over the output of this one
    ├── StorageError           exit 1: a storage could not be reached, or kept failing after retries
    ├── BundleError            exit 1: a model bundle is missing, damaged or of an unknown format
    ├── DatasetError           exit 1: a dataset is missing, damaged or incomplete, or cannot be made
    ├── TrainingError          exit 1: training cannot start or cannot go on
    ├── BooksError             exit 1: images of a prediction run were lost or counted twice
    └── ImageError             one image cannot be used; it becomes a row with an error code, and the job goes on

Only `catdog.cli` ends a command with a `CatdogError`: it prints the message as one line and exits with `exit_code`. A
task on another process hands its `CatdogError` to the driver, which raises it again. Every other exception keeps its
traceback.
"""

from typing import ClassVar


class CatdogError(Exception):
    """Root of every error that catdog raises on purpose."""

    exit_code: ClassVar[int] = 1


class UsageError(CatdogError):
    """An argument, a configuration or an input cannot be used. The message states the rule, then what was received."""

    exit_code: ClassVar[int] = 2


class OutputRefusedError(UsageError):
    """The output is not empty and holds something that this command did not write."""


class OutputClaimedError(UsageError):
    """Another run is at work in the output. Nothing was touched."""


class ClaimLostError(CatdogError):
    """Another run took over the output of this one, which had given no sign of life for a minute."""


class StorageError(CatdogError):
    """A storage could not be reached, or kept failing after retries."""


class BundleError(CatdogError):
    """A model bundle is missing, damaged, or of a format that this version does not know."""


class DatasetError(CatdogError):
    """A dataset is missing, damaged or incomplete, or the images do not suffice to make one."""


class TrainingError(CatdogError):
    """Training cannot start or cannot go on."""


class BooksError(CatdogError):
    """The books of a prediction run do not balance, or an output holds an image twice or lacks a part file.

    Books balance if `listed == ok + error + already_done + duplicate + skipped`.
    """


class ImageError(CatdogError):
    """One image cannot be used.

    Attributes:
        code: one of `catdog.schema.ERROR_CODES`.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code

    def __reduce__(self) -> tuple[type["ImageError"], tuple[str, str]]:
        """Pickle both arguments, which the default does not do: images are read in other processes."""
        return type(self), (self.code, str(self))
