"""What is known of the inputs of a matrix: sums over all calibration tokens, and a few of the inputs themselves.

Sums of squares and products are formed in float32 for each call of a layer and added up in float64, so that they
do not depend on how the calibration data are cut into batches beyond rounding.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from farms_tb.sparsity.prunable import PrunableWeight
from farms_tb.weights.norms import frobenius_norm

SAMPLE = 512
"""Inputs of each matrix that are kept, evenly spread, to measure the error of its output."""

_GOLDEN = (5**0.5 - 1) / 2
"""Multiples of it, modulo 1, are evenly spread however many there are."""

_ATTENTION_INPUTS = ("query", "key", "value")


@dataclass
class InputStatistics:
    """Sums over the inputs of one matrix.

    Attributes:
        squared_norms: sum of the squares of each feature, `(groups, in)`, float64; None before the first input.
        hessian: X X^T of inputs X `(in, tokens)`, `(groups, in, in)`, float64; None unless it is asked for.
        samples: some of the inputs of each call, `(groups, n, in)`, float32; `SAMPLE` in all at most.
        inputs: number of inputs, tokens for a language model.
    """

    squared_norms: Tensor | None = None
    hessian: Tensor | None = None
    samples: list[Tensor] = field(default_factory=list)
    inputs: int = 0

    def add(self, summary: _Summary) -> None:
        """Add what one call brought."""
        self.inputs += summary.inputs
        self.samples.append(summary.sample)
        self.squared_norms = _sum(self.squared_norms, summary.squared_norms)
        if summary.hessian is not None:
            self.hessian = _sum(self.hessian, summary.hessian)


def _sum(total: Tensor | None, summand: Tensor) -> Tensor:
    """Add a float32 tensor to a sum in float64, in place where there is one."""
    return summand.double() if total is None else total.add_(summand)


@contextmanager
def observed(
    weights: Sequence[PrunableWeight], *, hessian: bool, calls: int
) -> Iterator[dict[str, InputStatistics]]:
    """Collect statistics of the inputs of some layers while their modules are called.

    Args:
        weights: the layers.
        hessian: whether to sum X X^T, too.
        calls: how often each layer will be called, for the size of the samples.

    Yields:
        The statistics of each weight by name, which grow with every call.
    """
    statistics = {weight.name: InputStatistics() for weight in weights}
    calls = max(calls, 1)
    # Layers that are called with the same tensor one after the other, q, k and v for example, share the work.
    last: tuple[Tensor, int, _Summary] | None = None

    def see(weight: PrunableWeight, module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        nonlocal last
        is_plain = len(args) == 1 and not kwargs and weight.layout in ("linear", "transposed")
        source = args[0] if is_plain else None
        if last is not None and last[0] is source and last[1] == source._version:
            summary = last[2]
        else:
            call, sample = _next_sample(statistics[weight.name], calls)
            summary = _summary(layer_inputs(weight, args, kwargs), hessian, sample, call)
            last = None if source is None else (source, source._version, summary)
        statistics[weight.name].add(summary)

    with ExitStack() as hooks:
        for weight in weights:
            if weight.has_inputs:
                hook = partial(see, weight)
                hooks.callback(weight.module.register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield statistics


def _next_sample(statistics: InputStatistics, calls: int) -> tuple[int, int]:
    """Return the number of a layer's next call, and how many inputs to keep of it: `SAMPLE` of all calls."""
    call = len(statistics.samples)
    before, after = (-(-SAMPLE * number // calls) for number in (call, call + 1))
    # A layer may be called more often than its block: nothing is kept then.
    return call, after - before if call < calls else 0


def layer_inputs(weight: PrunableWeight, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    """Return what a weight's matrix is multiplied with in one call of its module.

    Args:
        weight: the weight.
        args: positional arguments of the call.
        kwargs: keyword arguments of the call.

    Returns:
        The inputs `(groups, n, in)`: n tokens, or positions of the output of a convolution.
    """
    if isinstance(weight.module, nn.MultiheadAttention):
        named = dict(zip(_ATTENTION_INPUTS, args, strict=False)) | dict(kwargs)
        attended: Tensor = named[_ATTENTION_INPUTS["qkv".index(weight.name[-1])]]
        return attended.reshape(-1, attended.shape[-1])[None]
    inputs: Tensor = args[0] if args else next(iter(kwargs.values()))
    if weight.layout == "convolution":
        return _patches(weight.module, inputs)
    return inputs.reshape(-1, inputs.shape[-1])[None]  # a single vector `(in,)`, too


def _patches(module: Any, inputs: Tensor) -> Tensor:
    """Return the patches that a convolution multiplies its weight with, columns in the order of `to_matrix`.

    Of inputs `(batch, in, *space)` or `(in, *space)`: `(groups, batch * positions, kernel * in / groups)`.
    """
    if inputs.ndim == len(module.kernel_size) + 1:
        inputs = inputs[None]
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    patches = nn.functional.pad(inputs, module._reversed_padding_repeated_twice, mode=mode)
    dims = len(module.kernel_size)
    for dim in range(dims):
        span = module.dilation[dim] * (module.kernel_size[dim] - 1) + 1
        patches = patches.unfold(2 + dim, span, module.stride[dim])[..., :: module.dilation[dim]]
    # Now (batch, in, *positions, *kernel).
    patches = patches.flatten(2 + dims).flatten(2, 1 + dims)
    batch, channels, positions, kernel = patches.shape
    grouped = patches.reshape(batch, module.groups, channels // module.groups, positions, kernel)
    return grouped.permute(1, 0, 3, 4, 2).reshape(module.groups, batch * positions, -1)


@dataclass(frozen=True)
class _Summary:
    """What one call of a layer adds to the statistics.

    Attributes:
        squared_norms: sum of the squares of each feature, `(groups, in)`, float32.
        hessian: X^T X, `(groups, in, in)`, float32; None where it is not needed.
        sample: some of the inputs, `(groups, n, in)`, float32.
        inputs: how many inputs there were.
    """

    squared_norms: Tensor
    hessian: Tensor | None
    sample: Tensor
    inputs: int


def _summary(inputs: Tensor, hessian: bool, sample: int, call: int) -> _Summary:
    """Return the sums over one call's inputs `(groups, n, in)`, and `sample` of them; calls count from 0."""
    values = inputs.float()
    number = values.shape[1]
    chosen = torch.tensor(_places(number, sample, call), device=values.device, dtype=torch.long)
    with torch.autocast(values.device.type, enabled=False):  # sums over many inputs leave the range of float16
        products = values.mT @ values if hessian else None
    return _Summary(values.square().sum(1), products, values[:, chosen], number)


def _places(number: int, sample: int, call: int) -> list[int]:
    """Return which inputs of a call, counted from 0, are kept: evenly spread, and others in each call.

    The first token of a sequence often has inputs unlike all others, so it must not stand for more than its share.
    """
    kept = min(sample, number)
    shift = (0.5 + call * _GOLDEN) % 1
    return [int((place + shift) * number / kept) for place in range(kept)]


def relative_output_error(dense: Tensor, pruned: Tensor, statistics: InputStatistics) -> float | None:
    """Return how much of a matrix's output is lost, ||(W - W')X||_F / ||WX||_F.

    Args:
        dense: W `(out, in)`.
        pruned: W' `(out, in)`.
        statistics: of the inputs; X is their sample, at most `SAMPLE` of them.

    Returns:
        The error; None where no input is known, or the dense output is zero.
    """
    if not statistics.samples:
        return None
    inputs = torch.cat(statistics.samples, dim=1)
    groups = inputs.shape[0]
    before = dense.float().view(groups, -1, inputs.shape[2])
    lost = before - pruned.float().view(before.shape)
    norm = float(frobenius_norm(inputs @ before.mT))
    if norm == 0:
        return None
    return float(frobenius_norm(inputs @ lost.mT)) / norm
