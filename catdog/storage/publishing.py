"""Writing files. A reader sees a whole file or none, and an output that holds somebody else's files is refused."""

import contextlib
import fnmatch
import io
import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import IO, Any, Final

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from catdog import failpoints
from catdog.errors import OutputRefusedError, StorageError
from catdog.provenance import redact
from catdog.storage import s3
from catdog.storage.filesystems import OBJECT_STORES, attempt, describe, filesystem
from catdog.storage.listing import list_all_names, list_names
from catdog.storage.reading import read_json
from catdog.storage.urls import absolute, is_local, join, local_path

_TEMPORARY: Final = re.compile(r"\..+\.[0-9a-f]{32}\.tmp")


def publish_bytes(url: str, data: bytes) -> None:
    """Write a file atomically. A file that is there already is replaced.

    Raises:
        StorageError: the file could not be written. Nothing of it is left behind.
    """
    _publish(url, lambda file: file.write(data), lambda fs, path: fs.pipe_file(path, data))


def publish_file(url: str, local_path: str) -> None:
    """Copy a local file, as `publish_bytes`."""

    def copy(target: IO[bytes]) -> None:
        with open(local_path, "rb") as source:
            shutil.copyfileobj(source, target, 2**20)

    _publish(url, copy, lambda fs, path: fs.put_file(local_path, path))


def publish_json(url: str, obj: Any) -> None:
    """Write indented JSON, as `publish_bytes`."""
    publish_bytes(url, (json.dumps(obj, indent=2) + "\n").encode())


def publish_parquet(url: str, table: pa.Table, *, row_group_rows: int | None = None) -> None:
    """Write a Parquet file, as `publish_bytes`. Without `row_group_rows`, all rows are one row group."""
    publish_bytes(url, _parquet(table, row_group_rows))


def create_parquet(url: str, table: pa.Table) -> bool:
    """Write a Parquet file, as `create_bytes`."""
    return create_bytes(url, _parquet(table, None))


def _parquet(table: pa.Table, row_group_rows: int | None) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd", row_group_size=row_group_rows)
    return buffer.getvalue()


def create_bytes(url: str, data: bytes) -> bool:
    """Write a file atomically, unless there is one of this name already. Of many writers, one writes it.

    That holds on a local disk, and on stores with conditional writes; elsewhere the last of several writers that write
    at the same moment does.

    Returns:
        Whether this call has written it. If the answer of a store was lost, it may be False although it has.

    Raises:
        StorageError: the file could not be written. Nothing of it is left behind.
    """
    url = absolute(url)
    with _writing(url):
        if is_local(url):
            return attempt(url, lambda: _place_local(local_path(url), lambda file: file.write(data), _link))
        return attempt(url, lambda: _create_remote(url, data))


def _link(temporary: str, path: str) -> bool:
    """Give a file its name, unless the name is taken. Whether it was not."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    except OSError:  # no hard links here
        if os.path.exists(path):
            return False
        os.replace(temporary, path)
    return True


def _create_remote(url: str, data: bytes) -> bool:
    fs, path = filesystem(url)
    with failpoints.step("publish"):
        if s3.is_s3(fs) or url.partition("://")[0] in OBJECT_STORES:
            return create_object(fs, path, data)
    if fs.exists(path):
        return False
    _publish_by_rename(fs, path, lambda fs, path: fs.pipe_file(path, data))
    return True


def create_object(fs: Any, path: str, data: bytes) -> bool:
    """Write a file of a remote filesystem with a condition: only if there is none. Whether this call has written it."""
    if s3.is_s3(fs):
        return s3.create(fs, path, data)
    try:
        fs.pipe_file(path, data, mode="create")
    except FileExistsError:
        return False
    return True


def delete(url: str, *, patience_s: float | None = None) -> None:
    """Remove a file or a directory that the caller itself wrote. If there is none, nothing happens.

    A URL is a name and never a pattern: `run[1]` is not `run1`. If an object and a prefix have this name, both go.
    `patience_s` is that of `attempt`.
    """
    url = absolute(url)

    def remove() -> None:
        if not is_local(url):
            fs, path = filesystem(url, fresh=True)
            if s3.is_s3(fs):
                s3.delete(fs, url)
            else:
                _remove(fs, path, fs.info(path)["type"])
        elif os.path.isdir(path := local_path(url)) and not os.path.islink(path):
            shutil.rmtree(path)
        else:
            os.remove(path)

    with _writing(url), contextlib.suppress(FileNotFoundError), failpoints.step("delete"):
        attempt(url, remove, patience_s=patience_s)


def _remove(fs: Any, path: str, kind: str) -> None:
    """Remove a file, or a directory with all that is in it. No name is a pattern, as it would be for `fs.rm`."""
    if kind != "directory":
        fs.rm_file(path)
        return
    for entry in fs.ls(path, detail=True):
        _remove(fs, entry["name"], entry["type"])
    # A store of objects has no directories, or loses them with their last file.
    with contextlib.suppress(FileNotFoundError, NotImplementedError):
        fs.rmdir(path)


def delete_temporaries(url: str) -> None:
    """Remove the temporary files directly under a directory. Writers that were killed leave them.

    A writer that is still alive then fails.
    """
    for name in list_all_names(url):
        if _TEMPORARY.fullmatch(name):
            delete(join(url, name))


def refuse_foreign_output(url: str, markers: Sequence[str], *, says: Mapping[str, str] | None = None) -> None:
    """Refuse an output directory that holds files, but none of those that the command writes.

    Args:
        url: the output directory.
        markers: patterns of the names that the command writes directly under `url`: `("dataset.json", "_runs")`.
        says: fields that the JSON object in one of these files must have. For names that prove nothing by themselves.

    Raises:
        OutputRefusedError: none of the files is the command's, or the output is itself a file.
    """
    url = absolute(url)
    if is_local(url) and os.path.isfile(local_path(url)):
        raise OutputRefusedError(f"--output must be a directory. Received: --output={redact(url)}, which is a file")
    names = list_names(url)
    ours = [name for name in names if any(fnmatch.fnmatchcase(name, marker) for marker in markers)]
    if names and not any(says is None or _says(join(url, name), says) for name in ours):
        held = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
        raise OutputRefusedError(
            "--output must be empty, or hold what this command wrote earlier. "
            f"Received: --output={redact(url)}, which holds {held}"
        )


def _says(url: str, fields: Mapping[str, str]) -> bool:
    """Whether a file holds a JSON object with these fields."""
    try:
        found = read_json(url)
    except (ValueError, IsADirectoryError):
        return False
    return isinstance(found, dict) and fields.items() <= found.items()


def _publish(url: str, write: Callable[[IO[bytes]], Any], put: Callable[[Any, str], Any]) -> None:
    url = absolute(url)
    with _writing(url):
        if is_local(url):
            attempt(url, lambda: _place_local(local_path(url), write, _replace))
        else:
            attempt(url, lambda: _publish_remote(url, put))


def _replace(temporary: str, path: str) -> bool:
    os.replace(temporary, path)
    return True


def _place_local(path: str, write: Callable[[IO[bytes]], Any], place: Callable[[str, str], bool]) -> bool:
    """Write a temporary file, and let `place` give it its name; whether it did."""
    directory, name = os.path.split(path)
    os.makedirs(directory, exist_ok=True)
    temporary = os.path.join(directory, _temporary(name))
    try:
        with open(temporary, "xb") as file:
            with failpoints.step("write"):
                write(file)
                file.flush()
            with failpoints.step("sync"):
                os.fsync(file.fileno())
        with failpoints.step("publish"):
            is_placed = place(temporary, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.remove(temporary)
    if is_placed:
        _sync_directory(directory)
    return is_placed


def _publish_remote(url: str, put: Callable[[Any, str], Any]) -> None:
    fs, path = filesystem(url)
    if url.partition("://")[0] in OBJECT_STORES:
        with failpoints.step("publish"):
            put(fs, path)
        return
    _publish_by_rename(fs, path, put)


def _publish_by_rename(fs: Any, path: str, put: Callable[[Any, str], Any]) -> None:
    """Write under a temporary name, then rename."""
    directory, _, name = path.rpartition("/")
    temporary = f"{directory}/{_temporary(name)}"
    fs.makedirs(directory, exist_ok=True)
    try:
        put(fs, temporary)
        if type(fs).mv is fsspec.AbstractFileSystem.mv:  # it copies, and takes the names for globs
            fs.cp_file(temporary, path)
            fs.rm_file(temporary)
        else:
            fs.mv(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            fs.rm_file(temporary)
        raise


def _temporary(name: str) -> str:
    return f".{name}.{uuid.uuid4().hex}.tmp"


def _sync_directory(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _writing(url: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageError(f"{redact(url)} cannot be written: {describe(error)}") from error
