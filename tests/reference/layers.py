"""A whole model to the metrics of its layers, by slow reference implementations, in float64."""

from __future__ import annotations

import itertools
import math

import torch
from torch import nn

from . import spectrum, stacks, windows

TIE = 1e-9
"""Of two tails whose D differ by less, a search may choose either."""

ROUNDING_ALPHA = 1e10
"""Of a tail whose alpha is larger, only rounding tells the eigenvalues apart: its D may be anything."""

ZERO_CUTOFF, MIN_EIGENVALUES, FLAT_ALPHA = 1e-5, 5, 1e4
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
GATES = {nn.LSTM: "ifgo", nn.GRU: "rzn"}


def layers(model):
    """Each layer's matrices, how they are windowed, and the factor on their eigenvalues; no vectors."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            for part, stack in zip("qkv", stacks.attention(_double(module.in_proj_weight)), strict=True):
                found[f"{name}.{part}"] = (stack, "grid", 1.0)
        elif type(module) in GATES:
            found.update(_recurrent(name, module))
        elif isinstance(module, nn.Linear):
            found[name or "weight"] = (stacks.linear(_double(module.weight)), "grid", 1.0)
        elif isinstance(module, CONVOLUTIONS):
            found[name] = (stacks.convolution(_double(module.weight), module.groups), "blocks", 0.5)
        elif isinstance(module, TRANSPOSED):
            found[name] = (stacks.transposed_convolution(_double(module.weight), module.groups), "blocks", 0.5)
        elif type(module).__name__ == "SpectralConv":
            found[name] = (stacks.spectral(_double(module.weight.to_tensor())), "blocks", 1.0)
    return {name: layer for name, layer in found.items() if min(layer[0][0].shape) > 1}


def _recurrent(name, module):
    """The gates of a recurrent layer by name; one without a projection."""
    letters = GATES[type(module)]
    return {
        f"{name}.{own}.{letter}": (stack, "grid", 1.0)
        for own, weight in module.named_parameters()
        if own.startswith("weight")
        for letter, stack in zip(letters, stacks.gates(_double(weight), len(letters)), strict=True)
    }


def _double(weight):
    weight = weight.detach().cpu()
    return weight.to(torch.complex128 if weight.is_complex() else torch.float64).numpy()


def spectra(layer, **shape):
    """The ascending eigenvalues of each sample; `shape` holds options of `windows.samples`."""
    stack, sampling, scale = layer
    return [spectrum.eigenvalues(sample, scale) for sample in windows.samples(stack, sampling, **shape)]


def kept(values, filter_zeros=False, relative_cutoff=0.0):
    """The eigenvalues of a sample that count."""
    if filter_zeros:
        values = [value for value in values if value >= ZERO_CUTOFF] or values
    return [value for value in values if value >= relative_cutoff * values[-1]]


def figures(samples, numbers, fit="median", xmin_pos=2.0):
    """Every metric of a layer: the mean over its samples; an alpha only where every sample has one.

    Args:
        samples: eigenvalues of each sample, ascending, those that count.
        numbers: of eigenvalues of each sample, those that do not count among them.
        fit: the fit.
        xmin_pos: the divisor of the median fit.
    """
    found = [spectrum.metrics(values, fit, xmin_pos, n) for values, n in zip(samples, numbers, strict=True)]
    means = {name: _mean([figure[name] for figure in found]) for name in found[0]}
    alphas = [figure["alpha"] for figure in found]
    if None in alphas or max(alphas) > FLAT_ALPHA or min(map(len, samples)) < MIN_EIGENVALUES:
        means |= {"alpha": None, "ks_distance": None, "alpha_hat": None}
    return means | {"num_eigenvalues": sum(map(len, samples))}


def equal_choices(samples, fit):
    """Alpha, D and alpha_hat by name, for each choice of tails that a search may make as well as any other."""
    found = []
    for tails in itertools.product(*(_equal_tails(values, fit) for values in samples)):
        if None in tails:
            found.append({"alpha": None, "ks_distance": None, "alpha_hat": None})
            continue
        alphas, distances = zip(*tails, strict=True)
        hats = [alpha * math.log10(values[-1]) for alpha, values in zip(alphas, samples, strict=True)]
        found.append({"alpha": _mean(alphas), "ks_distance": _mean(distances), "alpha_hat": _mean(hats)})
    return found


def _equal_tails(values, fit):
    """(alpha, D) of each tail of one sample that may have the smallest D; None for one that is flat."""
    low, high = spectrum.peak_range(values) if fit == "xmin_peak" else (-math.inf, math.inf)
    starts = [i for i in range(len(values) - 1) if low <= values[i] <= high]
    alphas = [(i, spectrum.hill(values, i)) for i in starts]
    known = [
        (alpha, spectrum.ks_distance(values, i, alpha)) for i, alpha in alphas if alpha and alpha < ROUNDING_ALPHA
    ]
    smallest = min((distance for _, distance in known), default=1.0)
    equal = [
        (alpha, distance) if alpha <= FLAT_ALPHA else None
        for alpha, distance in known
        if distance <= smallest + TIE
    ]
    return equal + [None] * (len(known) < len(starts))


def _mean(values):
    return None if None in values else math.fsum(values) / len(values)
