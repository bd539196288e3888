"""Wanda as the research code does it: slow in places, and simple.

The inputs of the first block are captured from the model. Each block is run once on every sequence with hooks on
its linear layers, which keep a running mean of the squared norm of each input feature; each row of
|W| sqrt(mean squared norm) is sorted in full, and its int(in * sparsity) smallest entries become zero; then the
block is run a second time, for the inputs of the next one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["wanda"]

Batch = Mapping[str, Tensor]


class _Captured(Exception):  # noqa: N818 - nothing is wrong
    """Stops the model before its first block."""


class _RunningMean:
    """The mean over sequences of the squared norm of each input feature of a linear layer, float32 `(in,)`."""

    def __init__(self, layer: nn.Linear) -> None:
        self.mean = torch.zeros(layer.in_features)
        self.sequences = 0

    def add(self, layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        """Add one sequence; a forward hook."""
        inputs = args[0].flatten(0, -2).float()
        self.mean *= self.sequences / (self.sequences + 1)
        self.sequences += 1
        self.mean += torch.linalg.vector_norm(inputs, dim=0) ** 2 / self.sequences


@torch.no_grad()
def wanda(
    model: Any, blocks: Sequence[nn.Module], batches: Sequence[Mapping[str, Tensor]], sparsity: float
) -> None:
    """Prune every linear layer of some blocks to the same sparsity, in place.

    Args:
        model: the model, in evaluation mode.
        blocks: its decoder blocks in order; each returns the input of the next one.
        batches: keyword arguments for the model, one sequence each.
        sparsity: share of each row that becomes zero, rounded down to whole entries.
    """
    states, keywords = _first_inputs(model, blocks[0], batches)
    for block in blocks:
        layers = [module for module in block.modules() if isinstance(module, nn.Linear)]
        means = [_RunningMean(layer) for layer in layers]
        handles = [layer.register_forward_hook(mean.add) for layer, mean in zip(layers, means, strict=True)]
        for state, options in zip(states, keywords, strict=True):
            block(state, **options)
        for handle in handles:
            handle.remove()
        for layer, mean in zip(layers, means, strict=True):
            _prune_rows(layer.weight, mean.mean, sparsity)
        states = [_hidden(block(state, **options)) for state, options in zip(states, keywords, strict=True)]


def _prune_rows(weight: Tensor, mean: Tensor, sparsity: float) -> None:
    """Zero the entries of each row with the smallest scores."""
    scores = weight.abs() * mean.sqrt()
    order = torch.sort(scores, dim=-1, stable=True).indices
    mask = torch.zeros_like(scores, dtype=torch.bool)
    mask.scatter_(1, order[:, : int(weight.shape[1] * sparsity)], True)
    weight[mask] = 0


def _first_inputs(
    model: Any, block: nn.Module, batches: Sequence[Batch]
) -> tuple[list[Tensor], list[dict[str, Any]]]:
    """Return the hidden states and the keyword arguments that the first block is called with."""
    states: list[Tensor] = []
    keywords: list[dict[str, Any]] = []

    def capture(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        states.append(args[0])
        keywords.append(kwargs)
        raise _Captured

    handle = block.register_forward_pre_hook(capture, with_kwargs=True)
    for batch in batches:
        try:
            model(**batch, use_cache=False)
        except _Captured:
            continue
    handle.remove()
    return states, keywords


def _hidden(output: Any) -> Tensor:
    """Return the hidden states that a block returned; older blocks return them in a tuple."""
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden
