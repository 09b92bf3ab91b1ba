"""Reading PyTorch's `.pth` state dicts without PyTorch, and without running anything that they hold.

A `.pth` file is a pickle, and unpickling usually calls whatever the file names. A state dict needs only three kinds of
names: its container, its tensors and their storages. For these the unpickler here makes plain data; it refuses any
other name. There are two layouts: a zip archive (PyTorch 1.6 and later), and before that several pickles followed by
the storages.
"""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from catdog.errors import UsageError

LEGACY_MAGIC: Final = 0x1950A86A20F9469CFC6C
"""torch.serialization.MAGIC_NUMBER."""

LEGACY_PROTOCOL: Final = 1001
"""torch.serialization.PROTOCOL_VERSION."""

DTYPES: Final[dict[str, np.dtype[Any]]] = {"torch.FloatStorage": np.dtype("<f4"), "torch.LongStorage": np.dtype("<i8")}
"""Type of a storage → dtype. A state dict has floats for weights and integers for BatchNorm's counts of batches."""

_DAMAGED: Final = (
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    struct.error,
    zlib.error,
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""The exceptions that are documented for reading bytes that are no pickle or zip archive, or a damaged one."""


class _ForbiddenError(Exception):
    """The pickle names something that a state dict does not need."""


@dataclass(frozen=True)
class _Storage:
    """A named block of bytes in the file, of which tensors are views."""

    key: str
    dtype: np.dtype[Any]
    num_elements: int


@dataclass(frozen=True)
class _Tensor:
    """A view of a storage. The offset and the strides count elements."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def array(self, data: bytes) -> npt.NDArray[Any]:
        """The tensor as a view of `data`, the bytes of its storage."""
        if len(data) != self.storage.num_elements * self.storage.dtype.itemsize:
            raise ValueError(f"storage {self.storage.key} has {len(data)} bytes")
        sizes = (self.offset, *self.shape, *self.strides)
        if len(self.shape) != len(self.strides) or any(type(size) is not int or size < 0 for size in sizes):
            raise ValueError(f"tensor of shape {self.shape} with strides {self.strides}")
        last = self.offset + sum((n - 1) * stride for n, stride in zip(self.shape, self.strides, strict=True))
        if 0 not in self.shape and last >= self.storage.num_elements:
            raise ValueError(f"tensor of shape {self.shape} reaches beyond its storage")
        itemsize = self.storage.dtype.itemsize
        return np.ndarray(
            self.shape,
            self.storage.dtype,
            buffer=data,
            offset=self.offset * itemsize,
            strides=tuple(stride * itemsize for stride in self.strides),
        )


class _Unpickler(pickle._Unpickler):
    """Unpickles numbers, strings, `_Tensor`s and ordered dicts of them, and nothing else.

    Its base class is the unpickler written in Python. The one in C allocates as much memory as a damaged index into its
    memo asks for.
    """

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)

        # Each file gets a new function, because a pickle may also set attributes of the objects that it is given.
        def rebuild(storage: _Storage, offset: int, shape: Any, strides: Any, *_: Any) -> _Tensor:
            return _Tensor(storage, offset, shape, strides)

        self._names: dict[str, Any] = {
            "collections.OrderedDict": OrderedDict,
            "torch._utils._rebuild_tensor_v2": rebuild,
            **{name: name for name in DTYPES},
        }

    def find_class(self, module: str, name: str) -> Any:
        full_name = f"{module}.{name}"
        if full_name not in self._names:
            raise _ForbiddenError(full_name)
        return self._names[full_name]

    def persistent_load(self, pid: Any) -> _Storage:
        """The storage that a persistent id names.

        The id is ("storage", type, key, device, number of elements), in the old layout with None at its end.
        """
        kind, storage_type, key, _, num_elements = pid[:5]
        if kind != "storage" or not isinstance(key, str) or type(num_elements) is not int or any(pid[5:]):
            raise ValueError(f"persistent id {pid!r}")
        return _Storage(key, DTYPES[storage_type], num_elements)


def read_state_dict(data: bytes) -> dict[str, npt.NDArray[Any]]:
    """The tensors of a `.pth` file by name, float32 or int64, read-only, in PyTorch's axis order.

    Raises:
        UsageError: the file is damaged, is no state dict, or names something that a state dict does not need. A program
            that unpickled such a file would import and call what it names.
    """
    try:
        tensors, read_storage = (_read_zip if data.startswith(b"PK\x03\x04") else _read_legacy)(data)
        if not isinstance(tensors, dict):
            raise ValueError(f"a {type(tensors).__name__} at the top")
        arrays = {}
        for name, tensor in tensors.items():
            if not isinstance(name, str) or not isinstance(tensor, _Tensor):
                raise ValueError(f"{name!r} is a {type(tensor).__name__}")
            arrays[name] = tensor.array(read_storage(tensor.storage.key))
    except _ForbiddenError as error:
        raise UsageError(
            "a .pth file must hold a state dict: float32 or int64 tensors in an OrderedDict. "
            f"Received: one that names {error}"
        ) from error
    except _DAMAGED as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UsageError(
            "a .pth file must hold a state dict, as PyTorch's torch.save writes it. "
            f"Received: {len(data)} bytes that hold none ({reason})"
        ) from error
    return arrays


def is_torch_file(data: bytes) -> bool:
    """Whether this looks like what `torch.save` writes: a zip archive or a pickle of protocol 2."""
    return data.startswith((b"PK\x03\x04", b"\x80\x02"))


def _read_zip(data: bytes) -> tuple[Any, Callable[[str], bytes]]:
    """The unpickled object, and a function from the key of a storage to its bytes."""
    archive = zipfile.ZipFile(io.BytesIO(data))
    (pickled,) = (name for name in archive.namelist() if name.count("/") == 1 and name.endswith("/data.pkl"))
    folder = pickled.removesuffix("data.pkl")
    if f"{folder}byteorder" in archive.namelist() and archive.read(f"{folder}byteorder") != b"little":
        raise ValueError("big-endian tensors")
    return _Unpickler(io.BytesIO(archive.read(pickled))).load(), lambda key: archive.read(f"{folder}data/{key}")


def _read_legacy(data: bytes) -> tuple[Any, Callable[[str], bytes]]:
    """As `_read_zip`, for the layout before PyTorch 1.6."""
    file = io.BytesIO(data)
    magic, protocol, system = (_Unpickler(file).load() for _ in range(3))
    if magic != LEGACY_MAGIC or protocol != LEGACY_PROTOCOL or not system["little_endian"]:
        raise ValueError("another magic number, protocol or byte order")
    tensors = _Unpickler(file).load()
    keys = _Unpickler(file).load()
    dtypes = {tensor.storage.key: tensor.storage.dtype for tensor in tensors.values()}
    storages: Mapping[str, bytes] = {key: _read_storage(file, dtypes[key].itemsize) for key in keys}
    return tensors, storages.__getitem__


def _read_storage(file: io.BytesIO, itemsize: int) -> bytes:
    (num_elements,) = struct.unpack("<q", file.read(8))
    if num_elements < 0:
        raise ValueError(f"a storage of {num_elements} elements")
    return file.read(num_elements * itemsize)
