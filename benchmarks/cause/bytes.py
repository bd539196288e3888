"""On which bytes a model gains: its loss on the test text, by how often a byte occurs in a training batch."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional

from recipes.data.text import BYTES, ByteTextData
from recipes.parts import Parts

__all__ = ["GROUPS", "loss_by_frequency"]

EDGES = (0.0, 3.0, 10.0, 30.0, 100.0, float("inf"))
"""Mean number of times that a byte occurs in a batch."""

GROUPS = tuple(
    f"{low:g} to {high:g}" if high < float("inf") else f"{low:g} and more" for low, high in pairwise(EDGES)
)
"""From rare to common."""


@torch.no_grad()
def loss_by_frequency(parts: Parts) -> list[dict[str, float | str]]:
    """Return a row for each group of bytes: by the input byte, and by the target byte that follows it.

    Args:
        parts: the trained model and its text.

    Returns:
        `role`, "input" or "target"; `group`; `share`, that of the test text's bytes; `loss`, the mean in nats.
    """
    assert isinstance(parts.data, ByteTextData)
    groups = _groups(parts.data)
    inputs: list[Tensor] = []
    targets: list[Tensor] = []
    losses: list[Tensor] = []
    parts.model.eval()
    for tokens, following in parts.data.test_dataloader():
        logits = parts.model(tokens)
        losses.append(functional.cross_entropy(logits.flatten(0, 1), following.flatten(), reduction="none"))
        inputs.append(groups[tokens.flatten()])
        targets.append(groups[following.flatten()])
    loss = torch.cat(losses).double()
    return _rows("input", torch.cat(inputs), loss) + _rows("target", torch.cat(targets), loss)


def _groups(data: ByteTextData) -> Tensor:
    """Return the group of each byte, by its frequency in the training text."""
    tokens = data.datasets["train"].tensors[0]
    counts = torch.bincount(tokens.flatten(), minlength=BYTES) / tokens.numel()
    per_batch = (counts * data.batch_size * data.length).contiguous()
    return torch.bucketize(per_batch, torch.tensor(EDGES[1:-1]), right=True)


def _rows(role: str, group: Tensor, loss: Tensor) -> list[dict[str, float | str]]:
    rows: list[dict[str, float | str]] = []
    for number, name in enumerate(GROUPS):
        chosen = loss[group == number]
        if len(chosen):
            share = len(chosen) / len(loss)
            rows.append({"role": role, "group": name, "share": share, "loss": float(chosen.mean())})
    return rows
