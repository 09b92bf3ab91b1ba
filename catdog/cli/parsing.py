"""Turns command lines into configurations. Only this module uses argparse, the command-line library.

argparse splits a command line into flags and values and lays out the help. The flags are made here from the fields of
the configuration classes, and every error is one line written here: the rule, then what was received.
"""

import argparse
import dataclasses
import functools
import os
import re
import shlex
import shutil
import textwrap
import typing
from collections.abc import Sequence
from dataclasses import MISSING, dataclass
from types import NoneType, UnionType
from typing import Any, Final, Generic, TypeVar, Union

import docstring_parser

from catdog.cli.commands import COMMANDS
from catdog.config import flag
from catdog.errors import UsageError

ConfigT = TypeVar("ConfigT")

DESCRIPTION: Final = (
    "Cats versus dogs as a distributed batch classification job.",
    "Every path may be local or a URL (s3://bucket/prefix, ...). COMMAND --help lists a command's flags.",
    "Exit codes: 0 done; 1 the job failed; 2 bad usage; 3 done, but too many images failed.",
)
"""The paragraphs that `catdog --help` opens with."""


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

    config: ConfigT
    common: CommonFlags


def parse(args: Sequence[str]) -> tuple[str, Invocation[Any]]:
    """The command's name, its configuration and the common flags.

    Raises:
        UsageError: one line, for anything that is not a valid command line.
        SystemExit: after `--help`.
    """
    chosen = _choose(args)
    rest = args[len(chosen.split()) :]
    if chosen in COMMANDS:
        return chosen, _parse_flags(chosen, rest)
    members = [name for name in COMMANDS if name.startswith(f"{chosen} ".lstrip())]
    if rest and rest[0] in {"-h", "--help"}:
        _print_commands(chosen, members)
        raise SystemExit(0)
    known = ", ".join(name.removeprefix(chosen).strip() for name in members)
    received = shlex.join(rest) or "nothing"
    raise UsageError(f"{_program(chosen)} must be given one of the commands {known}. Received: {received}")


def _choose(args: Sequence[str]) -> str:
    """Return the command that a command line begins with, else the first word of a group of commands, else `""`."""
    for num_words in (2, 1):
        name = " ".join(args[:num_words])
        if name in COMMANDS or any(command.startswith(f"{name} ") for command in COMMANDS):
            return name
    return ""


def _program(name: str) -> str:
    return f"catdog {name}".rstrip()


def _print_commands(group: str, members: Sequence[str]) -> None:
    parser = _parser(f"{_program(group)} COMMAND [FLAGS]", "\n\n".join(map(_wrap, DESCRIPTION)))
    if not group:
        parser.add_argument("--version", action="store_true", help="print the version and exit")
    listed = parser.add_argument_group("commands")
    for name in members:
        listed.add_argument(name, help=COMMANDS[name].config_type.__doc__)
    parser.print_help()


def _parse_flags(name: str, args: Sequence[str]) -> Invocation[Any]:
    command, program = COMMANDS[name], _program(name)
    line = shlex.join([*program.split(), *args])

    summary = command.config_type.__doc__ or ""
    parser = _parser(program, f"{_wrap(summary)}\n\nExample:\n  {command.example}")
    own, common = _add_flags(parser, command.config_type), _add_flags(parser, CommonFlags)
    required = [own[field.name] for field in dataclasses.fields(command.config_type) if field.default is MISSING]
    needs = [" ".join([*action.option_strings[:1], str(action.metavar)]) for action in required]
    parser.usage = " ".join([program, *needs, "[FLAGS]"])

    # `--batch_size` is `--batch-size`, too.
    dashed = [re.sub(r"^--[\w-]+", lambda match: match[0].replace("_", "-"), token) for token in args]
    try:
        given, unknown = parser.parse_known_args(dashed)
    except argparse.ArgumentError as error:
        takes_value = {_name(action) for action in (own | common).values() if action.nargs != 0}
        rule = "needs a value" if error.argument_name in takes_value else "takes no value"
        raise UsageError(f"{error.argument_name} {rule}. Received: {line}") from None
    if unknown:
        rule = f"{program} takes only the flags that {program} --help lists"
        raise UsageError(f"{rule}{_about_quotes(unknown)}. Received: {shlex.join(unknown)}")
    if missing := [_name(action) for action in required if action.dest not in given]:
        raise UsageError(f"{program} needs {' and '.join(missing)}. Received: {line}")

    values: dict[str, Any] = {
        field: tuple(value) if isinstance(value, list) else value for field, value in vars(given).items()
    }
    return Invocation(
        config=command.config_type(**{field: values[field] for field in own if field in values}),
        common=CommonFlags(**{field: values[field] for field in common if field in values}),
    )


def _about_quotes(unknown: Sequence[str]) -> str:
    """A word about quotes, if a shell may have turned a glob into these names of files."""
    is_expanded = all(not token.startswith("-") and os.path.exists(token) for token in unknown)
    return ", and a glob in quotes: the shell replaces one without" if is_expanded else ""


def _name(action: argparse.Action) -> str:
    """How a user names a flag, or a value that stands without one."""
    return action.option_strings[0] if action.option_strings else str(action.metavar)


def _parser(usage: str, description: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(
        usage=usage,
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
        exit_on_error=False,
    )


def _wrap(paragraph: str) -> str:
    """Break the lines of a paragraph at the width at which argparse breaks the rest of the help."""
    return textwrap.fill(paragraph, shutil.get_terminal_size().columns - 2)


def _add_flags(parser: argparse.ArgumentParser, config_type: type) -> dict[str, argparse.Action]:
    """Add a flag for every field of a dataclass, with the field's docstring as its help. Return the flags by field."""
    hints = typing.get_type_hints(config_type)
    docs = {param.arg_name: param.description for param in docstring_parser.parse_from_object(config_type).params}
    return {
        field.name: _add_flag(parser, field, hints[field.name], docs[field.name] or "")
        for field in dataclasses.fields(config_type)
    }


def _add_flag(
    parser: argparse.ArgumentParser, field: dataclasses.Field[Any], kind: Any, description: str
) -> argparse.Action:
    """Add the flag of one field.

    The field's type, `kind`, is bool, T or `tuple[T, ...]`, with or without `| None`; T is str, int, float or a Literal
    of strings. A tuple may be `| T`, too, for callers in Python. A field whose metadata says `positional` is a value
    that stands without a flag.
    """
    if typing.get_origin(kind) in {Union, UnionType}:
        kinds = [each for each in typing.get_args(kind) if each is not NoneType]
        kind = next((each for each in kinds if typing.get_origin(each) is tuple), kinds[0])
    if field.metadata.get("positional"):
        return parser.add_argument(field.name, metavar=field.name.upper(), nargs="?", help=description)
    name, default = flag(field.name), field.default
    takes_many = typing.get_origin(kind) is tuple
    if default is MISSING:
        description += " (required)"
    elif default is not None and default is not False and default != ():
        description += f" (default: {' '.join(map(str, default)) if takes_many else default})"
    description = description.replace("%", "%%")
    if kind is bool:
        names = [name, name.replace("--", "--no-", 1)] if default else [name]
        return parser.add_argument(*names, dest=field.name, action=_Once, nargs=0, help=description)
    if takes_many:
        kind, _ = typing.get_args(kind)
    choices = ",".join(typing.get_args(kind))
    return parser.add_argument(
        name,
        dest=field.name,
        action="extend" if takes_many else _Once,
        nargs="+" if takes_many else None,
        type=functools.partial(_convert, name, kind),
        metavar=f"{{{choices}}}" if choices else kind.__name__.upper(),
        help=description,
    )


def _convert(name: str, kind: Any, text: str) -> Any:
    """Return `text` as a value of type `kind`: str, int, float or a Literal of strings."""
    if choices := typing.get_args(kind):
        if text in choices:
            return text
        rule = f"one of {', '.join(choices)}"
    else:
        try:
            return kind(text)
        except ValueError:
            rule = "an integer" if kind is int else "a number"
    raise UsageError(f"{name} must be {rule}. Received: {name}={text}")


class _Once(argparse.Action):
    """Stores the value of a flag and refuses the same flag again.

    A switch is a flag that takes no value (`nargs=0`): its first name means True, its second, `--no-...`, False.
    """

    def __call__(
        self, _parser: object, namespace: argparse.Namespace, values: Any, option_string: str | None = None
    ) -> None:
        """Store the value of the flag that argparse has just read."""
        name = self.option_strings[0]
        value = option_string == name if self.nargs == 0 else values
        if self.dest in namespace:
            received = " ".join(self._spell(each) for each in (getattr(namespace, self.dest), value))
            raise UsageError(f"{name} must be given once. Received: {received}")
        setattr(namespace, self.dest, value)

    def _spell(self, value: Any) -> str:
        if self.nargs == 0:
            return self.option_strings[0 if value else 1]
        return f"{self.option_strings[0]}={value}"
