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


def sparsegpt(
    weight: np.ndarray, inputs: np.ndarray, counts: list[int], block: int = 128, damping: float = 0.01
) -> tuple[np.ndarray, np.ndarray]:
    """Prune a weight (out, in) by SparseGPT and return the corrected weight and the mask.

    The inverse Hessian of the columns that are left is recomputed for every column by eliminating the one before,
    which is what the rows of a Cholesky factor abbreviate.
    """
    weight = weight.astype(np.float64).copy()
    hessian = inputs.astype(np.float64).T @ inputs.astype(np.float64)
    columns = weight.shape[1]
    dead = np.diag(hessian) == 0
    mean = np.diag(hessian)[~dead].mean()
    hessian[dead, dead] = mean
    hessian += damping * mean * np.eye(columns)
    inverses = [np.linalg.inv(hessian)]
    for column in range(columns - 1):
        last = inverses[-1]
        eliminated = last - np.outer(last[:, column], last[column]) / last[column, column]
        inverses.append(eliminated)
    mask = np.zeros(weight.shape, bool)
    for number, start in enumerate(range(0, columns, block)):
        stop = min(start + block, columns)
        diagonal = np.array([inverses[column][column, column] for column in range(start, stop)])
        scores = np.where(dead[start:stop], 0.0, weight[:, start:stop] ** 2 / diagonal)
        mask[:, start:stop] = np.reshape(smallest_of_row(scores.flatten().tolist(), counts[number]), scores.shape)
        for column in range(start, stop):
            inverse = inverses[column]
            pruned = np.where(mask[:, column], weight[:, column], 0.0)
            weight[:, column:] -= np.outer(pruned / inverse[column, column], inverse[column, column:])
            weight[mask[:, column], column] = 0.0
    return weight, mask


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
