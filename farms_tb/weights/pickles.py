"""Interpret the pickle in a file by `torch.save` without executing anything that it names.

A pickle is a small program that builds objects. It is run by an interpreter that knows tensors and plain
containers; whatever else it names (classes of configuration libraries, paths, optimizers) becomes a `Skipped`, an
object without behaviour. Nothing is imported, and no foreign function called. A tensor becomes a `TorchTensor`,
which says where its entries are.
"""

from __future__ import annotations

import pickle
from collections import OrderedDict
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, BinaryIO

import torch

from farms_tb.weights.names import quantised
from farms_tb.weights.values import MAKE_DENSE, NESTED, NO_VALUES

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


@lru_cache(maxsize=1000)
def _skipped(full_name: str) -> type[Skipped]:
    return type("Skipped", (Skipped,), {"full_name": full_name})


@dataclass(frozen=True, slots=True)
class Storage:
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
    storage: Storage | None = None
    problem: str = ""


class Interpreter(pickle._Unpickler):  # type: ignore[name-defined,misc]
    """Runs a pickle with nothing but tensors and plain containers in its vocabulary.

    The interpreter in Python is used: the one in C takes memory for as many entries as a number in the file says.
    """

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file)
        self.storages: dict[str, Storage] = {}

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

    def persistent_load(self, pid: Any) -> Storage:
        """Return the storage that a tensor's entries are in."""
        if isinstance(pid, str):
            raise RefusedError("a pickle of protocol 0")
        kind, storage_type, key, _device, entries = pid[:5]
        if kind != "storage" or not isinstance(storage_type, _StorageType) or type(entries) is not int:
            raise pickle.UnpicklingError("a reference to something else than a storage")
        storage = Storage(str(key), storage_type.dtype or torch.uint8, entries)
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
    valid = isinstance(storage, Storage) and isinstance(dtype, torch.dtype) and len(shape) == len(steps)
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
