"""A folder with an adapter of PEFT, merged onto the file of the weights that it was trained for.

PEFT saves A and B of each layer in `adapter_model.safetensors`, and how they are scaled in `adapter_config.json`.
Here the tensors of the base file are listed, and each that has an adapter is added to it when it is read: one
weight, its A and its B are in memory at a time. Weights that were trained as a whole (`modules_to_save`) take the
place of those in the base file, and so do the weights below an adapter that PEFT saves with it
(`lm_head.base_layer.weight`): the table of tokens may have grown. An adapter on one name of a tied weight changes
it under all of them, as it does where PEFT merges.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor

from farms_tb.printable import printable
from farms_tb.weights.config import json_object
from farms_tb.weights.files import listed_tensors, stored_tensors, tensors_in
from farms_tb.weights.low_rank import LowRankUpdate, fits, merged
from farms_tb.weights.names import Renaming, renaming
from farms_tb.weights.stored import ModelFacts, StoredTensor
from farms_tb.weights.stored_layers import values_of
from farms_tb.weights.values import dense

CONFIG = "adapter_config.json"

_OUTSIDE = "base_model.model."
"""What PEFT puts before the names of the model that it adapts."""

_PART = re.compile(r"(?P<layer>.+)\.lora_(?P<part>A|B|embedding_A|embedding_B|magnitude_vector)(\.weight)?")
_VARIANTS = (
    *("alora_invocation_tokens", "arrow_config", "kasa_config", "monteclora_config", "target_parameters"),
    *("use_bdlora", "use_qalora", "layer_replication", "trainable_token_indices"),
)
"""Entries of the config that are set where the adapter is a variant of LoRA that adds something else."""

_CHANGING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""How `init_lora_weights` begins where the initialisation took A and B out of the base weight.

B A is no part of what the base file has then.
"""

_WEIGHTS = ("weight", "in_proj_weight", "qweight", "weight_packed")
"""Names of the weight of a layer that an adapter may be for; the last two are those of quantised ones."""

Parts = dict[str, StoredTensor]
"""The tensors of one layer's adapter by the last part of their names: `"A"`, `"B"`, `"magnitude_vector"`."""


@dataclass(frozen=True)
class _Settings:
    """How the products of an adapter are scaled and added.

    Attributes:
        alpha: the scaling is alpha / r.
        alphas: other values of alpha for layers of these names, from some dot on.
        by_root: whether it is alpha / sqrt(r).
        transposed: whether weights are stored as (in, out).
        tied: whether tied weights stay tied.
    """

    alpha: float
    alphas: Mapping[str, float]
    by_root: bool
    transposed: bool
    tied: bool

    def scaling(self, layer: str, rank: int) -> float:
        """Return the factor of B A for a layer."""
        alpha = next((value for name, value in self.alphas.items() if _ends_in(layer, name)), self.alpha)
        return alpha / (math.sqrt(rank) if self.by_root else rank)


def adapter_folder(path: str | PathLike[str]) -> Path | None:
    """Return the folder of an adapter where `path` is one, or the file of weights in one; else None."""
    path = Path(path)
    folder = path.parent if path.name.startswith("adapter_model.") else path
    return folder if (folder / CONFIG).is_file() else None


def tensors_with_adapter(
    path: str | PathLike[str],
    base: str | PathLike[str],
    damaged: list[str] | None = None,
    *,
    key: str | None = None,
) -> list[StoredTensor]:
    """List the tensors of a file of weights with the adapter in a folder merged onto them.

    Args:
        path: the adapter's folder, or the file of weights in it.
        base: the weights that the adapter was trained for.
        damaged: as in `farms_tb.weights.files.stored_tensors`, for the base.
        key: where the weights lie in the base file.

    Returns:
        What `farms_tb.weights.files.stored_tensors` lists of the base, in the same order, with the values of the
        sum where the adapter has a part for them; and the tensors that the adapter alone has.

    Raises:
        FileNotFoundError: a file is not there, or there are no weights in the adapter's folder.
        ValueError: `path` is no adapter, or the adapter is no LoRA or DoRA, is damaged, or is for other layers
            than those of the base; and see `farms_tb.analyze_checkpoint`.
    """
    folder = adapter_folder(path)
    if folder is None:
        raise ValueError(
            f"{printable(path)} is no folder of an adapter: base is for those, which hold an {CONFIG}"
        )
    found = {tensor.key: tensor for tensor in stored_tensors(base, damaged, key=key)}
    settings = _settings(folder / CONFIG)
    adapters, below, wholes = _sorted(tensors_in(_weights_of(folder)))
    if not adapters:
        raise ValueError(f"{printable(folder)} holds no adapter: expected tensors called ...lora_A and ...lora_B")
    of_base = {tensor.path: tensor for tensor in found.values() if tensor.name in _WEIGHTS}
    rename = renaming(adapters, of_base)
    if rename is None:
        missing = next(layer for layer in adapters if layer not in of_base)
        raise ValueError(
            f"the adapter is for other weights than those of the base: these have no layer {missing!r}"
        )
    # Adapters are added last, to the weights that PEFT saved with them where there are such.
    _put_wholes(found, _renamed(wholes, rename), settings)
    _put_below(found, _renamed(below, rename))
    _put_adapters(
        found, {of_base[rename(layer)].key: (layer, parts) for layer, parts in adapters.items()}, settings
    )
    return list(found.values())


def _renamed(tensors: list[StoredTensor], rename: Renaming) -> list[StoredTensor]:
    """Return the tensors of an adapter's folder that are layers, by their names in the base file."""
    listed = listed_tensors(tensors, ModelFacts())
    return [replace(tensor, key=f"{rename(tensor.path)}.{tensor.name}".strip(".")) for tensor in listed]


def _put_wholes(found: dict[str, StoredTensor], wholes: Sequence[StoredTensor], settings: _Settings) -> None:
    """Put tensors that were trained as a whole in the place of those of the same keys in the base, `found`."""
    for tensor in wholes:
        known = found.get(tensor.key, tensor)
        # The file's own identities may be those of other tensors in the base file.
        identity = ("whole", known.identity if settings.tied else tensor.identity)
        found[tensor.key] = replace(tensor, identity=identity, siblings=known.siblings, facts=known.facts)


def _put_below(found: dict[str, StoredTensor], below: Sequence[StoredTensor]) -> None:
    """Put what PEFT saved as `...base_layer.weight` in the place of the base's, under all names that this has."""
    for tensor in below:
        for key in _names_of(found, tensor.key):
            known = found.get(key, tensor)
            identity = ("below", known.identity)
            found[key] = replace(tensor, key=key, identity=identity, siblings=known.siblings, facts=known.facts)


def _put_adapters(
    found: dict[str, StoredTensor], adapters: Mapping[str, tuple[str, Parts]], settings: _Settings
) -> None:
    """Add adapters to their weights in `found`, under all names that these have.

    `adapters` has, for the key of each weight, the name of its layer in the adapter's folder, and the parts.

    Raises:
        ValueError: an adapter does not fit its weight.
    """
    done: set[str] = set()
    for own, (layer, parts) in adapters.items():
        if settings.tied and own in done:
            raise ValueError(
                f"the adapter of {layer!r} is that of a weight tied to it (ensure_weight_tying), which PEFT adds "
                "once when it runs the model and twice when it merges: analyse the model that you use"
            )
        adapted = _merged(found[own], layer, parts, settings)
        names = _names_of(found, own)
        done.update(names)
        for key in names:
            found[key] = replace(adapted, key=key, siblings=found[key].siblings)


def _names_of(found: Mapping[str, StoredTensor], key: str) -> list[str]:
    """Return the keys of all tensors that are tied to one, its own among them."""
    if key not in found:
        return [key]
    identity = found[key].identity
    return [other for other, tensor in found.items() if tensor.identity == identity]


def _weights_of(folder: Path) -> Path:
    """Return the file of the adapter's weights, or raise FileNotFoundError."""
    for name in ("adapter_model.safetensors", "adapter_model.bin"):
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(f"{printable(folder)} has an {CONFIG} and no adapter_model.safetensors")


def _settings(path: Path) -> _Settings:
    """Read an `adapter_config.json`, or raise a ValueError where it is damaged, or not that of a plain LoRA."""
    config = json_object(path)
    if config is None:
        raise ValueError(f"{printable(path)} is damaged: expected a JSON object")
    kind = config.get("peft_type")
    if kind != "LORA":
        raise ValueError(
            f"{printable(path)}: an adapter of the kind {kind!r:.40}, expected 'LORA': merge it in PEFT first"
        )
    variants = [name for name in _VARIANTS if config.get(name)]
    if variants:
        raise ValueError(
            f"{printable(path)}: a variant of LoRA ({printable(variants[0])}) that is not known here: merge it in "
            "PEFT first"
        )
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(_CHANGING_INITS):
        raise ValueError(
            f"{printable(path)}: init_lora_weights={init!r:.40} changed the weights of the base, expected an "
            "adapter for the base as it is: after training, call merge_and_unload() in PEFT and save the model; "
            "of PiSSA, OLoRA and CorDA, save_pretrained(..., path_initial_model_for_weight_conversion=...) makes "
            "a LoRA"
        )
    patterns = config.get("alpha_pattern") or {}
    alphas = [config.get("lora_alpha"), *(patterns.values() if isinstance(patterns, dict) else [None])]
    if not all(_is_number(alpha) for alpha in alphas):
        raise ValueError(
            f"{printable(path)}: expected numbers as lora_alpha and in alpha_pattern, got {alphas!r:.60}"
        )
    for name in patterns:
        # A regular expression that somebody else wrote may take for ever.
        if not re.fullmatch(r"\^?[\w.\-]+", name):
            raise ValueError(
                f"{printable(path)}: alpha_pattern has {name!r:.60}, expected a name: merge it in PEFT first"
            )
    return _Settings(
        alpha=config["lora_alpha"],
        alphas=patterns,
        by_root=config.get("use_rslora") is True,
        transposed=config.get("fan_in_fan_out") is True,
        tied=config.get("ensure_weight_tying") is True,
    )


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _ends_in(layer: str, pattern: str) -> bool:
    """Return whether a name is, or from some dot on is, that of a pattern; one with `^` has to be all of it."""
    if pattern.startswith("^"):
        return layer == pattern[1:]
    return layer == pattern or layer.endswith(f".{pattern}")


def _sorted(
    tensors: Sequence[StoredTensor],
) -> tuple[dict[str, Parts], list[StoredTensor], list[StoredTensor]]:
    """Tell the tensors of an adapter's file apart.

    Returns:
        The parts of each layer's adapter, by the layer's name in the model; the weights below adapters; and those
        that were trained as a whole.

    Raises:
        ValueError: a part of another kind of adapter.
    """
    adapters: dict[str, Parts] = {}
    below: list[StoredTensor] = []
    wholes: list[StoredTensor] = []
    for tensor in tensors:
        key = tensor.key.removeprefix(_OUTSIDE).replace(".base_layer.", ".")
        match = _PART.fullmatch(key)
        if match is not None:
            part = match["part"].removeprefix("embedding_")
            adapters.setdefault(match["layer"], {})[part] = tensor
        elif ".lora_" not in key:
            (below if ".base_layer." in tensor.key else wholes).append(replace(tensor, key=key))
        elif not key.endswith(".lora_B.bias"):
            raise ValueError(f"the adapter has a tensor {tensor.key!r}, which is no part of LoRA or DoRA")
    return adapters, below, wholes


def _merged(base: StoredTensor, layer: str, parts: Parts, settings: _Settings) -> StoredTensor:
    """Return a tensor of the base file whose values, when they are read, have the adapter added.

    Quantised weights are returned as they are: they are listed with that reason.

    Raises:
        ValueError: A or B is not there, or their product has another shape.
    """
    _check_parts(layer, parts)
    if base.problem or not base.has_numbers:
        return base
    left, right = parts["B"].shape, parts["A"].shape
    is_table = "embedding" in parts["A"].name
    is_transposed = is_table or (settings.transposed and fits(base.shape, left, right, transposed=True))
    if not fits(base.shape, left, right, transposed=is_transposed):
        raise ValueError(
            f"the adapter of {layer!r} does not fit the weight of shape {base.shape}: B has the shape {left}, A "
            f"{right}"
        )
    read = partial(_read, base, parts, settings.scaling(layer, right[0]), is_transposed)
    return replace(base, read=read, identity=("adapter", base.identity), dtype=torch.float32)


def _check_parts(layer: str, parts: Parts) -> None:
    """Raise a ValueError where A or B of an adapter is missing, or some part of it cannot be read."""
    problems = [part.problem for part in parts.values() if part.problem]
    if problems or not {"A", "B"} <= parts.keys():
        found = "; ".join(problems) or f"only {sorted(parts)}"
        raise ValueError(f"the adapter of {layer!r} is damaged: expected lora_A and lora_B, got {found}")


def _read(base: StoredTensor, parts: Parts, scaling: float, transposed: bool) -> Tensor:
    """Read a weight and its adapter, and return the sum, in single precision or a higher one."""
    left, right = dense(parts["B"].read()), dense(parts["A"].read())
    magnitude = dense(parts["magnitude_vector"].read()) if "magnitude_vector" in parts else None
    update = LowRankUpdate.of_adapter(left, right, scaling, magnitude, transposed=transposed)
    return merged(values_of(base), [update])[0]
