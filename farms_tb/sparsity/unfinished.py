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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from farms_tb.atomic_write import atomic_path, write_text_atomically
from farms_tb.sparsity.checkpoint import file_digest, note_run
from farms_tb.sparsity.other_files import REPORT
from farms_tb.sparsity.prune_report import PrunedLayer

if TYPE_CHECKING:
    from filelock import BaseFileLock

_LOCK = ".lock"


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
        write_text_atomically(model / REPORT, report)
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
    is_folder = output.is_dir() and not is_link
    is_free = not any(output.iterdir()) if is_folder else not (output.exists() or is_link)
    if is_free:
        return
    if is_folder and (output / REPORT).is_file():
        kind = "a pruned model"
        _remove_leftover(UnfinishedFolder(output.absolute()).folder)
    elif is_folder:
        kind = "a folder with other content"
    else:
        kind = "a link" if is_link else "no folder"
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
        for cut in folder.rglob(".*.part"):  # what a process that was killed had begun to write
            cut.unlink()
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


def _check_room(folder: Path, size: int) -> None:
    """Refuse a disk that has no room for `size` more bytes in a folder."""
    disk = shutil.disk_usage(folder)
    # Some network file systems say that they have no size at all.
    if disk.total and disk.free < size:
        raise OSError(
            f"no room for the pruned model in {folder.parent}: it takes {size / 1e9:.3g} GB, and "
            f"{disk.free / 1e9:.3g} GB are free"
        )
