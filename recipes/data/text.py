"""Text as bytes, for small language models: a known text, or any files of the user's."""

from __future__ import annotations

import torch
from torch.utils.data import TensorDataset

from recipes.data.documents import KNOWN_TEXTS, text_files
from recipes.data.loaders import SplitData
from recipes.errors import RecipeError
from recipes.values import Range

__all__ = ["ByteTextData"]

BYTES = 256


class ByteTextData(SplitData):
    """Windows of consecutive bytes, and the same a byte later as targets.

    The text is cut in three: its end is the test text, what comes before that the validation text, and the rest is
    trained on. Windows of one text do not overlap.

    Batches are bytes and the bytes after them, int64 (B, length) each.

    Args:
        path: A file of text, or a folder, of which all files that end in `suffix` are read in the order of their
            paths. Or a text that is at hand under a name: `"wikipedia"`, the articles that `make real` brings,
            2.3 MB; `"python"`, modules of the standard library, about 4 MB. None stands for `"wikipedia"`.
        suffix: Ending of the files of a folder.
        length: Bytes of a window.
        train_bytes: Train on so many bytes, from the start of the text; None for all that is left.
        val_bytes: Bytes of validation text.
        test_bytes: Bytes of test text.
        batch_size: Windows a batch.
        shuffle_seed: Seed of the order of the windows.

    Raises:
        ValueError: A size is not positive.
        RecipeError: There is no such file, or too little text.
    """

    kind = "text"
    num_classes = BYTES

    def __init__(
        self,
        path: str | None = None,
        suffix: str = ".txt",
        length: int = 128,
        train_bytes: int | None = None,
        val_bytes: int = 131072,
        test_bytes: int = 131072,
        batch_size: int = 32,
        shuffle_seed: int = 0,
    ) -> None:
        super().__init__(batch_size, shuffle_seed, evaluation_batch_size=4 * batch_size)
        sizes = {"length": length, "val_bytes": val_bytes, "test_bytes": test_bytes, "batch_size": batch_size}
        if train_bytes is not None:
            sizes["train_bytes"] = train_bytes
        for name, size in sizes.items():
            Range(1).check(f"data.{name}", size)
        self.path = path
        self.suffix = suffix
        self.length = length
        self.train_bytes = train_bytes
        self.val_bytes, self.test_bytes = val_bytes, test_bytes

    def make_splits(self) -> dict[str, TensorDataset]:
        """Read the text, cut it in three, and each part in windows."""
        text = self._text()
        end = len(text) - self.val_bytes - self.test_bytes
        length = self.train_bytes or end
        if min(length, end, self.val_bytes, self.test_bytes) <= self.length or length > end:
            raise RecipeError(
                f"data.path={self.path}: {len(text)} bytes are too few for data.val_bytes={self.val_bytes}, "
                f"data.test_bytes={self.test_bytes}, data.train_bytes={self.train_bytes} and windows of "
                f"data.length={self.length}; choose smaller ones"
            )
        parts = {"train": text[:length], "val": text[end:][: self.val_bytes], "test": text[-self.test_bytes :]}
        return {name: _windows(part, self.length) for name, part in parts.items()}

    def _text(self) -> bytes:
        """Return the whole text: a known one in UTF-8, files as they are."""
        name = self.path or "wikipedia"
        if name in KNOWN_TEXTS:
            return "\n\n".join(KNOWN_TEXTS[name]()).encode()
        return b"\n\n".join(file.read_bytes() for file in text_files(name, self.suffix))


def _windows(text: bytes, length: int) -> TensorDataset:
    """Cut a text in windows of `length` bytes; what is left at its end is not used."""
    codes = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    windows = codes.unfold(0, length + 1, length).long()  # neighbours share a byte: a target, then an input
    return TensorDataset(windows[:, :-1], windows[:, 1:])
