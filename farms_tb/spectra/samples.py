"""From stacks of matrices to samples of eigenvalues and their fits: which windows are solved, and by which route.

The layers are solved together. Each window takes the cheapest route (`farms_tb.spectra.eigenvalues`) whose
rounding errors alpha does not show; samples of similar size, of whatever layers, are sorted and fitted at once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from farms_tb.options import SpectrumOptions
from farms_tb.spectra.eigenvalues import (
    FLOOR,
    LARGE_WINDOW,
    ROUNDOFF,
    ROUTES,
    Eigenvalues,
    Route,
    Wanted,
    multiplies_in_full,
    to_cpu,
    window_eigenvalues,
)
from farms_tb.spectra.power_law import PowerLawFit, fit_power_law
from farms_tb.spectra.rows import NO_WINDOW, NON_FINITE, TOO_FEW, WITHOUT_VALUES, ZERO, make_row
from farms_tb.spectra.standard_error import parts_of_windows
from farms_tb.spectra.windows import Windows, layer_windows
from farms_tb.spectra.workers import map_on_threads
from farms_tb.weights.matrices import MatrixStack

Number = TypeVar("Number", float, Tensor)

ZERO_CUTOFF = 1e-5
"""Eigenvalues below this are what `filter_zeros` drops: the papers' absolute threshold."""

_FLOAT32, _DEFLATED, _FLOAT64, _SVD = map(ROUTES.index, ("float32", "deflated", "float64", "svd"))
# By position in `ROUTES`.
_ROUNDOFF, _FLOOR = (
    torch.tensor([of_route[route] for route in ROUTES], dtype=torch.float64, device="cpu")
    for of_route in (ROUNDOFF, FLOOR)
)
# Rounding moves a window's eigenvalues, and with them alpha: relative to itself by some roundoffs * (alpha - 1).
# How many was measured on matrices of many kinds and sizes. Of eigenvalues far below the largest one errors are
# the smaller the larger the matrix, as they add up at random: 3 scale / xmin / sqrt(w) for w x w Gram matrices
# at most. Solvers make more errors of the largest ones: up to 15 were seen where all of a tail are large.
_ROUNDOFFS, _ROUNDOFFS_OF_LARGEST = 6, 64
# How much it may move alpha, relative to alpha.
_TOLERANCE = 5e-5
# How much it may move xmin of a window on its own, whose alpha counts for the standard error alone.
_TOLERANCE_OF_ERROR = 1e-3
# What products lose below the range of single precision.
_UNDERFLOW = 2.0**-120
# One window tells beforehand which route will do, of layers with this many windows and as much to do: cubed sizes
# of the windows added up, half a millisecond.
_PILOT, _PILOT_WORK = 4, 2 * 10**6
# How much of weights there has to be for another thread to help looking at them: a millisecond.
_BYTES_WORTH_A_THREAD = 2**22
# On the CPU double precision costs little more where windows are small, and deflating as much: real ones of these
# sizes on are tried in single precision, and deflated.
_SINGLE_SIZE, _DEFLATED_SIZE = 64, 192
# Zeros that a table is filled up with at most so that more layers share it: those of another table cost as much.
_PADDING = 16000


@dataclass
class Job:
    """A layer that has windows, of finite numbers the largest of which is not 0.

    Attributes:
        stack: the layer's matrices, divided by 2**exponent.
        windows: their windows.
        parts: what else is solved for the standard error.
        exponent: so that squares neither overflow nor vanish in float64.
        routes: `(W,)` int64, how each window is solved, as a position in `ROUTES`.
        deflatable: whether single precision may be tried once more, without the largest directions.
        solved: all windows.
        of_parts: eigenvalues of `parts`, `(S * 4, v)`.
        route_of_parts: how they were solved, as a position in `ROUTES`; -1 before.
        counted: the eigenvalues `(S, N)` that a histogram counts, where they are not those that are fitted.
    """

    stack: MatrixStack
    windows: Windows
    parts: Windows | None
    exponent: int
    routes: Tensor
    deflatable: bool
    solved: Eigenvalues = field(init=False)
    of_parts: Tensor | None = None
    route_of_parts: int = -1
    counted: Tensor | None = None

    @property
    def size(self) -> int:
        """Number of eigenvalues of a window."""
        return min(self.windows.view.shape[-2:])

    @property
    def route(self) -> int:
        """The most accurate route that some window is solved by."""
        return int(self.routes.max())

    @cached_property
    def factor(self) -> float:
        """What eigenvalues are multiplied by; it may leave the range of float64."""
        try:
            return math.ldexp(self.stack.eigenvalue_scale, 2 * self.exponent)
        except OverflowError:
            return math.inf

    @property
    def pieces(self) -> Tensor:
        """Eigenvalues of what is fitted for the standard error: each sample's windows, or quarters of one."""
        return self.solved.values if self.of_parts is None else self.of_parts

    @property
    def sample_size(self) -> int:
        """Number of eigenvalues of a sample."""
        return len(self.routes) // self.windows.samples * self.size


@dataclass
class Samples:
    """Samples of one or more layers, in tables: S samples, of V windows in all.

    Rows begin with as many zeros as they are shorter than the longest. No number of a row depends on how many.

    Attributes:
        jobs: the layers.
        by_window: `(V, w)` float64, eigenvalues of each window, ascending.
        eigenvalues: `(S, N)` float64, ascending.
        padding: `(S,)` int64, how many zeros precede them.
        first: `(S,)` int64, where those begin that count.
        fits: the fits of these.
    """

    jobs: list[Job]
    by_window: Tensor
    eigenvalues: Tensor
    padding: Tensor
    first: Tensor
    fits: PowerLawFit

    @property
    def xmin(self) -> Tensor:
        """`(S,)`, the eigenvalue at which the tail begins."""
        return self.eigenvalues.gather(-1, self.fits.tail_start[:, None])[:, 0]

    @property
    def numbers(self) -> list[int]:
        """How many samples each layer has."""
        return [job.windows.samples for job in self.jobs]

    def per_sample(self, of_layers: Sequence[float]) -> Tensor:
        """Repeat a number of each layer for its samples: `(S,)`."""
        return repeated(of_layers, self.numbers)

    def of(self, jobs: Sequence[Job]) -> Samples:
        """Return the samples of some of the layers."""
        chosen = [any(job is one for one in jobs) for job in self.jobs]
        rows = self.per_sample(chosen)
        windows = repeated(chosen, [len(job.routes) for job in self.jobs])
        fits = PowerLawFit(*(of_all[rows] for of_all in self.fits))
        tables = self.by_window[windows], self.eigenvalues[rows], self.padding[rows], self.first[rows]
        return Samples(list(jobs), *tables, fits)


def make_jobs(stacks: Sequence[MatrixStack], options: SpectrumOptions) -> list[Job | Tensor]:
    """Return what is to be solved for each layer, or at once the row of a layer that has nothing to solve."""
    with_values = [replace(s, matrices=_solvable(s.matrices)) for s in stacks if not s.matrices.is_meta]
    sizes = [stack.matrices.nbytes for stack in with_values]
    # Half of the memory is for copies of weights, half for windows, see `_eigenvalues`.
    pack = _packed if 2 * sum(sizes) <= options.memory_mb * 2**20 else lambda matrices: matrices

    def prepare(stack: MatrixStack) -> tuple[MatrixStack, Tensor]:
        return replace(stack, matrices=pack(stack.matrices)), _largest(stack.matrices)

    if all(stack.matrices.device.type == "cpu" for stack in with_values):
        prepared = map_on_threads(prepare, with_values, sizes, _BYTES_WORTH_A_THREAD)
    else:
        # Other threads are not on this one's stream.
        prepared = [prepare(stack) for stack in with_values]
    largest = map(float, to_cpu([largest for _, largest in prepared]))
    solvable = iter([stack for stack, _ in prepared])
    return [
        _plan(stack, options) if stack.matrices.is_meta else _job(next(solvable), next(largest), options)
        for stack in stacks
    ]


def solver_device(device: torch.device) -> torch.device:
    """Eigenvalues need float64, which Apple's GPUs lack and others are not tested for: the CPU stands in."""
    return device if device.type in ("cpu", "cuda") else torch.device("cpu")


def _solvable(matrices: Tensor) -> Tensor:
    """Move the matrices where they can be solved; eight-bit floats, which have no arithmetic, become float32."""
    # Detached, as a rule may forget to and threads do not inherit `no_grad`: eigenvectors would be computed too.
    matrices = matrices.detach().to(solver_device(matrices.device))
    return matrices.float() if matrices.element_size() == 1 else matrices


def _packed(matrices: Tensor) -> Tensor:
    """Return the matrices with their rows or columns whole in memory: windows are read from there many times.

    In a convolution's weight the entries of a matrix lie as far apart as there are kernel positions.
    """
    small = matrices.shape[1:].numel() < LARGE_WINDOW
    if small or matrices.device.type != "cpu" or 1 in matrices.stride()[1:] or matrices.stride(0) != 1:
        return matrices
    by_rows = matrices.stride(1) >= matrices.stride(2)
    ordered = matrices if by_rows else matrices.mT
    # In two dimensions torch transposes block by block, which is several times as fast.
    packed = ordered.permute(1, 2, 0).flatten(0, 1).t().contiguous().view(ordered.shape)
    return packed if by_rows else packed.mT


def _largest(matrices: Tensor) -> Tensor:
    """Return the largest absolute value, of the parts of complex numbers; NaN where there is one."""
    if matrices.is_complex():
        matrices = torch.view_as_real(matrices.resolve_conj())
    # Without a copy of the weight, which takes several times as long as looking at it.
    return torch.maximum(matrices.amax(), -matrices.amin())


def _plan(stack: MatrixStack, options: SpectrumOptions) -> Tensor:
    """Return the row of a weight without values: how many eigenvalues it has, or what its shape rules out."""
    windows = layer_windows(stack, options)
    if windows is None:
        return make_row(NO_WINDOW)
    *lead, height, width = windows.view.shape
    number = math.prod(lead) * min(height, width)
    sample = number // windows.samples
    outcome = (WITHOUT_VALUES, 0) if sample >= options.min_eigenvalues else (TOO_FEW, sample)
    return make_row(*outcome, number=number)


def _job(stack: MatrixStack, largest: float, options: SpectrumOptions) -> Job | Tensor:
    if not math.isfinite(largest):
        return make_row(NON_FINITE)
    if largest == 0:
        return make_row(ZERO)
    exponent = _safe_exponent(stack.matrices.dtype, largest)
    if exponent:
        stack = replace(stack, matrices=stack.matrices * 2.0**-exponent)
    windows = layer_windows(stack, options)
    if windows is None:
        return make_row(NO_WINDOW)
    parts = parts_of_windows(windows, stack.matrices.numel(), options)
    route = _first_route(windows.view, largest, options)
    # Not tried on GPUs yet. Its norms are squared once more than the entries are.
    deflatable = (
        route == _FLOAT32
        and stack.matrices.device.type == "cpu"
        and _is_large(windows)
        and 2.0**-15 < largest < 2.0**15
        and multiplies_in_full(stack.matrices.device)
    )
    routes = torch.full((windows.view.shape[:-2].numel(),), route)
    return Job(stack, windows, parts, exponent, routes, deflatable)


def _is_large(windows: Windows) -> bool:
    """Tell whether deflating windows takes less time than solving them in double precision."""
    return min(windows.view.shape[-2:]) >= _DEFLATED_SIZE


def _safe_exponent(dtype: torch.dtype, largest: float) -> int:
    """Power of two to divide the weights by so that squares neither overflow nor vanish in float64."""
    if dtype not in (torch.float64, torch.complex128):
        return 0
    exponent = math.frexp(largest)[1]
    return 0 if abs(exponent) < 400 else max(-1000, min(exponent, 1000))


def _first_route(windows: Tensor, largest: float, options: SpectrumOptions) -> int:
    if options.fit != "median":
        # The searches compare distances, whose order a rounding may change.
        return _SVD
    double = windows.dtype in (torch.float64, torch.complex128)
    squares_fit = 2.0**-40 < largest < 2.0**40
    faster = windows.device.type != "cpu" or windows.is_complex() or min(windows.shape[-2:]) >= _SINGLE_SIZE
    return _FLOAT32 if options.precision == "auto" and not double and squares_fit and faster else _FLOAT64


def solve(jobs: Sequence[Job], options: SpectrumOptions) -> list[Samples]:
    """Solve all windows of all layers, each by the route that it needs, and pool and fit the eigenvalues."""
    _solve_all(jobs, options)
    done = []
    while jobs:
        again: list[tuple[Job, Tensor]] = []
        for samples in _pool(jobs, options):
            uncertain = _uncertain(samples, options)
            of_jobs = torch.split(uncertain, [len(job.routes) for job in samples.jobs])
            certain = [job for job, windows in zip(samples.jobs, of_jobs, strict=True) if not windows.any()]
            if certain:
                done.append(samples if len(certain) == len(samples.jobs) else samples.of(certain))
            again += [pair for pair in zip(samples.jobs, of_jobs, strict=True) if pair[1].any()]
        _solve_again(again, options)
        jobs = [job for job, _ in again]
    return done


def solve_to_count(jobs: Sequence[Job], options: SpectrumOptions) -> None:
    """Solve all windows by the most accurate route, as a histogram shows the smallest eigenvalues as well.

    Alpha stays that of the others: it must not depend on what is logged.
    """
    others = [job for job in jobs if int(job.routes.min()) < _SVD]
    found = _eigenvalues([Wanted(job.windows.view) for job in others], options)
    for job, solved in zip(others, found, strict=True):
        job.counted = _sorted(solved.values.view(job.windows.samples, -1))


def first_counted(
    eigenvalues: Tensor, factor: Tensor, options: SpectrumOptions, padding: Tensor | None = None
) -> Tensor:
    """Return where those eigenvalues begin that are not left out.

    Args:
        eigenvalues: `(S, N)`, ascending.
        factor: `(S,)`, what they are multiplied by.
        options: what is left out.
        padding: `(S,)` int64, how many zeros precede the eigenvalues; None for 0.

    Returns:
        `(S,)` int64.
    """
    size = eigenvalues.shape[-1]
    first = eigenvalues.new_zeros(len(eigenvalues), dtype=torch.int64) if padding is None else padding
    if options.filter_zeros:
        below = (eigenvalues * factor[:, None] < ZERO_CUTOFF).sum(-1)
        first = torch.maximum(first, below.where(below < size, 0))
    if options.relative_cutoff > 0:
        cut = (eigenvalues < options.relative_cutoff * eigenvalues[:, -1:]).sum(-1)
        first = torch.maximum(first, cut)
    return first


def _solve_all(jobs: Sequence[Job], options: SpectrumOptions) -> None:
    """Solve all windows, by the routes that they are likely to need."""
    wanted = [_wanted(job, options) for job in jobs]
    with_parts = _with_parts(jobs)
    found = _eigenvalues(wanted + [part for _, part in with_parts], options)
    for job, solved in zip(jobs, found[: len(jobs)], strict=True):
        job.solved = solved
    _keep_parts(with_parts, found[len(jobs) :])


def _wanted(job: Job, options: SpectrumOptions) -> Wanted:
    """Return the windows of a layer; of a larger one, one goes ahead and tells by which route the others go."""
    if job.route != _FLOAT32 or not _has_pilot(job):
        if job.deflatable:
            job.routes.fill_(_DEFLATED)
        return Wanted(job.windows.view, ROUTES[job.route])
    way = _DEFLATED if job.deflatable else _FLOAT32

    def choose(pilot: Eigenvalues) -> Route:
        # The window stands for its sample. No tensors: two threads that take turns at many small operations hinder
        # each other.
        alpha, xmin = _plain_fit(pilot.values[0].tolist(), job, options)
        largest = float(pilot.values[0, -1])
        for route in range(_FLOAT32, way + 1):
            scale = largest if route == _FLOAT32 else float(pilot.scale)
            rounding = max(scale, math.sqrt(largest * xmin))
            if _shift(rounding, xmin, alpha, job.size, ROUNDOFF[ROUTES[route]]) <= _TOLERANCE:
                break
        else:
            route = _FLOAT64
        # Not in place: inference mode is not that of other threads.
        job.routes = torch.full((len(job.routes),), route)
        return ROUTES[route]

    return Wanted(job.windows.view, ROUTES[way], choose=choose)


def _has_pilot(job: Job) -> bool:
    return len(job.routes) >= _PILOT and len(job.routes) * job.size**3 >= _PILOT_WORK


def _plain_fit(eigenvalues: Sequence[float], job: Job, options: SpectrumOptions) -> tuple[float, float]:
    """Return alpha by the median fit, and the eigenvalue at which the tail begins; NaN where there is no fit."""
    counted = [value for value in eigenvalues if not value < options.relative_cutoff * eigenvalues[-1]]
    if options.filter_zeros:
        counted = [value for value in counted if not value * job.factor < ZERO_CUTOFF] or counted
    tail = counted[int(len(counted) / options.xmin_pos) :]
    if not tail[0] > 0:
        return math.nan, math.nan
    rise = sum(math.log(value / tail[0]) for value in tail)
    return 1 + len(tail) / rise if rise > 0 else math.nan, tail[0]


def _solve_again(again: Sequence[tuple[Job, Tensor]], options: SpectrumOptions) -> None:
    """Solve those windows of each layer that are marked `(W,)` by the next route."""
    picked: list[tuple[Job, Tensor]] = []
    wanted = []
    for job, uncertain in again:
        following = torch.tensor([_DEFLATED if job.deflatable else _FLOAT64, _FLOAT64, _SVD, _SVD])
        for route in sorted(set(job.routes[uncertain].tolist())):
            picks = (uncertain & (job.routes == route)).nonzero()[:, 0]
            picked.append((job, picks))
            wanted.append(Wanted(job.windows.view, ROUTES[int(following[route])], picks))
        job.routes = following[job.routes].where(uncertain, job.routes)
    with_parts = _with_parts([job for job, _ in again])
    found = _eigenvalues(wanted + [part for _, part in with_parts], options)
    for (job, picks), solved in zip(picked, found[: len(picked)], strict=True):
        job.solved.values[picks], job.solved.scale[picks] = solved.values, solved.scale
        job.solved = job.solved._replace(directly=job.solved.directly or solved.directly)
    _keep_parts(with_parts, found[len(picked) :])


def _with_parts(jobs: Sequence[Job]) -> list[tuple[Job, Wanted]]:
    """Return what is solved for the standard error, by the route of the windows where it is known and fit."""
    found = []
    for job in jobs:
        if job.parts is None:
            continue
        route = job.route
        if (route == _FLOAT32 and _has_pilot(job)) or (route == _DEFLATED and not _is_large(job.parts)):
            route = _FLOAT64
        if route > job.route_of_parts:
            job.route_of_parts = route
            found.append((job, Wanted(job.parts.view, ROUTES[route])))
    return found


def _keep_parts(with_parts: Sequence[tuple[Job, Wanted]], found: Sequence[Eigenvalues]) -> None:
    for (job, _), solved in zip(with_parts, found, strict=True):
        job.of_parts = solved.values


def _eigenvalues(wanted: Sequence[Wanted], options: SpectrumOptions) -> list[Eigenvalues]:
    memory = options.memory_mb * 2**20
    if any(part.view.device.type == "cpu" for part in wanted):
        memory //= 2  # the other half is that of the weights that were packed
    return window_eigenvalues(wanted, memory, options.solver)


def _pool(jobs: Sequence[Job], options: SpectrumOptions) -> list[Samples]:
    """Sort and fit the samples of layers, those of similar size together: small operations take their time."""
    found = []
    for members in _groups(jobs):
        numbers = [job.windows.samples for job in members]
        by_window = table([job.solved.values for job in members])
        eigenvalues = _sorted(table([job.solved.values.view(job.windows.samples, -1) for job in members]))
        padding = repeated([eigenvalues.shape[-1] - job.sample_size for job in members], numbers)
        factors = repeated([job.factor for job in members], numbers)
        first = first_counted(eigenvalues, factors, options, padding)
        # One of the searches begins at a value that depends on the scale.
        scales = repeated([job.stack.eigenvalue_scale for job in members], numbers)
        fits = fit_power_law(eigenvalues * scales[:, None], options.fit, options.xmin_pos, first)
        found.append(Samples(members, by_window, eigenvalues, padding, first, fits))
    return found


def _groups(jobs: Sequence[Job]) -> list[list[Job]]:
    """Put layers together the tables of which take little padding."""
    groups: list[list[Job]] = []
    samples = windows = eigenvalues = longest = largest = 0
    for job in sorted(jobs, key=lambda job: -job.sample_size):
        samples += job.windows.samples
        windows += len(job.routes)
        eigenvalues += len(job.routes) * job.size
        largest = max(largest, job.size)
        if not groups or samples * longest + windows * largest - 2 * eigenvalues > _PADDING:
            groups.append([])
            samples, windows, largest, longest = job.windows.samples, len(job.routes), job.size, job.sample_size
            eigenvalues = windows * largest
        groups[-1].append(job)
    return groups


def table(parts: Sequence[Tensor]) -> Tensor:
    """Put the rows `(n, m)` of all parts under each other, with zeros before the shorter ones."""
    rows = np.zeros((sum(map(len, parts)), max(part.shape[-1] for part in parts)))
    begin = 0
    for part in parts:
        rows[begin : begin + len(part), rows.shape[-1] - part.shape[-1] :] = part.numpy()
        begin += len(part)
    return torch.from_numpy(rows)


def _sorted(values: Tensor) -> Tensor:
    # NumPy's sort is more than ten times as fast as torch's, which finds out the order as well.
    return torch.from_numpy(np.sort(values.numpy(), axis=-1))


def repeated(values: Sequence[float] | Tensor, numbers: Sequence[int] | Tensor) -> Tensor:
    """Repeat each value the number of times that is beside it."""
    return torch.from_numpy(np.repeat(np.asarray(values), np.asarray(numbers)))


def _rounding(scale: Tensor, largest: Tensor, at: Tensor) -> Tensor:
    """Return what rounding errors of an eigenvalue are relative to: see `Eigenvalues.scale`."""
    return torch.maximum(scale, (largest * at).sqrt())


def _shift(rounding: Number, xmin: Number, alpha: Number, size: Number, roundoff: Number) -> Number:
    """Return by how much the rounding of a window may move alpha, relative to alpha; NaN where there is none."""
    roundoffs = _ROUNDOFFS / size**0.5 * rounding / xmin + _ROUNDOFFS_OF_LARGEST
    shift: Number = roundoffs * roundoff * (alpha - 1)
    return shift


def _uncertain(samples: Samples, options: SpectrumOptions) -> Tensor:
    """Return `(V,)` which windows have to be solved by a more accurate route."""
    jobs, by_window = samples.jobs, samples.by_window
    numbers = [len(job.routes) for job in jobs]
    routes = torch.cat([job.routes for job in jobs])
    scale = torch.cat([job.solved.scale for job in jobs])
    size = repeated([float(job.size) for job in jobs], numbers)
    padding = by_window.shape[-1] - size
    of_sample = [len(job.routes) // job.windows.samples for job in jobs]
    sample = repeated(range(len(samples.first)), samples.per_sample(of_sample))
    largest, roundoff = by_window[:, -1], _ROUNDOFF[routes]
    xmin, alpha = samples.xmin[sample], samples.fits.alpha[sample]
    # Not larger, which NaN is not either.
    rounding = _rounding(scale, largest, xmin)
    uncertain = ~(_shift(rounding, xmin, alpha, size, roundoff) <= _TOLERANCE)
    if options.fit == "median":
        own_xmin = by_window.gather(-1, (padding + (size / options.xmin_pos).floor()).long()[:, None])[:, 0]
        moved = _ROUNDOFFS / size.sqrt() * roundoff * _rounding(scale, largest, own_xmin) + _UNDERFLOW
        # Only in single precision: what double precision cannot tell from 0 either is most likely 0.
        uncertain |= ~(moved < _TOLERANCE_OF_ERROR * own_xmin) & (routes < _FLOAT64)
    cutoffs = []
    if options.filter_zeros:
        cutoffs.append(ZERO_CUTOFF / samples.per_sample([job.factor for job in jobs]))
    if options.relative_cutoff > 0:
        cutoffs.append(options.relative_cutoff * samples.eigenvalues[:, -1])
    for cutoff in cutoffs:
        # On which side of it they are decides how many there are.
        unknown = 2 * _FLOOR[routes] * _rounding(scale, largest, cutoff[sample])
        inside = torch.arange(by_window.shape[-1]) >= padding[:, None]
        uncertain |= (((by_window - cutoff[sample, None]).abs() <= unknown[:, None]) & inside).any(-1)
    wanted: Tensor = uncertain & (routes < _SVD)
    return wanted
