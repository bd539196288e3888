"""Stacks of matrices measured together: from the samples of all layers to the figures of each, as rows."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from farms_tb.options import SpectrumOptions
from farms_tb.spectra.eigenvalues import ROUTES
from farms_tb.spectra.power_law import fit_power_law, ordered_sum
from farms_tb.spectra.rows import (
    FLAT,
    HISTOGRAM_BINS,
    LOW_RANK,
    MEASURED,
    NO_PEAK,
    NOT_CONVERGED,
    TOO_FEW,
    make_row,
)
from farms_tb.spectra.samples import Job, Samples, first_counted, make_jobs, repeated, solve, solve_to_count, table
from farms_tb.spectra.solvers import solver_for
from farms_tb.spectra.standard_error import alpha_variance, independent_windows
from farms_tb.spectra.workers import one_thread
from farms_tb.weights.matrices import MatrixStack

# Whose logarithm is finite: torch's own function for entropy takes seven times as long as this.
_TINY = torch.finfo(torch.float64).tiny


@torch.no_grad()
def measure_stacks(
    stacks: Sequence[MatrixStack], options: SpectrumOptions, histogram: bool = False
) -> list[Tensor]:
    """Return the row `(ROW_LENGTH,)` float64, on the CPU, of each layer (see `farms_tb.spectra.rows`).

    The layers are measured together: what one of them is found to be depends on no other.
    """
    with one_thread(options.threads), _new_tensors_on_the_cpu():
        work = make_jobs(stacks, options)
        jobs = [job for job in work if isinstance(job, Job)]
        samples = solve(jobs, options)
        if histogram:
            solve_to_count(jobs, options)
        rows = {
            id(job): row
            for group in samples
            for job, row in zip(group.jobs, _rows_of(group, options, histogram), strict=True)
        }
        return [rows[id(job)] if isinstance(job, Job) else job for job in work]


def _new_tensors_on_the_cpu() -> AbstractContextManager[Any]:
    """All but eigenvalues is computed there, whatever the user's default device."""
    # Only where there is need: it makes every operation slower.
    needed = torch.get_default_device().type != "cpu"
    return torch.device("cpu") if needed else nullcontext()


def _rows_of(samples: Samples, options: SpectrumOptions, histogram: bool) -> list[Tensor]:
    """Return the row of each layer."""
    facts = _facts(samples, options)
    rows = []
    begin = 0
    for job, number in zip(samples.jobs, samples.numbers, strict=True):
        own = {name: values[begin : begin + number] for name, values in facts.items()}
        eigenvalues = samples.eigenvalues[begin : begin + number, -job.sample_size :]
        rows.append(_row_of(job, own, eigenvalues, options, histogram))
        begin += number
    return rows


def _row_of(
    job: Job, facts: dict[str, list[float]], eigenvalues: Tensor, options: SpectrumOptions, histogram: bool
) -> Tensor:
    """Return the row of a layer: the means over its samples."""
    # Sorted last.
    if any(map(math.isnan, facts["largest"])):
        return make_row(NOT_CONVERGED)
    # Apart from the factor, which leaves the range of float64 before its logarithm leaves anything.
    log_factor = 2 * job.exponent * math.log10(2) + math.log10(job.stack.eigenvalue_scale)
    factor = job.factor
    alphas, largest = facts["alpha"], facts["largest"]
    figures = (
        _mean(alphas),
        _mean(facts["ks_distance"]),
        _mean(alpha * (log + log_factor) for alpha, log in zip(alphas, facts["log10_largest"], strict=True)),
        _mean(largest) * factor,
        _mean(facts["total"]) * factor,
        _mean(facts["stable_rank"]),
        _mean(total * factor / kept for total, kept in zip(facts["total"], facts["kept"], strict=True)),
        _mean(facts["entropy"]),
        math.sqrt(sum(facts["variance"])) / len(alphas),
        math.exp(_mean(facts["log_xmin"])) * factor,
    )
    counts: list[float] = []
    if histogram:
        counted = eigenvalues if job.counted is None else job.counted
        first = first_counted(counted, counted.new_full((len(counted),), factor), options)
        counts = _histogram(counted, first, log_factor).tolist()
    return make_row(
        *_outcome(facts, options),
        figures=figures,
        number=sum(facts["kept"]),
        solved_by=_solved_by(job, options),
        histogram=counts,
    )


def _solved_by(job: Job, options: SpectrumOptions) -> str:
    view = job.windows.view
    route = ROUTES[job.route]
    single = route in ("float32", "deflated")
    precision = "float64 svd" if job.solved.directly else "float64"
    if single:
        precision = "float32 deflated" if route == "deflated" else "float32"
    dtype = torch.float32 if single else torch.float64
    return f"{solver_for(view.device, dtype, job.size, options.solver)} {precision}"


def _facts(samples: Samples, options: SpectrumOptions) -> dict[str, list[float]]:
    """Return what is known of each sample, in units of the job."""
    eigenvalues, first, fits = samples.eigenvalues, samples.first, samples.fits
    size = eigenvalues.shape[-1]
    values = eigenvalues
    if first.any():
        values = values.where(torch.arange(size) >= first[:, None], 0)
    # In double precision: the logarithm of an integer tensor is single.
    kept = (size - first).to(values.dtype)
    largest, total = values[:, -1], ordered_sum(values)
    shares = values / total[:, None]
    missing = zero = flat = fits.alpha.isnan()
    xmin = samples.xmin
    if missing.any() and size > 1:
        zero = missing & (xmin == 0 if options.fit == "median" else eigenvalues[:, -2] == 0)
        flat = missing & (eigenvalues[:, -1] <= eigenvalues[:, -2] * (1 + 1e-4))
    facts = {
        "alpha": fits.alpha,
        "ks_distance": fits.ks_distance,
        "largest": largest,
        "log10_largest": largest.log10(),
        "total": total,
        "stable_rank": total / largest,
        "entropy": ordered_sum(-shares * shares.clamp_min(_TINY).log()) / kept.log(),
        "log_xmin": xmin.log(),
        "kept": kept,
        "missing": missing,
        "zero": zero,
        "flat": flat,
    }
    rows = torch.stack([values.to(torch.float64) for values in facts.values()]).tolist()
    return dict(zip(facts, rows, strict=True)) | {"variance": _variances(samples, options)}


def _variances(samples: Samples, options: SpectrumOptions) -> list[float]:
    """Return the squared standard error of the alpha of each sample."""
    of_pieces = iter(_alphas_of_pieces(samples, options))
    alphas = samples.fits.alpha.tolist()
    lengths = (samples.eigenvalues.shape[-1] - samples.fits.tail_start).tolist()
    variances: list[float] = []
    for job, number in zip(samples.jobs, samples.numbers, strict=True):
        windows, pieces = len(job.routes) // number, len(job.pieces) // number
        independent = independent_windows(job.windows, job.stack.matrices.numel())
        room = independent if job.of_parts is None else pieces * independent
        for _ in range(number):
            sample = len(variances)
            # The tail of overlapping windows holds each eigenvalue several times over.
            tail = lengths[sample] * independent / windows
            variances.append(alpha_variance(alphas[sample], tail, list(islice(of_pieces, pieces)), room))
    return variances


def _alphas_of_pieces(samples: Samples, options: SpectrumOptions) -> list[float]:
    """Return alpha of each of `Job.pieces`, sample by sample."""
    jobs = samples.jobs
    pieces = table([job.pieces for job in jobs])
    numbers = [len(job.pieces) for job in jobs]
    of_sample = [number // of_job for number, of_job in zip(numbers, samples.numbers, strict=True)]
    sample = repeated(range(len(samples.first)), samples.per_sample(of_sample))
    # Quarters of a window may have smaller eigenvalues than any window, all of which count if those do.
    smallest = samples.eigenvalues.gather(-1, samples.first[:, None])[:, 0]
    smallest = smallest.where(samples.first > samples.padding, 0)
    padding = repeated([pieces.shape[-1] - job.pieces.shape[-1] for job in jobs], numbers)
    first = torch.maximum(padding, (pieces < smallest[sample, None]).sum(-1))
    # One of the fits depends on the scale.
    scale = repeated([job.stack.eigenvalue_scale for job in jobs], numbers)
    fits = fit_power_law(pieces * scale[:, None], options.fit, options.xmin_pos, first, distance=False)
    alphas: list[float] = fits.alpha.tolist()
    return alphas


def _mean(values: Iterable[float]) -> float:
    # Not `fmean`, which an infinity among them is an error to.
    values = list(values)
    return sum(values) / len(values)


def _outcome(facts: dict[str, list[float]], options: SpectrumOptions) -> tuple[int, float]:
    """Say whether the layer has an alpha, which it has when every sample has; or why not, and a number for it."""
    kept, missing, zero = min(facts["kept"]), sum(facts["missing"]), sum(facts["zero"])
    if kept < options.min_eigenvalues:
        return TOO_FEW, kept
    if not missing:
        return MEASURED, 0.0
    if zero:
        return LOW_RANK, zero
    no_peak = options.fit == "xmin_peak" and not any(facts["flat"])
    return (NO_PEAK if no_peak else FLAT), missing


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
