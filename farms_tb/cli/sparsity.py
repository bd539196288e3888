"""`farms-tb sparsity`: how much of each layer to prune.

The layers are measured as `analyze` measures them, one tensor in memory at a time; the plan that follows from
their alphas is printed as a table and written as a file, which `farms-tb prune` reads.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from farms_tb.cli.arguments import Device, Key, ModelArgument, Pretrained, takes_spectrum_options
from farms_tb.cli.measuring import MeasureRequest, checked_device, measure
from farms_tb.cli.messages import EXIT_INTERRUPTED, EXIT_PART, complaints, say
from farms_tb.cli.output import check_output
from farms_tb.cli.sources import Source, open_source
from farms_tb.cli.tables import Column, print_table
from farms_tb.options import SpectrumOptions, as_plain
from farms_tb.report import OK, LayerRecord, Report
from farms_tb.sparsity import SparsityOptions, SparsityPlan, compare_with_depth, plan_from_report
from farms_tb.sparsity.allocation import check_target
from farms_tb.sparsity.options import Compat, Granularity, Method
from farms_tb.weights.adapter_files import adapter_folder
from farms_tb.weights.names import counted

_DEFAULT = SparsityOptions()
_COLUMNS = (
    Column("layer", "layer"),
    Column("block", "block", optional=True),
    Column("alpha", "alpha", 3, error="alpha_error"),
    Column("alpha_error", "±", 3, error="alpha_error"),
    Column("size", "entries", 0, optional=True),
    Column("sparsity", "sparsity", 4),
)
EXIT_CODES_OF_A_PLAN = """
\b
Exit codes:
    0  planned
    1  reading stopped early, and there is no plan
    2  wrong usage or input
  130  interrupted, and there is no plan
"""
_WITHOUT_ALPHAS = ("uniform", "depth")
"""Methods for which nothing has to be measured."""


@takes_spectrum_options
def sparsity(
    model: ModelArgument,
    *,
    options: SpectrumOptions,
    target: Annotated[
        float, typer.Option(metavar="SHARE", help="Share of all entries of the pruned layers that becomes zero.")
    ],
    method: Annotated[
        Method,
        typer.Option(
            help="shrinkage: by alpha as far as it is known; depth: a straight line; shuffled: those of alpha in "
            "random order, a placebo. owl and search need data: use Python."
        ),
    ] = _DEFAULT.method,
    epsilon: Annotated[
        float, typer.Option(help="Half-width of the range of sparsities, relative to the target.")
    ] = _DEFAULT.epsilon,
    granularity: Annotated[
        Granularity, typer.Option(help="What gets a sparsity of its own; mixed: matrices within their block's.")
    ] = _DEFAULT.granularity,
    min_sparsity: Annotated[float, typer.Option(help="No layer gets less.")] = _DEFAULT.min_sparsity,
    max_sparsity: Annotated[float, typer.Option(help="No layer gets more.")] = _DEFAULT.max_sparsity,
    compat: Annotated[
        Compat | None, typer.Option(help="Reproduce research code: no bounds, no protection against outliers.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the order of --method shuffled.")] = _DEFAULT.seed,
    blocks: Annotated[
        list[str] | None,
        typer.Option(
            "--blocks",
            metavar="PATTERN",
            help="Paths of the blocks, such as 'encoder.layers.*' (may be repeated). Default: found by the names.",
        ),
    ] = None,
    pretrained: Pretrained = False,
    key: Key = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write the plan: .json or .csv.")
    ] = None,
    device: Device = "cpu",
) -> None:
    """Plan how much of each layer to prune, from the alphas of a model or a file of weights.

    Layers with a large alpha, which are less well trained, are pruned more; the total over all planned layers is
    the target exactly. Planned are the matrices inside the model's blocks; embeddings and heads stay dense. The
    title shows how the plan correlates with depth, and how far it is from the uniform one and from a straight line
    in depth, which needs no alphas: compare with both before you believe in alphas. A .json file is a plan for
    farms-tb prune, a .csv file a table.
    """
    chosen = {
        "method": method,
        "epsilon": epsilon,
        "granularity": granularity,
        "min_sparsity": min_sparsity,
        "max_sparsity": max_sparsity,
        "compat": compat,
        "seed": seed,
    }
    with complaints():
        check_target(target, SparsityOptions(**chosen))  # type: ignore[arg-type]
        _check_before_measuring(method, model, output)
        request = MeasureRequest(options, device=checked_device(device))
        if adapter_folder(model) is not None:
            raise ValueError(f"{model} is an adapter and no model: merge it (merge_and_unload) and save that")
        source = open_source(model, pretrained=pretrained, key=key, options=options)
    report = _report(source, request, method)
    with complaints():
        plan = _plan(report, target, blocks, chosen)
        _print(plan, report, model)
        if output is not None:
            plan.save(output)
            say(f"wrote {output}")
    for note in plan.notes:
        say(note, style="yellow")


def _check_before_measuring(method: Method, model: str, output: Path | None) -> None:
    """Refuse what would fail after the measurement, and an output that would replace the model."""
    if method in ("owl", "search"):
        raise ValueError(f"--method {method} needs calibration data: use farms_tb.sparsity.allocate in Python")
    if output is None:
        return
    if output.suffix not in (".json", ".csv"):
        raise ValueError(f"--output {output}: a plan ends in .json, a table in .csv")
    check_output(output, (model,))


def _report(source: Source, request: MeasureRequest, method: Method) -> Report:
    """Return what was measured, or names and shapes alone where no alphas are needed.

    Raises:
        typer.Exit: reading stopped early: a plan of a part of the layers would be taken for that of the model.
    """
    if method in _WITHOUT_ALPHAS:
        with complaints():
            return Report(dict(_unmeasured(source)))
    found = measure(source, request, Console(stderr=True))
    if found.stopped:
        say(f"No plan, since not all layers were measured: {found.stopped}", style="red")
        raise typer.Exit(EXIT_INTERRUPTED if found.interrupted else EXIT_PART)
    return Report(found.records, as_plain(request.options))


def _unmeasured(source: Source) -> Mapping[str, LayerRecord]:
    """Return a record of each layer's kind and shape; one tensor is in memory at a time."""
    if source.note:
        say(source.note)
    if source.damaged:
        raise ValueError("; ".join(source.damaged))
    records = {}
    for name, weight in source.read(source.items):
        if isinstance(weight, LayerRecord):
            records[name] = weight
        else:
            shape = tuple(weight.matrices.shape)
            records[name] = LayerRecord(status="not measured", kind=weight.kind, shape=shape)
    return records


def _plan(report: Report, target: float, blocks: Sequence[str] | None, options: dict[str, Any]) -> SparsityPlan:
    """Return the plan; what it warns of is in its notes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return plan_from_report(report, target, blocks=blocks or None, **options)


def _print(plan: SparsityPlan, report: Report, model: str) -> None:
    """Print the plan as a table to stdout."""
    rows = []
    for row in plan.rows():
        status = report.layers[row["layer"]].status
        rows.append({**row, "status": OK if status == "not measured" else status})
    print_table(Console(), f"{model}: {_summary(plan)}", _COLUMNS, rows)


def _summary(plan: SparsityPlan) -> str:
    """Return two lines: what is pruned in all, and how the plan compares with those that need no alphas."""
    found = compare_with_depth(plan)
    entries = sum(layer.size for layer in plan.layers.values())
    blocks = f", {counted(len(plan.blocks), 'block')}" if plan.blocks else ""
    depth = "none, all are equal" if found.correlation is None else f"{found.correlation:+.2f}"
    return (
        f"total sparsity {plan.total:.6f} of {entries:,} entries ({counted(len(plan.layers), 'layer')}{blocks})\n"
        f"correlation with depth {depth}; mean distance from uniform {found.from_uniform:.4f}, "
        f"from a straight line in depth {found.from_line:.4f}"
    )
