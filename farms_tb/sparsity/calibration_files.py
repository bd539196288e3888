"""Calibration data in a file: text, or the ids of tokens."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from farms_tb.options import check_integer
from farms_tb.sparsity.calibration import calibration_batches, tokens_of_text

__all__ = ["CalibrationFile", "batches_of_file", "holds_ids", "with_context"]

_IDS = "input_ids"
_LENGTH = 2048


@dataclass(frozen=True)
class CalibrationFile:
    """A file of calibration data, and which part of it is used.

    Attributes:
        path: a text file in UTF-8, or ids of tokens (.pt, .pth, .safetensors): integers `(tokens,)`, or
            `(sequences, tokens)`, which are used as they are; alone in the file or called `"input_ids"`.
        sequences: how many sequences are used, all there are where there are fewer.
        length: tokens of a sequence; None for 2048, or as many as the model takes where that is less.
        seed: of the choice among the sequences.
    """

    path: Path
    sequences: int = 128
    length: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_integer("sequences", self.sequences, at_least=1)
        if self.length is not None:
            check_integer("length", self.length, at_least=1)
        check_integer("seed", self.seed, at_least=0)


def holds_ids(path: Path) -> bool:
    """Tell a file of ids from one of text by the end of its name."""
    return path.suffix in (".pt", ".pth", ".safetensors")


def batches_of_file(file: CalibrationFile, tokenizer: Callable[..., Any] | None) -> list[dict[str, Tensor]]:
    """Read calibration data.

    Args:
        file: the file.
        tokenizer: for text, see `farms_tb.sparsity.calibration.tokens_of_text`.

    Returns:
        Batches of one sequence each, `{"input_ids": (1, tokens)}`, int64.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is neither text nor ids, or is too short.
    """
    if not holds_ids(file.path):
        assert tokenizer is not None
        ids = tokens_of_text(file.path, tokenizer)
    else:
        ids = _ids(file.path)
    if ids.ndim == 2:
        chosen = _chosen_rows(len(ids), file)
        return [{_IDS: ids[row][None]} for row in chosen]
    return calibration_batches(ids, number=file.sequences, length=file.length or _LENGTH, seed=file.seed)


def with_context(file: CalibrationFile, longest: int | None) -> CalibrationFile:
    """Return calibration data with the length of their sequences.

    Args:
        file: the file.
        longest: tokens that the model was made for at most; None where that is not known.

    Raises:
        ValueError: the sequences are longer.
    """
    if file.length is None:
        return replace(file, length=min(_LENGTH, longest or _LENGTH))
    if longest is not None and file.length > longest:
        raise ValueError(
            f"calibration sequences of {file.length} tokens are longer than the context of the model: pass "
            f"--length {longest} or less"
        )
    return file


def _chosen_rows(rows: int, file: CalibrationFile) -> list[int]:
    """Choose sequences at random, in order."""
    generator = torch.Generator().manual_seed(file.seed)
    chosen: list[int] = torch.randperm(rows, generator=generator)[: file.sequences].sort().values.tolist()
    return chosen


def _ids(path: Path) -> Tensor:
    """Read the ids in a file.

    Raises:
        OSError, ValueError: see `batches_of_file`.
    """
    held = _held(path)
    if isinstance(held, Mapping):
        held = held.get(_IDS, next(iter(held.values())) if len(held) == 1 else held)
    is_ids = isinstance(held, Tensor) and held.dtype in (torch.int64, torch.int32, torch.int16, torch.uint8)
    if not is_ids or held.ndim not in (1, 2):
        kind = f"{held.dtype} of shape {tuple(held.shape)}" if isinstance(held, Tensor) else type(held).__name__
        raise ValueError(
            f"{path} holds no calibration data: expected ids of tokens, integers (tokens,) or (sequences, "
            f"tokens), alone or as {_IDS!r}, got {kind}"
        )
    if held.numel() == 0:
        raise ValueError(f"calibration is too short: {path} holds no tokens")
    ids: Tensor = held.to(torch.int64)
    return ids


def _held(path: Path) -> Any:
    """Return what a file holds; nothing in it is executed.

    Raises:
        OSError, ValueError: see `batches_of_file`.
    """
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load

            return load(path.read_bytes())
        return torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError, KeyError) as error:
        raise ValueError(f"cannot read calibration data in {path}: {str(error).splitlines()[0]:.200}") from error
    except Exception as error:
        if type(error).__name__ != "SafetensorError":
            raise
        raise ValueError(f"cannot read calibration data in {path}: {error}") from error
