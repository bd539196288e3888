"""What the objects in a pickle become: tensors that are noted and not read, plain containers, and `Skipped`.

A pickle names functions and classes, and calls them. Each name that a tensor needs leads to a function of this
module, which checks its arguments and notes them; every other name leads to a `Skipped`. A new way in which torch
saves tensors is one function here, and one line in `GLOBALS`.

The arguments come from a file that may be hostile. No function here imports, prints, hashes, compares or copies
an argument before its type and length are known: a tuple that holds itself twice, sixty levels deep, has
120 bytes in a file and 2^60 entries.
"""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch

from farms_tb.weights.names import quantised
from farms_tb.weights.stored import MAX_DIMS, shape_problem
from farms_tb.weights.values import MAKE_DENSE, NESTED, NO_VALUES

MAX_ARGUMENTS = 100
"""Arguments of a call; the longest that torch writes has a dozen."""

_MAX_NUMBER = 2**60
"""Numbers from here on are no sizes. As keys of a dict, many of them could be made to have one hash."""

MAX_NAME = 200
"""Characters of the name of a function, class or storage: a pickle can keep a long one and use it many times."""

_MAX_KEY = 10_000
"""Characters of a key of a dict: of two long ones that are equal, all are compared each time that one is used."""


@dataclass(frozen=True, slots=True)
class Skipped:
    """Stands for a function or class that is not loaded, and for every object made by it.

    Attributes:
        full_name: its module and name, at most 200 characters.
    """

    full_name: str


@dataclass(frozen=True, slots=True)
class Storage:
    """Where the entries of one or more tensors are.

    Attributes:
        key: the name of a record in the file.
        dtype: the type of its entries; 8-bit integers where the tensors have a type of their own.
    """

    key: str
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class StorageType:
    """A storage class of torch by the type of its entries; None for the one that leaves that to its tensors."""

    dtype: torch.dtype | None


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


def skipped(module: str, name: str) -> Skipped:
    """Return what stands for a name that is not loaded."""
    return Skipped(f"{module}.{name}"[:MAX_NAME])


def named(module: str, name: str) -> Any:
    """Return what stands for a name of a pickle. Nothing is imported or looked up outside of this module's tables.

    Args:
        module: the name's module, `"torch._utils"`, at most `MAX_NAME` characters.
        name: the name in it, `"_rebuild_tensor_v2"`, at most as many.

    Returns:
        A function of this module, a `torch.dtype`, a `StorageType`, or a `Skipped`.
    """
    if (module, name) in GLOBALS:
        return GLOBALS[module, name]
    if module == "torch" and name in _DTYPES:
        return _DTYPES[name]
    if module in ("torch", "torch.storage", "torch.cuda") and name.endswith("Storage"):
        return StorageType(_STORAGE_DTYPES.get(name))
    return skipped(module, name)


def called(function: Any, arguments: Any) -> Any:
    """Return the result of a call in a pickle; only functions of `GLOBALS` are really called.

    Raises:
        pickle.UnpicklingError: `function` is neither known nor skipped, or `arguments` are no short sequence.
    """
    if isinstance(function, Skipped):
        return function
    if not isinstance(function, FunctionType):
        raise pickle.UnpicklingError("a call of something that is no function")
    if len(_sequence(arguments)) > MAX_ARGUMENTS:
        raise pickle.UnpicklingError("a call with too many arguments")
    return function(*arguments)


def put(container: Any, key: Any, value: Any) -> None:
    """Put one item into a dict. Items of skipped mappings are dropped, and those whose key is no short value.

    A hostile key can be slow to hash, a tuple, or to compare, a long string, or exhaust the interpreter's stack.

    Raises:
        pickle.UnpicklingError: `container` is something else.
    """
    if isinstance(container, Skipped):
        return
    if not isinstance(container, dict):
        raise pickle.UnpicklingError("an item of something that is no dict")
    is_small_number = type(key) is int and -_MAX_NUMBER < key < _MAX_NUMBER
    is_short = type(key) in (str, bytes) and len(key) <= _MAX_KEY
    if is_small_number or is_short or key is None or type(key) in (float, bool):
        container[key] = value


def _sequence(found: Any = ()) -> tuple[Any, ...] | list[Any]:
    """Return what should be a tuple or a list, and a `torch.Size` as what it is made of."""
    if isinstance(found, (tuple, list)):
        return found
    raise pickle.UnpicklingError("expected a tuple or a list")


def _numbers(found: Any) -> tuple[int, ...]:
    """Return a shape or strides, of at most `MAX_DIMS` numbers."""
    for number in _sequence(found)[: MAX_DIMS + 1]:
        if type(number) is not int or not 0 <= number < _MAX_NUMBER:
            raise pickle.UnpicklingError("a tensor of impossible shape")
    return tuple(found[: MAX_DIMS + 1])


def _unread(dtype: Any, size: Any, problem: str) -> TorchTensor:
    """Note a tensor that cannot be read, for the given reason, by its type and shape as the pickle gives them."""
    if not isinstance(dtype, torch.dtype):
        raise pickle.UnpicklingError("a tensor without a type")
    return TorchTensor(_numbers(size), dtype, problem=problem)


def _storage(found: Any) -> Storage:
    """Return the first argument of most functions, checked."""
    if isinstance(found, Storage):
        return found
    raise pickle.UnpicklingError("a tensor without a storage")


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> TorchTensor:
    """Note an ordinary tensor, whose entries have the type of its storage."""
    return _strided(_storage(storage), offset, size, stride, _storage(storage).dtype)


def _typed_tensor(
    storage: Any, offset: Any, size: Any, stride: Any, _grad: Any, _hooks: Any, dtype: Any, *_: Any
) -> TorchTensor:
    """Note a tensor of a type that has no storage class: 8-bit floats, unsigned integers."""
    return _strided(_storage(storage), offset, size, stride, dtype)


def _strided(storage: Storage, offset: Any, size: Any, stride: Any, dtype: Any) -> TorchTensor:
    """Note a tensor whose entry `(i, j, ...)` is that at `offset + i * stride[0] + j * stride[1] + ...`.

    Raises:
        pickle.UnpicklingError: an argument is not what torch writes. Whether the storage has so many entries is
            checked when the file's records are known, in `farms_tb.weights.torch_files`.
    """
    if len(_sequence(size)) != len(_sequence(stride)):
        raise pickle.UnpicklingError("a tensor of impossible shape")
    unread = _unread(dtype, size, shape_problem(size))
    if unread.problem:
        return unread
    (start,) = _numbers([offset])
    return TorchTensor(unread.shape, dtype, _numbers(stride), start, storage)


def _parameter(data: Any, *_: Any) -> Any:
    """Note an `nn.Parameter` as the tensor that it holds."""
    return data


def _rebuilt(function: Any, _type: Any, arguments: Any, _state: Any) -> Any:
    """Note a tensor of a class of its own, or with attributes, by the function that makes it."""
    return called(function, arguments)


def _on_meta(dtype: Any, size: Any, *_: Any) -> TorchTensor:
    return _unread(dtype, size, NO_VALUES)


def _of_subclass(cls: Any, dtype: Any, size: Any, *_: Any) -> TorchTensor:
    """Note a tensor of a class that packs its values in its own way: a DTensor, those of torchao."""
    name = cls.full_name.rpartition(".")[2] if isinstance(cls, Skipped) else "unknown"
    return _unread(dtype, size, f"weights of type {name}: dequantise or gather them first")


def _sparse(layout: Any, data: Any, *_: Any) -> TorchTensor:
    """Note a sparse tensor: `data` are its indices, its values, and at or near the end its shape."""
    shape: Any = ()
    dtype: Any = torch.float32
    for part in _sequence(data)[:MAX_ARGUMENTS]:
        if isinstance(part, (tuple, list)):
            shape = part
        if isinstance(part, TorchTensor):
            dtype = part.dtype
    name = layout if isinstance(layout, str) else "unknown"
    return _unread(dtype, shape, f"a weight of layout {name}: {MAKE_DENSE}")


def _nested(buffer: Any, *_: Any) -> TorchTensor:
    """Note a nested tensor: `buffer` holds the entries of all its parts."""
    dtype = buffer.dtype if isinstance(buffer, TorchTensor) else None
    return _unread(dtype, (), NESTED)


def _quantised(storage: Any, _offset: Any, size: Any, *_: Any) -> TorchTensor:
    """Note a tensor by torch's own quantisation, whose storage holds codes."""
    dtype = _storage(storage).dtype
    return _unread(dtype, size, quantised(dtype))


def _layout(name: Any) -> str:
    """Note a memory layout by its name, `"torch.sparse_coo"`."""
    if isinstance(name, str):
        return name[:MAX_NAME]
    raise pickle.UnpicklingError("a layout without a name")


def _mapping(*_: Any) -> dict[Any, Any]:
    """Return an empty dict: the items follow, and a default factory is dropped."""
    return {}


def _ordered_mapping(*arguments: Any) -> dict[Any, Any]:
    """Return an `OrderedDict` as a dict. Python 2 gives its items as a list of pairs, Python 3 afterwards.

    The list is emptied, so that a file cannot have one list copied many times; a tuple could not be.
    """
    found: dict[Any, Any] = {}
    for pairs in arguments:
        if not isinstance(pairs, list):
            raise pickle.UnpicklingError("expected a list of pairs")
        for key, value in pairs:
            put(found, key, value)
        pairs.clear()
    return found


GLOBALS: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): _ordered_mapping,
    ("collections", "defaultdict"): _mapping,
    ("torch", "Size"): _sequence,
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

# Attributes of `torch` cannot be asked for by a name of the file: some import a module when they are read.
_DTYPES = {name: value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}

_STORAGE_DTYPES = {
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
    "QInt8Storage": torch.qint8,
    "QUInt8Storage": torch.quint8,
    "QInt32Storage": torch.qint32,
}
