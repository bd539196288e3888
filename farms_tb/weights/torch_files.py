"""Read files by `torch.save` without running anything that they hold.

Such a file is a pickle, a small program that builds objects, and the entries of its tensors. The program is run by
an interpreter that knows tensors and plain containers; whatever else it names (classes of configuration libraries,
paths, optimizers) becomes a `Skipped`, an object without behaviour. Nothing is imported, and no foreign function
called. A tensor becomes a `TorchTensor`, which says where its entries are; they are read when they are asked for.
"""

from __future__ import annotations

import io
import math
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from farms_tb.weights.names import quantised
from farms_tb.weights.stored import OpenedFile, StoredTensor, shape_problem
from farms_tb.weights.values import MAKE_DENSE, NESTED, NO_VALUES

_MAGIC = 0x1950A86A20F9469CFC6C
"""First number of a file by a version of torch before 1.6."""

_LOCAL_HEADER = 30
"""Bytes in front of the name of each record of a zip file."""

_RUNS_PROGRAMS = ("os", "posix", "nt", "subprocess", "pty", "socket", "shutil", "runpy", "importlib", "webbrowser")
_BUILTINS_THAT_RUN = ("eval", "exec", "compile", "open", "__import__", "input", "breakpoint")


class RefusedError(ValueError):
    """The pickle names something that no checkpoint needs; the message is its full name."""


class Skipped:
    """Stands for an object of a class that is not loaded: takes any arguments, items and state, and drops them."""

    full_name = ""

    def __new__(cls, *_: Any, **__: Any) -> Skipped:
        """Make one, whatever the arguments."""
        return object.__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __call__(self, *_: Any, **__: Any) -> Skipped:
        """Return itself: a pickle may call what a foreign function would have returned."""
        return self

    def __setstate__(self, state: object) -> None:
        """Drop attributes."""

    def __setitem__(self, key: object, value: object) -> None:
        """Drop an item of a foreign mapping."""

    def append(self, item: object) -> None:
        """Drop an item of a foreign sequence."""

    def extend(self, items: object) -> None:
        """Drop the items of a foreign sequence."""


@cache
def _skipped(full_name: str) -> type[Skipped]:
    return type("Skipped", (Skipped,), {"full_name": full_name})


@dataclass(frozen=True, slots=True)
class _Storage:
    """Where the entries of one or more tensors are: a record of the file, and the type that its numbers have."""

    key: str
    dtype: torch.dtype
    entries: int


@dataclass(frozen=True, slots=True)
class TorchTensor:
    """A tensor in a file, not read.

    Attributes:
        shape: its shape.
        dtype: the type of its entries.
        stride: its strides, in entries.
        offset: its first entry in the storage.
        storage: where its entries are; None where they are not read.
        problem: why it cannot be read; empty where it can.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    stride: tuple[int, ...] = ()
    offset: int = 0
    storage: _Storage | None = None
    problem: str = ""


@dataclass(frozen=True)
class _Record:
    """A record of a file: how many bytes it has, and what finds the first of them."""

    size: int
    start: Callable[[], int]


@dataclass(frozen=True)
class TorchFile:
    """The content of a file by `torch.save`.

    Attributes:
        content: what was saved: plain values and containers, with a `TorchTensor` for each tensor and a `Skipped`
            for everything else.
        file: the file.
        records: where in the file each storage is.
    """

    content: Any
    file: OpenedFile
    records: Mapping[str, _Record]

    def read(self, tensor: TorchTensor) -> Tensor:
        """Read the entries of one tensor.

        Raises:
            ValueError: the file is cut short or damaged, or has changed.
        """
        storage = tensor.storage
        if storage is None:
            return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        start = self.records[storage.key].start() + tensor.offset * tensor.dtype.itemsize
        return self.file.tensor(start, tensor.dtype, tensor.shape, tensor.stride)

    def problem(self, tensor: TorchTensor) -> str:
        """Say why a tensor cannot be read: above all, one that claims more entries than the file has."""
        if tensor.problem or tensor.storage is None or 0 in tensor.shape:
            return tensor.problem
        if shape_problem(tensor.shape):
            return shape_problem(tensor.shape)
        record = self.records.get(tensor.storage.key)
        available = 0 if record is None else record.size // tensor.dtype.itemsize
        entries = math.prod(tensor.shape)
        last = tensor.offset + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride, strict=True))
        if entries > available or last >= available:
            return f"damaged: it claims {entries} entries, the file has {available} for it"
        return ""


def open_torch_file(path: Path) -> TorchFile:
    """Read the structure of a file by `torch.save`, of any version of torch.

    Args:
        path: the file.

    Returns:
        Its content; entries of tensors are read later, one tensor at a time.

    Raises:
        ValueError: it is no such file, or cut short or damaged, or holds a program or a whole module.
        OSError: the file cannot be opened.
    """
    file = OpenedFile.at(path)
    try:
        with path.open("rb") as opened:
            return _open_zip(file, opened) if zipfile.is_zipfile(opened) else _open_legacy(file, opened)
    except RefusedError as error:
        raise ValueError(holds_more(path, str(error))) from error
    except Exception as error:
        if isinstance(error, OSError) and error.filename is not None:
            raise  # The file is gone, or may not be read. A damaged one leads to positions that it does not have.
        raise ValueError(
            f"cannot read {path}: no checkpoint, or one that is empty, cut short or damaged ({_reason(error)})"
        ) from error


def read_torch_file(path: Path) -> Any:
    """Return what a file by `torch.save` holds: plain values, and a stand-in for each tensor and foreign object.

    Raises:
        ValueError, OSError: see `open_torch_file`.
    """
    found = open_torch_file(path).content
    if isinstance(found, Skipped):
        raise ValueError(holds_more(path, found.full_name))
    return found


def holds_more(path: Path, what: str) -> str:
    """Return the message that refuses a file because of `what` it holds."""
    named = f" ({what})" if what else ""
    return (
        f"{path} holds more than weights{named}, and loading that could run anything: save the state dict "
        "instead, by torch.save(model.state_dict(), path) or as safetensors; or, if you trust the file, "
        "load it yourself with torch.load(path, weights_only=False) and call analyze(model)"
    )


def _reason(error: Exception) -> str:
    if isinstance(error, (pickle.UnpicklingError, EOFError)):
        return "no pickle, or half of one"
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]:.200}"


def _open_zip(file: OpenedFile, opened: BinaryIO) -> TorchFile:
    with zipfile.ZipFile(opened) as archive:
        records = {info.filename: info for info in archive.infolist()}
        pickles = [name for name in records if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise ValueError("a zip file without one data.pkl")
        root = pickles[0].removesuffix("data.pkl")
        if any(name.startswith(f"{root}code/") for name in records):
            raise RefusedError
        if f"{root}byteorder" in records and _small(archive, records[f"{root}byteorder"]) != b"little":
            raise ValueError("numbers in big-endian order")
        content = _Interpreter(io.BytesIO(_small(archive, records[pickles[0]]))).load()
    data = f"{root}data/"
    stored = {name: info for name, info in records.items() if name.startswith(data)}
    return TorchFile(content, file, {name.removeprefix(data): _record(file, i) for name, i in stored.items()})


def _small(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    """Read a record that is not compressed: a small file must not become a large one."""
    if info.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{info.filename} is compressed")
    return archive.read(info)


def _record(file: OpenedFile, info: zipfile.ZipInfo) -> _Record:
    """Return where the bytes of a record of a zip file are: behind a header of variable length."""

    def start() -> int:
        header = file.read(info.header_offset, _LOCAL_HEADER)
        name_length, extra_length = struct.unpack("<HH", header[26:30])
        return info.header_offset + _LOCAL_HEADER + int(name_length) + int(extra_length)

    stored = info.compress_type == zipfile.ZIP_STORED
    return _Record(min(info.file_size, file.size - info.header_offset) if stored else 0, start)


def _open_legacy(file: OpenedFile, opened: BinaryIO) -> TorchFile:
    """Read a file of before torch 1.6: five pickles, then for each storage a number of entries and the entries."""
    opened.seek(0)
    magic = _Interpreter(opened).load()
    if isinstance(magic, Skipped):
        raise RefusedError(magic.full_name)
    if magic != _MAGIC:
        raise ValueError("a pickle of something else")
    _version, _machine = _Interpreter(opened).load(), _Interpreter(opened).load()
    interpreter = _Interpreter(opened)
    content, keys = interpreter.load(), _Interpreter(opened).load()
    records: dict[str, _Record] = {}
    position = opened.tell()
    for key in keys:
        opened.seek(position)
        (entries,) = struct.unpack("<q", opened.read(8))
        size = entries * interpreter.storages[str(key)].dtype.itemsize
        if entries < 0 or position + 8 + size > file.size:
            raise ValueError("it ends before its tensors")
        records[str(key)] = _Record(size, partial(int, position + 8))
        position += 8 + size
    return TorchFile(content, file, records)


class _Interpreter(pickle._Unpickler):  # type: ignore[name-defined,misc]
    """Runs a pickle with nothing but tensors and plain containers in its vocabulary.

    The interpreter in Python is used: the one in C takes memory for as many entries as a number in the file says.
    """

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file)
        self.storages: dict[str, _Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        """Return what stands for a global of the pickle; nothing is imported."""
        module = "builtins" if module == "__builtin__" else module
        root = module.partition(".")[0]
        if root in _RUNS_PROGRAMS or (root == "builtins" and name in _BUILTINS_THAT_RUN):
            raise RefusedError(f"{module}.{name}")
        known = _GLOBALS.get((module, name))
        if known is not None:
            return known
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if module in ("torch", "torch.storage", "torch.cuda") and name.endswith("Storage"):
            return _StorageType(_STORAGE_TYPES.get(name))
        return _skipped(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> _Storage:
        """Return the storage that a tensor's entries are in."""
        if isinstance(pid, str):
            raise RefusedError("a pickle of protocol 0")
        kind, storage_type, key, _device, entries = pid[:5]
        if kind != "storage" or not isinstance(storage_type, _StorageType) or type(entries) is not int:
            raise pickle.UnpicklingError("a reference to something else than a storage")
        storage = _Storage(str(key), storage_type.dtype or torch.uint8, entries)
        self.storages[storage.key] = storage
        return storage


@dataclass(frozen=True, slots=True)
class _StorageType:
    """Which numbers a storage holds; None for one that leaves that to its tensors."""

    dtype: torch.dtype | None


_STORAGE_TYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
}


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> TorchTensor:
    return _typed_tensor(storage, offset, size, stride, False, None, storage.dtype)


def _typed_tensor(
    storage: Any, offset: Any, size: Any, stride: Any, _grad: Any, _hooks: Any, dtype: Any, *_: Any
) -> TorchTensor:
    shape, steps = tuple(size), tuple(stride)
    numbers = (offset, *shape, *steps)
    valid = isinstance(storage, _Storage) and isinstance(dtype, torch.dtype) and len(shape) == len(steps)
    if not valid or not all(type(number) is int and number >= 0 for number in numbers):
        raise pickle.UnpicklingError("a tensor of impossible shape")
    return TorchTensor(shape, dtype, steps, offset, storage)


def _parameter(data: Any, *_: Any) -> Any:
    return data


def _rebuilt(function: Any, _type: Any, args: Any, _state: Any) -> Any:
    return function(*args)


def _on_meta(dtype: Any, size: Any, stride: Any, *_: Any) -> TorchTensor:
    return TorchTensor(tuple(size), dtype, tuple(stride), problem=NO_VALUES)


def _of_subclass(cls: Any, dtype: Any, size: Any, *_: Any) -> TorchTensor:
    name = getattr(cls, "full_name", "").rpartition(".")[2]
    return TorchTensor(tuple(size), dtype, problem=f"weights of type {name}: dequantise or gather them first")


def _sparse(layout: Any, data: Any, *_: Any) -> TorchTensor:
    shape = next((tuple(part) for part in reversed(data) if isinstance(part, (tuple, list))), ())
    dtype = next((p.dtype for p in reversed(data) if isinstance(p, TorchTensor)), torch.float32)
    return TorchTensor(shape, dtype, problem=f"a weight of layout {layout}: {MAKE_DENSE}")


def _nested(buffer: Any, *_: Any) -> TorchTensor:
    return TorchTensor((), buffer.dtype, problem=NESTED)


def _quantised(storage: Any, _offset: Any, size: Any, *_: Any) -> TorchTensor:
    dtype = storage.dtype
    return TorchTensor(tuple(size), dtype, problem=quantised(dtype))


def _layout(name: Any) -> str:
    return str(name)


def _values(*values: Any) -> tuple[Any, ...]:
    return tuple(values[0]) if values else ()


_GLOBALS: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("collections", "defaultdict"): lambda *_: {},
    ("builtins", "set"): lambda *items: _values(*items),
    ("torch", "Size"): _values,
    ("torch.serialization", "_get_layout"): _layout,
    ("torch._utils", "_rebuild_tensor"): _tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _typed_tensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _parameter,
    ("torch._tensor", "_rebuild_from_type_v2"): _rebuilt,
    ("torch._utils", "_rebuild_meta_tensor_no_storage"): _on_meta,
    ("torch._utils", "_rebuild_wrapper_subclass"): _of_subclass,
    ("torch._utils", "_rebuild_sparse_tensor"): _sparse,
    ("torch._utils", "_rebuild_sparse_csr_tensor"): _sparse,
    ("torch._utils", "_rebuild_nested_tensor"): _nested,
    ("torch._utils", "_rebuild_qtensor"): _quantised,
}
"""What a pickle may call. None of these does more than note its arguments."""


def tensors_of(state_dict: Mapping[Any, Any], where: TorchFile) -> Iterator[StoredTensor]:
    """Yield the tensors of a state dict in the file; nothing is read."""
    for key, tensor in state_dict.items():
        if not (isinstance(key, str) and isinstance(tensor, TorchTensor)):
            continue
        identity = (where.file.path, tensor) if tensor.storage is not None else key
        read = partial(where.read, tensor)
        yield StoredTensor(key, tensor.shape, read, identity, tensor.dtype, where.problem(tensor))
