"""Measure a model: every layer's ESD, its power-law fit and the figures beside it.

`analyze` is the entry point. A layer's result travels as one row of float64 numbers, so that processes can
share the work and merge it by adding rows, exactly.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from farms_tb.layers import NO_VALUES, Layer, find_layers, read_stacks, stack_problem
from farms_tb.matrices import MatrixStack, NoSpectrumError
from farms_tb.options import Esd, Fit, SpectralOptions, as_plain
from farms_tb.power_law import PowerLawFit, fit_power_law
from farms_tb.report import OK, EsdHistogram, LayerRecord, Report
from farms_tb.spectra import pooled_eigenvalues
from farms_tb.windows import layer_windows

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
)
# A row: outcome, a number for its message, the figures, the number of eigenvalues, low, high and bins of the ESD.
_HEAD = 2 + len(_FIGURES) + 1
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
)
_OK, _NON_FINITE, _ZERO, _NO_WINDOW, _TOO_FEW, _LOW_RANK, _FLAT, _NO_PEAK, _NO_VALUES = range(1, len(_OUTCOMES))


def analyze(
    model: nn.Module,
    *,
    esd: Esd = "farms",
    fit: Fit = "median",
    aspect_ratio: float = 1.0,
    window: int = 100,
    windows_per_dim: int = 9,
    window_step: int | None = None,
    xmin_pos: float = 2.0,
    filter_zeros: bool = False,
    relative_cutoff: float = 0.0,
    min_eigenvalues: int = 5,
) -> Report:
    """Measure how well each layer of a model is trained.

    Args:
        model: any module, on any device. Nothing of it is changed. On the meta device the report is a plan: the
            layers, their shapes and how many eigenvalues a measurement would solve for.
        esd: `"farms"` for windows of one fixed aspect ratio, `"full"` for whole weight matrices (TempBalance).
        fit: where the power-law tail begins: `"median"`, `"goodness-of-fit"` or `"xmin_peak"`.
        aspect_ratio: columns / rows of a window.
        window: rows of a window of a linear layer; a smaller matrix gets the largest window that fits.
        windows_per_dim: start positions of windows along each dimension of a linear layer.
        window_step: a fixed distance between start positions, instead of `windows_per_dim`.
        xmin_pos: the median fit's tail starts at index int(N / xmin_pos) of N ascending eigenvalues.
        filter_zeros: drop eigenvalues below 1e-5, all kept where none would be left.
        relative_cutoff: drop eigenvalues below this fraction of the largest one of their sample.
        min_eigenvalues: samples with fewer eigenvalues have no alpha.

    Returns:
        A report; `report.layers["conv1"].alpha`, `print(report)`, `report.to_dataframe()`.

    Raises:
        ValueError: an option is unknown or out of range, or the model has no layer with a weight matrix.
        TypeError: an option has the wrong type, or `model` is not a module.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> report = analyze(nn.Sequential(nn.Linear(512, 128), nn.ReLU(), nn.Linear(128, 1024)))
        >>> {name: round(record.alpha, 1) for name, record in report.layers.items()}
        {'0': 2.1, '2': 2.1}
    """
    options = SpectralOptions(
        esd,
        fit,
        aspect_ratio,
        window,
        windows_per_dim,
        window_step,
        xmin_pos,
        filter_zeros,
        relative_cutoff,
        min_eigenvalues,
    )
    return measure(checked_layers(model, plan=True), options)


def checked_layers(model: nn.Module, *, plan: bool = False) -> list[Layer]:
    """`find_layers`, with an error where there is nothing to measure, or to plan for."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a torch.nn.Module, got {type(model).__name__}")
    layers = find_layers(model)
    planned = any(layer.planned for layer in layers)
    if all(layer.problem for layer in layers) and not (plan and planned):
        if planned:
            raise ValueError(
                f"{type(model).__name__} is on the meta device: its layers have no values to balance. Give it "
                "memory first, model.to_empty(device=...), and load or initialise its weights"
            )
        reasons = "".join(f"\n  {layer.name}: {layer.problem}" for layer in layers[:10])
        raise ValueError(
            f"{type(model).__name__} has no layer that can be analysed; linear, convolution, attention and "
            "spectral-convolution layers can, others by farms_tb.layer_matrices.register" + reasons
        )
    return layers


def measure(
    layers: Sequence[Layer],
    options: SpectralOptions,
    *,
    histogram: bool = False,
    rank: int = 0,
    world_size: int = 1,
    add_up: Callable[[Tensor], Tensor] | None = None,
) -> Report:
    """Measure layers, shared among processes where there are several.

    Args:
        layers: what `find_layers` returned, the same on every process.
        options: how alpha is measured.
        histogram: also count each layer's ESD.
        rank: this process.
        world_size: number of processes; layer i is measured by rank i % world_size.
        add_up: sums a float64 tensor over the processes.

    Returns:
        The same report on every process, to the bit.

    Raises:
        RuntimeError: the measurement failed on some process; raised on every one.
    """
    table, error = _own_rows(layers, options, histogram, rank, world_size)
    if add_up is not None and world_size > 1:
        failed = table.new_zeros(1, ROW_LENGTH)
        failed[0, 0] = 0.0 if error is None else 1.0
        # The failures travel with the rows: one collective call, and no process waits for one that gave up.
        summed = add_up(torch.cat([table, failed]))
        table, failures = summed[:-1], int(summed[-1, 0])
        if failures:
            here = (
                f"on this rank {rank}: {error}"
                if error is not None
                else "elsewhere: see the output of other ranks"
            )
            raise RuntimeError(
                f"measuring the layers failed on {failures} of {world_size} ranks, {here}"
            ) from error
    if error is not None:
        raise error
    rows = table.cpu().tolist()
    records = {
        layer.name: _record(row, options, layer.kind, layer.shape, "" if layer.planned else layer.problem)
        for layer, row in zip(layers, rows, strict=True)
    }
    return Report(records, as_plain(options))


def stack_record(stack: MatrixStack, options: SpectralOptions) -> LayerRecord:
    """Measure one weight that belongs to no module."""
    problem = stack_problem(stack)
    row = [] if problem else measure_stack(stack, options).tolist()
    return _record(row, options, stack.kind, tuple(stack.matrices.shape), problem)


def _own_rows(
    layers: Sequence[Layer], options: SpectralOptions, histogram: bool, rank: int, world_size: int
) -> tuple[Tensor, Exception | None]:
    """Return a row for each layer, zeros for those of other ranks, and the error that stopped the work if any."""
    weights = (parameter for layer in layers for parameter in layer.module.parameters())
    device = _solver_device(next((weight.device for weight in weights), torch.device("cpu")))
    rows = [torch.zeros(ROW_LENGTH, dtype=torch.float64, device=device) for _ in layers]
    error: Exception | None = None
    module, stacks = None, []
    for index, layer in enumerate(layers):
        if layer.problem and not layer.planned:
            continue
        try:
            # Every rank reads every layer: gathering a sharded weight is a collective call.
            if layer.module is not module:
                module, stacks = layer.module, read_stacks(layer.module)
            if error is None and index % world_size == rank:
                rows[index] = measure_stack(stacks[layer.index], options, histogram).to(device)
        except NoSpectrumError:
            continue
        except Exception as caught:
            error = error or caught
    return torch.stack(rows), error


@torch.no_grad()
def measure_stack(stack: MatrixStack, options: SpectralOptions, histogram: bool = False) -> Tensor:
    """Return the row `(ROW_LENGTH,)` float64 of one layer, on the device of its weight."""
    if stack.matrices.is_meta:
        return _plan(stack, options)
    stack = replace(stack, matrices=_solvable(stack.matrices))
    largest = stack.matrices.abs().amax()
    if not largest.isfinite():
        return _row(stack, _NON_FINITE)
    if largest == 0:
        return _row(stack, _ZERO)
    windows = layer_windows(stack, options)
    if windows is None:
        return _row(stack, _NO_WINDOW)
    exponent = _safe_exponent(stack.matrices.dtype, largest)
    if exponent:
        windows = windows._replace(view=windows.view * 2.0**-exponent)
    eigenvalues = pooled_eigenvalues(windows)
    factor = torch.full_like(eigenvalues[0, 0], 2.0).pow(2 * exponent) * stack.eigenvalue_scale
    first = _first_counted(eigenvalues, factor, options)
    kept = eigenvalues.shape[-1] - first
    fits = fit_power_law(eigenvalues, options.fit, options.xmin_pos, first)
    outcome, detail = _outcome(eigenvalues, fits, kept, options)
    row = _row(stack, outcome, detail)
    # Apart from the factor, which leaves the range of float64 before its logarithm leaves anything.
    log_factor = 2 * exponent * math.log10(2) + math.log10(stack.eigenvalue_scale)
    figures = _figures(eigenvalues, fits, first, factor, log_factor)
    row[2 : 2 + len(figures)] = figures
    row[_HEAD - 1] = kept.sum()
    if histogram:
        row[_HEAD:] = _histogram(eigenvalues, first, log_factor)
    return row


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
    row[2 : _HEAD - 1] = torch.nan
    row[_HEAD - 1] = number
    return row


def _solvable(matrices: Tensor) -> Tensor:
    """Move the matrices where they can be solved; eight-bit floats, which have no arithmetic, become float32."""
    # Detached, as a rule may forget to and threads do not inherit `no_grad`: eigenvectors would be computed too.
    matrices = matrices.detach().to(_solver_device(matrices.device))
    return matrices.float() if matrices.element_size() == 1 else matrices


def _solver_device(device: torch.device) -> torch.device:
    """Eigenvalues need float64, which Apple's GPUs lack and others are not tested for: the CPU stands in."""
    return device if device.type in ("cpu", "cuda") else torch.device("cpu")


def _row(stack: MatrixStack, outcome: int, detail: float = 0.0) -> Tensor:
    row = torch.zeros(ROW_LENGTH, dtype=torch.float64, device=stack.matrices.device)
    row[0], row[1] = outcome, detail
    return row


def _safe_exponent(dtype: torch.dtype, largest: Tensor) -> int:
    """Power of two to divide the weights by so that squares neither overflow nor vanish in float64."""
    if dtype not in (torch.float64, torch.complex128):
        return 0
    exponent = int(torch.frexp(largest).exponent)
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
    """Return the mean over samples of each of `_FIGURES`."""
    counted = torch.arange(eigenvalues.shape[-1], device=first.device) >= first[:, None]
    values = eigenvalues.where(counted, 0)
    # In double precision: the logarithm of an integer tensor is single.
    number = counted.sum(-1).to(values.dtype)
    largest, total = values[:, -1], values.sum(-1)
    shares = values / total[:, None]
    figures = (
        fits.alpha,
        fits.ks_distance,
        fits.alpha * (largest.log10() + log_factor),
        largest * factor,
        total * factor,
        total / largest,
        total * factor / number,
        torch.special.entr(shares).sum(-1) / number.log(),
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


def _record(
    row: Sequence[float], options: SpectralOptions, kind: str, shape: tuple[int, ...], problem: str
) -> LayerRecord:
    """Turn a row back into a record."""
    if problem:
        return LayerRecord(status=problem, kind=kind, shape=shape)
    outcome, detail = int(row[0]), int(row[1])
    figures: dict[str, Any] = {
        name: value if math.isfinite(value) else None
        for name, value in zip(_FIGURES, row[2 : _HEAD - 1], strict=True)
    }
    number = int(row[_HEAD - 1])
    if outcome != _OK:
        figures.update(alpha=None, ks_distance=None, alpha_hat=None)
    if number == 0:
        figures = {}
    low, high, *counts = row[_HEAD:]
    return LayerRecord(
        **figures,
        num_eigenvalues=number,
        status=_OUTCOMES[outcome].format(detail, options.min_eigenvalues),
        kind=kind,
        shape=shape,
        histogram=EsdHistogram(tuple(map(int, counts)), low, high) if any(counts) else None,
    )
