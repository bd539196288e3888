"""What a path holds: the tensors in a file, a folder or a state dict, by name and shape.

The readers of single formats are `safetensors_files`, `torch_files` and `gguf_files`; which layer a tensor is,
`stored_layers` tells. Nothing that a file holds is ever executed, and one tensor is in memory at a time.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from torch import Tensor

from farms_tb.printable import printable
from farms_tb.weights.config import facts_of, with_tied_head
from farms_tb.weights.gguf_files import in_gguf, is_gguf, parts_of
from farms_tb.weights.names import first_few, natural_order
from farms_tb.weights.pickled_objects import Skipped, TorchTensor
from farms_tb.weights.safetensors_files import in_safetensors, is_safetensors
from farms_tb.weights.stored import ModelFacts, StoredTensor, stored_in_memory, with_siblings
from farms_tb.weights.stored_layers import may_be_layer
from farms_tb.weights.torch_files import open_torch_file, tensors_of

INDEX = ".index.json"
ENDINGS = (".safetensors", ".gguf", ".pt", ".pth", ".ckpt", ".bin", INDEX)
"""Usual ends of the names of files that `stored_tensors` reads; torch.save takes any other as well."""

_OPTIMIZER = re.compile("optim(?!al|um)")
"""In keys of what belongs to an optimizer: `optimizer_states`, `optim_g`, but not `weights_optimal`."""

# Where training scripts keep the weights in a checkpoint that holds more; the first is Lightning's.
_STATE_DICT_KEYS = ("state_dict", "model_state_dict", "model")
# What a folder of Hugging Face's holds; the first that is there is read.
_IN_FOLDER = (
    *(f"*.safetensors{INDEX}", "*.safetensors", f"*.bin{INDEX}"),
    *("pytorch_model.bin", "adapter_model.bin", "*.gguf"),
)
_ARRAY = re.compile(r"numpy\..*\.(_reconstruct|_frombuffer)$")
"""The functions that a pickled numpy array names."""

_DEPTH = 4
"""Dicts within dicts that are searched for a state dict."""

_MAX_KEY = 1000
"""Characters of a key that may lead to a state dict: a hostile file may have one long key in many dicts."""

_ALONGSIDE = (".csv", ".yaml", ".json", ".html")
"""Ends of the names of other files in the folder of a run or a model: `metrics.csv`, `config.json`."""

_OTHER_FORMATS = {
    b"\x89HDF": "an HDF5 file (Keras)",
    b"\x93NUM": "a numpy array",
    b"\x08\x08\x12": "an ONNX model",
}


def stored_tensors(
    path: str | PathLike[str], damaged: list[str] | None = None, *, key: str | None = None
) -> list[StoredTensor]:
    """List the tensors in a file that may be layers; nothing is read but their names and shapes.

    Args:
        path: see `farms_tb.analyze_checkpoint`.
        damaged: where given, gets a sentence for each of several files that cannot be read, and the tensors of the
            others are listed; None to raise an error instead.
        key: where in a file by `torch.save` the weights are, `"ema"`, or `"student.model"` for a dict in a dict;
            None to look for them.

    Returns:
        The tensors, those that no report lists left out, in the order of a torch file, else sorted by name.

    Raises:
        FileNotFoundError, ValueError, ImportError: see `farms_tb.analyze_checkpoint`. A ValueError, too, where
            there is a key and no file by `torch.save`.
    """
    if "://" in str(path):
        raise ValueError(f"{printable(path)} is a URL: download the file first, then pass its path")
    path = _file_at(Path(path))
    return listed_tensors(tensors_in(path, damaged, key=key), facts_of(path.parent))


def tensors_in(path: Path, damaged: list[str] | None = None, *, key: str | None = None) -> list[StoredTensor]:
    """List all tensors in a file, as `stored_tensors` does, also vectors and others that are no layers."""
    if key is not None and not takes_key(path):
        raise ValueError(f"{printable(path)} takes no key: its tensors lie side by side, not in dicts by name")
    is_index = path.name.endswith(INDEX)
    found = _in_parts(path, damaged) if is_index else list(_in_file(path, key))
    if is_index or is_safetensors(path):
        # Neither safetensors nor parts of a checkpoint have an order of their own.
        found.sort(key=lambda tensor: natural_order(tensor.key))
    return found


def takes_key(path: str | PathLike[str]) -> bool:
    """Return whether a file can hold several state dicts, by torch.save, of which a key chooses one.

    Raises:
        FileNotFoundError, ValueError: there is none, or several that no index belongs to.
    """
    path = _file_at(Path(path))
    return not (path.name.endswith(INDEX) or is_safetensors(path) or is_gguf(path))


def files_of_weights(path: str | PathLike[str]) -> list[Path]:
    """List the files that `stored_tensors` reads: the parts that an index names, sorted by name, or the one file.

    Raises:
        FileNotFoundError, ValueError: there is none, or several that no index belongs to.
    """
    path = _file_at(Path(path))
    if not path.name.endswith(INDEX):
        return [path]
    return [path.parent / name for name in sorted(set(_parts(path).values()))]


def part_of_each(path: str | PathLike[str]) -> dict[str, str]:
    """Return the name of the file that holds each tensor; empty for weights in one file.

    Raises:
        FileNotFoundError, ValueError: see `files_of_weights`.
    """
    path = _file_at(Path(path))
    return _parts(path) if path.name.endswith(INDEX) else {}


def tensors_of_state_dict(state_dict: Mapping[str, Any]) -> list[StoredTensor]:
    """List the tensors of a state dict in memory that may be layers.

    Args:
        state_dict: tensors by name; other items are left out.

    Returns:
        The tensors in the order of the dict; none is copied.

    Raises:
        TypeError: it holds no tensor by name.
    """
    found = [
        stored_in_memory(key, value)
        for key, value in state_dict.items()
        if isinstance(key, str) and isinstance(value, Tensor)
    ]
    if not found:
        kind = type(state_dict).__name__
        raise TypeError(f"expected a torch.nn.Module, got {kind}, and no state dict: it holds no tensor by name")
    return listed_tensors(found, ModelFacts())


def listed_tensors(tensors: list[StoredTensor], facts: ModelFacts) -> list[StoredTensor]:
    """Return the tensors that a report lists, each with what is known of its module and the model."""
    tensors = with_tied_head(with_siblings(tensors, facts), facts.tied_head)
    return [tensor for tensor in tensors if may_be_layer(tensor)]


def _file_at(path: Path) -> Path:
    """Return the file that a path stands for: itself, or the weights in a directory.

    Raises:
        FileNotFoundError, ValueError: there is none, there are several, or it is a pipe.
    """
    file = _weights_in(path) if path.is_dir() else path
    if not file.is_file():
        if file.exists():
            raise ValueError(f"{printable(file)} is a pipe or a device, expected a file: save the weights to one")
        raise FileNotFoundError(f"no such file: {printable(file)}")
    return file


def _weights_in(folder: Path) -> Path:
    """Return the one index, or else the one file of weights, in a directory; the first of a GGUF that was split.

    Raises:
        FileNotFoundError: a part of such a GGUF is missing.
        ValueError: there is none, or several; the message says what there is, and how it can be read.
    """
    for pattern in _IN_FOLDER:
        found = sorted(folder.glob(pattern))
        if found and parts_of(found[0]) == found:
            return found[0]
        if found:
            names = first_few([file.name for file in found])
            raise ValueError(f"{printable(folder)} has several files of weights, pass one of them: {names}")
    raise ValueError(_without_weights(folder))


def _without_weights(folder: Path) -> str:
    """Return the message that refuses a folder in which no known file of weights lies."""
    if any(folder.glob("*.distcp")):
        return (
            f"{printable(folder)} is a distributed checkpoint (.distcp): make one file of it first, python -m "
            f"torch.distributed.checkpoint.format_utils dcp_to_torch {printable(folder)} weights.pt"
        )
    if (folder / "model_index.json").is_file():
        parts = ", ".join(sorted({printable(file.parent.name) for file in folder.glob("*/*.safetensors")}))
        return f"{printable(folder)} is a diffusers pipeline, pass the folder of one of its parts: {parts}"
    return (
        f"{printable(folder)} is a directory without a .safetensors file or model.safetensors{INDEX}: pass the "
        "file of the weights"
    )


def _in_parts(index: Path, damaged: list[str] | None) -> list[StoredTensor]:
    """List the tensors of a checkpoint in several files; of those in two, the one that the index names.

    Raises:
        FileNotFoundError: a file is not there.
        ValueError: the index or a file is damaged, or a tensor is not in its file.
    """
    parts = part_of = _parts(index)
    found = []
    for name in sorted(set(parts.values())):
        try:
            found += [one for one in _in_file(index.parent / name) if part_of.get(one.key, name) == name]
        except (ValueError, OSError) as error:
            if damaged is None:
                raise
            damaged.append(str(error))
            parts = {key: part for key, part in parts.items() if part != name}
    absent = sorted(parts.keys() - {tensor.key for tensor in found})
    if absent:
        raise ValueError(f"{printable(index)} names tensors that its files do not hold: {first_few(absent)}")
    return found


def _parts(index: Path) -> dict[str, str]:
    """Return the name of the file, in the folder of the index, that holds each tensor.

    Raises:
        ValueError: the index is not such a table.
        FileNotFoundError: it names files that are not there.
    """
    try:
        parts = json.loads(index.read_bytes())["weight_map"]
        valid = all(Path(name).name == name for name in parts.values())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        valid = False
    if not valid:
        raise ValueError(
            f"{printable(index)} is no index: expected JSON whose 'weight_map' names a file next to it for each "
            "tensor"
        )
    missing = sorted({name for name in parts.values() if not (index.parent / name).is_file()})
    if missing:
        raise FileNotFoundError(f"{printable(index)} names files that are not next to it: {first_few(missing)}")
    return dict(parts)


def _in_file(path: Path, key: str | None = None) -> Iterator[StoredTensor]:
    """Return the tensors of a file, whose format is known by its ending or first bytes."""
    if is_gguf(path):
        return in_gguf(path)
    if is_safetensors(path):
        return in_safetensors(path)
    if path.suffix in _ALONGSIDE:
        raise ValueError(f"{printable(path)} holds no weights: pass the folder of the run or the model")
    with path.open("rb") as file:
        start = file.read(4)
    for magic, name in _OTHER_FORMATS.items():
        if start.startswith(magic):
            raise ValueError(
                f"cannot read {printable(path)}: {name}, expected safetensors, GGUF or a file by torch.save. Load "
                "the model in torch and call analyze(model)"
            )
    where = open_torch_file(path)
    return tensors_of(_state_dict(where.content, path, key), where)


def _state_dict(loaded: Any, path: Path, key: str | None) -> Mapping[str, Any]:
    """Return the tensors by name in what a file holds: under a key, in one of the usual places, or the only ones.

    Raises:
        ValueError: there are none, or several dicts of tensors.
    """
    candidates = dict(_candidates(loaded, set()))
    if key is not None:
        found = candidates.get(key, _under(loaded, key))
        if found is None:
            raise ValueError(
                f"{printable(path)} holds no state dict under key={key!r}, but under: {_names(candidates)}"
            )
        return found
    possible = _possible(candidates)
    if len(possible) == 1:
        return candidates[possible[0]]
    if possible:
        names = _names(possible)
        raise ValueError(
            f"{printable(path)} holds several state dicts, choose one by --key, in Python by key=: {names}"
        )
    raise ValueError(
        f"{printable(path)} holds no state dict: expected tensors by name, alone or as {_STATE_DICT_KEYS[0]!r}, "
        f"got {_held(loaded)}"
    )


def _candidates(
    held: Any, seen: set[int], where: str = "", depth: int = 0
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the dicts of tensors within a dict, by their keys joined with dots.

    An optimizer's are none, and neither is the further state of a module, which is part of a state dict. `seen`
    has the identities of the dicts that were searched: a hostile file may hold one in many places.
    """
    if not isinstance(held, dict) or depth > _DEPTH or id(held) in seen:
        return
    seen.add(id(held))
    if _has_tensors(held):
        yield where, held
    for key, value in _searched(held):
        yield from _candidates(value, seen, f"{where}.{key}".strip("."), depth + 1)


def _under(held: Any, key: str) -> Mapping[str, Any] | None:
    """Return the dict of tensors under a key, whose parts may have dots in them; None where there is no such dict.

    One that is saved under several keys is found by each, while `_candidates` names it once.
    """
    if not key:
        return held if isinstance(held, dict) and _has_tensors(held) else None
    for first, value in _searched(held):
        if f"{key}.".startswith(f"{first}."):
            found = _under(value, key[len(first) + 1 :])
            if found is not None:
                return found
    return None


def _searched(held: Any) -> Iterator[tuple[str, dict[Any, Any]]]:
    """Yield the dicts within a dict that may be a state dict, or hold one, by their keys."""
    for key, value in held.items() if isinstance(held, dict) else ():
        if not (isinstance(value, dict) and isinstance(key, str)) or len(key) > _MAX_KEY:
            continue
        if not _OPTIMIZER.search(key) and not key.endswith("_extra_state"):
            yield key, value


def _has_tensors(held: Mapping[Any, Any], least_dims: int = 0) -> bool:
    """Return whether a dict holds a tensor of so many dimensions or more."""
    return any(isinstance(value, TorchTensor) and len(value.shape) >= least_dims for value in held.values())


def _possible(candidates: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return the names of the dicts of tensors that may be the weights, one where it can be told which."""
    for usual in (*_STATE_DICT_KEYS, ""):
        if usual in candidates:
            # A loss next to the weights, or scores within them, make no second state dict: those have no matrices.
            within = [name for name in candidates if name == usual or not usual or name.startswith(f"{usual}.")]
            return [name for name in within if _has_tensors(candidates[name], least_dims=2)] or [usual]
    return list(candidates)


def _names(candidates: Iterable[str]) -> str:
    """Return the first ten names, quoted; long ones, as a hostile file may have, are cut."""
    return first_few([f"{name!r:.200}" for name in candidates], most=10) or "none"


def _held(loaded: Any) -> str:
    """Describe what lies where a state dict was expected."""
    found = loaded
    if isinstance(loaded, dict):
        usual = next((name for name in _STATE_DICT_KEYS if name in loaded), None)
        found = loaded if usual is None else loaded[usual]
        if isinstance(found, Skipped):  # Ultralytics, for one, saves the whole model.
            return (
                f"as {usual!r} an object of {printable(found.full_name)}, and loading that could run anything: "
                "save its state_dict() instead; or, if you trust the file, load it yourself with torch.load(path, "
                "weights_only=False) and call analyze(model)"
            )
    if isinstance(found, Mapping):
        keys = [repr(key) for key in list(found)[:5] if isinstance(key, (str, int))]
        arrays = any(isinstance(value, Skipped) and _ARRAY.match(value.full_name) for value in found.values())
        hint = ". Save its numpy arrays as tensors, by torch.from_numpy(array)" if arrays else ""
        return f"a dict with {', '.join(keys)}{hint}" if keys else "a dict without names"
    if isinstance(found, TorchTensor):
        return "Tensor"
    return type(found).__name__
