"""Read GGUF, the format of llama.cpp, through the package `gguf`; quantised blocks are dequantised.

The package lists the tensors and knows the quantised types. It maps a file into memory, which is undone once they
are listed; their entries are read here through ordinary file handles (see `farms_tb.weights.stored`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from farms_tb.missing import cannot_import
from farms_tb.printable import printable
from farms_tb.weights.names import first_few
from farms_tb.weights.stored import OpenedFile, StoredTensor

_PLAIN = {"F32": "float32", "F16": "float16", "F64": "float64"}
"""NumPy's names of the types that are not quantised."""


_SPLIT = re.compile(r"(.+-)\d{5}-of-(\d{5})\.gguf")
"""Names of the files into which llama.cpp splits a large model."""


def is_gguf(path: Path) -> bool:
    """Return whether a file is of this format, by its ending or first bytes."""
    with path.open("rb") as file:
        return path.suffix == ".gguf" or file.read(4) == b"GGUF"


def parts_of(path: Path) -> list[Path]:
    """Return all files of a model that was split, of which `path` is one; else that file alone.

    Raises:
        FileNotFoundError: one of them is not there.
    """
    split = _SPLIT.fullmatch(path.name)
    if split is None:
        return [path]
    parts = [path.with_name(f"{split[1]}{number:05}-of-{split[2]}.gguf") for number in range(1, int(split[2]) + 1)]
    missing = [part.name for part in parts if not part.is_file()]
    if missing:
        raise FileNotFoundError(
            f"{printable(path)} is a part of a model, of which others lack: {first_few(missing)}"
        )
    return parts


def in_gguf(path: Path) -> Iterator[StoredTensor]:
    """Yield the tensors of a file, or of all files into which the model was split; only headers are read.

    Raises:
        FileNotFoundError: one of several files is not there.
        ImportError: the package gguf is not installed.
        ValueError: no GGUF file, one that is cut short or damaged, or one without tensors.
    """
    found = [tensor for part in parts_of(path) for tensor in _in_part(part)]
    if not found:
        raise ValueError(f"{printable(path)} is a GGUF file that holds no tensors")
    yield from found


def _in_part(path: Path) -> list[StoredTensor]:
    """List the tensors of one file. The first one of several may hold none. Raises as `in_gguf`."""
    try:
        import gguf  # type: ignore[import-not-found,unused-ignore]
    except Exception as error:  # what a broken installation raises is anything
        remedy = 'pip install "farms-tb[gguf]"; or measure the model that it was converted from'
        raise ImportError(
            cannot_import(f"{printable(path)} is a GGUF file, and reading it", error, remedy)
        ) from error
    file = OpenedFile.at(path)
    try:
        entries = gguf.GGUFReader(path).tensors
    except Exception as error:
        raise ValueError(
            f"cannot read {printable(path)}: no GGUF file, or one that is cut short or damaged "
            f"({printable(error):.200})"
        ) from error
    return [_tensor(file, entry) for entry in entries]


def _tensor(file: OpenedFile, entry: Any) -> StoredTensor:
    """Return the tensor that a `gguf.ReaderTensor` stands for."""
    name, kind = str(entry.name), entry.tensor_type
    shape = tuple(int(size) for size in reversed(entry.shape.tolist()))  # the reverse of torch's order
    read = partial(_read, file, (int(entry.data_offset), int(entry.n_bytes)), kind, shape)
    return StoredTensor(name, shape, read, name, problem=_problem(kind))


def _problem(kind: Any) -> str:
    """Return why tensors of a `gguf.GGMLQuantizationType` have no numbers to measure; empty where they have."""
    import gguf

    if kind.name in _PLAIN or hasattr(gguf.quants, kind.name):
        return ""
    return f"stored as {kind.name}, which the package gguf cannot turn into numbers"


def _read(file: OpenedFile, place: tuple[int, int], kind: Any, shape: tuple[int, ...]) -> Tensor:
    """Read one tensor in its own floating type, or in float32 where it was quantised.

    `place` is the position of its first byte and the number of its bytes, `shape` is in torch's order.
    """
    import gguf
    import numpy as np

    content = np.frombuffer(file.read(*place), dtype=np.uint8)
    if kind.name in _PLAIN:
        return torch.from_numpy(content.view(_PLAIN[kind.name])).reshape(shape)
    rows = content.reshape(*shape[:-1], -1)
    return torch.from_numpy(gguf.quants.dequantize(rows, kind)).reshape(shape)
