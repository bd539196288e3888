"""Read GGUF, the format of llama.cpp, through the package `gguf`; quantised blocks are dequantised.

The package lists the tensors and knows the quantised types. The entries are read here through ordinary file
handles, because the package maps files into memory (see `farms_tb.weights.stored`).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from farms_tb.weights.stored import OpenedFile, StoredTensor


def in_gguf(path: Path) -> Iterator[StoredTensor]:
    """Yield the tensors of a file; nothing is read but its header.

    Raises:
        ImportError: the package gguf is not installed.
        ValueError: no GGUF file, one that is cut short or damaged, or one without tensors.
    """
    try:
        import gguf  # type: ignore[import-not-found,unused-ignore]
    except ImportError as error:
        raise ImportError(
            f"{path} is a GGUF file, and reading it needs gguf: pip install gguf; or measure the model that it "
            "was converted from"
        ) from error
    file = OpenedFile.at(path)
    try:
        entries = gguf.GGUFReader(path).tensors
    except Exception as error:
        raise ValueError(
            f"cannot read {path}: no GGUF file, or one that is cut short or damaged ({error!s:.200})"
        ) from error
    if not entries:
        raise ValueError(f"{path} is a GGUF file that holds no tensors")
    for entry in entries:
        # The file's order of dimensions is the reverse of torch's.
        shape = tuple(int(size) for size in reversed(entry.shape.tolist()))
        place = (int(entry.data_offset), int(entry.n_bytes))
        read = partial(_read, file, place, entry.tensor_type, shape)
        yield StoredTensor(str(entry.name), shape, read, str(entry.name))


def _read(file: OpenedFile, place: tuple[int, int], kind: Any, shape: tuple[int, ...]) -> Tensor:
    """Read one tensor.

    Args:
        file: the file.
        place: position of its first byte, and the number of its bytes.
        kind: its type, a `gguf.GGMLQuantizationType`.
        shape: its shape, in torch's order.

    Returns:
        A tensor of that shape, in its own floating type, or in float32 where it was quantised.
    """
    import gguf
    import numpy as np

    content = np.frombuffer(file.read(*place), dtype=np.uint8)
    plain = {"F32": np.float32, "F16": np.float16, "F64": np.float64}.get(kind.name)
    if plain is not None:
        return torch.from_numpy(content.view(plain)).reshape(shape)
    rows = content.reshape(*shape[:-1], -1)
    return torch.from_numpy(gguf.quants.dequantize(rows, kind)).reshape(shape)
