"""The command line: configuration dataclasses to commands, logging, exit codes.

`catdog COMMAND` and `python -m jobs.COMMAND` both end in `main`. Nothing heavy is imported until a job runs, so that
`--help` and `--dry-run` answer at once.

Exit codes: 0 done; 1 the job failed; 2 bad usage or configuration; 3 done, but more images failed than
`--max-failed-fraction` allows; 130 interrupted (Ctrl-C); 143 terminated (SIGTERM).
"""

import contextlib
import errno
import importlib
import json
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from types import FrameType
from typing import Any, Final, NoReturn

from catdog import __version__, provenance, streams
from catdog.cli import supervised
from catdog.cli.commands import COMMANDS
from catdog.cli.parsing import CommonFlags, parse
from catdog.config import PredictConfig, ServeConfig, TrainConfig, TuneConfig
from catdog.errors import CatdogError
from catdog.records import Record

__all__ = ["COMMANDS", "CommonFlags", "leave", "main", "parse", "run"]

logger = logging.getLogger(__name__)

EXIT_OK: Final = 0
EXIT_FAILED: Final = 1
EXIT_INTERRUPTED: Final = 128 + signal.SIGINT
EXIT_TERMINATED: Final = 128 + signal.SIGTERM

_EXTRA_OF: Final = {
    "fastapi": "serve",
    "grpc": "ray",
    "httptools": "serve",
    "prometheus_client": "serve",
    "pydantic": "serve",
    "python_multipart": "serve",
    "ray": "ray",
    "starlette": "serve",
    "uvicorn": "serve",
    "h5py": "train",
    "imagehash": "train",
    "keras": "train",
    "matplotlib": "train",
    "nncf": "train",
    "jinja2": "tune",
    "optuna": "tune",
    "scipy": "train",
    "tensorflow": "train",
}
"""Imported name → the extra of catdog that brings it."""


def run(argv: Sequence[str] | None = None) -> NoReturn:
    """Run one command line (default: the process's), and end the process, as `catdog` and the scripts in `jobs` do."""
    streams.make_usable()
    leave(main(argv, is_alone=True))


def leave(exit_code: int) -> NoReturn:
    """End this process as soon as its output is out.

    All results are published by then. To take down the libraries one by one would need a fifth of a second, half a
    second with Ray, and DuckDB would tell the user which of its objects Ray Data still holds.
    """
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # whoever was to read it is gone, which `_main` has told
            stream.flush()
    os._exit(exit_code)


def main(argv: Sequence[str] | None = None, *, is_alone: bool = False) -> int:
    """Run one command line (default: the process's) and return its exit code.

    Args:
        argv: the arguments.
        is_alone: whether the command has the process for itself, and may become a child of it.

    Raises:
        SystemExit: after `--help`, and on SIGTERM.
    """
    args = sys.argv[1:] if argv is None else list(argv)
    try:
        with _terminable():
            return _main(args, is_alone=is_alone)
    except CatdogError as error:
        print("error:", provenance.redact(" ".join(str(error).splitlines())), file=sys.stderr)
        return error.exit_code
    except (OSError, ModuleNotFoundError) as error:
        text = _fault_of_environment(error) if isinstance(error, OSError) else _missing_extra(error)
        if text is None:
            raise
        print("error:", text, file=sys.stderr)
        return EXIT_FAILED
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


def _missing_extra(error: ModuleNotFoundError) -> str | None:
    """Which extra to install, if that is what an error comes from."""
    package = (error.name or "").partition(".")[0]
    if package not in _EXTRA_OF:
        return None
    return f"this needs more packages: pip install 'catdog[{_EXTRA_OF[package]}]'. Received: {package} is not installed"


def _fault_of_environment(error: OSError) -> str | None:
    """What is wrong with the place where the command runs, if that is what an error comes from."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        where = f"{error.filename}: " if error.filename else ""
        return f"every directory that is written to must have space, TMPDIR's too. Received: {where}{error.strerror}"
    if "usable temporary directory" in str(error):
        received = os.environ.get("TMPDIR", "no TMPDIR")
        return f"TMPDIR must name a directory with space in it that can be written to. Received: {received}"
    try:
        os.getcwd()
    except FileNotFoundError:
        return "the working directory must exist. Received: one that was removed"
    return None


def _main(args: list[str], *, is_alone: bool) -> int:
    if args == ["--version"]:
        print(__version__)
        return EXIT_OK
    name, invocation = parse(args)
    command, config, flags = COMMANDS[name], invocation.config, invocation.common
    _configure_logging(verbose=flags.verbose)
    if flags.dry_run:
        print(_to_json(_dry_run(name, config)))
        return EXIT_OK
    _configure_libraries(verbose=flags.verbose)
    logger.debug("catdog %s %s", name, json.dumps(provenance.configuration(config)))
    if is_alone and isinstance(config, PredictConfig | ServeConfig) and config.executor != "ray":
        _outlive_deaths(config)
    with streams.stdout_kept_clean():
        run: Callable[[Any], Record] = getattr(importlib.import_module(command.module), command.function)
        record = run(config)
    _tell(_to_json(record) if flags.json else "\n".join(record.summary()))
    if (complaint := record.complaint()) is None:
        return EXIT_OK
    print(f"error: {complaint}", file=sys.stderr)
    return record.failure_exit_code


def _tell(text: str) -> None:
    """Print what a command has done.

    Raises:
        CatdogError: nobody reads it any more.
    """
    try:
        print(text, flush=True)
    except BrokenPipeError:
        raise CatdogError("what reads stdout must read all of it. Received: it has ended; the work is done") from None


def _outlive_deaths(config: PredictConfig | ServeConfig) -> None:
    try:
        note_progress = supervised.outlive_deaths()
    except CatdogError as error:
        if isinstance(config, PredictConfig):
            _follow_deaths(config, error)
        raise
    if isinstance(config, PredictConfig):  # what is imported is heavy, and therefore imported by the child
        from catdog.inference import executors

        executors.after_publishing = note_progress
    else:
        from catdog.serving import inline

        inline.after_starting = note_progress


def _follow_deaths(config: PredictConfig, error: CatdogError) -> None:
    """Do what follows a run that failed, in a child process: what killed the others may kill it, too."""
    if (child := os.fork()) == 0:
        try:
            from catdog.inference import aftermath

            aftermath.failed(config, error)
        finally:
            os._exit(0)
    os.waitpid(child, 0)


@dataclass(frozen=True, kw_only=True)
class DryRun(Record):
    """What `--dry-run` prints."""

    command: str
    config: dict[str, Any]
    """With no field left to the architecture's recipe."""

    plan: dict[str, Any] | None
    """Of predict: a `catdog.inference.PlanSummary`. Of tune: the training that the trials vary, and the space."""


def _dry_run(name: str, config: object) -> DryRun:
    plan = None
    if isinstance(config, TrainConfig):
        from catdog.training import resolve

        config = resolve(config)
    elif isinstance(config, TuneConfig):
        from catdog.tuning import space

        base, found = space.resolved(config)
        plan = {"train": provenance.configuration(base), "space": space.plain(found)}
    elif isinstance(config, PredictConfig):
        from catdog.inference import plan_summary

        plan = asdict(plan_summary(config))
    return DryRun(command=name, config=provenance.configuration(config), plan=plan)


def _to_json(record: Record) -> str:
    return json.dumps(record.to_dict(), indent=2)


class _WithoutSecrets(logging.Formatter):
    """Blots out the passwords and signatures of URLs, whoever logs them."""

    def format(self, record: logging.LogRecord) -> str:
        """The line of a record."""
        return provenance.redact(super().format(record))


def _configure_logging(*, verbose: bool) -> None:
    """Progress to stderr: ours, and with `--verbose` everybody's."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_WithoutSecrets("%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S"))
    logging.basicConfig(handlers=[handler])
    logging.getLogger().setLevel(logging.INFO if verbose else logging.WARNING)
    logging.getLogger("catdog").setLevel(logging.DEBUG if verbose else logging.INFO)


def _configure_libraries(*, verbose: bool) -> None:
    """What must stand before Ray and TensorFlow are imported, here and in processes started from here."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # an embedded Ray does not call home
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    if not verbose:
        streams.quieten_tensorflow()


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Let SIGTERM (`ray job stop`, Kubernetes) unwind the stack, `finally` blocks included."""
    is_stopped = False

    def stop(_signum: int, _frame: FrameType | None) -> NoReturn:
        nonlocal is_stopped
        is_stopped = True
        raise SystemExit(EXIT_TERMINATED)

    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except SystemExit as stopped:
        # Ray, where it was waiting, has put an exit code of its own in the place of ours.
        raise SystemExit(EXIT_TERMINATED if is_stopped else stopped.code) from None
    finally:
        signal.signal(signal.SIGTERM, previous)
