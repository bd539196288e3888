"""Measure the weights in a file, without the model and without running anything that the file holds.

A file holds names and tensors and nothing of the modules they come from, so a layer's type is told by its name and
the number of its dimensions:

=============================================  ==============================================================
name and weight                                taken for
=============================================  ==============================================================
`weight`, 2 dimensions                         a linear layer; an embedding, which is listed but not measured,
                                               where its name contains "emb", "wte" or "wpe"
`weight`, 3 to 5 dimensions, real              a convolution of one group, transposed or not
`in_proj_weight`, or `q_proj_weight` and so on  q, k and v of attention
any name, 3 and more dimensions, complex       a spectral convolution (in, out, *modes), all modes in use
=============================================  ==============================================================

What is anything else is listed with the reason, as in `farms_tb.analyze`. So are quantised weights: integers, and
8-bit floats with a scale for each block; the scales beside them are not listed. 8-bit floats with one or no scale
are measured: alpha does not depend on it.
"""

from __future__ import annotations

import json
import math
import pickle
import re
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from farms_tb.report import LayerRecord
from farms_tb.weights.layers import clean_name, unreadable
from farms_tb.weights.matrices import CONV_NORM, MatrixStack, NoSpectrumError

INDEX = ".index.json"

_EMBEDDINGS = ("emb", "wte", "wpe")
_ATTENTION_PARTS = {f"{part}_proj_weight": part for part in "qkv"}
# Where training scripts keep the weights in a checkpoint that holds more; the first is Lightning's.
_STATE_DICT_KEYS = ("state_dict", "model_state_dict", "model")
# What a Hugging Face directory holds; the first that is there is read.
_IN_FOLDER = (f"*.safetensors{INDEX}", "*.safetensors", f"*.bin{INDEX}", "pytorch_model.bin")

# How quantised layers are saved by bitsandbytes, GPTQ, AWQ, compressed-tensors and in 8-bit floats.
_QUANTISED = ("weight", "qweight", "weight_packed")
_SCALES = ("weight_scale", "weight_scale_inv", "scales", "SCB")
_BESIDE_QUANTISED = (*_SCALES, "qzeros", "g_idx", "weight_g_idx", "weight_zero_point", "weight_shape")


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file.

    Attributes:
        key: its name there.
        shape: its shape.
        read: reads it.
        identity: equal for two names of one tensor.
        block_scales: whether scales lie beside it, one for each block or row.
    """

    key: str
    shape: tuple[int, ...]
    read: Callable[[], Tensor]
    identity: object
    block_scales: bool = False

    @property
    def path_and_name(self) -> tuple[str, str]:
        """Path of the module, and name of the parameter there."""
        # tltorch keeps a dense weight as the `tensor` of a module `weight`.
        path, _, name = clean_name(self.key).removesuffix(".tensor").rpartition(".")
        return path, name

    @property
    def may_be_layer(self) -> bool:
        """Not a vector in any disguise, but for the weights of linear layers and convolutions of one channel."""
        matrix_like = self.path_and_name[1] == "weight" and len(self.shape) > 1
        return matrix_like or sum(size > 1 for size in self.shape) > 1


def stored_tensors(path: str | PathLike[str], damaged: list[str] | None = None) -> list[StoredTensor]:
    """List the tensors in a file that may be layers; nothing is read but their names and shapes.

    Args:
        path: see `analyze_checkpoint`.
        damaged: where given, gets a sentence for each of several files that cannot be read, and the tensors of the
            others are listed; None for an error.

    Raises:
        FileNotFoundError, ValueError, ImportError: see `analyze_checkpoint`.
    """
    path = Path(path)
    if path.is_dir():
        path = _weights_in(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    if path.name.endswith(INDEX):
        parts = _parts(path)
        found = []
        for name in sorted(set(parts.values())):
            try:
                found += list(_in_file(path.parent / name))
            except ValueError as error:
                if damaged is None:
                    raise
                damaged.append(str(error))
                parts = {key: part for key, part in parts.items() if part != name}
        absent = sorted(parts.keys() - {tensor.key for tensor in found})
        if absent:
            raise ValueError(f"{path} names tensors that its files do not hold: {', '.join(absent[:5])}")
    else:
        found = list(_in_file(path))
    if path.suffix in (".safetensors", ".json"):
        # Neither safetensors nor parts of a checkpoint have an order of their own.
        found.sort(key=lambda tensor: _natural(tensor.key))
    return _without_scales(found)


def stored_layers(tensors: Iterable[StoredTensor]) -> Iterator[tuple[str, MatrixStack | LayerRecord]]:
    """Read one tensor after the other.

    Args:
        tensors: what `stored_tensors` returned.

    Yields:
        Name of each layer, with its weight or a record that says why it has no spectrum.
    """
    measured: dict[object, str] = {}
    names: set[str] = set()
    for stored in tensors:
        for name, found in _layers(stored, measured):
            # Only a dict made by hand has both `a` and `a.weight`.
            name = stored.key if name in names else name
            names.add(name)
            yield name, found


def _layers(stored: StoredTensor, measured: dict[object, str]) -> Iterator[tuple[str, MatrixStack | LayerRecord]]:
    """Yield the layers of one tensor, and note in `measured` that it has a spectrum."""
    path, own = stored.path_and_name
    unnamed = own in (*_QUANTISED, "in_proj_weight") or own in _ATTENTION_PARTS
    name = (path if unnamed else f"{path}.{own}").strip(".") or own
    if stored.identity in measured:
        yield name, LayerRecord(status=f"tied to {measured[stored.identity]!r}")
        return
    try:
        stacks = _stacks(stored, stored.read())
    except NoSpectrumError as error:
        yield name, LayerRecord(status=str(error))
        return
    for stack in stacks:
        if min(stack.matrices.shape[1:]) > 1:
            measured[stored.identity] = name
        yield (f"{path}.{stack.part}".strip(".") if stack.part else name), stack


def _stacks(stored: StoredTensor, weight: Tensor) -> list[MatrixStack]:
    """Return the weight as stacks of matrices by its name and shape.

    Raises:
        NoSpectrumError: it is none, or cannot be told to be one.
    """
    path, own = stored.path_and_name
    packed = not (weight.is_floating_point() or weight.is_complex()) or "float4" in str(weight.dtype)
    if own in _QUANTISED and (packed or (weight.element_size() == 1 and stored.block_scales)):
        scaled = "" if packed else ", a scale for each block"
        raise NoSpectrumError(f"quantised weights ({weight.dtype}{scaled}): dequantise the model first")
    problem = unreadable([weight])
    if problem or weight.layout != torch.strided:
        raise NoSpectrumError(problem or f"a sparse weight ({weight.layout})")
    if ".weight." in f".{path}.":
        raise NoSpectrumError(
            "part of a parametrized or factorised weight: build the model and use analyze(model)"
        )
    if own == "in_proj_weight" and weight.ndim == 2 and len(weight) % 3 == 0:
        parts = zip("qkv", weight.chunk(3), strict=True)
        return [MatrixStack(matrix[None], sampling="grid", part=part) for part, matrix in parts]
    if own in _ATTENTION_PARTS and weight.ndim == 2:
        return [MatrixStack(weight[None], sampling="grid", part=_ATTENTION_PARTS[own])]
    if weight.is_complex() and weight.ndim >= 3:
        return [MatrixStack(weight.flatten(2).permute(2, 0, 1))]
    if own != "weight":
        raise NoSpectrumError(f"a parameter called {own!r}: its name does not tell what it is")
    if weight.ndim == 2:
        if _is_embedding(path):
            raise NoSpectrumError("embedding, by its name: not analysed by default")
        return [MatrixStack(weight[None], sampling="grid")]
    if weight.ndim <= 5:
        return [MatrixStack(weight.flatten(2).permute(2, 0, 1), eigenvalue_scale=CONV_NORM)]
    raise NoSpectrumError(f"a weight of {weight.ndim} dimensions: neither linear nor convolution")


def _is_embedding(path: str) -> bool:
    """Look at the module's own name: `patch_embed.proj` is no embedding, `tok_emb` and `embeds.0` are."""
    own = [part for part in path.split(".") if not part.isdigit()][-1:]
    return any(word in part.lower() for part in own for word in _EMBEDDINGS)


def _weights_in(folder: Path) -> Path:
    """Return the one index, or else the one file of weights, in a directory."""
    for pattern in _IN_FOLDER:
        found = sorted(folder.glob(pattern))
        if len(found) == 1:
            return found[0]
        if found:
            names = ", ".join(file.name for file in found[:5])
            raise ValueError(f"{folder} has several files of weights, pass one of them: {names}")
    raise ValueError(
        f"{folder} is a directory without a .safetensors file or model.safetensors{INDEX}: pass the file of the "
        "weights"
    )


def _without_scales(tensors: list[StoredTensor]) -> list[StoredTensor]:
    """Keep what may be a layer; note of a weight whether a scale for each block lies beside it."""
    paths = {path for path, own in (tensor.path_and_name for tensor in tensors) if own in _QUANTISED}
    scaled = set()
    kept = []
    for tensor in tensors:
        path, own = tensor.path_and_name
        beside = own in _BESIDE_QUANTISED and path in paths
        if beside and own in _SCALES and math.prod(tensor.shape) > 1:
            scaled.add(path)
        if tensor.may_be_layer and not beside:
            kept.append(tensor)
    return [replace(tensor, block_scales=tensor.path_and_name[0] in scaled) for tensor in kept]


def _in_file(path: Path) -> Iterator[StoredTensor]:
    return _in_safetensors(path) if path.suffix == ".safetensors" else _in_torch_file(path)


def _in_safetensors(path: Path) -> Iterator[StoredTensor]:
    with _opened(path) as file:
        for key in file.keys():  # noqa: SIM118 (no dict)
            yield StoredTensor(key, tuple(file.get_slice(key).get_shape()), partial(_read, path, key), key)


def _read(path: Path, key: str) -> Tensor:
    # The file is mapped as long as it is open: what was read of it would stay in memory until its last tensor.
    with _opened(path) as file:
        tensor: Tensor = file.get_tensor(key)
    return tensor


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """Open safetensors, and name the file in what they have to say about it."""
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise ImportError(f'reading {path.name} needs safetensors: pip install "farms-tb[safetensors]"') from error
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(
            f"cannot read {path}: no safetensors file, or one that is cut short or damaged ({error})"
        ) from error


def _parts(index: Path) -> dict[str, str]:
    """Return the file, beside the index, of each tensor."""
    try:
        parts = json.loads(index.read_bytes())["weight_map"]
        valid = all(Path(name).name == name for name in parts.values())
    except (ValueError, KeyError, TypeError, AttributeError):
        valid = False
    if not valid:
        raise ValueError(f"{index} is no index: expected JSON whose 'weight_map' names a file beside it a tensor")
    missing = sorted({name for name in parts.values() if not (index.parent / name).is_file()})
    if missing:
        raise FileNotFoundError(f"{index} names files that are not beside it: {', '.join(missing[:5])}")
    return dict(parts)


def _natural(key: str) -> list[tuple[int, str]]:
    """Sort `layers.10` after `layers.2`."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in key.split(".")]


def _in_torch_file(path: Path) -> Iterator[StoredTensor]:
    for key, tensor in _state_dict(read_torch_file(path), path).items():
        if isinstance(key, str) and isinstance(tensor, Tensor):
            yield StoredTensor(key, tuple(tensor.shape), partial(_same, tensor), _identity(key, tensor))


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _identity(key: str, tensor: Tensor) -> object:
    """Tell two names of one weight: tied weights share their memory, in a torch file too."""
    if tensor.layout != torch.strided or tensor.is_meta:
        return key
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def read_torch_file(path: Path) -> Any:
    """Read a file by `torch.save` without running it, tensors on the CPU.

    Raises:
        ValueError: it is no such file, or cut short or damaged, or holds more than tensors and plain containers.
    """
    with path.open("rb") as file:
        pickled = file.read(1) == b"\x80"
    zipped = zipfile.is_zipfile(path)
    try:
        with warnings.catch_warnings():
            # The file is read or refused: what torch has to add is of no use to who reads it.
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:
        said = str(error) or type(error).__name__
        needs = re.search(r"(?:GLOBAL|class|function) ([\w.]+\.\w+)", said)
        refused = isinstance(error, pickle.UnpicklingError)
        if "TorchScript" in said or (refused and (needs or zipped or pickled)):
            what = f" ({needs[1]})" if needs else ""
            raise ValueError(
                f"{path} holds more than weights{what}, and loading that could run anything: save the state dict "
                "instead, by torch.save(model.state_dict(), path) or as safetensors; or, if you trust the file, "
                "load it yourself with torch.load(path, weights_only=False) and call analyze(model)"
            ) from error
        # Torch advises to load what is no pickle without its safeguards.
        detail = "no pickle" if refused or not (zipped or pickled) else said.partition("\n")[0]
        raise ValueError(
            f"cannot read {path}: no checkpoint, or one that is empty, cut short or damaged ({detail})"
        ) from error


def _state_dict(loaded: Any, path: Path) -> Mapping[str, Any]:
    """Return the tensors by name in what a file holds."""
    found = loaded
    if isinstance(loaded, dict):
        found = next((loaded[key] for key in _STATE_DICT_KEYS if isinstance(loaded.get(key), dict)), loaded)
    if isinstance(found, dict) and any(isinstance(value, Tensor) for value in found.values()):
        return found
    held = (
        f"a dict with {', '.join(map(repr, list(found)[:5]))}" if isinstance(found, dict) else type(found).__name__
    )
    raise ValueError(
        f"{path} holds no state dict: expected tensors by name, alone or as {_STATE_DICT_KEYS[0]!r}, got {held}"
    )
