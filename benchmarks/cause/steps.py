"""What single optimizer steps do to each type of matrix: their size, the noise of the gradient, what they gain.

At some steps of a training the gradients of `BATCHES` other batches are taken at the weights before the step. From
them and from the change that the optimizer made come, for each type of matrix:

- *signal*: the share of a batch's squared gradient that is the mean gradient's, |E g|^2 / E |g|^2; both are
  unbiased estimates over the batches (McCandlish et al., An Empirical Model of Large-Batch Training, 2018).
- *step*: ||change|| / ||weights||, Frobenius norms over all matrices of the type.
- *gain of a step*: by how much the loss on these batches falls if the matrices of this type alone make their step,
  and the best of several multiples of it.

The last one looks one step ahead. It says which type of matrix could have gone further *now*, not what
is best for the training as a whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional
from torch.utils.data import DataLoader

from benchmarks.cause.runs import matrices_of
from benchmarks.results import Value
from farms_tb import FARMSTempBalance, analyze

__all__ = ["FACTORS", "MOMENTS", "Steps", "signal_share"]

MOMENTS = (20, 80, 160, 320)
"""Steps done before the one that is looked at."""

BATCHES = 16
FACTORS = (0.5, 1, 2, 4, 8, 16)

Weights = dict[str, Tensor]
Batches = Sequence[tuple[Tensor, Tensor]]


def signal_share(total: Tensor, mean_square: float, number: int) -> float:
    """Return the share of a gradient's squared norm that is the mean's, |E g|^2 / E |g|^2.

    Args:
        total: the sum of independent gradients g.
        mean_square: the mean of their squared norms.
        number: how many there are, at least 2.

    Returns:
        1 without noise, 0 where all is noise; an estimate may be a little below 0.
    """
    signal = (float(total.square().sum()) - number * mean_square) / (number * (number - 1))
    return signal / mean_square


class Steps(Callback):
    """Looks at some steps of a training, and changes nothing of it.

    Args:
        seed: draws the other batches; no random number of the training is drawn.
        moments: steps done before those that are looked at.

    Attributes:
        rows: a row for each moment and type.
    """

    def __init__(self, seed: int, moments: Sequence[int] = MOMENTS) -> None:
        self.rows: list[dict[str, Value]] = []
        self._generator = torch.Generator().manual_seed(seed)
        self._moments = moments
        self._before: Weights = {}

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Keep the weights before the step."""
        self._before = {}
        if trainer.global_step in self._moments:
            self._before = {name: p.detach().clone() for name, p in _net(pl_module).named_parameters()}

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Add the rows of the step that was made."""
        if not self._before:
            return
        net = _net(pl_module)
        ratios = _ratios(trainer, pl_module)
        change = {name: p.detach() - self._before[name] for name, p in net.named_parameters()}
        batches = list(self._batches(trainer))
        measured = (
            _spectra(net),
            _signals(net, self._before, batches),
            _sizes(net, self._before, change),
            _gains(net, self._before, change, batches),
        )
        for kind in matrices_of(net):
            row: dict[str, Value] = {"step": trainer.global_step, "type": kind, "ratio": ratios[kind]}
            for found in measured:
                row |= found[kind]
            self.rows.append(row)

    def _batches(self, trainer: Trainer) -> Iterator[tuple[Tensor, Tensor]]:
        """Draw batches of the training data, as large as those of the training."""
        loader = trainer.train_dataloader
        assert isinstance(loader, DataLoader)
        tokens, following = loader.dataset.tensors  # type: ignore[attr-defined]
        for _ in range(BATCHES):
            chosen = torch.randint(len(tokens), (loader.batch_size or 1,), generator=self._generator)
            yield tokens[chosen], following[chosen]


def _net(module: LightningModule) -> nn.Module:
    net = module.net
    assert isinstance(net, nn.Module)
    return net


def _ratios(trainer: Trainer, module: LightningModule) -> dict[str, float]:
    """Return the learning-rate ratio of each type, the mean over its matrices; 1 without a callback."""
    found: dict[str, float] = {}
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, FARMSTempBalance):
            found = callback.parameter_ratios(module)
    kinds = matrices_of(_net(module))
    return {kind: fmean(found.get(f"net.{name}", 1.0) for name in names) for kind, names in kinds.items()}


def _loss(net: nn.Module, weights: Mapping[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
    tokens, following = batch
    logits = functional_call(net, dict(weights), (tokens,))
    return functional.cross_entropy(logits.flatten(0, 1), following.flatten())


def _spectra(net: nn.Module) -> dict[str, dict[str, float]]:
    """Return alpha, effect and rank share of each type, means over its matrices."""
    records = analyze(net, null=True, embeddings=True).layers
    found = {}
    for kind, names in matrices_of(net).items():
        layers = [records[name.removesuffix(".weight")] for name in names]
        found[kind] = {
            metric: fmean(value for layer in layers if (value := getattr(layer, metric)) is not None)
            for metric in ("alpha", "effect", "rank_share")
        }
    return found


def _signals(net: nn.Module, weights: Weights, batches: Batches) -> dict[str, dict[str, float]]:
    """Return the share of the mean in the gradients of each type."""
    leaves = {name: value.clone().requires_grad_() for name, value in weights.items()}
    kinds = matrices_of(net)
    totals = {name: torch.zeros_like(value) for name, value in weights.items()}
    squares = dict.fromkeys(kinds, 0.0)
    for batch in batches:
        gradients = dict(
            zip(leaves, torch.autograd.grad(_loss(net, leaves, batch), list(leaves.values())), strict=True)
        )
        for name, gradient in gradients.items():
            totals[name] += gradient
        for kind, names in kinds.items():
            squares[kind] += sum(float(gradients[name].square().sum()) for name in names) / len(batches)
    return {
        kind: {
            "signal": signal_share(
                torch.cat([totals[name].flatten() for name in names]), squares[kind], len(batches)
            )
        }
        for kind, names in kinds.items()
    }


def _sizes(net: nn.Module, weights: Weights, change: Weights) -> dict[str, dict[str, float]]:
    """Return the relative size of the step of each type."""

    def norm(of: Weights, names: Sequence[str]) -> float:
        return float(torch.cat([of[name].flatten() for name in names]).norm())

    return {
        kind: {"relative_step": norm(change, names) / norm(weights, names)}
        for kind, names in matrices_of(net).items()
    }


@torch.no_grad()
def _gains(net: nn.Module, weights: Weights, change: Weights, batches: Batches) -> dict[str, dict[str, float]]:
    """Return by how much the loss falls when one type alone makes a multiple of its step, in nats."""

    def loss(multiples: Mapping[str, float]) -> float:
        moved = {name: value + multiples.get(name, 0.0) * change[name] for name, value in weights.items()}
        return fmean(float(_loss(net, moved, batch)) for batch in batches)

    before = loss({})
    found = {}
    for kind, names in matrices_of(net).items():
        gains = {factor: before - loss(dict.fromkeys(names, factor)) for factor in FACTORS}
        best = max({0.0: 0.0, **gains}.items(), key=lambda pair: pair[1])
        found[kind] = {"best_factor": best[0], "best_gain": best[1]}
        found[kind] |= {f"gain_{factor:g}": gain for factor, gain in gains.items()}
    return found
