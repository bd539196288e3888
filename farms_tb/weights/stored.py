"""A tensor in a file: its name and shape now, its values when they are asked for.

Files are read through ordinary file handles and never mapped into memory: when another process cuts a mapped file,
for example by saving onto the same name, the operating system ends the reader.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from farms_tb.printable import printable
from farms_tb.weights.names import clean_name
from farms_tb.weights.stacks import NoSpectrumError
from farms_tb.weights.values import is_plain, unreadable

MAX_DIMS = 16
"""Dimensions of a tensor that are looked at; a damaged file may claim any number."""


@dataclass(frozen=True)
class ModelFacts:
    """What a `config.json` in the folder of the weights tells of them.

    Attributes:
        experts: experts of a mixture; 0 where none are named.
        tied_head: name of the head that shares the weight of the input embedding; empty where there is none.
    """

    experts: int = 0
    tied_head: str = ""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file.

    Attributes:
        key: its name there.
        shape: its shape.
        read: reads its values, a tensor of that shape. Raises ValueError where the file has changed or ends early.
        identity: equal for two names of one tensor.
        dtype: the type of its entries.
        problem: why it cannot be read; empty where it can.
        siblings: the tensors of the same module by their names there, itself among them.
        facts: what is known of the whole model.
    """

    key: str
    shape: tuple[int, ...]
    read: Callable[[], Tensor]
    identity: object
    dtype: torch.dtype = torch.float32
    problem: str = ""
    siblings: Mapping[str, StoredTensor] = field(default_factory=dict, repr=False)
    facts: ModelFacts = ModelFacts()

    @property
    def path(self) -> str:
        """Path of the module; empty for a parameter of the model itself."""
        return self._path_and_name[0]

    @property
    def name(self) -> str:
        """Name of the parameter in its module."""
        return self._path_and_name[1]

    @property
    def _path_and_name(self) -> tuple[str, str]:
        # tltorch keeps a dense weight as the `tensor` of a module `weight`.
        path, _, name = clean_name(self.key).removesuffix(".tensor").rpartition(".")
        return path, name

    def shape_of(self, sibling: str) -> tuple[int, ...]:
        """Return the shape of another tensor of the module; empty where there is none."""
        return self.siblings[sibling].shape if sibling in self.siblings else ()

    @property
    def has_numbers(self) -> bool:
        """Whether its entries are real or complex numbers of at least 8 bits."""
        is_number = self.dtype.is_floating_point or self.dtype.is_complex
        return is_number and "float4" not in str(self.dtype)


def with_siblings(tensors: Iterable[StoredTensor], facts: ModelFacts) -> list[StoredTensor]:
    """Note for each tensor which others belong to the same module, and what is known of the model."""
    tensors = list(tensors)
    modules: dict[str, dict[str, StoredTensor]] = {}
    for tensor in tensors:
        modules.setdefault(tensor.path, {})[tensor.name] = tensor
    return [replace(tensor, siblings=modules[tensor.path], facts=facts) for tensor in tensors]


def stored_in_memory(key: str, tensor: Tensor) -> StoredTensor:
    """Return a tensor of a state dict as one of a file; two names of the same entries have one identity."""
    try:
        shape = tuple(tensor.shape)
    except RuntimeError:  # A nested tensor, or one that waits for its first batch.
        return StoredTensor(key, (), lambda: tensor, key, problem=unreadable([tensor]))
    identity: object = key
    if tensor.layout == torch.strided and is_plain(tensor) and not tensor.is_meta:
        identity = (tensor.data_ptr(), shape, tensor.stride())
    return StoredTensor(key, shape, lambda: tensor, identity, tensor.dtype)


@dataclass(frozen=True)
class OpenedFile:
    """A file as it was when its tensors were listed.

    Attributes:
        path: where it is.
        size: its bytes.
        version: what changes when the file is written again or replaced.
    """

    path: Path
    size: int
    version: tuple[int, ...]

    @classmethod
    def at(cls, path: Path) -> OpenedFile:
        """Note size and version of the file at `path`."""
        status = path.stat()
        return cls(path, status.st_size, (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns))

    def read(self, start: int, size: int) -> bytearray:
        """Return `size` bytes from `start` on.

        Raises:
            ValueError: the file is not the one whose tensors were listed, or ends before.
            FileNotFoundError: it was deleted meanwhile.
        """
        if start + size > self.size:
            raise ValueError(
                f"cannot read {printable(self.path)}: cut short, it ends before a tensor that it names"
            )
        content = bytearray(size)
        with self.path.open("rb") as file:
            if OpenedFile.at(self.path).version != self.version:
                raise ValueError(
                    f"cannot read {printable(self.path)}: it changed while it was read, measure it again"
                )
            file.seek(start)
            if file.readinto(content) != size:
                raise ValueError(
                    f"cannot read {printable(self.path)}: cut short while it was read, measure it again"
                )
        return content

    def tensor(
        self, start: int, dtype: torch.dtype, shape: tuple[int, ...], stride: tuple[int, ...] | None = None
    ) -> Tensor:
        """Read a tensor whose first entry is at byte `start`.

        Args:
            start: position in the file.
            dtype: the type of its entries.
            shape: its shape.
            stride: its strides, in entries; None where it is stored row by row.

        Returns:
            A tensor of that shape, on the CPU, in memory of its own.

        Raises:
            NoSpectrumError: it does not fit into memory, or no tensor can have the shape.
            ValueError, FileNotFoundError: see `read`.
        """
        entries = math.prod(shape) if stride is None else span(shape, stride)
        try:
            if 0 in shape:
                return torch.empty(shape, dtype=dtype)
            content = self.read(start, entries * dtype.itemsize)
            flat = torch.frombuffer(content, dtype=dtype)
            return flat.view(shape) if stride is None else flat.as_strided(shape, stride)
        except MemoryError as error:
            raise NoSpectrumError(f"its {entries} entries do not fit into memory") from error
        except RuntimeError as error:
            raise NoSpectrumError(f"damaged: no tensor can have the shape {shape}") from error


def span(shape: Sequence[int], stride: Sequence[int]) -> int:
    """Return how many entries of its storage lie from the first to the last entry of a tensor, both included.

    Args:
        shape: its shape, without 0.
        stride: its strides, in entries.
    """
    return 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))


def shape_problem(shape: tuple[int, ...]) -> str:
    """Say that a shape has more dimensions than any layer's; empty where it has not."""
    return f"a tensor of {len(shape)} dimensions" if len(shape) > MAX_DIMS else ""
