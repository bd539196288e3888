"""The files of a model's folder next to its weights: which of them belong to the pruned model."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from farms_tb.weights.files import ENDINGS, INDEX

REPORT = "sparsity.json"
"""What was done to each layer; a folder with it is the output of a pruning."""

_WEIGHTS = (
    *ENDINGS,
    *(".ggml", ".msgpack", ".ptl", ".pte", ".distcp", ".pkl", ".pickle", ".joblib", ".npy", ".npz"),
    *(".onnx", ".onnx_data", ".onnx.data", ".ort", ".ot", ".mlmodel", ".engine", ".pdparams"),
    *(".h5", ".hdf5", ".keras", ".pb", ".tflite"),
)
"""Ends of names of files that hold weights, dense ones, which do not belong to the pruned model."""


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
        path = file.relative_to(model)
        name = path.as_posix()
        of_module = any(path.is_relative_to(module) for module in modules)
        other = None if of_module else _other_model(model, path)
        if other is not None:
            other_models[other] = None
        elif name == REPORT:  # of the pruning that made this model
            continue
        elif not _holds_weights(file):
            copied[name] = file
        elif of_module:
            copied[name] = file
            unpruned.append(name)
        else:
            left_out.append(name)
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


def _other_model(model: Path, file: Path) -> str | None:
    """Return the folder in a model's folder in which a file is part of another model; None where it is not.

    Checkpoints of a trainer are such, and outputs of earlier prunings.
    """
    for folder in list(file.parents)[-2::-1]:  # From the outermost; the last parent is the model's folder itself.
        if folder.name.startswith("checkpoint-") or (model / folder / REPORT).is_file():
            return f"{folder.as_posix()}/"
    return None


def _visible_files(folder: Path, above: tuple[Path, ...] = ()) -> Iterator[Path]:
    """Yield the files in a folder and in the folders in it, hidden ones left out; links are followed."""
    resolved = folder.resolve()
    if resolved in above:  # a loop: a link to a folder that leads here
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
