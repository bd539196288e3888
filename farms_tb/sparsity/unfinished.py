"""The folder that a pruned model is written to: it appears when it is whole, and not before.

A run for `out` works in `.out.unfinished` next to it:

==============  ======================================================================
name            content
==============  ======================================================================
`run.json`      what the run is, so that no other run goes on with its state
`blocks/`       finished blocks, see `farms_tb.sparsity.checkpoint`
`layers/`       for each finished file of weights, what was done to the layers in it
`model/`        the files of the pruned model, each written whole or not at all
==============  ======================================================================

At the end `model` is renamed to `out`, which is one step, and the rest is removed. A run that is stopped leaves
the hidden folder, and the same run finds it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from farms_tb.atomic_write import atomic_path, write_text_atomically
from farms_tb.sparsity.checkpoint import note_run
from farms_tb.sparsity.prune_report import PrunedLayer
from farms_tb.weights.files import INDEX

__all__ = ["UnfinishedFolder", "check_output", "copied_files", "open_unfinished"]

_WEIGHTS = (
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".gguf",
    ".h5",
    ".msgpack",
    ".onnx",
    ".onnx_data",
    ".npz",
)
"""Ends of names of files that hold weights, dense ones, which do not belong to the pruned model."""


@dataclass(frozen=True)
class UnfinishedFolder:
    """The state of a run, see the table above.

    Attributes:
        output: the folder that appears at the end.
    """

    output: Path

    @property
    def folder(self) -> Path:
        """Where the state is."""
        return self.output.with_name(f".{self.output.name}.unfinished")

    @property
    def blocks(self) -> Path:
        """The folder of finished blocks."""
        return self.folder / "blocks"

    def has(self, name: str) -> bool:
        """Tell whether a file of weights is finished."""
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
            layers = content(path)
            text = json.dumps({layer: asdict(done) for layer, done in layers.items()})
            # Before the file itself takes its name: a finished file has its layers.
            write_text_atomically(self.folder / "layers" / f"{name}.json", text)

    def layers(self, names: Sequence[str]) -> dict[str, PrunedLayer]:
        """Return what was done to the layers in finished files, given by their names."""
        found: dict[str, PrunedLayer] = {}
        for name in names:
            rows = json.loads((self.folder / "layers" / f"{name}.json").read_text("utf-8"))
            found.update({layer: PrunedLayer(**row) for layer, row in rows.items()})
        return found

    def remove_if_empty(self) -> None:
        """Remove the state of a run that has finished nothing."""
        finished = [file for file in self.folder.rglob("*") if file.is_file() and file.name != "run.json"]
        if not finished:
            shutil.rmtree(self.folder)

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
        write_text_atomically(model / "sparsity.json", report)
        if self.output.is_dir():
            self.output.rmdir()  # An empty one; any other raises.
        model.rename(self.output)
        shutil.rmtree(self.folder, ignore_errors=True)


def check_output(output: Path) -> None:
    """Refuse an output that exists, unless it is an empty folder.

    Raises:
        ValueError: it does.
    """
    if output.is_dir() and not any(output.iterdir()):
        return
    if output.exists() or output.is_symlink():
        kind = "a folder with other content" if output.is_dir() else "no folder"
        raise ValueError(f"{output} exists and is {kind}: pass a new folder, or delete it first")


def open_unfinished(output: Path, facts: Mapping[str, Sequence[bytes]], size: int) -> UnfinishedFolder:
    """Make the folder of a run's state, or find that of the same run.

    Args:
        output: the folder that appears at the end.
        facts: what the run is, see `farms_tb.sparsity.checkpoint.note_run`.
        size: bytes that the pruned model and the finished blocks will take in all.

    Raises:
        ValueError: the output exists, or the state is that of another run.
        OSError: the folder cannot be made, or the disk has no room for the model.
    """
    output = output.absolute()
    check_output(output)
    unfinished = UnfinishedFolder(output)
    made = not unfinished.folder.exists()
    for part in ("blocks", "layers", "model"):
        (unfinished.folder / part).mkdir(parents=True, exist_ok=True)
    note_run(unfinished.folder, facts)
    _remove_cut_files(unfinished.folder)
    written = sum(file.stat().st_size for file in unfinished.folder.rglob("*") if file.is_file())
    try:
        _check_room(unfinished.folder, size - written)
    except OSError:
        if made:
            shutil.rmtree(unfinished.folder)
        raise
    return unfinished


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
            f"no room for the pruned model in {folder.parent}: it takes {size / 1e9:.1f} GB, and "
            f"{disk.free / 1e9:.1f} GB are free"
        )


def copied_files(model: Path) -> tuple[dict[str, Path], list[str]]:
    """List the files of a folder that belong to the pruned model as they are: configuration, tokenizer, index.

    Args:
        model: the folder of the dense model; of a file of weights, nothing is copied.

    Returns:
        The files by their names relative to the folder, and the names of those that are left out because they hold
        dense weights.
    """
    copied: dict[str, Path] = {}
    left_out: list[str] = []
    if not model.is_dir():
        return copied, left_out
    for file in sorted(_visible_files(model)):
        name = file.relative_to(model).as_posix()
        if name == "sparsity.json":  # of the pruning that made this model
            continue
        if _holds_weights(file):
            left_out.append(name)
        else:
            copied[name] = file
    return copied, left_out


def _visible_files(folder: Path) -> Iterator[Path]:
    """Yield the files in a folder and in the folders in it, hidden ones left out."""
    for path in folder.rglob("*"):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if path.is_file() and not hidden:
            yield path


def _holds_weights(file: Path) -> bool:
    """Tell a file of weights, or an index of such files in another format, by its name."""
    if file.name.endswith(INDEX):
        return not file.name.endswith(f".safetensors{INDEX}")
    return file.suffix in _WEIGHTS
