"""The tensors of a file or folder that a plan names, found and checked without the model's class.

Names, shapes and types are read from the headers of the files; values are read one tensor at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial, reduce
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor

from farms_tb.printable import printable
from farms_tb.report import LayerRecord
from farms_tb.sparsity.methods import PruneTarget, Structure, check_groups, prune_targets
from farms_tb.sparsity.plan import SparsityPlan
from farms_tb.sparsity.prunable import NOT_QUANTISED, Layout, check_intact, plan_for_names, refusal
from farms_tb.weights.files import files_of_weights, stored_tensors
from farms_tb.weights.gguf_files import is_gguf
from farms_tb.weights.stored import StoredTensor
from farms_tb.weights.stored_layers import stored_layers


@dataclass(frozen=True)
class StoredLayer:
    """A layer of a plan in a file.

    Attributes:
        name: its name in the file.
        tensor: the tensor that holds it.
        layout: how its weight becomes a matrix: `"linear"` for a matrix (out, in), else `"rows"`.
        part: which of `parts` equal runs of rows of the tensor it is.
        parts: how many layers share the tensor: three for packed attention.
        stack: shape of its stack of matrices (K, R, C); empty where it has none.
        problem: why it cannot be pruned; empty where it can.
        block: path of its block in the plan.
        target: how it is to be pruned.
    """

    name: str
    tensor: StoredTensor
    layout: Layout = "linear"
    part: int = 0
    parts: int = 1
    stack: tuple[int, ...] = ()
    problem: str = ""
    block: str = ""
    target: PruneTarget = field(default_factory=lambda: PruneTarget(0.0))

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of its weight as it is stored."""
        rows, *others = self.tensor.shape
        return (rows // self.parts, *others)

    def view(self, whole: Tensor) -> Tensor:
        """Return the layer's rows of the tensor that it is stored in, a view."""
        return whole.chunk(self.parts)[self.part]


@dataclass(frozen=True)
class StoredModel:
    """A model in files, and what a plan says of it.

    Attributes:
        files: the files of its weights.
        layers: the planned layers by name, in the order of the plan.
        plan: the plan, its names as in the files.
        has_transposed: whether some matrix of the model, planned or not, is stored as (in, out).
    """

    files: tuple[Path, ...]
    layers: Mapping[str, StoredLayer]
    plan: SparsityPlan
    has_transposed: bool = False

    @property
    def by_tensor(self) -> dict[str, list[StoredLayer]]:
        """The planned layers by the name of the tensor that holds them."""
        found: dict[str, list[StoredLayer]] = {}
        for layer in self.layers.values():
            found.setdefault(layer.tensor.key, []).append(layer)
        return found

    @property
    def size(self) -> int:
        """Bytes of all files of weights."""
        return sum(file.stat().st_size for file in self.files)

    @property
    def dtype(self) -> torch.dtype:
        """The type that holds the entries of all planned layers without loss."""
        dtypes = {layer.tensor.dtype for layer in self.layers.values()}
        return reduce(torch.promote_types, dtypes)


def pruned_files(path: str | PathLike[str]) -> list[Path]:
    """List the files of a model's weights, after a check that they can be written again.

    Args:
        path: a folder or a file.

    Raises:
        FileNotFoundError: there is none.
        ValueError: they are no safetensors; the message says what to do.
    """
    files = files_of_weights(path)
    for file in files:
        if is_gguf(file):
            raise ValueError(f"{printable(file)} is GGUF, which holds quantised weights: {NOT_QUANTISED}")
        if file.suffix != ".safetensors":
            raise ValueError(
                f"{printable(file)} is no safetensors file, and only those are written: load the model in "
                "transformers and save it by model.save_pretrained(folder), or a state dict by "
                "safetensors.torch.save_file"
            )
    return files


def planned_tensors(path: Path, plan: SparsityPlan, structure: Structure) -> StoredModel:
    """Find every layer of a plan in a file or folder, and check that it can be pruned; no values are read.

    Args:
        path: a safetensors file or a folder of them.
        plan: its names may lack the prefix that the file gives all of them, or have one more.
        structure: the structure of the zeros.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the weights are no safetensors, the plan was made for another model, a planned layer is tied,
            quantised or cannot have the structure. The message names the layer and says what to do.
    """
    files = pruned_files(path)
    adapter = files[0].parent / "adapter_config.json"
    if adapter.is_file():
        raise ValueError(
            f"{printable(adapter)} belongs to an adapter, which transformers adds to the weights: load the model, "
            "call merge_and_unload(), save it to a folder of its own and prune that"
        )
    stored = stored_tensors(path)
    found = {layer.name: layer for tensor in stored for layer in _layers(tensor)}
    plan = plan_for_names(plan, found)
    known = [found[name] for name in plan.layers if name in found]
    for layer in known:
        _check_prunable(layer)
        _check_untied(layer, stored)
    plan.check_fits({layer.name: layer.stack for layer in found.values() if layer.stack})
    targets = prune_targets(plan, structure)
    layers = {}
    for name, planned in plan.layers.items():
        check_groups(name, found[name].shape, found[name].layout, targets[name])
        layers[name] = replace(found[name], block=planned.block, target=targets[name])
    return StoredModel(tuple(files), layers, plan, any(map(_is_transposed, stored)))


def check_oriented(model: StoredModel) -> None:
    """Refuse a structure for weights `(in, out)`, whose groups of inputs lie in columns.

    GPT-2 stores its weights so. A file does not say it, but the length of a bias does; of a square matrix, the
    biases of others.

    Raises:
        ValueError: a layer that is to have the structure is stored so.
    """
    for layer in model.layers.values():
        rows, *columns = layer.tensor.shape
        is_square = columns == [rows]
        if layer.target.structure is not None and (
            _is_transposed(layer.tensor) or (is_square and model.has_transposed)
        ):
            raise ValueError(
                f"{printable(layer.name)} is stored as (in, out), as biases show: use --structure unstructured, "
                "or pass --calibration, with which the model is loaded"
            )


def _is_transposed(tensor: StoredTensor) -> bool:
    """Return whether a matrix is (in, out), by its bias (out,)."""
    return len(tensor.shape) == 2 and tensor.shape_of("bias") == tensor.shape[1:] != tensor.shape[:1]


def check_finite(model: StoredModel, progress: Callable[[int, int], None]) -> None:
    """Read every planned layer and refuse NaN and inf; one tensor is in memory at a time.

    Args:
        model: the model.
        progress: called with the number of layers that were read and of all.

    Raises:
        ValueError: a layer holds NaN or inf, or a file was cut or changed.
    """
    number = 0
    for layers in model.by_tensor.values():
        whole = layers[0].tensor.read()
        for layer in layers:
            check_intact(layer.name, layer.view(whole))
        number += len(layers)
        progress(number, len(model.layers))


def _layers(tensor: StoredTensor) -> Iterator[StoredLayer]:
    """Yield the layers in a tensor, told by names and shapes as a measurement tells them."""
    shown = replace(tensor, read=partial(torch.empty, tensor.shape, dtype=tensor.dtype, device="meta"))
    if tensor.dtype.itemsize == 1:
        # Without its scales, which would be multiplied with it.
        shown = replace(shown, siblings={tensor.name: shown})
    found = list(stored_layers([shown]))
    for place, (name, layer) in enumerate(found):
        if isinstance(layer, LayerRecord):
            yield StoredLayer(name, tensor, problem=layer.status)
            continue
        yield StoredLayer(
            name,
            tensor,
            # A plain matrix (out, in): no part of a parameter, convolution or expert.
            layout="linear" if len(tensor.shape) == 2 and not layer.part else "rows",
            part=place,
            parts=len(found),
            stack=tuple(layer.matrices.shape),
        )


def _check_prunable(layer: StoredLayer) -> None:
    """Refuse a layer whose entries are no plain numbers, or that is no matrix."""
    dtype = layer.tensor.dtype
    if not layer.tensor.problem and not dtype.is_complex and (dtype.itemsize == 1 or not dtype.is_floating_point):
        raise ValueError(f"{printable(layer.name)} is quantised ({dtype}) and cannot be pruned: {NOT_QUANTISED}")
    if layer.problem:
        raise ValueError(refusal(layer.name, layer.problem))
    if math.prod(layer.stack) != math.prod(layer.shape) or dtype.is_complex:
        raise ValueError(
            f"{printable(layer.name)} cannot be pruned: its {dtype} entries are no matrix. Leave it out of the "
            "plan"
        )


def _check_untied(layer: StoredLayer, tensors: Sequence[StoredTensor]) -> None:
    """Refuse a weight that the model uses in a second place, by what its `config.json` says."""
    head = layer.tensor.facts.tied_head
    others = [one.key for one in tensors if one.identity == layer.tensor.identity and one.key != layer.tensor.key]
    if head and f".{layer.name}".endswith(f".{head}") and not others:
        others = ["the input embedding"]
    if others:
        raise ValueError(
            f"{printable(layer.name)} is tied to {printable(others[0])}: pruning one prunes the other. Leave it "
            "out of the plan"
        )
