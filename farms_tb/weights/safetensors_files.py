"""Read safetensors: eight bytes for the length of a header, the header in JSON, the entries of all tensors.

The format is small enough to be read here, and has to be: the library of the same name maps files into memory (see
`farms_tb.weights.stored`) and parses the header anew for every tensor.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from farms_tb.printable import printable
from farms_tb.weights.stored import OpenedFile, StoredTensor, shape_problem

MAX_HEADER = 100_000_000
"""Bytes of the longest header that the format allows."""

DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu",
    "C64": "complex64",
    "C128": "complex128",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
}


@dataclass(frozen=True)
class Header:
    """What a file says of itself.

    Attributes:
        tensors: type, shape and place of each tensor by name, `{"dtype": ..., "shape": ..., "data_offsets": ...}`,
            in the order of the header; offsets are counted from `start`.
        metadata: the texts that a writer has added, by name.
        start: position of the first byte of the tensors.
    """

    tensors: Mapping[str, Mapping[str, Any]]
    metadata: Mapping[str, str]
    start: int


def is_safetensors(path: Path) -> bool:
    """Return whether a file is of this format, by its ending or first bytes: a cache may drop endings."""
    if path.suffix == ".safetensors":
        return True
    with path.open("rb") as file:
        length, brace = file.read(8), file.read(1)
    return brace == b"{" and int.from_bytes(length, "little") <= MAX_HEADER


def in_safetensors(path: Path) -> Iterator[StoredTensor]:
    """Yield the tensors of a file; nothing is read but its header.

    Raises:
        ValueError: no safetensors file, or one that is cut short or damaged.
        OSError: the file cannot be opened.
    """
    file = OpenedFile.at(path)
    try:
        header = read_header(file)
        for key, entry in header.tensors.items():
            yield _tensor(file, header.start, key, entry)
    except (KeyError, TypeError, AttributeError, RecursionError, ValueError) as error:
        reason = "the header is too deep" if isinstance(error, RecursionError) else error
        raise ValueError(
            f"cannot read {printable(path)}: no safetensors file, or one that is cut short or damaged "
            f"({printable(reason):.200})"
        ) from error


def read_header(file: OpenedFile) -> Header:
    """Read the header of a file.

    Raises:
        ValueError: the header is no JSON object, or its tensors do not fill the file one after the other.
    """
    if file.size < 8:
        raise ValueError(f"{file.size} bytes")
    length = int.from_bytes(file.read(0, 8), "little")
    if length > min(MAX_HEADER, file.size - 8):
        raise ValueError(f"a header of {length} bytes in a file of {file.size}")
    header = json.loads(bytes(file.read(8, length)))
    if not isinstance(header, dict):
        raise ValueError("the header is no object")
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise ValueError("its metadata are no texts by name")
    _check_offsets([tuple(entry["data_offsets"]) for entry in header.values()], file.size - 8 - length)
    return Header(header, metadata, 8 + length)


def _check_offsets(offsets: list[tuple[int, ...]], size: int) -> None:
    """Raise a ValueError where tensors do not fill a file without overlap and gap, as the format demands.

    Args:
        offsets: first byte and the byte after the last of each tensor, counted from the end of the header.
        size: bytes behind the header.
    """
    end = 0
    for begin, stop in sorted(offsets):
        if not isinstance(begin, int) or not isinstance(stop, int) or begin != end or stop < begin:
            raise ValueError("its tensors do not lie one after the other")
        end = stop
    if end != size:
        raise ValueError(f"{end} bytes of tensors are named, there are {size}")


def _tensor(file: OpenedFile, start: int, key: str, entry: Mapping[str, Any]) -> StoredTensor:
    """Return one tensor of a file, with a problem where its shape or type is none that can be read.

    Its place, which its entry in the header names, is counted from `start`.

    Raises:
        ValueError: the shape is none, or does not fit its bytes.
    """
    begin, end = entry["data_offsets"]
    shape = tuple(entry["shape"])
    if not all(type(size) is int and size >= 0 for size in shape):
        raise ValueError(f"{key} has the shape {shape}")
    problem = shape_problem(shape)
    dtype = None if problem else getattr(torch, DTYPES.get(entry["dtype"], ""), None)
    if dtype is None:
        problem = problem or f"weights of type {entry['dtype']!s:.20}: unknown here"
        return StoredTensor(key, shape, partial(torch.empty, 0), key, problem=problem)
    if math.prod(shape) * dtype.itemsize != end - begin:
        raise ValueError(f"{key} of shape {shape} has {end - begin} bytes")
    read = partial(file.tensor, start + begin, dtype, shape)
    return StoredTensor(key, shape, read, key, dtype)
