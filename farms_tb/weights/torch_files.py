"""Read files by `torch.save`: a pickle and the entries of its tensors, since torch 1.6 in a zip file.

`farms_tb.weights.pickles` interprets the pickle and executes nothing; entries are read when they are asked for,
one tensor at a time.
"""

from __future__ import annotations

import io
import math
import pickle
import struct
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from farms_tb.printable import printable
from farms_tb.weights.pickled_objects import Skipped, TorchTensor
from farms_tb.weights.pickles import Interpreter, RefusedError
from farms_tb.weights.stored import OpenedFile, StoredTensor, span

_MAGIC = 0x1950A86A20F9469CFC6C
"""First number of a file by a version of torch before 1.6."""

_LOCAL_HEADER = 30
"""Bytes in front of the name of each record of a zip file."""


@dataclass(frozen=True)
class _Record:
    """A record of a file: how many bytes it has, and what finds the first of them."""

    size: int
    start: Callable[[], int]


@dataclass(frozen=True)
class TorchFile:
    """The content of a file by `torch.save`.

    Attributes:
        content: what was saved: plain values, lists, tuples and dicts, with a `TorchTensor` for each tensor and,
            within containers, a `Skipped` for everything else.
        file: the file.
        records: where in the file each storage is.
    """

    content: Any
    file: OpenedFile
    records: Mapping[str, _Record]

    def read(self, tensor: TorchTensor) -> Tensor:
        """Read the entries of one tensor.

        Args:
            tensor: one that `problem` finds nothing wrong with.

        Returns:
            A tensor of its shape and dtype; on the meta device where the file holds no entries.

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
        record = self.records.get(tensor.storage.key)
        available = 0 if record is None else record.size // tensor.dtype.itemsize
        entries = math.prod(tensor.shape)
        end = tensor.offset + span(tensor.shape, tensor.stride)
        if max(entries, end) > available:
            return f"damaged: it claims {entries} entries, the file has {available} for it"
        return ""


def open_torch_file(path: Path) -> TorchFile:
    """Read the structure of a file by `torch.save`, of any version of torch; entries of tensors are read later.

    Raises:
        ValueError: it is no such file, or cut short or damaged, or holds a program or a whole module.
        OSError: the file cannot be opened.
    """
    file = OpenedFile.at(path)
    try:
        with path.open("rb") as opened:
            found = _open_zip(file, opened) if zipfile.is_zipfile(opened) else _open_legacy(file, opened)
        if isinstance(found.content, Skipped):
            raise RefusedError(found.content.full_name)
        return found
    except RefusedError as error:
        named = f" ({error})" if str(error) else ""
        raise ValueError(
            f"{printable(path)} holds more than weights{printable(named)}, and loading that could run anything: "
            "save the state dict instead, by torch.save(model.state_dict(), path) or as safetensors; or, if you "
            "trust the file, load it yourself with torch.load(path, weights_only=False) and call analyze(model)"
        ) from error
    except Exception as error:
        if isinstance(error, OSError) and error.filename is not None:
            raise  # The file is gone, or may not be read. A damaged one leads to positions that it does not have.
        raise ValueError(
            f"cannot read {printable(path)}: no checkpoint, or one that is empty, cut short or damaged "
            f"({_reason(error)})"
        ) from error


def _reason(error: Exception) -> str:
    """Say in one line why a file cannot be read."""
    if isinstance(error, (pickle.UnpicklingError, EOFError)):
        return "no pickle, or half of one"
    return f"{type(error).__name__}: {printable(str(error).partition(chr(10))[0]):.200}"


def _open_zip(file: OpenedFile, opened: BinaryIO) -> TorchFile:
    """Read a file of torch 1.6 and later: a zip file with the records `data.pkl` and `data/KEY` for each storage.

    Raises:
        RefusedError: it holds code (TorchScript).
        ValueError: it is another zip file, or of a machine with another order of bytes.
    """
    with zipfile.ZipFile(opened) as archive:
        records = {info.filename: info for info in archive.infolist()}
        root = _root(records)
        order = records.get(f"{root}byteorder")
        if order is not None and _small(archive, order) != b"little":
            raise ValueError("numbers in big-endian order")
        content = Interpreter(io.BytesIO(_small(archive, records[f"{root}data.pkl"]))).load()
    data = f"{root}data/"
    storages = {
        name.removeprefix(data): _record(file, info) for name, info in records.items() if name.startswith(data)
    }
    return TorchFile(content, file, storages)


def _root(records: Iterable[str]) -> str:
    """Return the folder inside a zip file that holds `data.pkl`, with a slash at its end.

    Raises:
        RefusedError: the folder holds code as well (TorchScript).
        ValueError: there is no such folder, or more than one.
    """
    pickles = [name for name in records if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise ValueError("a zip file without one data.pkl")
    root = pickles[0].removesuffix("data.pkl")
    if any(name.startswith(f"{root}code/") for name in records):
        raise RefusedError
    return root


def _small(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    """Read a record, or raise a ValueError if it is compressed: a small file must not become a large one."""
    if info.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{info.filename} is compressed")
    return archive.read(info)


def _record(file: OpenedFile, info: zipfile.ZipInfo) -> _Record:
    """Return where the bytes of a record of a zip file are: behind a header of variable length."""

    def start() -> int:
        header = file.read(info.header_offset, _LOCAL_HEADER)
        name_length, extra_length = struct.unpack("<HH", header[26:30])
        return info.header_offset + _LOCAL_HEADER + int(name_length) + int(extra_length)

    if info.compress_type != zipfile.ZIP_STORED:
        return _Record(0, start)
    return _Record(min(info.file_size, file.size - info.header_offset), start)


def _open_legacy(file: OpenedFile, opened: BinaryIO) -> TorchFile:
    """Read a file of before torch 1.6: five pickles, then for each storage a number of entries and the entries."""
    opened.seek(0)
    magic = Interpreter(opened).load()
    if isinstance(magic, Skipped):
        raise RefusedError(magic.full_name)
    if magic != _MAGIC:
        raise ValueError("a pickle of something else")
    _version, _machine = Interpreter(opened).load(), Interpreter(opened).load()
    interpreter = Interpreter(opened)
    content, keys = interpreter.load(), Interpreter(opened).load()
    records: dict[str, _Record] = {}
    position = opened.tell()
    for key in keys:
        opened.seek(position)
        (entries,) = struct.unpack("<q", opened.read(8))
        if not isinstance(key, str):
            raise ValueError("a storage without a name")
        size = entries * interpreter.storages[key].dtype.itemsize
        if entries < 0 or position + 8 + size > file.size:
            raise ValueError("it ends before its tensors")
        records[key] = _Record(size, partial(int, position + 8))
        position += 8 + size
    return TorchFile(content, file, records)


def tensors_of(state_dict: Mapping[Any, Any], where: TorchFile) -> Iterator[StoredTensor]:
    """Yield the tensors, by name, of a dict in the file; nothing is read, and other items are left out."""
    for key, tensor in state_dict.items():
        if isinstance(key, str) and isinstance(tensor, TorchTensor):
            identity = key if tensor.storage is None else (where.file.path, tensor)
            read = partial(where.read, tensor)
            yield StoredTensor(key, tensor.shape, read, identity, tensor.dtype, where.problem(tensor))
