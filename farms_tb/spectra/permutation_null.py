"""The permutation null of a layer: what alpha it would have if nothing had been learnt.

The alpha of a small stack of matrices is a noisy number with a bias of its own; both depend on how many matrices
there are and how large, not on the aspect ratio alone. So a layer is compared with random layers of just its
shape: its own entries, shuffled, which keeps their distribution and destroys every correlation. Each layer has a
permutation null of its own, from a fixed seed: it does not depend on which other layers are measured.

The standard deviation is that of a few shuffles, 8 for a large layer, and known to 1 / sqrt(2 (n - 1)) of itself:
27 % for 8 shuffles, 13 % for 32. A z-score is no better known, see `LayerRecord.z_error`.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from statistics import fmean, pvariance

import torch

from farms_tb.options import SpectrumOptions
from farms_tb.report import LayerRecord, Outliers, Report
from farms_tb.spectra.distributed import Team, layers_of_this_process, results_of_all
from farms_tb.spectra.measure import blank, cost, for_own_layers, measure_alphas, measure_stacks
from farms_tb.spectra.whole_matrix import MAX_COLUMNS, TRAP_QUANTILE, find_outliers
from farms_tb.spectra.windows import windows_of
from farms_tb.spectra.workers import map_on_threads, single_threaded_torch
from farms_tb.weights.layers import Layer
from farms_tb.weights.stacks import MatrixStack, stack_problem

SEED = 0
"""Seed of the shuffles of every layer, which touch no other random state."""

MIN_DRAWS, MAX_DRAWS = 8, 32
"""Shuffles of a layer that make up its permutation null."""

DRAWS_WORK = 2 * 10**8
"""Entries * columns of all shuffles together, beyond which a layer gets fewer of them. `null_of` allows for the
uncertainty that this leaves."""


@dataclass(frozen=True)
class PermutationNull:
    """What a random layer of the same shape has: metrics of the layer's own entries, shuffled several times.

    Attributes:
        mean: mean alpha.
        std: standard deviation of alpha, widened for the small number of shuffles.
        draws: number of shuffles; None where a file of an earlier version does not say.
        entropy_mean: mean entropy of the ESD; None as for `draws`, or where all are equal.
        entropy_std: standard deviation of the entropy, widened in the same way.
        num_traps: mean number of outliers of a shuffled layer; None where they were not counted.
        traps: the outliers of all shuffled layers together, ascending, in units of `LayerRecord.spectral_norm`;
            for pictures. None as for `num_traps`, and where the null is that of a record without `outliers`.
    """

    mean: float
    std: float
    draws: int | None = None
    entropy_mean: float | None = None
    entropy_std: float | None = None
    num_traps: float | None = None
    traps: tuple[float, ...] | None = field(default=None, compare=False, repr=False)

    @classmethod
    def of(cls, record: LayerRecord) -> PermutationNull | None:
        """Return the permutation null that a record holds; None where it has none."""
        if record.null_mean is None or record.null_std is None:
            return None
        entropy = record.null_entropy_mean, record.null_entropy_std
        traps = None if record.outliers is None else record.outliers.traps
        return cls(record.null_mean, record.null_std, record.null_draws, *entropy, record.num_traps, traps)

    def add_to(self, record: LayerRecord) -> LayerRecord:
        """Return the record, compared with this permutation null."""
        outliers = record.outliers
        if outliers is not None:
            outliers = replace(outliers, traps=self.traps)
        return replace(
            record,
            null_mean=self.mean,
            null_std=self.std,
            null_draws=self.draws,
            null_entropy_mean=self.entropy_mean,
            null_entropy_std=self.entropy_std,
            num_traps=self.num_traps,
            outliers=outliers,
        )


def measure_nulls(
    layers: Sequence[Layer],
    report: Report,
    options: SpectrumOptions,
    *,
    traps: bool = True,
    team: Team | None = None,
) -> dict[str, PermutationNull]:
    """Measure the permutation null of every layer that has an alpha and no null yet.

    Args:
        layers: the layers of the report.
        report: the measurement that is to be compared with the nulls.
        options: those of the report.
        traps: also count the outliers of shuffled layers, which needs their whole matrices.
        team: the processes that share the work, as in `measure`.

    Returns:
        The permutation nulls by layer, the same on every process; no entry for a layer without one. Those that the
        report holds are among them.
    """
    known = {name: null for name, record in report.layers.items() if (null := PermutationNull.of(record))}
    missing = [
        layer for layer in layers if layer.name not in known and report.layers[layer.name].alpha is not None
    ]
    if not missing:
        return known  # on every process, which so agree that there is nothing to gather

    def work(group: Mapping[str, MatrixStack]) -> dict[str, PermutationNull | None]:
        return {name: null_of_stack(stack, options, traps=traps) for name, stack in group.items()}

    own = layers_of_this_process(missing, lambda layer: draws_for(blank(layer)) * cost(layer, options), team)
    found = results_of_all(team, lambda: for_own_layers(missing, own, work, options))
    return known | {name: null for name, null in found.items() if null is not None}


def null_of_stack(stack: MatrixStack, options: SpectrumOptions, *, traps: bool = True) -> PermutationNull | None:
    """Measure the permutation null of one layer; None where too few of its shuffles have an alpha.

    With `traps` the outliers of the shuffles are counted, too, which needs their whole matrices.
    """
    generator = torch.Generator("cpu").manual_seed(SEED)
    draws = draws_for(stack)
    # As many at a time as there is memory for.
    together = max(1, options.memory_bytes // stack.matrices.nbytes)
    records: list[LayerRecord] = []
    outliers: list[Outliers | None] = []
    for begin in range(0, draws, together):
        stacks = [shuffled(stack, generator) for _ in range(begin, min(begin + together, draws))]
        if traps:
            # torch's own threads wait for each other at every small operation, many times as long as they compute.
            with single_threaded_torch(options.threads) as threads:
                outliers += map_on_threads(lambda each: find_outliers(each, TRAP_QUANTILE), stacks, threads)
        records += measure_alphas(stacks, options)
    return _null_of(records, [found.spikes for found in outliers if found is not None])


def _null_of(records: Sequence[LayerRecord], traps: Sequence[Sequence[float]]) -> PermutationNull | None:
    """Return the permutation null of shuffled layers and their outliers; None where too few have an alpha."""
    alpha = mean_and_std([record.alpha for record in records if record.alpha is not None])
    if alpha is None:
        return None
    entropy = mean_and_std([record.entropy for record in records if record.entropy is not None])
    entropy_mean, entropy_std = entropy or (None, None)
    return PermutationNull(
        *alpha,
        draws=len(records),
        entropy_mean=entropy_mean,
        entropy_std=entropy_std,
        num_traps=fmean(map(len, traps)) if traps else None,
        traps=tuple(sorted(chain.from_iterable(traps))) if traps else None,
    )


def mean_and_std(values: Sequence[float]) -> tuple[float, float] | None:
    """Return mean m and standard deviation s of a metric of shuffled layers; None where there are too few.

    s is widened so that z = (x - m) / s has variance 1 for a random layer although m and s are estimates: its
    square by (1 + 1/n) (n - 1) / (n - 3) for n draws, the variance of Student's t.

    Args:
        values: the metric of each shuffled layer that has one. With four or fewer, or where all are equal, there
            is no standard deviation to compare with.
    """
    number = len(values)
    if number <= MIN_DRAWS // 2:
        return None
    mean, variance = fmean(values), pvariance(values) * number / (number - 3) * (1 + 1 / number)
    return (mean, math.sqrt(variance)) if variance > 0 else None


def with_shared_deviations(nulls: Mapping[str, PermutationNull], report: Report) -> dict[str, PermutationNull]:
    """Return permutation nulls in which layers of one shape have the same standard deviation of alpha.

    It depends on little else than the shape. A map of z-scores takes the mean of all estimates there are, rather
    than hand the error of each, 13 to 27 %, on to the learning-rate ratios.
    """
    shapes = {name: _shape(report.layers[name]) for name in nulls}
    variances: dict[Hashable, list[float]] = {}
    for name, null in nulls.items():
        variances.setdefault(shapes[name], []).append(null.std**2)
    return {name: replace(null, std=math.sqrt(fmean(variances[shapes[name]]))) for name, null in nulls.items()}


def _shape(record: LayerRecord) -> Hashable:
    # The number of eigenvalues tells a 1x1 convolution from a linear layer of its shape.
    return record.shape, record.kind, record.num_eigenvalues


def with_nulls(report: Report, nulls: Mapping[str, PermutationNull]) -> Report:
    """Return the report with permutation nulls, but for those of layers that it does not hold."""
    records = dict(report.layers)
    for name, null in nulls.items():
        if name in records:
            records[name] = null.add_to(records[name])
    return replace(report, layers=records)


def weight_record(
    stack: MatrixStack, options: SpectrumOptions, *, histogram: bool = False, null: bool = False
) -> LayerRecord:
    """Measure one weight that belongs to no module.

    Args:
        stack: the weight.
        options: how alpha is measured.
        histogram: also count its ESD.
        null: also measure its permutation null and its whole matrices.
    """
    problem = stack_problem(stack)
    if problem:
        return LayerRecord(status=problem, kind=stack.kind, shape=tuple(stack.matrices.shape))
    (record,) = measure_stacks([stack], options, histogram=histogram, whole=null)
    if not null or record.alpha is None:
        return record
    found = null_of_stack(stack, options)
    return record if found is None else found.add_to(record)


def draws_for(stack: MatrixStack) -> int:
    """Return the number of shuffles for the permutation null of stacks of this shape.

    It is the number that comes to `DRAWS_WORK` entries times columns, from `MIN_DRAWS` to `MAX_DRAWS`.

    Args:
        stack: `(K, R, C)`, also on the meta device.
    """
    return max(MIN_DRAWS, min(MAX_DRAWS, DRAWS_WORK // (stack.matrices.numel() * stack.matrices.shape[-1])))


def null_seconds(stack: MatrixStack, options: SpectrumOptions, *, traps: bool = True) -> float:
    """Estimate how long the permutation null of a layer takes on one core of a processor of 2020.

    Windows are solved at some 2e9 entries times columns a second, whole matrices at some 3e10 operations a second.

    Args:
        stack: the layer's matrices, also without values, on the meta device.
        options: how alpha is measured.
        traps: also the time of counting outliers.
    """
    windows = windows_of(stack, options)
    if windows is None:
        return 0.0
    number, rows, columns = stack.matrices.shape
    draws = draws_for(stack)
    seconds = draws * windows.view.numel() * windows.size / 2e9
    if traps and columns <= MAX_COLUMNS:
        seconds += draws * number * rows * columns**2 / 3e10 + number * columns**3 / 4e9
    return seconds


def shuffled(stack: MatrixStack, generator: torch.Generator) -> MatrixStack:
    """Return the stack with all its entries in random order, by a generator of the CPU."""
    entries = stack.matrices.detach().flatten()
    if entries.element_size() == 1:
        entries = entries.float()  # torch before 2.7 cannot index eight-bit floats
    order = torch.randperm(len(entries), generator=generator, device="cpu").to(entries.device)
    return replace(stack, matrices=entries[order].view(stack.matrices.shape))
