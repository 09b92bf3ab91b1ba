"""What a record says about its making: versions, machine, configuration and errors, all without secrets."""

import dataclasses
import importlib.metadata
import platform
import re
from typing import Any, Final, TypedDict

from catdog import __version__, hardware

_PACKAGES: Final = (
    "duckdb",
    "ImageHash",
    "keras",
    "numpy",
    "pillow",
    "pillow-heif",
    "pyarrow",
    "ray",
    "scipy",
    "tensorflow",
)
"""Packages whose versions can change a result."""

_USER_INFO: Final = re.compile(r"(?<=://)[^/@\s]+@")
_HOOK: Final = re.compile(r"(?<=://hooks\.slack\.com/)\S+")
_QUERY: Final = re.compile(r"(?<=[^/\s])\?[^\s:]*(X-Amz-Signature|sig|token|key)=[^\s]*", re.IGNORECASE)


class Host(TypedDict):
    """The machine that a record was made on, without its name: records are published."""

    cpu: str
    num_cores: int
    """Cores that the process could use."""

    system: str


def versions() -> dict[str, str]:
    """Name → version of catdog, of Python, and of the installed packages that can change a result."""
    found = {"catdog": __version__, "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def host() -> Host:
    """The machine that this process runs on."""
    return Host(cpu=hardware.cpu_name(), num_cores=hardware.num_cores(), system=platform.platform())


def configuration(config: object) -> dict[str, Any]:
    """The fields of a job's configuration as plain JSON values, with the secrets of its URLs blotted out.

    Of a field whose metadata says `secret`, only the host of the URL stays.
    """
    if not dataclasses.is_dataclass(config) or isinstance(config, type):
        raise TypeError(f"configuration takes a configuration dataclass. Received: {config!r}")
    secrets = {field.name for field in dataclasses.fields(config) if field.metadata.get("secret")}
    return {
        name: secret(value) if name in secrets and value is not None else _redacted(value)
        for name, value in dataclasses.asdict(config).items()
    }


def _redacted(value: Any) -> Any:
    if isinstance(value, str):
        return redact(value)
    return [_redacted(item) for item in value] if isinstance(value, (list, tuple)) else value


def secret(url: str) -> str:
    """A URL of which all but the host is secret, as that of a web hook.

    Example:
        >>> secret("https://hooks.example.org/services/T0/B0/XXX")
        'https://hooks.example.org/***'
    """
    scheme, slashes, rest = url.partition("://")
    return f"{scheme}://{rest.partition('/')[0].rpartition('@')[2].partition('?')[0]}/***" if slashes else "***"


def redact(text: str) -> str:
    """A URL, or a message that contains URLs, without passwords and signatures.

    Example:
        >>> redact("https://me:secret@host/a.jpg?X-Amz-Signature=0123")
        'https://***@host/a.jpg?***'
    """
    return _QUERY.sub("?***", _HOOK.sub("***", _USER_INFO.sub("***@", text)))


def one_line(error: BaseException | str, max_chars: int = 300) -> str:
    """The message of an error as one line of valid Unicode, cut after `max_chars`; its class if it has no message.

    Example:
        >>> one_line(ValueError("two\\nlines"))
        'two lines'
    """
    text = " ".join(str(error).split()) or type(error).__name__
    # A file name in the message need not be UTF-8.
    return text.encode("utf-8", "backslashreplace").decode("utf-8")[:max_chars]
