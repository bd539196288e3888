"""Calibration data in a file: text, or the ids of tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from farms_tb.options import check_integer
from farms_tb.printable import printable
from farms_tb.sparsity.calibration import calibration_batches, tokens_of_text
from farms_tb.weights.safetensors_files import in_safetensors

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


def batches_of_file(
    file: CalibrationFile, load_tokenizer: Callable[[], Callable[..., Any]], longest: int | None
) -> list[dict[str, Tensor]]:
    """Read calibration data.

    Args:
        file: the file.
        load_tokenizer: called for text alone, after the length was checked; returns a tokenizer, see
            `farms_tb.sparsity.calibration.tokens_of_text`.
        longest: tokens that the model was made for at most; None where that is not known.

    Returns:
        Batches of one sequence each, `{"input_ids": (1, tokens)}`, int64.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is neither text nor ids, is too short, or holds sequences that are longer than `longest` or
            of another length than `file` asks for.
    """
    if file.length is not None and longest is not None and file.length > longest:
        raise ValueError(
            f"calibration sequences of {file.length} tokens are longer than the context of the model: pass "
            f"--length {longest} or less"
        )
    holds_ids = file.path.suffix in (".pt", ".pth", ".safetensors")
    ids = _ids(file.path) if holds_ids else tokens_of_text(file.path, load_tokenizer())
    length = file.length or min(_LENGTH, longest or _LENGTH)
    if ids.ndim == 2:
        _check_rows(ids.shape[1], file, longest)
        length = ids.shape[1]
    return calibration_batches(ids.flatten(), number=file.sequences, length=length, seed=file.seed)


def _check_rows(tokens: int, file: CalibrationFile, longest: int | None) -> None:
    """Refuse sequences in a file of another length than the user asks for, or longer than the context."""
    cut = "pass ids (tokens,), which are cut by --length"
    if file.length not in (None, tokens):
        raise ValueError(
            f"{file.path} holds sequences of {tokens} tokens, which are used as they are, not of --length "
            f"{file.length}: leave --length out, or {cut}"
        )
    if longest is not None and tokens > longest:
        raise ValueError(
            f"{file.path} holds calibration sequences of {tokens} tokens, longer than the context of the model, "
            f"{longest}: pass ids (sequences, {longest}) or shorter, or {cut}"
        )


def _ids(path: Path) -> Tensor:
    """Return the ids in a file."""
    held = _held(path)
    if isinstance(held, Mapping) and _IDS in held:
        held = held[_IDS]
    elif isinstance(held, Mapping) and len(held) == 1:
        (held,) = held.values()
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
    """Return what a file holds; nothing in it is executed."""
    if path.suffix == ".safetensors":
        return {tensor.key: tensor.read() for tensor in in_safetensors(path)}
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # a damaged file makes torch.load fail in any way
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"cannot read calibration data in {path}: {printable(reason):.200}") from error
