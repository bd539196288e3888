"""One stack of matrices: from its windows to the figures of its layer.

The result is a row of float64 numbers, so that processes can share the layers and merge them exactly, by adding
rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from farms_tb.layers import NO_VALUES
from farms_tb.matrices import MatrixStack
from farms_tb.options import SpectralOptions
from farms_tb.power_law import PowerLawFit, fit_power_law, ordered_sum
from farms_tb.report import OK, EsdHistogram, LayerRecord
from farms_tb.solvers import solver_for
from farms_tb.spectra import FLOOR, ROUNDOFF, ROUTES, Eigenvalues, Route, Wanted, to_cpu, window_eigenvalues
from farms_tb.standard_error import alpha_error, parts_of_windows
from farms_tb.threads import one_thread
from farms_tb.windows import Windows, layer_windows

ZERO_CUTOFF = 1e-5
"""Eigenvalues below this are what `filter_zeros` drops: the papers' absolute threshold."""

HISTOGRAM_BINS = 64

_FIGURES = (
    "alpha",
    "ks_distance",
    "alpha_hat",
    "spectral_norm",
    "norm",
    "stable_rank",
    "norm_stable_rank",
    "entropy",
    "alpha_error",
    "xmin",
)
# A row: outcome, a number for its message, the figures, the number of eigenvalues, what solved for them, low, high
# and bins of the ESD.
_END = 2 + len(_FIGURES)
_HEAD = _END + 2
ROW_LENGTH = _HEAD + 2 + HISTOGRAM_BINS

_OUTCOMES = (
    "not measured",
    OK,
    "weights contain NaN or infinity",
    "all weights are zero",
    "no window of this aspect ratio fits",
    "too few eigenvalues: {} in a sample, min_eigenvalues is {}",
    "low rank: zero eigenvalues in the tail of {} sample(s)",
    "flat spectrum: the eigenvalues in the tail of {} sample(s) are all equal",
    "no eigenvalue in the range that fit='xmin_peak' searches in {} sample(s)",
    NO_VALUES,
    "the eigenvalue solver did not converge",
)
_OK, _NON_FINITE, _ZERO, _NO_WINDOW, _TOO_FEW, _LOW_RANK, _FLAT, _NO_PEAK, _NO_VALUES, _NOT_CONVERGED = range(
    1, len(_OUTCOMES)
)

_SOLVED_BY = (
    "",
    *(f"{name} {route}" for name in ("cpu", "torch", "cupy") for route in ("float32", "float64", "float64 svd")),
)

# By position in `ROUTES`.
_ROUNDOFF, _FLOOR = (
    torch.tensor([of_route[route] for route in ROUTES], dtype=torch.float64, device="cpu")
    for of_route in (ROUNDOFF, FLOOR)
)
# Rounding moves a window's eigenvalues, and with them alpha: relative to itself by some roundoffs * (alpha - 1).
# How many was measured on matrices of many kinds and sizes. Of eigenvalues far below the largest one errors are
# the smaller the larger the matrix, as they add up at random: 3 largest / xmin / sqrt(w) for w x w Gram matrices
# at most. Solvers make more errors of the largest ones: up to 15 were seen where all of a tail are large.
_ROUNDOFFS, _ROUNDOFFS_OF_LARGEST = 6, 64
# How much it may move alpha, relative to alpha.
_TOLERANCE = 5e-5
# How much it may move xmin of a window on its own, whose alpha counts for the standard error alone.
_TOLERANCE_OF_ERROR = 1e-3
# What products lose below the range of single precision.
_UNDERFLOW = 2.0**-120
# One window tells beforehand whether single precision is worth an attempt, of layers with this many windows and as
# much to do: cubed sizes of the windows added up, half a millisecond.
_PILOT, _PILOT_WORK = 4, 2 * 10**6


@torch.no_grad()
def measure_stacks(
    stacks: Sequence[MatrixStack], options: SpectralOptions, histogram: bool = False
) -> list[Tensor]:
    """Return the row `(ROW_LENGTH,)` float64, on the CPU, of each layer.

    The layers are measured together: what one of them is found to be depends on no other.
    """
    with one_thread(), _new_tensors_on_the_cpu():
        work = _begin(stacks, options)
        jobs = [job for job in work if isinstance(job, _Job)]
        _try_single(jobs, options)
        _solve(jobs, options)
        _solve_again(jobs, options)
        if histogram:
            _solve_to_count(jobs, options)
        return [_row_of(job, options, histogram) if isinstance(job, _Job) else job for job in work]


def _new_tensors_on_the_cpu() -> AbstractContextManager[Any]:
    """All but eigenvalues is computed there, whatever the user's default device."""
    # Only where there is need: it makes every operation slower.
    needed = torch.get_default_device().type != "cpu"
    return torch.device("cpu") if needed else nullcontext()


@dataclass
class _Job:
    """A layer that has windows, of finite numbers the largest of which is not 0.

    Attributes:
        stack: the layer's matrices, divided by 2**exponent.
        windows: their windows.
        parts: what else is solved for the standard error.
        exponent: so that squares neither overflow nor vanish in float64.
        routes: `(W,)` int64, how each window is solved, as a position in `ROUTES`.
        pilot: the eigenvalues of the first window, if it was solved before.
        solved: the eigenvalues of all windows.
        of_parts: those of `parts`.
        sample: the eigenvalues of the samples and their fits.
        counted: the eigenvalues `(S, N)` that a histogram counts.
    """

    stack: MatrixStack
    windows: Windows
    parts: Windows | None
    exponent: int
    routes: Tensor
    pilot: Tensor | None = None
    solved: Eigenvalues = field(init=False)
    of_parts: Tensor | None = None
    sample: _Sample = field(init=False)
    counted: Tensor | None = None

    @property
    def route(self) -> Route:
        """The most accurate route that some window is solved by."""
        return ROUTES[int(self.routes.max())]

    @property
    def by_window(self) -> Tensor:
        """Eigenvalues of each window `(S, n, min(h, w))`, ascending."""
        values = self.solved.values
        return values.reshape(self.windows.samples, -1, values.shape[-1])

    @property
    def factor(self) -> Tensor:
        """What eigenvalues are multiplied by; it may leave the range of float64."""
        return torch.tensor(2.0, dtype=torch.float64).pow(2 * self.exponent) * self.stack.eigenvalue_scale


class _Sample(NamedTuple):
    """The pooled eigenvalues of S samples.

    Attributes:
        eigenvalues: `(S, N)`, ascending.
        first: `(S,)`, how many of the smallest are left out.
        fits: the fits of the others.
    """

    eigenvalues: Tensor
    first: Tensor
    fits: PowerLawFit

    @property
    def xmin(self) -> Tensor:
        """`(S,)`, the eigenvalue at which the tail begins."""
        return self.eigenvalues.gather(-1, self.fits.tail_start[:, None])[:, 0]


def _begin(stacks: Sequence[MatrixStack], options: SpectralOptions) -> list[_Job | Tensor]:
    """Return what is to be solved for each layer, or at once the row of a layer that has nothing to solve."""
    with_values = [replace(s, matrices=_solvable(s.matrices)) for s in stacks if not s.matrices.is_meta]
    largest = map(float, to_cpu([_largest(stack.matrices) for stack in with_values]))
    solvable = iter(with_values)
    return [
        _plan(stack, options) if stack.matrices.is_meta else _job(next(solvable), next(largest), options)
        for stack in stacks
    ]


def _largest(matrices: Tensor) -> Tensor:
    """Return the largest absolute value, of the parts of complex numbers; NaN where there is one."""
    if matrices.is_complex():
        matrices = torch.view_as_real(matrices.resolve_conj())
    # Without a copy of the weight, which takes several times as long as looking at it.
    return torch.maximum(matrices.amax(), -matrices.amin())


def _job(stack: MatrixStack, largest: float, options: SpectralOptions) -> _Job | Tensor:
    if not math.isfinite(largest):
        return _row(_NON_FINITE)
    if largest == 0:
        return _row(_ZERO)
    exponent = _safe_exponent(stack.matrices.dtype, largest)
    if exponent:
        stack = replace(stack, matrices=stack.matrices * 2.0**-exponent)
    windows = layer_windows(stack, options)
    if windows is None:
        return _row(_NO_WINDOW)
    parts = parts_of_windows(windows, stack.matrices.numel(), options)
    route = ROUTES.index(_first_route(stack, largest, options))
    return _Job(stack, windows, parts, exponent, torch.full((windows.view.shape[:-2].numel(),), route))


def _first_route(stack: MatrixStack, largest: float, options: SpectralOptions) -> Route:
    if options.fit != "median":
        # The searches compare distances, whose order a rounding may change.
        return "svd"
    double = stack.matrices.dtype in (torch.float64, torch.complex128)
    squares_fit = 2.0**-40 < largest < 2.0**40
    return "float32" if options.precision == "auto" and not double and squares_fit else "float64"


def _try_single(jobs: Sequence[_Job], options: SpectralOptions) -> None:
    """Solve one window of each layer in single precision, and give that up for those where it won't do."""
    tried = [job for job in jobs if job.route == "float32" and _needs_pilot(job)]
    first = torch.zeros(1, dtype=torch.int64)
    found = _eigenvalues([Wanted(job.windows.view, "float32", first) for job in tried], options)
    for job, (values, _) in zip(tried, found, strict=True):
        if _moves_alpha(values[:, -1:], values.shape[-1], _sample(values, job, options), job.routes[:1]):
            job.routes += 1
        else:
            job.pilot = values


def _needs_pilot(job: _Job) -> bool:
    number = len(job.routes)
    return number >= _PILOT and number * min(job.windows.view.shape[-2:]) ** 3 >= _PILOT_WORK


def _solve(jobs: Sequence[_Job], options: SpectralOptions) -> None:
    """Solve all windows of all layers, and pool and fit them."""
    wanted = []
    for job in jobs:
        rest = None if job.pilot is None else torch.arange(1, len(job.routes))
        wanted.append(Wanted(job.windows.view, job.route, rest))
    with_parts = [job for job in jobs if job.parts is not None]
    wanted += [Wanted(job.parts.view, job.route) for job in with_parts if job.parts is not None]
    found = _eigenvalues(wanted, options)
    for job, (values, directly) in zip(jobs, found[: len(jobs)], strict=True):
        job.solved = Eigenvalues(values if job.pilot is None else torch.cat([job.pilot, values]), directly)
        job.sample = _sample(job.by_window.flatten(1), job, options)
    for job, (values, _) in zip(with_parts, found[len(jobs) :], strict=True):
        job.of_parts = values.reshape(job.windows.samples, -1, values.shape[-1])


def _solve_again(jobs: Sequence[_Job], options: SpectralOptions) -> None:
    """Solve those windows by the next route whose rounding errors alpha may show, until there are none."""
    again = [(job, uncertain) for job in jobs if (uncertain := _uncertain(job, options)).any()]
    if not again:
        return
    picked: list[tuple[_Job, Tensor]] = []
    wanted = []
    for job, uncertain in again:
        for route in sorted(set(job.routes[uncertain].tolist())):
            picks = (uncertain & (job.routes == route)).nonzero()[:, 0]
            picked.append((job, picks))
            wanted.append(Wanted(job.windows.view, ROUTES[route + 1], picks))
        job.routes += uncertain
    with_parts = [job for job, _ in again if job.parts is not None]
    wanted += [Wanted(job.parts.view, job.route) for job in with_parts if job.parts is not None]
    found = _eigenvalues(wanted, options)
    for (job, picks), (values, directly) in zip(picked, found[: len(picked)], strict=True):
        job.solved.values[picks] = values
        job.solved = Eigenvalues(job.solved.values, job.solved.directly or directly)
    for job, _ in again:
        job.sample = _sample(job.by_window.flatten(1), job, options)
    for job, (values, _) in zip(with_parts, found[len(picked) :], strict=True):
        job.of_parts = values.reshape(job.windows.samples, -1, values.shape[-1])
    _solve_again([job for job, _ in again], options)


def _solve_to_count(jobs: Sequence[_Job], options: SpectralOptions) -> None:
    """Solve all windows by the most accurate route, as a histogram shows the smallest eigenvalues as well.

    Alpha stays that of the others: it must not depend on what is logged.
    """
    others = [job for job in jobs if int(job.routes.min()) < ROUTES.index("svd")]
    found = _eigenvalues([Wanted(job.windows.view) for job in others], options)
    for job, (values, _) in zip(others, found, strict=True):
        job.counted = values.reshape(job.windows.samples, -1).sort(dim=-1).values


def _eigenvalues(wanted: Sequence[Wanted], options: SpectralOptions) -> list[Eigenvalues]:
    return window_eigenvalues(wanted, options.memory_mb * 2**20, options.solver)


def _sample(eigenvalues: Tensor, job: _Job, options: SpectralOptions) -> _Sample:
    """Sort and fit `(S, N)` eigenvalues."""
    eigenvalues = eigenvalues.sort(dim=-1).values
    first = _first_counted(eigenvalues, job.factor, options)
    # One of the searches begins at a value that depends on the scale.
    scaled = eigenvalues * job.stack.eigenvalue_scale
    return _Sample(eigenvalues, first, fit_power_law(scaled, options.fit, options.xmin_pos, first))


def _moves_alpha(largest: Tensor, size: int, sample: _Sample, routes: Tensor) -> Tensor:
    """Return `(S, n)` whether the rounding of a window may move alpha by more than is tolerated.

    Args:
        largest: `(S, n)`, the largest eigenvalue of each window.
        size: the number of eigenvalues of a window.
        sample: what they were pooled to.
        routes: `(S * n,)`, how they were solved.
    """
    roundoffs = _ROUNDOFFS / size**0.5 * largest / sample.xmin[:, None] + _ROUNDOFFS_OF_LARGEST
    error = roundoffs * _ROUNDOFF[routes].view_as(largest) * (sample.fits.alpha - 1)[:, None]
    # Not larger, which NaN is not either.
    tolerated: Tensor = error <= _TOLERANCE
    return ~tolerated


def _uncertain(job: _Job, options: SpectralOptions) -> Tensor:
    """Return `(W,)` which windows have to be solved by a more accurate route."""
    by_window, sample = job.by_window, job.sample
    largest = by_window[..., -1]
    uncertain = _moves_alpha(largest, by_window.shape[-1], sample, job.routes)
    if options.fit == "median":
        own_xmin = by_window[..., int(by_window.shape[-1] / options.xmin_pos)]
        moved = _ROUNDOFFS * _ROUNDOFF[job.routes].view_as(largest) * largest + _UNDERFLOW
        # Only once: what double precision cannot tell from 0 either is most likely 0.
        uncertain |= ~(moved < _TOLERANCE_OF_ERROR * own_xmin) & (job.routes.view_as(largest) == 0)
    cutoffs = []
    if options.filter_zeros:
        cutoffs.append(torch.full_like(sample.xmin, ZERO_CUTOFF) / job.factor)
    if options.relative_cutoff > 0:
        cutoffs.append(options.relative_cutoff * sample.eigenvalues[:, -1])
    for cutoff in cutoffs:
        # On which side of it they are decides how many there are.
        unknown = 2 * _FLOOR[job.routes].view_as(largest) * largest
        uncertain |= ((by_window - cutoff[:, None, None]).abs() <= unknown[..., None]).any(-1)
    return uncertain.flatten() & (job.routes < ROUTES.index("svd"))


def _row_of(job: _Job, options: SpectralOptions, histogram: bool) -> Tensor:
    """Return the row of a layer that was solved."""
    if job.solved.values.isnan().any():
        return _row(_NOT_CONVERGED)
    eigenvalues, first, fits = job.sample
    kept = eigenvalues.shape[-1] - first
    row = _row(*_outcome(eigenvalues, fits, kept, options))
    # Apart from the factor, which leaves the range of float64 before its logarithm leaves anything.
    log_factor = 2 * job.exponent * math.log10(2) + math.log10(job.stack.eigenvalue_scale)
    figures = _figures(eigenvalues, fits, first, job.factor, log_factor)
    smallest = eigenvalues.gather(-1, first[:, None].clamp_max(eigenvalues.shape[-1] - 1))
    entries = job.stack.matrices.numel()
    scale = job.stack.eigenvalue_scale
    of_parts = None if job.of_parts is None else job.of_parts * scale
    error = alpha_error(job.windows, job.by_window * scale, of_parts, fits, smallest * scale, entries, options)
    xmin = job.sample.xmin.log().mean().exp() * job.factor
    row[2:_END] = torch.cat([figures, torch.stack([error, xmin])])
    row[_END] = kept.sum()
    row[_END + 1] = _SOLVED_BY.index(_solved_by(job, options))
    if histogram:
        counted = eigenvalues if job.counted is None else job.counted
        row[_HEAD:] = _histogram(counted, _first_counted(counted, job.factor, options), log_factor)
    return row


def _solved_by(job: _Job, options: SpectralOptions) -> str:
    view = job.windows.view
    single = job.route == "float32"
    precision = "float32" if single else "float64 svd" if job.solved.directly else "float64"
    dtype = torch.float32 if single else torch.float64
    return f"{solver_for(view.device, dtype, min(view.shape[-2:]), options.solver)} {precision}"


def alpha_of_row(row: Tensor) -> Tensor:
    """Return alpha, NaN where the layer has none."""
    return row[2].where(row[0] == _OK, torch.nan)


def _plan(stack: MatrixStack, options: SpectralOptions) -> Tensor:
    """Return the row of a weight without values: how many eigenvalues it has, or what its shape rules out."""
    row = torch.zeros(ROW_LENGTH, dtype=torch.float64)
    windows = layer_windows(stack, options)
    if windows is None:
        row[0] = _NO_WINDOW
        return row
    *lead, height, width = windows.view.shape
    number = math.prod(lead) * min(height, width)
    sample = number // windows.samples
    row[0], row[1] = (_NO_VALUES, 0) if sample >= options.min_eigenvalues else (_TOO_FEW, sample)
    row[2:_END] = torch.nan
    row[_END] = number
    return row


def _solvable(matrices: Tensor) -> Tensor:
    """Move the matrices where they can be solved; eight-bit floats, which have no arithmetic, become float32."""
    # Detached, as a rule may forget to and threads do not inherit `no_grad`: eigenvectors would be computed too.
    matrices = matrices.detach().to(solver_device(matrices.device))
    return matrices.float() if matrices.element_size() == 1 else matrices


def solver_device(device: torch.device) -> torch.device:
    """Eigenvalues need float64, which Apple's GPUs lack and others are not tested for: the CPU stands in."""
    return device if device.type in ("cpu", "cuda") else torch.device("cpu")


def _row(outcome: int, detail: float = 0.0) -> Tensor:
    row = torch.zeros(ROW_LENGTH, dtype=torch.float64)
    row[0], row[1] = outcome, detail
    return row


def _safe_exponent(dtype: torch.dtype, largest: float) -> int:
    """Power of two to divide the weights by so that squares neither overflow nor vanish in float64."""
    if dtype not in (torch.float64, torch.complex128):
        return 0
    exponent = math.frexp(largest)[1]
    return 0 if abs(exponent) < 400 else max(-1000, min(exponent, 1000))


def _first_counted(eigenvalues: Tensor, factor: Tensor, options: SpectralOptions) -> Tensor:
    """Return `(S,)` how many of the smallest eigenvalues of each sample are left out."""
    size = eigenvalues.shape[-1]
    first = eigenvalues.new_zeros(len(eigenvalues), dtype=torch.int64)
    if options.filter_zeros:
        below = (eigenvalues * factor < ZERO_CUTOFF).sum(-1)
        first = below.where(below < size, 0)
    if options.relative_cutoff > 0:
        cut = (eigenvalues < options.relative_cutoff * eigenvalues[:, -1:]).sum(-1)
        first = torch.maximum(first, cut)
    return first


def _outcome(eigenvalues: Tensor, fits: PowerLawFit, kept: Tensor, options: SpectralOptions) -> tuple[int, float]:
    """Say whether the layer has an alpha, which it has when every sample has; or why not, and a number for it."""
    if int(kept.min()) < options.min_eigenvalues:
        return _TOO_FEW, float(kept.min())
    missing = fits.alpha.isnan()
    if not missing.any():
        return _OK, 0.0
    if options.fit == "median":
        zero = missing & (eigenvalues.gather(-1, fits.tail_start[:, None])[:, 0] == 0)
    else:
        zero = missing & (eigenvalues[:, -2] == 0)
    if zero.any():
        return _LOW_RANK, float(zero.sum())
    flat = eigenvalues[:, -1] <= eigenvalues[:, -2] * (1 + 1e-4)
    no_peak = options.fit == "xmin_peak" and not (missing & flat).any()
    return (_NO_PEAK if no_peak else _FLAT), float(missing.sum())


def _figures(eigenvalues: Tensor, fits: PowerLawFit, first: Tensor, factor: Tensor, log_factor: float) -> Tensor:
    """Return the mean over samples of each of `_FIGURES` but the last two."""
    counted = torch.arange(eigenvalues.shape[-1], device=first.device) >= first[:, None]
    values = eigenvalues.where(counted, 0)
    # In double precision: the logarithm of an integer tensor is single.
    number = counted.sum(-1).to(values.dtype)
    largest, total = values[:, -1], ordered_sum(values)
    shares = values / total[:, None]
    figures = (
        fits.alpha,
        fits.ks_distance,
        fits.alpha * (largest.log10() + log_factor),
        largest * factor,
        total * factor,
        total / largest,
        total * factor / number,
        ordered_sum(torch.special.entr(shares)) / number.log(),
    )
    return torch.stack(figures).mean(-1)


def _histogram(eigenvalues: Tensor, first: Tensor, log_factor: float) -> Tensor:
    """Return low, high and counts of log10 of all positive eigenvalues that count; zeros where there are none."""
    index = torch.arange(eigenvalues.shape[-1], device=first.device)
    logs = eigenvalues[(index >= first[:, None]) & (eigenvalues > 0)].log10() + log_factor
    if not len(logs):
        return logs.new_zeros(2 + HISTOGRAM_BINS)
    low, high = logs.min(), logs.max()
    position = ((logs - low) / (high - low) * HISTOGRAM_BINS).nan_to_num(0).long()
    counts = torch.bincount(position.clamp(0, HISTOGRAM_BINS - 1), minlength=HISTOGRAM_BINS)
    return torch.cat([torch.stack([low, high]), counts.to(logs.dtype)])


def record_from_row(
    row: Sequence[float], options: SpectralOptions, kind: str, shape: tuple[int, ...], problem: str
) -> LayerRecord:
    """Turn a row back into a record."""
    if problem:
        return LayerRecord(status=problem, kind=kind, shape=shape)
    outcome, detail = int(row[0]), int(row[1])
    figures: dict[str, Any] = {
        name: value if math.isfinite(value) else None for name, value in zip(_FIGURES, row[2:_END], strict=True)
    }
    number, solver = map(int, row[_END:_HEAD])
    if outcome != _OK:
        figures.update(dict.fromkeys(("alpha", "ks_distance", "alpha_hat", "alpha_error", "xmin")))
    if number == 0:
        figures = {}
    low, high, *counts = row[_HEAD:]
    return LayerRecord(
        **figures,
        num_eigenvalues=number,
        solver=_SOLVED_BY[solver],
        status=_OUTCOMES[outcome].format(detail, options.min_eigenvalues),
        kind=kind,
        shape=shape,
        histogram=EsdHistogram(tuple(map(int, counts)), low, high) if any(counts) else None,
    )
