"""The commands of `farms-tb`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

import farms_tb
from farms_tb.cli.arguments import (
    MODEL_HELP,
    Device,
    Filter,
    ModelArgument,
    Null,
    Output,
    OutputFormat,
    Pretrained,
    RunFolderArgument,
    Strict,
    takes_spectral_options,
)
from farms_tb.cli.comparing import changes
from farms_tb.cli.measuring import COLUMNS, Measured, Wanted, measure
from farms_tb.cli.messages import EXIT_INTERRUPTED, EXIT_PART, complaints, say
from farms_tb.cli.output import chosen_format, emit
from farms_tb.cli.sources import open_source
from farms_tb.cli.tables import Column, Row, sort_rows
from farms_tb.options import SpectrumOptions, as_plain
from farms_tb.viewing.run_folder import RunFolder, read_run_folder

_EXIT_CODES = """
\b
Exit codes:
    0  measured
    1  nothing could be measured, or reading stopped early;
       with --strict: some layer has no alpha
    2  wrong usage or input
  130  interrupted; what was measured until then is printed
"""

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    """See how well each layer of a network is trained: FARMS alpha and what follows from it."""
    if version:
        print(farms_tb.__version__)
        raise typer.Exit


def _analyze_columns(full: bool) -> list[Column]:
    return [
        Column("layer", "layer"),
        Column("shape", "K x R x C", optional=True),
        Column("alpha", "alpha", ".3f"),
        Column("alpha_error", "±", ".3f"),
        Column("alpha_full", "full", ".3f"),
        Column("bias", "bias", "+.3f"),
        Column("z_score", "z", "+.1f"),
        Column("ks_distance", "KS", ".3f"),
        # Windows overlap: the rank of all of them together says little where the whole matrix's is known.
        Column("stable_rank_full" if full else "stable_rank", "st. rank", ".1f"),
    ]


@app.command(epilog=_EXIT_CODES)
@takes_spectral_options
def analyze(
    model: ModelArgument,
    *,
    options: SpectrumOptions,
    full: Annotated[
        bool, typer.Option(help="Also measure whole matrices, for the bias of their alpha. Slow for large ones.")
    ] = True,
    null: Null = False,
    pretrained: Pretrained = False,
    patterns: Filter = None,
    sort: Annotated[
        str | None, typer.Option(metavar="COLUMN", help="Sort by a column of the CSV: alpha, bias, layer, ...")
    ] = None,
    reverse: Annotated[bool, typer.Option("--reverse", "-r", help="Sort from the largest down.")] = False,
    output_format: OutputFormat = None,
    output: Output = None,
    strict: Strict = False,
    device: Device = "cpu",
) -> None:
    """Measure each layer of a model or a file of weights.

    alpha is the power-law exponent of the layer's spectrum by FARMS, ± its standard error. full is that of the
    whole matrix, and bias their difference, which comes of the matrix's shape. KS is the distance between the
    spectrum and its power law, 0 the best; st. rank the stable rank of the whole matrix; z how many standard
    deviations alpha lies from that of a random layer of the same shape.
    """
    with complaints():
        chosen = chosen_format(output_format, output)
        wanted = Wanted(options, full and options.esd == "farms", null, tuple(patterns or ()), _device(device))
        if sort is not None and sort not in COLUMNS:
            raise ValueError(f"--sort {sort}: the columns are {', '.join(COLUMNS)}")
        source = open_source(model, pretrained=pretrained)
    found = measure(source, wanted, Console(stderr=True))
    rows: Sequence[Row] = found.rows()
    if sort is not None:
        rows = sort_rows(rows, sort, reverse)
    facts = {"model": model, "complete": not found.stopped, "options": as_plain(options)}
    with complaints():
        emit(
            f"{model}: {_summary(rows)}",
            _analyze_columns(wanted.full),
            rows,
            facts,
            chosen,
            output,
            not found.stopped,
        )
    _finish([found], rows, "alpha", strict)


_COMPARE_COLUMNS = (
    Column("layer", "layer"),
    Column("shape", "K x R x C", optional=True),
    Column("alpha_a", "alpha A", ".3f"),
    Column("alpha_b", "alpha B", ".3f"),
    Column("change", "B - A", "+.3f"),
    Column("change_error", "±", ".3f"),
    Column("change_in_errors", "(B - A)/±", "+.1f"),
)


@app.command(epilog=_EXIT_CODES)
@takes_spectral_options
def compare(
    model_a: Annotated[str, typer.Argument(metavar="A", help=MODEL_HELP, show_default=False)],
    model_b: Annotated[str, typer.Argument(metavar="B", help="The same.", show_default=False)],
    *,
    options: SpectrumOptions,
    pretrained: Pretrained = False,
    patterns: Filter = None,
    output_format: OutputFormat = None,
    output: Output = None,
    strict: Strict = False,
    device: Device = "cpu",
) -> None:
    """Compare the alphas of two models, layer by layer of the same name, the largest change first.

    ± is the standard error of the change: both alphas' standard errors, added in squares.
    """
    with complaints():
        chosen = chosen_format(output_format, output)
        wanted = Wanted(options, patterns=tuple(patterns or ()), device=_device(device))
        sources = [
            open_source(model, pretrained=pretrained and not Path(model).exists()) for model in (model_a, model_b)
        ]
    found = []
    for source in sources:
        found.append(measure(source, wanted, Console(stderr=True)))
        if found[-1].interrupted:
            say(f"{found[-1].stopped}: nothing to compare yet")
            raise typer.Exit(EXIT_INTERRUPTED)
    found_a, found_b = found
    rows = changes(found_a, found_b)
    complete = not (found_a.stopped or found_b.stopped)
    facts = {"a": model_a, "b": model_b, "complete": complete, "options": as_plain(options)}
    with complaints():
        emit(f"A: {model_a}\nB: {model_b}", _COMPARE_COLUMNS, rows, facts, chosen, output, complete)
    if not found_a.records.keys() & found_b.records.keys():
        say(f"No layer has the same name in both: {_some(found_a)} in A, {_some(found_b)} in B.")
    _finish(found, rows, "change", strict)


def _some(found: Measured) -> str:
    return ", ".join(list(found.records)[:3]) or "none"


def _device(name: str) -> str:
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name}: {str(error).partition(chr(10))[0]}") from error
    return name


def _summary(rows: Sequence[Row]) -> str:
    alphas = [row["alpha"] for row in rows if row["alpha"] is not None]
    span = f", {min(alphas):.2f} to {max(alphas):.2f}" if alphas else ""
    return f"{len(alphas)} of {len(rows)} layers have an alpha{span}"


def _finish(found: Sequence[Measured], rows: Sequence[Row], figure: str, strict: bool) -> None:
    """Say what went wrong and leave with the exit code that fits."""
    for part in found:
        if part.stopped:
            say(f"Not all layers were measured: {part.stopped}", style="red")
    if any(part.interrupted for part in found):
        raise typer.Exit(EXIT_INTERRUPTED)
    measured = [row for row in rows if row[figure] is not None]
    if not measured:
        say(
            "Nothing could be measured: "
            + ("the status of each layer says why" if rows else "no weight matrix, or none of such a name")
        )
    if not measured or any(part.stopped for part in found) or (strict and len(measured) < len(rows)):
        raise typer.Exit(EXIT_PART)
    raise typer.Exit


@app.command()
def watch(
    run_folder: RunFolderArgument,
    ratio: Annotated[bool, typer.Option("--ratio", help="Learning-rate ratios instead of alphas.")] = False,
    patterns: Filter = None,
    every: Annotated[float, typer.Option(metavar="SECONDS", min=0.1, help="How often to look.")] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="Print what is there and end.")] = False,
) -> None:
    """Show how each layer's alpha develops while a run goes on. Ends on Ctrl-C.

    Waits for the folder where there is none yet. Where stdout is no terminal, prints once.
    """
    from farms_tb.cli.watch import follow

    with complaints():
        follow(run_folder, "ratio" if ratio else "alpha", tuple(patterns or ("*",)), every, once)


@app.command()
def report(
    run_folder: RunFolderArgument,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Default: report.html in the run folder.")
    ] = None,
    null: Null = False,
) -> None:
    """Write a page about a run: one HTML file with everything in it."""
    from farms_tb.viewing.page import write_page

    with complaints():
        run = read_run_folder(run_folder, null=null)
        print(write_page(run, output))
        _say_missing(run)


@app.command()
def plot(
    run_folder: RunFolderArgument,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FOLDER", help="Default: figures in the run folder.")
    ] = None,
    picture_format: Annotated[str, typer.Option("--format", help="png, pdf, svg, ...")] = "png",
    only: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PICTURE",
            help="Only this one (may be repeated): alpha, lr_ratio, lr_ratio_map, alpha_by_depth, "
            "full_against_farms, esd.",
        ),
    ] = None,
    layer: Annotated[
        list[str] | None,
        typer.Option(metavar="LAYER", help="Only the spectrum of this layer, in full size (may be repeated)."),
    ] = None,
    null: Null = False,
) -> None:
    """Draw every picture that a run has the figures for, or those of a file of weights."""
    from farms_tb.viewing.plots.everything import check_wanted, save_all

    pictures, suffix = only or ([] if layer else None), f".{picture_format}"
    with complaints():
        check_wanted(pictures, suffix)
        run = read_run_folder(run_folder, null=null)
        for path in save_all(run, output, suffix=suffix, pictures=pictures, layers=layer or ()):
            print(path)
        _say_missing(run)


def _say_missing(run: RunFolder) -> None:
    for sentence in run.missing:
        say(sentence)
