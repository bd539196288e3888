"""Write a safetensors file again with other entries in some tensors, or without some: same names, types and order.

One tensor is in memory at a time. What is not changed is copied byte by byte, also types that are unknown here.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from farms_tb.weights.safetensors_files import DTYPES, Header, read_header
from farms_tb.weights.stored import OpenedFile

_ALIGNMENT = 8
"""Bytes; the format wants tensors to begin at a multiple."""


def rewrite(
    source: Path,
    target: Path,
    changes: Mapping[str, Callable[[Tensor], None]],
    metadata: Mapping[str, str],
    left_out: Container[str] = (),
) -> None:
    """Write a file again.

    Args:
        source: the safetensors file to read.
        target: the file to write, which is not written atomically here.
        changes: what changes a tensor in place, by its name.
        metadata: texts to add to those that the file has.
        left_out: names of tensors that are not written.

    Raises:
        ValueError: the source was cut or changed meanwhile.
        OSError: the disk is full, or a file cannot be opened.
    """
    file = OpenedFile.at(source)
    header = read_header(file)
    kept = {name: entry for name, entry in header.tensors.items() if name not in left_out}
    entries = sorted(kept.items(), key=lambda entry: entry[1]["data_offsets"])
    with target.open("wb") as written:
        written.write(_header_bytes(replace(header, tensors=_moved_up(kept, entries)), metadata))
        for name, entry in entries:
            begin, end = entry["data_offsets"]
            content = file.read(header.start + begin, end - begin)
            if name in changes:
                dtype = getattr(torch, DTYPES[entry["dtype"]])
                # Shares memory with the content.
                changes[name](torch.frombuffer(content, dtype=dtype).view(entry["shape"]))
            written.write(content)


def _moved_up(
    kept: Mapping[str, Mapping[str, Any]], in_order: Sequence[tuple[str, Mapping[str, Any]]]
) -> dict[str, Mapping[str, Any]]:
    """Return entries of a header, in its order, with tensors one after the other, as the format wants them.

    `in_order` are the same entries in the order of the tensors.
    """
    moved, at = dict(kept), 0
    for name, entry in in_order:
        begin, end = entry["data_offsets"]
        moved[name] = {**entry, "data_offsets": [at, at + end - begin]}
        at += end - begin
    return moved


def _header_bytes(header: Header, metadata: Mapping[str, str]) -> bytes:
    """Return the length of a header and the header, with texts added."""
    # Versions of transformers refuse metadata that do not say for which library the tensors are.
    texts = {"format": "pt", **header.metadata, **metadata}
    content = json.dumps({"__metadata__": texts, **header.tensors}, separators=(",", ":")).encode()
    content += b" " * (-len(content) % _ALIGNMENT)
    return len(content).to_bytes(8, "little") + content
