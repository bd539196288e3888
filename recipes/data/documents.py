"""Documents for language models: a known text, any files of text, or a data set of `datasets` on this machine."""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from farms_tb.sparsity.calibration import dataset_texts
from recipes.errors import RecipeError
from recipes.real import wikipedia

__all__ = ["KNOWN_TEXTS", "Documents", "file_states", "text_files"]


def _wikipedia() -> list[str]:
    """Return the articles of the English Wikipedia that `make real` brings, 2.3 MB."""
    return wikipedia("calibration") + wikipedia("evaluation")


def _python() -> list[str]:
    """Return the public modules of the standard library that are one file each, about 4 MB.

    They are those of the running Python, and so differ a little between its versions.
    """
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("[!_]*.py"))
    return [file.read_bytes().decode() for file in files]


KNOWN_TEXTS: dict[str, Callable[[], list[str]]] = {"wikipedia": _wikipedia, "python": _python}
"""Functions that return the documents of a text, by its name. A file or folder of that name is `./python`."""


@dataclass(frozen=True)
class Documents:
    """Where the documents of a text are, either files or a data set.

    Attributes:
        path: A file of text, or a folder, of which all files that end in `suffix` are read in the order of their
            paths; each is a document. Or the name of one of `KNOWN_TEXTS`.
        suffix: Ending of the files of a folder.
        dataset: A folder of data files, or the name of a data set that `datasets` has on this machine.
        config: Which configuration of the data set.
        split: Which part of the data set: "train", "train[:10%]".
        column: Which column of the data set holds the text.
    """

    path: str | None
    suffix: str
    dataset: str | None
    config: str | None
    split: str
    column: str

    def check(self) -> None:
        """Refuse what can be seen to be missing.

        Raises:
            RecipeError: Not exactly one of `path` and `dataset` is given, there is no file, or the known text is
                not on this machine.
        """
        if (self.path is None) == (self.dataset is None):
            raise RecipeError(
                "set one of data.path=FILE_OR_FOLDER, files of text, and data.dataset=NAME_OR_FOLDER, a data set "
                f"of `datasets` on this machine; got data.path={self.path} and data.dataset={self.dataset}"
            )
        if self.path in KNOWN_TEXTS:
            self.read()
        elif self.path is not None:
            text_files(self.path, self.suffix)

    def read(self) -> Iterable[str]:
        """Return the documents one after the other, without holding them all.

        Raises:
            RecipeError: There is no such data set on this machine, or a file is no text in UTF-8; nothing is
                downloaded.
        """
        if self.path in KNOWN_TEXTS:
            return KNOWN_TEXTS[self.path]()
        if self.dataset is None:
            return map(_text_of, text_files(str(self.path), self.suffix))
        try:
            return dataset_texts(self.dataset, split=self.split, config=self.config, column=self.column)
        except (ImportError, FileNotFoundError, ValueError) as error:
            raise RecipeError(f"data.dataset: {error}") from error

    def state(self) -> dict[str, Any]:
        """Return plain values that change with the documents, without reading them if they are large."""
        if self.path in KNOWN_TEXTS:
            text = "\0".join(KNOWN_TEXTS[self.path]())
            return {**asdict(self), "sha256": hashlib.sha256(text.encode()).hexdigest()}
        folder = Path(self.dataset or "")
        if self.path is not None:
            files = text_files(self.path, self.suffix)
        elif folder.is_dir():
            files = sorted(file for file in folder.rglob("*") if file.is_file())
        else:
            files = []
        return {**asdict(self), "files": file_states(files)}


def text_files(path: str, suffix: str) -> list[Path]:
    """Return a file of text, or those in a folder in the order of their paths.

    Args:
        path: The file or the folder.
        suffix: Ending of the files of a folder.

    Raises:
        RecipeError: There is none.
    """
    folder = Path(path)
    files = [folder] if folder.is_file() else sorted(folder.rglob(f"*{suffix}"))
    if not files:
        raise RecipeError(f"data.path={path} is no file and no folder with files that end in {suffix!r}")
    return files


def file_states(files: Iterable[Path]) -> list[tuple[str, int, int]]:
    """Return path, size in bytes and time of change in nanoseconds of files, which tell changed content."""
    return [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]


def _text_of(file: Path) -> str:
    """Return the text of a file."""
    try:
        return file.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise RecipeError(f"{file} is no text in UTF-8: {error}") from error
