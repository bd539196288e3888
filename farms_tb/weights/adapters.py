"""Layers with adapters such as LoRA, read as the weight that the network computes with.

PEFT puts a layer of its own around each layer that it adapts. That layer holds the other one as `base_layer`, with
a weight W that is mostly frozen, and the matrices A and B of each adapter. B A alone has rank r, which is too few
eigenvalues for an alpha; the spectrum that counts is that of the sum W', see `farms_tb.weights.low_rank`.

Adapters are told by their attributes, so that PEFT need not be installed. Nothing of the model is changed: W' is
computed into memory of its own, one weight at a time.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from farms_tb.options import Adapters
from farms_tb.weights.low_rank import LowRankUpdate, change_of_merged, fits, merged
from farms_tb.weights.matrices import layer_matrices
from farms_tb.weights.stacks import MatrixStack, NoSpectrumError
from farms_tb.weights.values import dense, reading, weight_of

_KNOWN_VARIANTS = ("Dora", "MiCA")
"""How the names of PEFT's variants of LoRA begin whose weight `farms_tb.weights.low_rank` computes."""

_MERGED = "its adapters are merged into the weight: unmerge them first, or measure with adapters='merged'"
_DISABLED = "its adapters are merged and disabled: unmerge them first, model.unmerge_adapter()"


def is_adapted(module: nn.Module) -> bool:
    """Return whether it is a layer of PEFT, of whatever kind, on or off, that adapts another one inside it."""
    return isinstance(getattr(module, "base_layer", None), nn.Module) and hasattr(module, "active_adapters")


def base_of(module: nn.Module) -> nn.Module:
    """Return the layer inside a layer of PEFT, or inside several; a module without adapters as it is."""
    while is_adapted(module):
        module = module._modules["base_layer"]  # type: ignore[assignment]
    return module


def unused_copies(module: nn.Module, adapters: Adapters) -> list[nn.Module]:
    """Return which copies of a layer that PEFT trains as a whole (`modules_to_save`) the network does not use.

    There is the layer as it was, and a copy for each adapter. Of any other module, none is returned.
    """
    original, copies = getattr(module, "original_module", None), getattr(module, "modules_to_save", None)
    if adapters == "separate" or not (isinstance(original, nn.Module) and isinstance(copies, nn.ModuleDict)):
        return []
    is_off = adapters == "base" or getattr(module, "disable_adapters", False)
    active = [] if is_off else _active(module)
    used = copies[active[0]] if active and all(name in copies for name in active) else original
    return [copied for copied in (original, *copies.values()) if copied is not used]


def adapter_problem(module: nn.Module, adapters: Adapters) -> str:
    """Say why a layer, with adapters or without, has no weight that could be measured; empty where it has one.

    No values are read, but for a parametrized weight, which is computed to know its shape.
    """
    if adapters == "separate":
        return ""
    if not is_adapted(module):
        # Other packages, loralib for one, derive their layer from the one that it adapts.
        is_adapter = module._parameters.get("lora_A") is not None
        return _unknown(module) if is_adapter else ""
    is_merged = _is_merged(module)
    if adapters == "base":
        return _MERGED if is_merged else ""
    if is_merged and getattr(module, "disable_adapters", False):
        return _DISABLED
    try:
        with reading(module):
            _applied(module)
    except NoSpectrumError as error:
        return str(error)
    return ""


def adapted_stacks(module: nn.Module, adapters: Adapters) -> list[MatrixStack]:
    """Return the weights of a layer with adapters as stacks of matrices.

    Args:
        module: a layer for which `is_adapted` holds.
        adapters: `"merged"` for the sum W', `"base"` for W alone.

    Returns:
        The stacks of the layer inside, with `adapter_change` where it is known.

    Raises:
        NoSpectrumError: the adapters are of another kind, or the layer inside has no weight.
    """
    base = base_of(module)
    applied = _applied(module) if adapters == "merged" else []
    if not applied:
        return layer_matrices(base)
    name = _weight_name(base)
    weight = weight_of(base, name)
    updates = [read() for read in applied]
    if _is_merged(module):
        change = change_of_merged(weight, updates)
    else:
        weight, change = merged(weight, updates)
    return [replace(stack, adapter_change=change) for stack in layer_matrices(_with_weight(base, name, weight))]


def _update(
    left: Tensor, right: Tensor, scaling: float, magnitude: Tensor | None, *, transposed: bool
) -> LowRankUpdate:
    """Read what an adapter adds, see `LowRankUpdate.of_adapter`; gathering sharded values is a collective call."""
    magnitude = None if magnitude is None else dense(magnitude)
    return LowRankUpdate.of_adapter(dense(left), dense(right), scaling, magnitude, transposed=transposed)


def _applied(module: nn.Module) -> list[Callable[[], LowRankUpdate]]:
    """Return what reads each adapter of a layer that is merged into its weight, or else that the network applies.

    Raises:
        NoSpectrumError: one of them is no LoRA or DoRA, or does not fit the weight.
    """
    base = base_of(module)
    if module._modules["base_layer"] is not base or hasattr(module, "parameter_name"):
        raise NoSpectrumError(_unknown(module))
    shape = _shape(getattr(base, _weight_name(base)))
    # AdaLoRA, whose product has a third factor, is derived from LoRA's layer.
    if not all(hasattr(module, name) for name in ("lora_A", "lora_B", "scaling")) or hasattr(module, "lora_E"):
        raise NoSpectrumError(_unknown(module))
    is_table = len(getattr(module, "lora_embedding_A", ())) > 0
    prefix = "lora_embedding_" if is_table else "lora_"
    is_transposed = is_table or bool(getattr(module, "fan_in_fan_out", False))
    found: list[Callable[[], LowRankUpdate]] = []
    for name in _applied_names(module):
        left, right = _entry(module, f"{prefix}B", name), _entry(module, f"{prefix}A", name)
        if left is None or right is None:
            continue  # An adapter of other layers.
        _check_variant(module, name)
        if not fits(shape, left.shape, right.shape, transposed=is_transposed):
            raise NoSpectrumError(
                f"its adapter {name!r} does not fit the weight of shape {shape}: B has the shape "
                f"{tuple(left.shape)}, A {tuple(right.shape)}. Measure with adapters='separate'"
            )
        magnitude = _entry(module, "lora_magnitude_vector", name)
        scaling = float(module.scaling[name])  # type: ignore[index,operator]
        found.append(partial(_update, left, right, scaling, magnitude, transposed=is_transposed))
    return found


def _entry(module: nn.Module, attribute: str, name: str) -> Tensor | None:
    """Return the tensor that a layer keeps for an adapter under `"lora_A"`, or the weight of a layer there.

    None where there is none; NoSpectrumError where it is neither a tensor nor a layer.
    """
    parts = getattr(module, attribute, None)
    if parts is None or name not in parts:
        return None
    part = parts[name]
    found = part if isinstance(part, Tensor) else getattr(part, "weight", None)
    if not isinstance(found, Tensor):
        raise NoSpectrumError(_unknown(module))
    return found


def _check_variant(module: nn.Module, name: str) -> None:
    """Raise NoSpectrumError for an adapter that is an unknown variant of LoRA, whose weight is another one."""
    variants = getattr(module, "lora_variant", {})
    variant = type(variants[name]).__name__ if name in variants else ""
    if variant and not variant.startswith(_KNOWN_VARIANTS):
        raise NoSpectrumError(_unknown(module, variant))


def _applied_names(module: nn.Module) -> list[str]:
    """Return the names of the adapters that are merged, or else of those that the network applies."""
    if _is_merged(module):
        return list(module.merged_adapters)  # type: ignore[arg-type]
    if getattr(module, "disable_adapters", False):
        return []
    return _active(module)


def _active(module: nn.Module) -> list[str]:
    """Return the names of the active adapters of a layer of PEFT, on or off."""
    active: Any = module.active_adapters
    return [active] if isinstance(active, str) else list(active)


def _is_merged(module: nn.Module) -> bool:
    """Return whether the weight of the layer inside holds adapters already."""
    return bool(getattr(module, "merged_adapters", ()))


def _weight_name(base: nn.Module) -> str:
    """Return the name of the weight that adapters change, or raise NoSpectrumError where the layer has none."""
    for name in ("weight", "in_proj_weight"):
        if isinstance(getattr(base, name, None), Tensor):
            return name
    raise NoSpectrumError(f"adapters around a {type(base).__name__}, which has no weight")


def _shape(weight: Any) -> tuple[int, ...]:
    """Return the shape of a weight; bitsandbytes packs those of 4 bits into a column of codes."""
    packed = getattr(weight, "quant_state", None)
    return tuple(weight.shape if packed is None else packed.shape)


def _with_weight(base: nn.Module, name: str, weight: Tensor) -> nn.Module:
    """Return a copy of a layer that shares all with it but for one weight."""
    if parametrize.is_parametrized(base):
        # It refuses to be copied, and its class computes the weight anew: that of before has a plain one.
        cls: Any = parametrize.type_before_parametrizations(base)
        copied: nn.Module = cls.__new__(cls)
        copied.__dict__.update(base.__dict__)
    else:
        copied = copy.copy(base)
    copied.__dict__.pop(name, None)
    copied.__dict__["_forward_pre_hooks"] = {}  # One of them may compute the weight anew.
    copied.__dict__["_parameters"] = {**base._parameters, name: nn.Parameter(weight, requires_grad=False)}
    return copied


def _unknown(module: nn.Module, variant: str = "") -> str:
    """Return the problem of an adapter that is no LoRA, or a variant of it."""
    kind = f"{type(module).__module__}.{type(module).__qualname__}"
    return (
        f"an adapter of an unknown kind ({kind}{variant and ', '}{variant}): of PEFT, LoRA and DoRA are known. "
        "adapters='base' measures the weight below such an adapter, adapters='separate' its parts"
    )
