"""The folder that a pruned model is written to: it appears when it is whole, and not before.

A run for `out` works in `.out.unfinished` next to it:

==============  ======================================================================
name            content
==============  ======================================================================
`run.json`      what the run is, so that no other run goes on with its state
`.lock`         held by the process that is at work, so that no other one is
`blocks/`       finished blocks, see `farms_tb.sparsity.checkpoint`
`layers/`       for each finished file of weights, its SHA-256 and what was done to the layers in it
`model/`        the files of the pruned model, each written whole or not at all
==============  ======================================================================

At the end `model` is renamed to `out`, which is one step, and the rest is removed. A run that is stopped leaves
the hidden folder, and the same run finds it.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from farms_tb.atomic_write import atomic_path, write_text_atomically
from farms_tb.sparsity.checkpoint import file_digest, note_run
from farms_tb.sparsity.prune_report import PrunedLayer
from farms_tb.weights.files import ENDINGS, INDEX

if TYPE_CHECKING:
    from filelock import BaseFileLock

__all__ = ["FolderFiles", "UnfinishedFolder", "check_output", "files_of_folder", "open_unfinished"]

_WEIGHTS = (
    *ENDINGS,
    *(".ggml", ".msgpack", ".ptl", ".pte", ".distcp", ".pkl", ".pickle", ".joblib", ".npy", ".npz"),
    *(".onnx", ".onnx_data", ".onnx.data", ".ort", ".ot", ".mlmodel", ".engine", ".pdparams"),
    *(".h5", ".hdf5", ".keras", ".pb", ".tflite"),
)
"""Ends of names of files that hold weights, dense ones, which do not belong to the pruned model."""

_LOCK = ".lock"
_REPORT = "sparsity.json"
"""What was done to each layer; a folder with it is the output of a pruning."""


@dataclass(frozen=True)
class UnfinishedFolder:
    """The state of a run, see the table above.

    Attributes:
        output: the folder that appears at the end.
        lock: held while this process works there; None on a file system without locks.
    """

    output: Path
    lock: BaseFileLock | None = None

    @property
    def folder(self) -> Path:
        """Where the state is."""
        return self.output.with_name(f".{self.output.name}.unfinished")

    @property
    def blocks(self) -> Path:
        """The folder of finished blocks."""
        return self.folder / "blocks"

    def has(self, name: str) -> bool:
        """Return whether a file of weights is finished."""
        return (self.folder / "model" / name).is_file()

    def write(self, name: str, content: Callable[[Path], Mapping[str, PrunedLayer]]) -> None:
        """Write a file of weights, whole or not at all.

        Args:
            name: of the file.
            content: writes to the path that it is given, and returns what was done to the layers in the file.

        Raises:
            OSError: the disk is full, or the folder cannot be written to.
        """
        with atomic_path(self.folder / "model" / name) as path:
            rows = {layer: asdict(done) for layer, done in content(path).items()}
            text = json.dumps({"sha256": file_digest(path).hex(), "layers": rows})
            # Before the file itself takes its name: a finished file has its layers.
            write_text_atomically(self._note(name), text)

    def layers(self, names: Sequence[str]) -> dict[str, PrunedLayer]:
        """Return what was done to the layers in finished files, given by their names."""
        found: dict[str, PrunedLayer] = {}
        for name in names:
            rows = json.loads(self._note(name).read_text("utf-8"))["layers"]
            found.update({layer: PrunedLayer(**row) for layer, row in rows.items()})
        return found

    def remove_damaged(self) -> None:
        """Remove files of weights that no longer are as they were written, so that they are written again."""
        for file in (self.folder / "model").iterdir():
            try:
                digest = json.loads(self._note(file.name).read_bytes())["sha256"]
            except (OSError, ValueError, KeyError, TypeError):
                digest = None
            # What is copied at the end is copied again in any case.
            if file.is_file() and file_digest(file).hex() != digest:
                file.unlink()

    def _note(self, name: str) -> Path:
        """Return the file that says what was done to the layers in a file of weights."""
        return self.folder / "layers" / f"{name}.json"

    def remove_if_empty(self) -> None:
        """Remove the state of a run that has finished nothing."""
        finished = {file.name for file in self.folder.rglob("*") if file.is_file()} - {"run.json", _LOCK}
        if not finished:
            shutil.rmtree(self.folder)

    def release(self) -> None:
        """Let another run work there."""
        if self.lock is not None:
            self.lock.release()

    def finish(self, copied: Mapping[str, Path], report: str) -> None:
        """Add the small files, and let the output appear.

        Args:
            copied: files to copy by their names in the output, `"1_Pooling/config.json"`.
            report: content of `sparsity.json`.

        Raises:
            OSError: the disk is full, or the output was made by someone else meanwhile.
        """
        model = self.folder / "model"
        for name, source in copied.items():
            (model / name).parent.mkdir(parents=True, exist_ok=True)
            with atomic_path(model / name) as path:
                shutil.copyfile(source, path)
        write_text_atomically(model / _REPORT, report)
        if self.output.is_dir():
            self.output.rmdir()  # An empty one; any other raises.
        model.rename(self.output)
        shutil.rmtree(self.folder, ignore_errors=True)


def check_output(output: Path) -> None:
    """Refuse an output that exists, unless it is an empty folder, and not a link to one: that has to be renamed.

    Where it is a pruned model whose run was killed before its very end, what that run has left is removed.

    Raises:
        ValueError: there is a file, a link, a mount point, or a folder with content.
    """
    if os.path.ismount(output):
        raise ValueError(
            f"{output} is a mount point, which no folder can take the place of: pass a folder in it, "
            f"{output / 'pruned'} for example"
        )
    is_link = output.is_symlink()
    if output.is_dir() and not is_link and not any(output.iterdir()):
        return
    if output.exists() or is_link:
        kind = "a link" if is_link else "no folder"
        if output.is_dir() and not is_link:
            kind = "a folder with other content"
            if (output / _REPORT).is_file():
                kind = "a pruned model"
                _remove_leftover(UnfinishedFolder(output.absolute()).folder)
        raise ValueError(f"{output} exists and is {kind}: pass a new folder, or delete it first")


def open_unfinished(output: Path, facts: Mapping[str, Sequence[bytes]], size: int) -> UnfinishedFolder:
    """Make the folder of a run's state, or find that of the same run.

    Args:
        output: the folder that appears at the end.
        facts: what the run is, see `farms_tb.sparsity.checkpoint.note_run`.
        size: bytes that the pruned model and the finished blocks will take in all.

    Raises:
        ValueError: the output exists, the state is that of another run, or another process is at work there.
        OSError: the folder cannot be made, or the disk has no room for the model.
    """
    output = output.absolute()
    check_output(output)
    folder = UnfinishedFolder(output).folder
    made = not folder.exists()
    unfinished = UnfinishedFolder(output, _locked(folder))
    try:
        check_output(output)  # again, as another run may have finished before the lock was free
        for part in ("blocks", "layers", "model"):
            (folder / part).mkdir(exist_ok=True)
        note_run(folder, facts)
        _remove_cut_files(folder)
        unfinished.remove_damaged()
        written = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        _check_room(folder, size - written)
    except BaseException as error:
        if made and isinstance(error, OSError):
            shutil.rmtree(folder)
        unfinished.release()
        raise
    return unfinished


def _locked(folder: Path) -> BaseFileLock | None:
    """Make the folder and lock it; None on a file system without locks.

    Raises:
        ValueError: another process is at work there.
        OSError: the folder cannot be made.
    """
    from filelock import FileLock, Timeout

    while True:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / _LOCK)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise ValueError(
                f"another run is at work in {folder}: wait for it, or choose another output"
            ) from None
        except FileNotFoundError:  # a run that has just finished removed the folder
            continue
        except (OSError, NotImplementedError):
            return None
        if (folder / _LOCK).exists():
            return lock
        lock.release()  # that of a folder which a run that has just finished removed


def _remove_leftover(folder: Path) -> None:
    """Remove the state of a run that was killed when its output had just appeared: the model has moved there.

    Raises:
        ValueError: the run is about to remove it itself.
    """
    if (folder / "run.json").is_file() and not (folder / "model").exists():
        lock = _locked(folder)
        shutil.rmtree(folder, ignore_errors=True)
        if lock is not None:
            lock.release()


def _remove_cut_files(folder: Path) -> None:
    """Remove what a process that was killed had begun to write."""
    for file in folder.rglob(".*.part"):
        file.unlink()


def _check_room(folder: Path, size: int) -> None:
    """Refuse a disk without room.

    Args:
        folder: a folder on the disk.
        size: bytes that will be written.

    Raises:
        OSError: there is no room.
    """
    disk = shutil.disk_usage(folder)
    # Some network file systems say that they have no size at all.
    if disk.total and disk.free < size:
        raise OSError(
            f"no room for the pruned model in {folder.parent}: it takes {size / 1e9:.3g} GB, and "
            f"{disk.free / 1e9:.3g} GB are free"
        )


@dataclass(frozen=True)
class FolderFiles:
    """What of a model's folder belongs to the pruned model, and what does not.

    Attributes:
        copied: files that are copied as they are, by their names relative to the folder: configuration, tokenizer,
            index, and the modules of sentence-transformers after the model, weights included.
        unpruned: names of those copied files that hold weights.
        left_out: names of files that are not copied because they hold dense weights.
        other_models: names of folders that are not copied because another model is in them.
    """

    copied: Mapping[str, Path]
    unpruned: Sequence[str] = ()
    left_out: Sequence[str] = ()
    other_models: Sequence[str] = ()


def files_of_folder(model: Path) -> FolderFiles:
    """Sort the files of a folder by whether they belong to the pruned model.

    Args:
        model: the folder of the dense model; of a file of weights, nothing is copied.
    """
    if not model.is_dir():
        return FolderFiles({})
    modules = _modules(model)
    copied: dict[str, Path] = {}
    unpruned: list[str] = []
    left_out: list[str] = []
    other_models: dict[str, None] = {}
    for file in sorted(_visible_files(model)):
        name = file.relative_to(model)
        of_module = any(name.is_relative_to(module) for module in modules)
        other = None if of_module else _other_model(model, name)
        if other is not None:
            other_models[other] = None
        elif name.as_posix() == _REPORT:  # of the pruning that made this model
            continue
        elif _holds_weights(file) and not of_module:
            left_out.append(name.as_posix())
        else:
            copied[name.as_posix()] = file
            if _holds_weights(file):
                unpruned.append(name.as_posix())
    return FolderFiles(copied, unpruned, left_out, tuple(other_models))


def _modules(model: Path) -> list[str]:
    """Return the folders of the modules of sentence-transformers that come after the model, such as `2_Dense`."""
    try:
        modules = json.loads((model / "modules.json").read_bytes())
        paths = [module["path"] for module in modules]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return []
    # The empty path is the model's own.
    return [path for path in paths if isinstance(path, str) and Path(path).parts]


def _other_model(model: Path, name: Path) -> str | None:
    """Return the folder in a model's folder in which a file is part of another model; None where it is not.

    Checkpoints of a trainer are such, and outputs of earlier prunings.
    """
    for folder in list(name.parents)[-2::-1]:  # From the outermost; the last parent is the model's folder itself.
        if folder.name.startswith("checkpoint-") or (model / folder / _REPORT).is_file():
            return f"{folder.as_posix()}/"
    return None


def _visible_files(folder: Path, above: tuple[Path, ...] = ()) -> Iterator[Path]:
    """Yield the files in a folder and in the folders in it, hidden ones left out; links are followed.

    Args:
        folder: the folder.
        above: the folders that lead to it, without links. A link to one of them is a loop.
    """
    resolved = folder.resolve()
    if resolved in above:
        return
    for path in folder.iterdir():
        if path.name.startswith("."):
            continue
        if path.is_dir():
            yield from _visible_files(path, (*above, resolved))
        elif path.is_file():
            yield path


def _holds_weights(file: Path) -> bool:
    """Return whether a file is one of weights, or an index of such files in another format, by its name."""
    name = file.name.lower()
    if name.endswith(INDEX):
        return not name.endswith(f".safetensors{INDEX}")
    # TensorFlow's checkpoints are `model.ckpt.index` and `model.ckpt.data-00000-of-00001`.
    return name.endswith(_WEIGHTS) or ".ckpt." in name
