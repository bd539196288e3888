"""Tokenised text for language models, in windows.

The text is tokenised once, into one file that is mapped into memory: billions of tokens need no memory of their
own.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from itertools import accumulate, chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from farms_tb.atomic_write import atomic_path
from recipes.console import make_console
from recipes.data.documents import Documents, file_states
from recipes.data.loaders import EpochShuffle, SplitData, epoch_generator
from recipes.errors import RecipeError
from recipes.real import smollm2_folder
from recipes.values import Range

__all__ = ["PartShuffle", "TokenData", "TokenWindows"]

SMOLLM2 = "smollm2"
_DOCUMENTS_AT_ONCE = 1000
_TOKENIZER_FILES = (".json", ".model", ".txt")


class PartShuffle(EpochShuffle):
    """Shuffle indices 0..size-1 by (seed, pass), and go through them once in `parts` epochs of equal length.

    Args:
        size: Number of samples.
        seed: Seed of the shuffles.
        parts: Epochs of a pass. What is left where it does not divide `size` is not used in that pass.
    """

    def __init__(self, size: int, seed: int, parts: int) -> None:
        super().__init__(size, seed)
        self.parts = parts

    def __len__(self) -> int:
        return self.size // self.parts

    def __iter__(self) -> Iterator[int]:
        passes, part = divmod(self.epoch, self.parts)
        order = torch.randperm(self.size, generator=epoch_generator(self.seed, passes))
        yield from order[part * len(self) : (part + 1) * len(self)].tolist()


class TokenWindows(Dataset[tuple[Tensor, Tensor]]):
    """Windows without overlap of a part of a file of tokens, each with the same window one token later.

    Args:
        file: The tokens, one after the other.
        dtype: Type of a token in the file.
        part: First token of the part, and the one after its last.
        length: Tokens of a window.
    """

    def __init__(self, file: Path, dtype: np.dtype[Any], part: tuple[int, int], length: int) -> None:
        self.file = file
        self.dtype = dtype
        self.start, end = part
        self.length = length
        self.number = (end - self.start - 1) // length

    def __len__(self) -> int:
        return self.number

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Return a window and the same one token later, int64 (length,) each."""
        if not 0 <= index < self.number:
            raise IndexError(index)
        # Mapped for each window, so that processes that load data are handed a name and not the tokens.
        first = (self.start + index * self.length) * self.dtype.itemsize
        tokens = np.memmap(self.file, self.dtype, "r", first, shape=(self.length + 1,))
        window = torch.from_numpy(tokens.astype(np.int64))
        return window[:-1], window[1:]


class TokenData(SplitData):
    """Windows of consecutive tokens, and the same a token later as targets.

    Each document ends in the tokenizer's end-of-text token, and documents follow one another. The start of the
    text is the test text, what comes after that the validation text, and the rest is trained on: the test text is
    the same for any `train_tokens`.

    Batches are tokens and the tokens after them, int64 (B, length) each.

    Args:
        tokenizer: Folder of a tokenizer of transformers, as `tokenizer.save_pretrained` writes it; `"smollm2"` for
            that of SmolLM2-135M, which `make real` brings.
        vocabulary: Tokens that the model knows; at least as many as the tokenizer has.
        cache_dir: Folder of the files of tokens.
        path: A file of text, or a folder, of which all files that end in `suffix` are read in the order of their
            paths; each is a document. Or `"wikipedia"`, the articles that `make real` brings, or `"python"`,
            modules of the standard library.
        suffix: Ending of the files of a folder.
        dataset: In place of `path`, a folder of data files or the name of a data set that `datasets` has on this
            machine. Nothing is downloaded.
        config: Which configuration of the data set.
        split: Which part of the data set: "train", "train[:10%]".
        column: Which column of the data set holds the text.
        length: Tokens of a window.
        train_tokens: Train on at most so many tokens; None for all. No more text than needed is tokenised.
        val_tokens: Tokens of validation text.
        test_tokens: Tokens of test text.
        held_out: Where validation and test text are: at the `"start"`, or at the `"end"` of what is tokenised,
            with the test text last, as in the published runs. They then move with `train_tokens`, into text that a
            larger number trains on: don't compare the scores of several.
        batch_size: Windows a batch.
        parts: Epochs in which the training text is gone through once; there is a validation after each.
        shuffle_seed: Seed of the order of the windows.

    Raises:
        ValueError: A size is not positive, or `held_out` is neither.
        RecipeError: In `prepare_data` and `setup`: there is no such text or tokenizer, the tokenizer has no
            end-of-text token or more tokens than the model, or there is too little text.
    """

    kind = "text"

    def __init__(
        self,
        tokenizer: str | None,
        vocabulary: int,
        cache_dir: str | Path,
        path: str | None = None,
        suffix: str = ".txt",
        dataset: str | None = None,
        config: str | None = None,
        split: str = "train",
        column: str = "text",
        length: int = 256,
        train_tokens: int | None = None,
        val_tokens: int = 10_000_000,
        test_tokens: int = 10_000_000,
        held_out: str = "start",
        batch_size: int = 128,
        parts: int = 1,
        shuffle_seed: int = 0,
    ) -> None:
        super().__init__(batch_size, shuffle_seed)
        sizes = {"vocabulary": vocabulary, "length": length, "val_tokens": val_tokens, "test_tokens": test_tokens}
        sizes |= {"batch_size": batch_size, "parts": parts}
        if train_tokens is not None:
            sizes["train_tokens"] = train_tokens
        for name, size in sizes.items():
            Range(1).check(f"data.{name}", size)
        if held_out not in ("start", "end"):
            raise ValueError(f"data.held_out must be 'start' or 'end' of the text, got {held_out!r}")
        self._tokenizer = tokenizer
        self.num_classes = vocabulary
        self.cache_dir = Path(cache_dir)
        self.documents = Documents(path, suffix, dataset, config, split, column)
        self.length = length
        self.val_tokens, self.test_tokens = val_tokens, test_tokens
        self.held_out = held_out
        self.limit = None if train_tokens is None else train_tokens + val_tokens + test_tokens
        self.parts = parts
        self.dtype = np.dtype(np.uint16 if vocabulary <= 1 << 16 else np.uint32)

    @property
    def tokenizer(self) -> str | None:
        """Folder of the tokenizer.

        Raises:
            RecipeError: It is SmolLM2's, and that is not on this machine.
        """
        return str(smollm2_folder()) if self._tokenizer == SMOLLM2 else self._tokenizer

    def prepare_data(self) -> None:
        """Tokenise the text where that has not been done (once, on one process)."""
        self.documents.check()
        tokenizer = load_tokenizer(self.tokenizer, self.num_classes)
        file = self._file()
        if file.exists():
            return
        make_console().print(f"tokenising {self.documents.dataset or self.documents.path} into {file}, once")
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(file) as part, part.open("wb") as target:
            for tokens in tokenised(self.documents.read(), tokenizer, self.limit):
                target.write(tokens.astype(self.dtype).tobytes())

    def make_splits(self) -> dict[str, TokenWindows]:
        """Cut the tokens in three parts."""
        file = self._file()
        number = file.stat().st_size // self.dtype.itemsize
        trained = number - self.val_tokens - self.test_tokens
        if min(trained // self.parts, self.val_tokens, self.test_tokens) <= self.length:
            raise RecipeError(
                f"data: {number} tokens are too few for data.val_tokens={self.val_tokens}, "
                f"data.test_tokens={self.test_tokens}, data.parts={self.parts} and windows of "
                f"data.length={self.length}; choose smaller ones, or more text"
            )
        if self.held_out == "start":
            order = {"test": self.test_tokens, "val": self.val_tokens, "train": trained}
        else:
            order = {"train": trained, "val": self.val_tokens, "test": self.test_tokens}
        ends = dict(zip(order, accumulate(order.values()), strict=True))
        borders = {name: (ends[name] - size, ends[name]) for name, size in order.items()}
        return {name: TokenWindows(file, self.dtype, part, self.length) for name, part in borders.items()}

    def _file(self) -> Path:
        """Return the file of tokens; its name is a digest of all that its content depends on."""
        files = sorted(Path(str(self.tokenizer)).iterdir())
        tokenizer = file_states(file for file in files if file.suffix in _TOKENIZER_FILES)
        description = json.dumps([self.documents.state(), tokenizer, self.dtype.name, self.limit])
        return self.cache_dir / f"{hashlib.sha256(description.encode()).hexdigest()[:16]}.tokens"

    def train_dataloader(self) -> DataLoader[Any]:
        """Shuffled training batches, a part of a pass an epoch."""
        windows = self.datasets["train"]
        order = PartShuffle(len(windows), self.shuffle_seed, self.parts)
        return DataLoader(windows, self.batch_size, sampler=order, pin_memory=torch.cuda.is_available())


def load_tokenizer(folder: str | None, vocabulary: int) -> Any:
    """Return a tokenizer of transformers, after a check that it fits a model.

    Args:
        folder: Where the tokenizer is.
        vocabulary: Tokens that the model knows.

    Raises:
        RecipeError: There is no tokenizer in the folder, or it has no end-of-text token or more tokens than the
            model.
    """
    if folder is None or not Path(folder).is_dir():
        raise RecipeError(
            f"data.tokenizer={folder} is no folder: pass one with a tokenizer of transformers, as "
            "tokenizer.save_pretrained(FOLDER) writes it; nothing is downloaded"
        )
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise RecipeError(f"data.tokenizer={folder} holds no tokenizer: {error}") from error
    if len(tokenizer) > vocabulary:
        raise RecipeError(
            f"data.tokenizer={folder} has {len(tokenizer)} tokens, more than data.vocabulary={vocabulary}; set "
            f"data.vocabulary={len(tokenizer)}"
        )
    if tokenizer.eos_token_id is None:
        raise RecipeError(
            f"data.tokenizer={folder} has no end-of-text token to end documents with; set its eos_token and save "
            "it again"
        )
    return tokenizer


def tokenised(documents: Iterable[str], tokenizer: Any, limit: int | None) -> Iterator[np.ndarray]:
    """Yield the tokens of some documents at a time, int64 (tokens,); each document ends in the end-of-text token.

    Args:
        documents: The texts.
        tokenizer: Of transformers.
        limit: Tokens to stop after; None for all.
    """
    left = limit
    remaining = iter(documents)
    while texts := list(islice(remaining, _DOCUMENTS_AT_ONCE)):
        rows = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        ended = chain.from_iterable([*row, tokenizer.eos_token_id] for row in rows)
        tokens = np.fromiter(ended, np.int64)[:left]
        yield tokens
        if left is None:
            continue
        left -= len(tokens)
        if left == 0:
            return
