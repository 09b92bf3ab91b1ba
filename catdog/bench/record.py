"""What the records of all benches have in common, and the beginning and the end of every bench."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Final, Protocol, TypeVar

from catdog import provenance, storage
from catdog.errors import UsageError
from catdog.provenance import Host
from catdog.ray_session import cluster_address
from catdog.records import Record

_LAST: Final = ("host", "load_average", "config", "versions", "duration_s")


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchRecord(Record):
    """What a bench found. In its JSON the fields from `host` to `duration_s` come last."""

    file_name: ClassVar[str]
    """The file of the output that holds the record. It marks the output as this command's."""

    command: str = "bench"
    output: str
    host: Host
    load_average: float
    """Of the machine's last minute before the start."""

    config: dict[str, Any]
    versions: dict[str, str]
    duration_s: float

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values: what was found, and then how."""
        found = super().to_dict()
        how = {name: found.pop(name) for name in _LAST}
        return found | how


class _Config(Protocol):
    @property
    def output(self) -> str: ...


_RecordT = TypeVar("_RecordT", bound=BenchRecord)


class Begun:
    """A bench that has begun.

    Attributes:
        output: the URL of the directory that gets the record.
    """

    def __init__(self, kind: type[BenchRecord], config: _Config) -> None:
        """Begin, and refuse an output that is not this bench's.

        Raises:
            OutputRefusedError: the output holds something else.
        """
        self._started, self._load_average = time.monotonic(), os.getloadavg()[0]
        self._kind, self._config = kind, config
        self.output = storage.absolute(config.output)
        storage.refuse_foreign_output(self.output, (kind.file_name,), says={"command": kind.command})

    def claim(self, parts: Sequence[str]) -> list[str]:
        """Mark the output as this bench's before there is a record, and delete these directories of an earlier one.

        Returns the URLs of the directories.
        """
        urls = [storage.join(self.output, part) for part in parts]
        for url in urls:
            storage.delete(url)
        storage.publish_json(storage.join(self.output, self._kind.file_name), {"command": self._kind.command})
        return urls

    def common(self, more_versions: Mapping[str, str] | None = None) -> dict[str, Any]:
        """The fields of the record that every bench fills alike."""
        return {
            "output": provenance.redact(self.output),
            "host": provenance.host(),
            "load_average": self._load_average,
            "config": provenance.configuration(self._config),
            "versions": {**provenance.versions(), **(more_versions or {})},
            "duration_s": round(time.monotonic() - self._started, 1),
        }

    def publish(self, record: _RecordT) -> _RecordT:
        """Write the record, and return it."""
        storage.publish_json(storage.join(self.output, record.file_name), record.to_dict())
        return record


def refuse_cluster(kind: type[BenchRecord]) -> None:
    """Refuse to kill processes where there is a cluster.

    Raises:
        UsageError: `RAY_ADDRESS` names one.
    """
    if (address := cluster_address(None)) is not None:
        raise UsageError(
            f"{kind.command} kills processes of this machine, and must have a Ray of its own. "
            f"Received: RAY_ADDRESS={provenance.redact(address)}"
        )
