"""Measure a model: every layer's ESD, its power-law fit and the figures beside it.

`analyze` is the entry point. Where there are several processes, each measures some of the layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from farms_tb.layers import Layer, find_layers, read_stacks, stack_problem
from farms_tb.matrices import MatrixStack, NoSpectrumError
from farms_tb.measurement import measure_stacks
from farms_tb.null import MAX_DRAWS, draws_for, null_of, shuffled_alphas
from farms_tb.options import Esd, Fit, Precision, Solver, SpectralOptions, as_plain, check_bool
from farms_tb.report import LayerRecord, Report
from farms_tb.rows import ROW_LENGTH, record_from_row
from farms_tb.samples import solver_device
from farms_tb.windows import layer_windows

Work = Callable[[Sequence[tuple[Layer, MatrixStack]]], list[Tensor]]
"""Finds the rows of some layers."""


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
    precision: Precision = "auto",
    solver: Solver = "auto",
    memory_mb: int = 512,
    threads: int | None = None,
    null: bool = False,
    histogram: bool = False,
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
        precision: `"auto"` solves in single precision where alpha stays within 5e-5 of itself, `"float64"` never.
        solver: what solves on a GPU: `"torch"`, `"cupy"`, `"cpu"`, or `"auto"` for the fastest of them in a trial.
        memory_mb: megabytes (MiB) that solving may take at a time, beside the model.
        threads: threads of the CPU that solve at a time; None for as many as torch may use.
        null: also measure layers with their entries shuffled, 8 to 32 times for each shape, which tells what alpha
            a random layer of that shape has: `null_mean`, `null_std` and `z_score` of a record.
        histogram: also count each layer's ESD, the `histogram` of its record.

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
        precision,
        solver,
        memory_mb,
        threads,
    )
    check_bool("null", null)
    check_bool("histogram", histogram)
    layers = checked_layers(model, plan=True)
    report = measure(layers, options, histogram=histogram)
    return with_nulls(report, measure_nulls(layers, report, options)) if null else report


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


@dataclass(frozen=True)
class Team:
    """The processes that measure a model together.

    Attributes:
        rank: this process.
        world_size: their number.
        add_up: sums a float64 tensor over them.
    """

    rank: int
    world_size: int
    add_up: Callable[[Tensor], Tensor]

    def own(self, costs: Sequence[int]) -> set[int]:
        """Return which tasks fall to this process: the costliest first, each goes to whoever has least to do.

        Args:
            costs: those of all tasks, the same on every process.
        """
        loads = [0] * self.world_size
        own = set()
        for task in sorted(range(len(costs)), key=lambda task: -costs[task]):
            rank = loads.index(min(loads))
            loads[rank] += costs[task]
            if rank == self.rank:
                own.add(task)
        return own


def measure(
    layers: Sequence[Layer], options: SpectralOptions, *, histogram: bool = False, team: Team | None = None
) -> Report:
    """Measure layers, shared among processes where there are several.

    Args:
        layers: what `find_layers` returned, the same on every process.
        options: how alpha is measured.
        histogram: also count each layer's ESD.
        team: the processes; None where this one is alone.

    Returns:
        The same report on every process, to the bit.

    Raises:
        RuntimeError: the measurement failed on some process; raised on every one.
    """
    rows = _rows(
        layers,
        lambda group: measure_stacks([stack for _, stack in group], options, histogram),
        lambda layer: cost(layer, options),
        ROW_LENGTH,
        team,
        options,
    )
    return report_of(rows, layers, options)


def report_of(rows: Sequence[Sequence[float]], layers: Sequence[Layer], options: SpectralOptions) -> Report:
    """Turn the rows of all layers into a report."""
    records = {
        layer.name: record_from_row(row, options, layer.kind, layer.shape, "" if layer.planned else layer.problem)
        for layer, row in zip(layers, rows, strict=True)
    }
    return Report(records, as_plain(options))


def cost(layer: Layer, options: SpectralOptions) -> int:
    """Return what measuring a layer costs, n h w min(h, w) for n windows of h x w: its shape alone decides."""
    windows = layer_windows(_blank(layer), options) if layer.kind else None
    if windows is None:
        return 0
    height, width = windows.view.shape[-2:]
    return windows.view.numel() * min(height, width)


def _blank(layer: Layer) -> MatrixStack:
    """Return a stack of the layer's shape, without values."""
    return MatrixStack(torch.empty(layer.shape, device="meta"), layer.sampling)


def measure_nulls(
    layers: Sequence[Layer], report: Report, options: SpectralOptions, *, team: Team | None = None
) -> dict[str, tuple[float, float]]:
    """Measure the null of every layer that has an alpha and no null yet: see `farms_tb.null`.

    Layers of one shape share a null, and the draws for it among them.

    Args:
        layers: the layers of the report.
        report: the measurement that is to be compared with the nulls.
        options: those of the report.
        team: the processes that share the work, as in `measure`.

    Returns:
        Mean and standard deviation by layer, the same on every process; no entry for a layer without a null.
    """
    groups: dict[Any, list[Layer]] = {}
    for layer in layers:
        record = report.layers[layer.name]
        if record.alpha is not None:
            # The number of eigenvalues tells a 1x1 convolution from a linear layer of its shape.
            groups.setdefault((record.shape, record.kind, record.num_eigenvalues), []).append(layer)
    nulls: dict[str, tuple[float, float]] = {}
    turns: dict[str, tuple[int, int]] = {}
    wanted: list[Layer] = []
    for members in groups.values():
        null = next(filter(None, (report.layers[layer.name].null for layer in members)), None)
        if null is None:
            turns.update({layer.name: (turn, len(members)) for turn, layer in enumerate(members)})
            wanted += members
        else:
            nulls.update({layer.name: null for layer in members})
    if not wanted:
        return nulls  # on every process: there is nothing to share, nor a device to share it on

    def draws(layer: Layer, stack: MatrixStack) -> int:
        turn, number = turns[layer.name]
        return len(range(turn, draws_for(stack), number))

    rows = _rows(
        wanted,
        lambda group: [
            shuffled_alphas(stack, options, draws(layer, stack), seed=turns[layer.name][0])
            for layer, stack in group
        ],
        lambda layer: draws(layer, _blank(layer)) * cost(layer, options),
        MAX_DRAWS,
        team,
        options,
    )
    alphas = {layer.name: [a for a in row if a] for layer, row in zip(wanted, rows, strict=True)}
    for members in groups.values():
        null = null_of([alpha for layer in members for alpha in alphas.get(layer.name, ())])
        if null is not None:
            nulls.update({layer.name: null for layer in members})
    return nulls


def with_nulls(report: Report, nulls: Mapping[str, tuple[float, float]]) -> Report:
    """Return the report with mean and standard deviation of the null beside the alphas of these layers."""
    records = dict(report.layers)
    for name, (mean, std) in nulls.items():
        if name in records:
            records[name] = replace(records[name], null_mean=mean, null_std=std)
    return replace(report, layers=records)


def stack_record(
    stack: MatrixStack, options: SpectralOptions, *, histogram: bool = False, null: bool = False
) -> LayerRecord:
    """Measure one weight that belongs to no module."""
    problem = stack_problem(stack)
    row = [] if problem else measure_stacks([stack], options, histogram)[0].tolist()
    record = record_from_row(row, options, stack.kind, tuple(stack.matrices.shape), problem)
    if null and record.alpha is not None:
        null_draws = shuffled_alphas(stack, options, draws_for(stack)).tolist()
        found = null_of([alpha for alpha in null_draws if alpha])
        record = record if found is None else replace(record, null_mean=found[0], null_std=found[1])
    return record


def _rows(
    layers: Sequence[Layer],
    work: Work,
    cost: Callable[[Layer], int],
    length: int,
    team: Team | None,
    options: SpectralOptions,
) -> list[list[float]]:
    """Return a row of `length` numbers for each layer, on every process where there are several."""
    own = own_layers(layers, cost, team)
    table, error = _own_rows(layers, work, length, own, options.memory_mb * 2**20)
    return merged(table, error, layers, team)


def own_layers(layers: Sequence[Layer], cost: Callable[[Layer], int], team: Team | None) -> set[int]:
    """Return the positions of the layers that are measured by this process."""
    return set(range(len(layers))) if team is None else team.own([cost(layer) for layer in layers])


def merged(
    table: Tensor, error: Exception | None, layers: Sequence[Layer], team: Team | None
) -> list[list[float]]:
    """Return the rows of all processes, on every one of them.

    Args:
        table: a row for each layer, zeros but for those measured here.
        error: what kept this process from measuring its own, if anything did.
        layers: all layers.
        team: the processes; None where this one is alone.

    Raises:
        RuntimeError: some process has an error; raised on every one.
    """
    if team is not None:
        failed = table.new_zeros(1, table.shape[1])
        failed[0, 0] = 0.0 if error is None else 1.0
        weights = (parameter for layer in layers for parameter in layer.module.parameters())
        device = solver_device(next((weight.device for weight in weights), torch.device("cpu")))
        # The failures travel with the rows: one collective call, and no process waits for one that gave up.
        summed = team.add_up(torch.cat([table, failed]).to(device)).cpu()
        table, failures = summed[:-1], int(summed[-1, 0])
        if failures:
            here = (
                f"on this rank {team.rank}: {error}"
                if error is not None
                else "elsewhere: see the output of other ranks"
            )
            raise RuntimeError(
                f"measuring the layers failed on {failures} of {team.world_size} ranks, {here}"
            ) from error
    if error is not None:
        raise error
    rows: list[list[float]] = table.tolist()
    return rows


def _own_rows(
    layers: Sequence[Layer], work: Work, length: int, own: set[int], memory: int
) -> tuple[Tensor, Exception | None]:
    """Return a row for each layer, zeros but for this rank's `own`, and the error that stopped the work if any.

    Args:
        layers: all layers.
        work: finds the rows of some of them.
        length: length of a row.
        own: positions of the layers that are measured here.
        memory: bytes of weights that are worked on at a time: gathered from shards, they are whole for that long.
    """
    table = torch.zeros(len(layers), length, dtype=torch.float64, device="cpu")
    error: Exception | None = None
    group: dict[int, MatrixStack] = {}
    size = 0

    def finish() -> None:
        nonlocal error, size
        try:
            if error is None and group:
                rows = work([(layers[index], stack) for index, stack in group.items()])
                table[list(group)] = torch.stack(rows)
        except Exception as caught:
            error = caught
        group.clear()
        size = 0

    for index, stack in read_layers(layers):
        if isinstance(stack, Exception):
            error = error or stack
        elif index in own:
            group[index] = stack
            size += stack.matrices.nbytes
            if size > memory:
                finish()
    finish()
    return table, error


def read_layers(layers: Sequence[Layer]) -> Iterator[tuple[int, MatrixStack | Exception]]:
    """Yield position and matrices of each layer that has some, or the error that reading it raised.

    With several processes each reads every layer, to the end: gathering a sharded weight is a collective call.
    """
    module, stacks = None, []
    for index, layer in enumerate(layers):
        if layer.problem and not layer.planned:
            continue
        try:
            if layer.module is not module:
                module, stacks = layer.module, read_stacks(layer.module)
            yield index, stacks[layer.index]
        except NoSpectrumError:
            continue
        except Exception as caught:
            yield index, caught
