"""The command line: configuration dataclasses to commands, logging, exit codes.

`catdog COMMAND` and `python -m jobs.COMMAND` both end in `main`. Nothing heavy is imported until a job runs, so that
`--help` and `--dry-run` answer at once.

Exit codes: 0 done; 1 the job failed; 2 bad usage or configuration; 3 done, but more images failed than
`--max-failed-fraction` allows; 130 interrupted (Ctrl-C); 143 terminated (SIGTERM).
"""

import contextlib
import dataclasses
import importlib
import json
import logging
import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Annotated, Any, Final, Generic, NoReturn, TypeVar, Union

import tyro

# tyro has no public hook for its parse errors; this one is why pyproject.toml pins tyro exactly.
from tyro import _errors as tyro_errors
from tyro.constructors import ConstructorRegistry, StructConstructorSpec, StructTypeInfo
from tyro.constructors._struct_spec_dataclass import dataclass_rule

from catdog import __version__, streams, summaries
from catdog.config import (
    BenchChaosConfig,
    BenchTrainConfig,
    DemoConfig,
    EvaluateConfig,
    PredictConfig,
    PrepareConfig,
    TrainConfig,
    to_dict,
)
from catdog.errors import CatdogError, UsageError

logger = logging.getLogger(__name__)

ConfigT = TypeVar("ConfigT")
Record = dict[str, Any]

EXIT_OK: Final = 0
EXIT_TOO_MANY_FAILED: Final = 3
EXIT_INTERRUPTED: Final = 128 + signal.SIGINT
EXIT_TERMINATED: Final = 128 + signal.SIGTERM


@dataclass(frozen=True, kw_only=True)
class CommonFlags:
    """What every command takes beside its own configuration."""

    dry_run: bool = False
    """Print the resolved configuration (and, for predict, the plan) as JSON, and do nothing."""

    json: bool = False
    """Print the run record as JSON, alone on stdout, instead of the summary."""

    verbose: bool = False
    """Log the configuration, and what the libraries underneath have to say."""


@dataclass(frozen=True, kw_only=True)
class Invocation(Generic[ConfigT]):
    """One parsed command line."""

    # The empty names put the flags of both side by side, without a prefix.
    config: Annotated[ConfigT, tyro.conf.arg(name="")]
    common: Annotated[CommonFlags, tyro.conf.arg(name="")]


@dataclass(frozen=True)
class Command:
    """A configuration class and the function that runs it, imported only to run."""

    config_type: type
    module: str
    function: str
    summarise: Callable[[Record], list[str]]
    example: str


COMMANDS: Final = {
    "demo": Command(DemoConfig, "catdog.demo", "run_demo", summaries.demo, "catdog demo --output catdog-demo"),
    "prepare": Command(
        PrepareConfig, "catdog.dataset", "prepare", summaries.prepare, "catdog prepare --images train.zip --output data"
    ),
    "train": Command(
        TrainConfig,
        "catdog.training",
        "train",
        summaries.train,
        "catdog train --data data --output model --arch resnet --num-workers 2",
    ),
    "evaluate": Command(
        EvaluateConfig,
        "catdog.evaluation",
        "evaluate",
        summaries.evaluate,
        "catdog evaluate --data data --model model --output evaluation",
    ),
    "predict": Command(
        PredictConfig,
        "catdog.inference",
        "predict",
        summaries.predict,
        "catdog predict --images s3://bucket/new --model s3://bucket/model --output s3://bucket/predictions",
    ),
    "bench train": Command(
        BenchTrainConfig,
        "catdog.bench",
        "bench_train",
        summaries.bench_train,
        "catdog bench train --data data --output bench",
    ),
    "bench chaos": Command(
        BenchChaosConfig,
        "catdog.bench",
        "bench_chaos",
        summaries.bench_chaos,
        "catdog bench chaos --data data --output chaos --num-kills 20",
    ),
}
"""By name: one word, or two of which the first is shared by a group."""

DESCRIPTION: Final = """Cats versus dogs as a distributed batch classification job.

Every path may be local or a URL (s3://bucket/prefix, ...). COMMAND --help lists a command's flags.

Exit codes: 0 done; 1 the job failed; 2 bad usage; 3 done, but too many images failed."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line (default: the process's) and return its exit code.

    Raises:
        SystemExit: after `--help`, and on SIGTERM.
    """
    args = sys.argv[1:] if argv is None else list(argv)
    try:
        with _terminable():
            return _main(args)
    except CatdogError as error:
        print("error:", " ".join(str(error).splitlines()), file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


def _main(args: list[str]) -> int:
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
    logger.debug("catdog %s %s", name, json.dumps(to_dict(config)))
    with streams.stdout_kept_clean():
        run: Callable[[Any], Record] = getattr(importlib.import_module(command.module), command.function)
        record = run(config)
    print(_to_json(record) if flags.json else "\n".join(command.summarise(record)))
    return _exit_code(record)


def parse(args: Sequence[str]) -> tuple[str, Invocation[Any]]:
    """The command's name, its configuration and the common flags.

    Raises:
        UsageError: one line, for anything that is not a valid command line.
        SystemExit: after `--help`.
    """
    chosen, names = _choose(args)
    commands: Any = Union[  # noqa: UP007 - of a tuple, which `|` cannot take
        tuple(
            Annotated[
                Invocation[COMMANDS[name].config_type],  # type: ignore[misc]
                tyro.conf.subcommand(name, description=_description(COMMANDS[name], with_example=name == chosen)),
            ]
            for name in names
        )
    ]
    rest = args[len(chosen.split()) :]
    with tyro_errors.on_parse_error(lambda event: _reject(event, chosen, names, rest)):
        invocation: Invocation[Any] = tyro.cli(
            commands,
            args=[chosen, *rest] if chosen in names else rest,
            prog="catdog",
            description=DESCRIPTION,
            config=(tyro.conf.DisallowNone,),
            registry=_REGISTRY,
        )
    return chosen, invocation


def _choose(args: Sequence[str]) -> tuple[str, list[str]]:
    """The command that a command line begins with, or the group, or nothing; and the commands that are in question."""
    for num_words in (2, 1):
        name = " ".join(args[:num_words])
        if name in COMMANDS:
            return name, list(COMMANDS)
        if group := [command for command in COMMANDS if command.startswith(f"{name} ")]:
            return name, group
    return "", list(COMMANDS)


def _description(command: Command, *, with_example: bool) -> str:
    summary = command.config_type.__doc__ or ""
    return f"{summary}\n\nExample:\n  {command.example}" if with_example else summary


_REGISTRY: Final = ConstructorRegistry()


@_REGISTRY.struct_rule
def _readable_flags(info: StructTypeInfo) -> StructConstructorSpec | None:
    """tyro's own rule, less what tells nobody anything: `(default: None)`, `(default: False)` and `--no-dry-run`."""
    spec = dataclass_rule(info)
    if spec is None:
        return None
    plain = (tyro.conf.arg(help_behavior_hint=""), tyro.conf.FlagCreatePairsOff)
    fields = (
        dataclasses.replace(field, type=Annotated[(field.type, *plain)])  # type: ignore[arg-type]
        if field.default is None or field.default is False
        else field
        for field in spec.fields
    )
    return dataclasses.replace(spec, fields=tuple(fields))


_VALUE_NAMES: Final = {"INT": "an integer", "FLOAT": "a number"}


def _reject(event: tyro_errors.ParseErrorEvent, chosen: str, names: Sequence[str], rest: Sequence[str]) -> NoReturn:
    """Raise tyro's parse error as one line: the rule, then what was received."""
    command = f"catdog {chosen}".rstrip()
    line = shlex.join([*command.split(), *rest])
    unknown: list[str] = []
    match event:
        case (
            tyro_errors.UnrecognizedArgs(tokens=tokens) | tyro_errors.MissingArgs(unrecognized_tokens=[_, *_] as tokens)
        ):
            unknown = tokens
        case tyro_errors.MissingArgs(missing_arguments=missing):
            needed = " and ".join(context.arg.lowered.name_or_flags[0] for context in missing)
            raise UsageError(f"{command} needs {needed}. Received: {line}")
        case tyro_errors.BadValue(argument=argument):
            flag = argument.lowered.name_or_flags[0]
            raise UsageError(f"{flag} needs a value. Received: {line}")
        case tyro_errors.InvalidChoice(argument=argument, value=value, choices=choices):
            flag = argument.lowered.name_or_flags[0]
            raise UsageError(f"{flag} must be one of {', '.join(choices)}. Received: {flag}={value}")
        case tyro_errors.InstantiationFailure(argument=argument) if argument is not None:
            flag = argument.lowered.name_or_flags[0]
            kind = _VALUE_NAMES.get(str(argument.lowered.metavar), f"a {argument.lowered.metavar}")
            raise UsageError(f"{flag} must be {kind}. Received: {flag}={_last_value(rest, flag)}")
    if chosen in names:
        raise UsageError(f"{command} takes only the flags that {command} --help lists. Received: {shlex.join(unknown)}")
    known = ", ".join(name.removeprefix(chosen).strip() for name in names)
    raise UsageError(f"{command} must be given one of the commands {known}. Received: {shlex.join(rest) or 'nothing'}")


def _last_value(args: Sequence[str], flag: str) -> str:
    """What the command line gives as the value of `flag`; where it is given twice, the last one counts."""
    values = ["", ""]
    for position, token in enumerate(args):
        name, equals, value = token.partition("=")
        if name.replace("_", "-") == flag:
            values.append(value if equals else args[position + 1])
    return values[-1]


def _dry_run(name: str, config: object) -> Record:
    if isinstance(config, TrainConfig):
        from catdog.training.trainer import resolve

        config = resolve(config)
    record: Record = {"command": name, "config": to_dict(config)}
    if isinstance(config, PredictConfig):
        from catdog.inference import plan_summary

        record["plan"] = plan_summary(config)
    return record


def _exit_code(record: Record) -> int:
    if not record.get("failed_fraction_exceeded"):
        return EXIT_OK
    books, allowed = record["books"], record["config"]["max_failed_fraction"]
    received = f"{books['error']} of {books['ok'] + books['error']} failed"
    print(
        f"error: --max-failed-fraction allows {allowed:g} of the images to fail. Received: {received}", file=sys.stderr
    )
    return EXIT_TOO_MANY_FAILED


def _to_json(record: Record) -> str:
    return json.dumps(record, indent=2)


def _configure_logging(*, verbose: bool) -> None:
    """Progress to stderr: ours, and with `--verbose` everybody's."""
    logging.basicConfig(stream=sys.stderr, format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S")
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
