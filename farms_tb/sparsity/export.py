"""A plan as the tables that llm-compressor and torchao read, which prune by one sparsity for each matrix.

Both are plain lists and dicts, so neither package is needed to make them. What is read where, checked with
llm-compressor 0.14 and torchao 0.18:

- llm-compressor's modifiers match `targets` by module name, and take the entries of a list `sparsity` in the order
  of `model.named_modules()`, whatever the order of `targets` is.
- torchao's sparsifiers take a dict for each tensor, with its name and a level of its own.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from farms_tb.printable import printable
from farms_tb.sparsity.plan import SparsityPlan
from farms_tb.sparsity.prunable import planned_weights


def to_llm_compressor(plan: SparsityPlan, model: nn.Module) -> dict[str, list[Any]]:
    """Return a plan as arguments of llm-compressor's `WandaPruningModifier` or `SparseGPTModifier`.

    llm-compressor's Wanda rounds the zeros of each row down, so that it prunes up to one entry a row less than
    planned; its SparseGPT rounds for each 128 columns.

    Args:
        plan: from `farms_tb.sparsity.allocate` or `SparsityPlan.load`.
        model: the model that will be pruned; its modules give names and order.

    Returns:
        `targets`, the full name of each planned module, and `sparsity`, the share of zeros of each, both in the
        order of `model.named_modules()`. Other modules stay dense.

    Raises:
        TypeError: `model` is no module.
        ValueError: the plan was made for another model, a weight cannot be pruned, or is not that of a Linear.

    Example:
        >>> from farms_tb.sparsity import PlannedLayer, SparsityPlan
        >>> model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 4))
        >>> plan = SparsityPlan({"1": PlannedLayer(24, 0.25), "0": PlannedLayer(48, 0.5)}, 0.41, "alpha")
        >>> to_llm_compressor(plan, model)
        {'targets': ['0', '1'], 'sparsity': [0.5, 0.25]}
    """
    shares = _shares(plan, model)
    return {"targets": list(shares), "sparsity": list(shares.values())}


def to_torchao(plan: SparsityPlan, model: nn.Module) -> list[dict[str, Any]]:
    """Return a plan as the configuration of torchao's `WandaSparsifier` and of the sparsifiers of torch.

    Args:
        plan: from `farms_tb.sparsity.allocate` or `SparsityPlan.load`.
        model: the model that will be pruned.

    Returns:
        For each planned weight a dict of `tensor_fqn`, its name in the model, and `sparsity_level`, its share of
        zeros: `sparsifier.prepare(model, config=to_torchao(plan, model))`.

    Raises:
        TypeError: `model` is no module.
        ValueError: the plan was made for another model, a weight cannot be pruned, or is not that of a Linear.

    Example:
        >>> from farms_tb.sparsity import PlannedLayer, SparsityPlan
        >>> model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 4))
        >>> to_torchao(SparsityPlan({"1": PlannedLayer(24, 0.25)}, 0.25, "alpha"), model)
        [{'tensor_fqn': '1.weight', 'sparsity_level': 0.25}]
    """
    return [
        {"tensor_fqn": f"{name}.weight", "sparsity_level": share} for name, share in _shares(plan, model).items()
    ]


def _shares(plan: SparsityPlan, model: nn.Module) -> dict[str, float]:
    """Return the sparsity of each planned Linear by its name in the model, in the order of the model."""
    weights = planned_weights(model, plan)
    other = next((weight for weight in weights if not isinstance(weight.module, nn.Linear)), None)
    if other is not None:
        raise ValueError(
            f"{printable(other.name)} is a weight of {type(other.module).__name__}, and only those of Linear "
            "modules can be exported: prune this model by farms_tb.sparsity.prune, or leave the layer out of the "
            "plan"
        )
    # The names of a plan may have another prefix than the model's, but its order is kept.
    found = {
        id(weight.module): layer.sparsity for weight, layer in zip(weights, plan.layers.values(), strict=True)
    }
    return {name: found[id(module)] for name, module in model.named_modules() if id(module) in found}
