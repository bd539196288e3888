"""Slow reference implementations of pruning: plain loops in float64, one entry and one column after the other."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn


def smallest_of_row(scores: list[float], count: int) -> list[bool]:
    """Mark the `count` smallest scores; of equal ones, the first."""
    order = sorted(range(len(scores)), key=lambda place: (scores[place], place))
    chosen = set(order[:count])
    return [place in chosen for place in range(len(scores))]


def wanda(weight: np.ndarray, inputs: np.ndarray, count: int) -> np.ndarray:
    """Mark `count` entries of a weight (out, in) by Wanda, row by row, with inputs (tokens, in)."""
    norms = np.sqrt((inputs.astype(np.float64) ** 2).sum(0))
    rows = len(weight)
    mask = np.zeros(weight.shape, bool)
    for row in range(rows):
        of_row = (row + 1) * count // rows - row * count // rows
        scores = [abs(float(w)) * float(norm) for w, norm in zip(weight[row], norms, strict=True)]
        mask[row] = smallest_of_row(scores, of_row)
    return mask


def prune_blocks(model: nn.Module, batches: list[dict], blocks: dict[str, dict[str, int]]) -> None:
    """Prune the linear layers of a model by Wanda, in place.

    The whole model is run anew for each block, from the pruned blocks before it.

    Args:
        model: the model.
        batches: keyword arguments for it.
        blocks: for each block, in the order of the forward pass, the count of each of its layers by name.
    """
    for counts in blocks.values():
        seen = inputs_of(model, batches, list(counts))
        for name, count in counts.items():
            layer = model.get_submodule(name)
            is_transposed = type(layer).__name__ == "Conv1D"
            weight = layer.weight.detach().T if is_transposed else layer.weight.detach()
            mask = torch.from_numpy(wanda(weight.numpy(), seen[name], count))
            layer.weight.data.masked_fill_(mask.T if is_transposed else mask, 0)


def inputs_of(model: nn.Module, batches: list[dict], names: list[str]) -> dict[str, np.ndarray]:
    """Run a model and return all inputs of some linear layers, each (tokens, in)."""
    seen: dict[str, list[np.ndarray]] = {name: [] for name in names}
    handles = []
    for name in names:

        def note(module: nn.Module, args: tuple, name: str = name) -> None:
            seen[name].append(args[0].detach().flatten(0, -2).numpy().copy())

        handles.append(model.get_submodule(name).register_forward_pre_hook(note))
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    for handle in handles:
        handle.remove()
    return {name: np.concatenate(inputs) for name, inputs in seen.items()}
